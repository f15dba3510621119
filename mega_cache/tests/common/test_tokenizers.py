"""Token ids, chat prompts and texts are those of transformers, whatever tokenizer a model has."""

import random
import shutil

import pytest
from tokenizers_as_found import CORPUS, KINDS, TEMPLATES, write_tokenizer

from common.cli import Console
from common.errors import UsageError
from common.model.checkpoint import resolve_checkpoint
from common.model.tokenizer import TextStream, load_codec

QUIET = Console(quiet=True)
TEXTS = [
    *CORPUS,
    "Write a short explanation of portable torch.compile caches.",
    "  two spaces, a tab\t and\n\n lines \r\n",
    "<s> marks inside </s> <|im_end|> [SEP] <|call|>  <0x41> a text",
    "Zażółć 🦙🦙 \u2028 e\u0301 \ufeff ﷽ it 's , so . done",
]
MESSAGES = [
    {"role": "system", "content": "  You answer in <b>HTML</b> & 'quotes'. "},
    {"role": "user", "content": " Grüße, 🦙! <s> "},
    {"role": "assistant", "content": "Hello </s> there\n"},
    {"role": "user", "content": "What is {{ 7 * 7 }}?"},
]
STREAMS = 1000  # random id sequences per kind of tokenizer


@pytest.fixture(scope="module")
def made(shared_folders, tmp_path_factory):
    """Return a function from kind and template to the checkpoint with that tokenizer."""
    tiny = resolve_checkpoint("random:tiny", QUIET).folder

    def make(kind, template=None):
        folder = tmp_path_factory.mktemp(kind)
        shutil.copy(tiny / "config.json", folder)
        (folder / "model.safetensors").symlink_to(tiny / "model.safetensors")
        write_tokenizer(folder, kind, template)
        return resolve_checkpoint(str(folder), QUIET)

    return make


def theirs(checkpoint):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint.folder)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_are_those_of_transformers(kind, made):
    checkpoint = made(kind)
    codec, tokenizer = load_codec(checkpoint), theirs(checkpoint)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert codec.encode(text) == ids
        assert codec.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_is_at_any_time_the_beginning_of_the_whole_text(kind, made):
    codec = load_codec(made(kind))
    every = range(codec.vocab_size)  # of the model: some the tokenizer does not know
    # bytes and marks are what streams stumble over: every other token is one of them
    odd = sorted(codec.byte_ids | codec.special_ids)
    chance = random.Random(kind)
    for _ in range(STREAMS):
        ids = [chance.choice(chance.choice((odd, every))) for _ in range(chance.randrange(24))]
        check_stream(codec, ids)
    # longer than what is decoded again for each token
    check_stream(codec, [chance.choice(every) for _ in range(1000)])
    check_stream(codec, codec.encode(" ".join(CORPUS * 4)))


def check_stream(codec, ids):
    stream, whole, given = TextStream(codec), codec.decode(ids), ""
    for one in ids:
        given += stream.add(one)
        assert whole.startswith(given), ids
    assert given + stream.end() == whole, ids


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_text_appears_as_soon_as_it_is_certain(kind, made):
    codec = load_codec(made(kind))
    stream, seen = TextStream(codec), []
    for one in codec.encode("the 🦙 is a"):
        seen.append(stream.add(one))
    assert "".join(seen) + stream.end() == "the 🦙 is a"
    assert len([piece for piece in seen if piece]) > 4


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", ["byte_level", "bos_by_flag"])
def test_a_chat_is_rendered_as_transformers_does(name, kind, made):
    checkpoint = made(kind, TEMPLATES[name])
    codec, tokenizer = load_codec(checkpoint), theirs(checkpoint)
    for messages in (MESSAGES[1:2], MESSAGES[1:], MESSAGES):
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert codec.render(messages) == text
        assert codec.encode(messages) == tokenizer(text, add_special_tokens=False)["input_ids"]
    content = MESSAGES[1]["content"]
    assert codec.encode(content, chat=True) == codec.encode(MESSAGES[1:2])


def test_a_template_file_comes_before_the_one_in_the_settings(made):
    checkpoint = made("byte_level", "old")
    (checkpoint.folder / "chat_template.jinja").write_text("new {{ messages[0].content }}")
    again = resolve_checkpoint(str(checkpoint.folder), QUIET)
    assert load_codec(again).render([{"role": "user", "content": "x"}]) == "new x"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('no system here') }}", "no system here"),
        ("{% for m in messages %}", "refuses this"),
        ("{{ messages.__class__.__mro__ }}", "refuses this"),
        ("{{ messages[0].append(1) }}", "refuses this"),
    ],
)
def test_a_template_that_cannot_be_rendered_says_so_in_a_line(template, words, made):
    codec = load_codec(made("byte_level", template))
    with pytest.raises(UsageError, match=words):
        codec.encode("x", chat=True)


def test_synthetic_prompts_hold_no_special_token_and_none_the_model_lacks(made):
    for kind in ("byte_fallback", "word_piece"):
        codec = load_codec(made(kind))
        prompt = codec.synthetic_prompt(500, seed=0)
        assert not codec.special_ids & set(prompt)
        assert max(prompt) < codec.vocab_size
