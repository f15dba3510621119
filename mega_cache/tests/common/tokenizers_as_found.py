"""Tokenizers and chat templates of the kinds that checkpoints come with, in miniature."""

import json
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "The capital of France is Paris , isn't it ? Yes , it 's so .",
    "def add(a, b):\n    return a + b  # größer, 日本語, ćwierć, и так далее",
    "Attention is all you need. We don't, they 've and we 're; I 'm 42.",
]
LETTERS = sorted({letter for text in CORPUS for letter in text if not letter.isspace()})
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
FAST = "PreTrainedTokenizerFast"


def _trained(model, special, pre_tokenizer=None, normalizer=None, decoder=None, post=None, **how):
    tokenizer = Tokenizer(model)
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer:
        tokenizer.normalizer = normalizer
    kinds = {
        "BPE": trainers.BpeTrainer,
        "Unigram": trainers.UnigramTrainer,
        "WordPiece": trainers.WordPieceTrainer,
        "WordLevel": trainers.WordLevelTrainer,
    }
    trainer = kinds[type(model).__name__](
        vocab_size=480, special_tokens=special, show_progress=False, **how
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if decoder:
        tokenizer.decoder = decoder
    if post:
        tokenizer.post_processor = post(tokenizer)
    return tokenizer


def _bos(token):
    """Return what makes a post-processor that puts the token in front."""
    return lambda tokenizer: processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B",
        special_tokens=[(token, tokenizer.token_to_id(token))],
    )  # fmt: skip


def byte_level(prefix=False, post=None, normalizer=None, special=("<s>", "</s>")):
    split = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(
        models.BPE(), list(special), split, normalizer, decoders.ByteLevel(), post,
        initial_alphabet=alphabet,
    )  # fmt: skip


def regex_byte_level():
    """As Llama 3 and Qwen: a pattern splits, and bytes stand for themselves."""
    pattern = Regex(r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|[^\r\n\p{L}\p{N}]?\p{L}+|\s+")
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )

    def post(tokenizer):
        return processors.Sequence(
            [processors.ByteLevel(trim_offsets=False), _bos("<s>")(tokenizer)]
        )

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(
        models.BPE(ignore_merges=True), ["<s>", "</s>"], split, normalizers.NFC(),
        decoders.ByteLevel(), post, initial_alphabet=alphabet,
    )  # fmt: skip


def sentencepiece_bpe(byte_fallback=True, metaspace=False, post=None):
    """As Llama 2 and Mistral: spaces are ▁, what is unknown falls back to bytes, if to anything."""
    pieces = ["<unk>", "<s>", "</s>", *(BYTES if byte_fallback else []), "▁", *LETTERS]
    merges = [("▁", "t"), ("t", "h"), ("▁", "a"), ("e", "r"), ("i", "s"), ("▁", "▁")]
    pieces += [a + b for a, b in merges]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    model = models.BPE(
        vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=byte_fallback
    )
    tokenizer = Tokenizer(model)
    parts = [decoders.Replace("▁", " ")] + [decoders.ByteFallback()] * byte_fallback
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        parts_of = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(parts_of)
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = [AddedToken(one, special=True, normalized=False) for one in pieces[:3]]
    tokenizer.add_special_tokens(special)
    if post:
        tokenizer.post_processor = post(tokenizer)
    return tokenizer


def unigram(byte_fallback=False):
    """As T5 and XLM-R, or, with bytes, as Gemma once was."""
    scores = [
        (piece, -float(number)) for number, piece in enumerate(["▁the", "▁is", "▁", *LETTERS])
    ]
    bytes_ = [(piece, -100.0) for piece in BYTES] if byte_fallback else []
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *bytes_, *scores]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=byte_fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    if byte_fallback:
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens([AddedToken(one, special=True) for one in ("<s>", "</s>")])
    tokenizer.post_processor = _bos("<s>")(tokenizer)
    return tokenizer


def word_piece():
    special = ["[UNK]", "[CLS]", "[SEP]"]

    def post(tokenizer):
        ids = [(one, tokenizer.token_to_id(one)) for one in special[1:]]
        return processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)

    return _trained(
        models.WordPiece(unk_token="[UNK]"), special, pre_tokenizers.BertPreTokenizer(),
        normalizers.BertNormalizer(lowercase=False), decoders.WordPiece(), post,
    )  # fmt: skip


def word_level():
    split = pre_tokenizers.WhitespaceSplit()
    return _trained(models.WordLevel(unk_token="<unk>"), ["<unk>", "<s>"], split)


def word_ends():
    """As the first GPT and CLIP: a word's last piece says so."""
    return _trained(
        models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"), ["<unk>", "<s>"],
        pre_tokenizers.BertPreTokenizer(), None, decoders.BPEDecoder(suffix="</w>"),
        end_of_word_suffix="</w>",
    )  # fmt: skip


def cut_and_padded():
    tokenizer = byte_level(post=_bos("<s>"))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=12)
    return tokenizer


_MARKS = {"bos_token": "<s>", "eos_token": "</s>"}
_LLAMA = {"tokenizer_class": "LlamaTokenizerFast", "unk_token": "<unk>", **_MARKS}
# name -> (what makes tokenizer.json, tokenizer_config.json, further files)
KINDS = {
    "byte_level": (byte_level, {"tokenizer_class": FAST, **_MARKS}, {}),
    "byte_level_prefix_space": (lambda: byte_level(prefix=True), {"tokenizer_class": FAST}, {}),
    "byte_level_gpt2": (byte_level, {"tokenizer_class": "GPT2TokenizerFast", **_MARKS}, {}),
    "byte_level_qwen": (
        lambda: byte_level(normalizer=normalizers.NFC(), special=("<|endoftext|>", "<|im_end|>")),
        {"tokenizer_class": "Qwen2TokenizerFast", "eos_token": "<|im_end|>", "bos_token": None},
        {},
    ),
    "bos_by_post_processor": (regex_byte_level, {"tokenizer_class": FAST, **_MARKS}, {}),
    "bos_by_flag": (sentencepiece_bpe, _LLAMA | {"add_bos_token": True}, {}),
    "bos_off_by_flag": (
        lambda: sentencepiece_bpe(post=_bos("<s>")), _LLAMA | {"add_bos_token": False}, {},
    ),
    "bos_and_eos_by_flag": (
        sentencepiece_bpe, _LLAMA | {"add_bos_token": True, "add_eos_token": True}, {},
    ),
    "bos_by_special_tokens_map": (
        sentencepiece_bpe, {"tokenizer_class": "LlamaTokenizerFast"},
        {"special_tokens_map.json": _MARKS | {"unk_token": "<unk>"}},
    ),
    "byte_level_as_llama": (
        byte_level, {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, **_MARKS}, {},
    ),
    "byte_fallback": (sentencepiece_bpe, {"tokenizer_class": FAST, **_MARKS}, {}),
    "metaspace_mistral": (
        lambda: sentencepiece_bpe(metaspace=True, post=_bos("<s>")),
        {"tokenizer_class": FAST, **_MARKS, "legacy": False}, {},
    ),
    "no_byte_fallback": (
        lambda: sentencepiece_bpe(byte_fallback=False), {"tokenizer_class": FAST, **_MARKS}, {},
    ),
    "unigram": (unigram, {"tokenizer_class": FAST, **_MARKS, "unk_token": "<unk>"}, {}),
    "unigram_bytes": (
        lambda: unigram(byte_fallback=True), {"tokenizer_class": FAST, **_MARKS}, {},
    ),
    "word_piece": (word_piece, {"tokenizer_class": FAST, "unk_token": "[UNK]"}, {}),
    "word_piece_cleaned_up": (
        word_piece,
        {"tokenizer_class": FAST, "unk_token": "[UNK]", "clean_up_tokenization_spaces": True}, {},
    ),
    "word_level": (
        word_level, {"tokenizer_class": FAST, "clean_up_tokenization_spaces": True}, {},
    ),
    "word_ends": (word_ends, {"tokenizer_class": FAST, "unk_token": "<unk>"}, {}),
    "byte_level_cleaned_up": (
        byte_level, {"tokenizer_class": FAST, "clean_up_tokenization_spaces": True, **_MARKS}, {},
    ),
    "stored_truncation_and_padding": (cut_and_padded, {"tokenizer_class": FAST, **_MARKS}, {}),
    "special_tokens_split": (
        byte_level, {"tokenizer_class": FAST, "split_special_tokens": True, **_MARKS}, {},
    ),
    "later_added_tokens": (
        byte_level,
        {
            "tokenizer_class": FAST, **_MARKS, "additional_special_tokens": ["<|call|>"],
            "added_tokens_decoder": {
                "490": {"content": "<|call|>", "special": True, "normalized": False,
                        "lstrip": False, "rstrip": True, "single_word": False},
            },
        }, {},
    ),
}  # fmt: skip


def write_tokenizer(folder: Path, kind: str, chat_template=None) -> None:
    make, settings, files = KINDS[kind]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    make().save(str(folder / "tokenizer.json"))
    template = {"chat_template": chat_template} if chat_template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | template))
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))


# How the published models' templates write a chat, special tokens included.
TEMPLATES = {
    "llama-2": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'] %}{% else %}"
        "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
        "{% for message in loop_messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if loop.index0 == 0 and system_message != false %}"
        "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' "
        "+ message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}"
        "{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}"
        "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama-3": (
        "{{- bos_token }}\n"
        "{%- if not date_string is defined %}\n"
        "    {%- if strftime_now is defined %}\n"
        '        {%- set date_string = strftime_now("%d %b %Y") %}\n'
        "    {%- else %}\n"
        '        {%- set date_string = "26 Jul 2024" %}\n'
        "    {%- endif %}\n"
        "{%- endif %}\n"
        "{%- if not tools is defined %}\n"
        "    {%- set tools = none %}\n"
        "{%- endif %}\n"
        "{%- if messages[0]['role'] == 'system' %}\n"
        "    {%- set system_message = messages[0]['content']|trim %}\n"
        "    {%- set messages = messages[1:] %}\n"
        "{%- else %}\n"
        '    {%- set system_message = "" %}\n'
        "{%- endif %}\n"
        '{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}\n'
        "{%- if tools is not none %}\n"
        '    {{- "Environment: ipython\\n" }}\n'
        "{%- endif %}\n"
        '{{- "Cutting Knowledge Date: December 2023\\n" }}\n'
        '{{- "Today Date: " + date_string + "\\n\\n" }}\n'
        "{{- system_message }}\n"
        '{{- "<|eot_id|>" }}\n'
        "{%- for message in messages %}\n"
        "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
        " + message['content'] | trim + '<|eot_id|>' }}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n"
        "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n"
        "{%- endif %}\n"
    ),
    "qwen-2.5": (
        "{%- if tools %}\n"
        "    {{- '<|im_start|>system\\n' }}\n"
        "    {%- for tool in tools %}{{- tool | tojson }}{%- endfor %}\n"
        "{%- else %}\n"
        "    {%- if messages[0]['role'] == 'system' %}\n"
        "        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
        "    {%- else %}\n"
        "        {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. "
        "You are a helpful assistant.<|im_end|>\\n' }}\n"
        "    {%- endif %}\n"
        "{%- endif %}\n"
        "{%- for message in messages %}\n"
        '    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or '
        '(message.role == "assistant" and not message.tool_calls) %}\n'
        "        {{- '<|im_start|>' + message.role + '\\n' + message.content "
        "+ '<|im_end|>' + '\\n' }}\n"
        "    {%- endif %}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n"
        "    {{- '<|im_start|>assistant\\n' }}\n"
        "{%- endif %}\n"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
        "{% endif %}{% endfor %}"
    ),
    "smollm2": (
        "{% for message in messages %}"
        "{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
        "trained by Hugging Face<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "generation_blocks": (
        "{% for m in messages %}[{{ m.role }}]\n  {% if m.role == 'assistant' %}\n"
        "    {%- generation %}{{ m.content }}{% endgeneration -%}\n"
        "  {% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    ),
    "loop_controls": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{{ m.content }};{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}"
    ),
    "json": (
        "{{ messages | tojson(indent=2) }}{{ messages[0] | tojson }}"
        "{{ messages | tojson(separators=(',', ':'), sort_keys=true, ensure_ascii=true) }}"
    ),
    "namespaces": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ ns.n }} {{ dict(a=1) }} {{ strftime_now('%Y') }}{# nothing #}"
        "{% macro say(x) %}<{{ x }}>{% endmacro %}{{ say(messages[-1].content | upper) }}"
    ),
    "several": [
        {"name": "tool_use", "template": "no{{ messages }}"},
        {"name": "default", "template": "{{ messages[-1]['content'] }} <s> tail"},
    ],
}
