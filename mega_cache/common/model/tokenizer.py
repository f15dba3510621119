"""From text to token ids and back, the same in every mode; and onto the user's screen.

`tokenizers`, jinja2 and what transformers once said of the checkpoint are all it takes: importing
transformers costs a lean start 1.7 s.
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from common.cli import PromptFlags
from common.errors import UsageError
from common.model.checkpoint import Checkpoint
from common.model.stored import damaged

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# (prompt's token ids, on_token) -> new token ids, a stop token included; `on_token` is called with
# each one as it reaches the host
Generate = Callable[[list[int], Callable[[int], None]], list[int]]
Messages = Sequence[dict[str, str]]  # {"role": ..., "content": ...}

# tokens of the end of a text that are decoded again for each new one: what a token becomes depends
# on its neighbours, never on one this far away
_WINDOW = 32
# what a tokenizer takes from another one
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_NO_TOKENIZER = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
    **dict.fromkeys(_PARTS), "model": {"type": "BPE", "vocab": {}, "merges": []},
}  # fmt: skip
# transformers' clean_up_tokenization, in its order
_CLEANED = {
    " .": ".", " ?": "?", " !": "!", " ,": ",", " ' ": "'", " n't": "n't", " 'm": "'m",
    " 's": "'s", " 've": "'ve", " 're": "'re",
}  # fmt: skip
# an end that may yet become part of one of these
_MAY_BE_CLEANED = re.compile(r"(?: ')*(?: [^ ]{0,3})?$")


class TextCodec:
    """A checkpoint's tokenizer with its chat template, as transformers has them."""

    def __init__(
        self, tokenizer: "Tokenizer", special: dict[str, Any], chat_template: str | None,
        vocab_size: int, cleans_up: bool = False,
    ):  # fmt: skip
        self.tokenizer, self.chat_template = tokenizer, chat_template
        self.special = special  # like bos_token -> its text
        self.vocab_size = vocab_size  # of the model: ids below it have a row in the embedding
        self.cleans_up = cleans_up  # decoding ends in clean_up_tokenization

    def encode(self, prompt: str | Messages, chat: bool = False) -> list[int]:
        """Return the token ids of the bare text, or of messages in the chat template.

        With `chat` a text is one user message. Raises UsageError for a token that the model lacks.
        """
        try:  # what a shell hands over need not be UTF-8
            str(prompt).encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"the prompt is no UTF-8: {error}") from error
        if isinstance(prompt, str) and not chat:
            ids = self.tokenizer.encode(prompt).ids
        else:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            text = self.render(messages)
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        self.check_ids(ids)
        return ids

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raise UsageError for an id that the model's embedding has no row for."""
        for one in ids:
            if not 0 <= one < self.vocab_size:
                token = self.tokenizer.id_to_token(one) if one >= 0 else None
                named = f", {token!r}," if token else ""
                raise UsageError(
                    f"the prompt holds token {one}{named} and the model's vocabulary has "
                    f"{self.vocab_size}: its embedding lacks that row"
                )

    def render(self, messages: Messages) -> str:
        """Return the text that the chat template makes of messages, up to the answer's begin."""
        if self.chat_template is None:
            raise UsageError("the checkpoint has no chat template: leave --chat out")
        from jinja2 import TemplateError

        try:
            template = _chat_environment().from_string(self.chat_template)
            return template.render(
                messages=list(messages), add_generation_prompt=True, tools=None, documents=None,
                **self.special,
            )  # fmt: skip
        except TemplateError as error:
            raise UsageError(f"the checkpoint's chat template refuses this: {error}") from error

    def decode(self, token_ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return _clean(text) if self.cleans_up else text

    @cached_property
    def byte_ids(self) -> frozenset[int]:
        """Ids of single bytes, if the tokenizer falls back to them: `<0xC3>`."""
        if "ByteFallback" not in repr(self.tokenizer.decoder):
            return frozenset()
        ids = (self.tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        return frozenset(one for one in ids if one is not None)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of special tokens."""
        added = self.tokenizer.get_added_tokens_decoder()
        return frozenset(one for one, token in added.items() if token.special)

    def is_silent(self, token_id: int) -> bool:
        """Say whether decoding skips it: a special token, or one that only the model knows."""
        return token_id in self.special_ids or self.tokenizer.id_to_token(token_id) is None

    def synthetic_prompt(self, length: int, seed: int) -> list[int]:
        """Return `length` seeded random token ids, none of them special."""
        import random

        ordinary = self.tokenizer.get_vocab_size(with_added_tokens=False)
        ordinary = min(ordinary, self.vocab_size)
        generator, ids = random.Random(seed), []
        while len(ids) < length:
            if (one := generator.randrange(ordinary)) not in self.special_ids:
                ids.append(one)
        return ids


class TextStream:
    """The text of token ids that come one by one.

    What `add` and `end` return, put together, is what decoding all ids gives, and at any time the
    beginning of it: what a later token may change is held back.
    """

    def __init__(self, codec: TextCodec):
        self._codec = codec
        self._ids: list[int] = []  # the newest, and _WINDOW before them
        self._given = 0  # characters of their text
        self._in_bytes = False  # the newest are single bytes

    def add(self, token_id: int) -> str:
        """Return the text that is certain now and was not before."""
        self._ids.append(token_id)
        if token_id in self._codec.byte_ids:
            self._in_bytes = True
        elif not self._codec.is_silent(token_id):
            self._in_bytes = False
        if self._in_bytes:
            return ""  # one more that is no UTF-8 spoils a whole run of bytes
        text = self._text()
        # half a character is a replacement character until its other half is there
        certain = len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
        if self._codec.cleans_up:
            certain = _MAY_BE_CLEANED.search(text, 0, certain).start()
        return self._give(text, certain)

    def end(self) -> str:
        """Return what was held back."""
        text = self._text()
        return self._give(text, len(text))

    def _text(self) -> str:
        # as it stands in front of any cleaning up: that is done piece by piece
        return self._codec.tokenizer.decode(self._ids, skip_special_tokens=True)

    def _give(self, text: str, certain: int) -> str:
        piece = text[self._given : certain]
        self._given = max(self._given, certain)
        if len(self._ids) >= 2 * _WINDOW:
            self._forget(text)
        return _clean(piece) if self._codec.cleans_up else piece

    def _forget(self, text: str) -> None:
        """Keep the newest ids alone, if they have the same text without those before them."""
        ids = self._ids[-_WINDOW:]
        shorter = self._codec.tokenizer.decode(ids, skip_special_tokens=True)
        given = self._given - (len(text) - len(shorter))
        # the first characters may differ: a stripped space, a character cut in two
        if given > 8 and text.endswith(shorter[4:]):
            self._ids, self._given = ids, given


def load_codec(checkpoint: Checkpoint) -> TextCodec:
    """Return the checkpoint's tokenizer as transformers encodes and decodes with it."""
    from tokenizers import Tokenizer

    path, told = checkpoint.folder / "tokenizer.json", checkpoint.resolved["tokenizer"]
    changes = told["changes"]
    parts = {name: part for name, part in changes.items() if name in _PARTS and part is not None}
    try:
        if len(parts) == len(changes):  # large files are parsed once, and not in Python
            tokenizer = Tokenizer.from_file(str(path))
            donor = Tokenizer.from_str(json.dumps(_NO_TOKENIZER | parts))
            for name in parts:
                setattr(tokenizer, name, getattr(donor, name))
        else:
            sections = json.loads(path.read_bytes())
            model = sections["model"] | changes.get("model", {})
            sections = sections | changes | {"model": model}
            tokenizer = Tokenizer.from_str(json.dumps(sections))
    except Exception as error:  # tokenizers raises nothing more special
        raise damaged(path, error) from error
    # what a trainer stored there is no part of encoding a prompt
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = told["split_special_tokens"]
    return TextCodec(
        tokenizer, told["special"], told["chat_template"], checkpoint.vocab_size, told["cleans_up"]
    )


def prompts_of(flags: PromptFlags, codec: TextCodec, seed: int) -> list[list[int]]:
    """Return the token ids of every request that the flags ask for, in order."""
    if flags.prompt_length:
        return [codec.synthetic_prompt(flags.prompt_length, seed)] * flags.num_requests
    texts = _texts_of(flags)
    prompts = [codec.encode(text, flags.chat) for text in texts]
    if not prompts or not all(prompts):
        raise UsageError("a prompt has no tokens: give some text, or --prompt-length N")
    return prompts * flags.num_requests


def _texts_of(flags: PromptFlags) -> list[str]:
    if flags.prompts_file is not None:
        try:
            text = flags.prompts_file.read_bytes().decode("utf-8-sig")  # without a BOM
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--prompts-file {flags.prompts_file}: {error}") from error
        # newlines alone end a line: a prompt may hold a form feed or U+2028
        lines = [line.removesuffix("\r") for line in text.split("\n")]
        return [line for line in lines if line.strip()]
    return [read_stdin() if flags.prompt == "-" else flags.prompt]


def read_stdin() -> str:
    """Return all of stdin as text. Raises UsageError if it is closed or no UTF-8."""
    try:
        if sys.stdin is None:
            raise ValueError("it is closed")
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except (OSError, ValueError) as error:  # a UnicodeDecodeError is one
        raise UsageError(f"--prompt - reads stdin: {error}") from error


def text_printer(codec: TextCodec) -> Callable[[int | None], None]:
    """Return what prints a text while it is generated: it takes each token id, None at the end."""
    stream = TextStream(codec)

    def show(token_id: int | None) -> None:
        text = stream.end() + "\n" if token_id is None else stream.add(token_id)
        if text:
            print(text, end="", flush=True)

    return show


def _clean(text: str) -> str:
    for found, instead in _CLEANED.items():
        text = text.replace(found, instead)
    return text


def _chat_environment():
    """Return jinja2 as transformers (4.57 to 5.24) sets it up for chat templates."""
    from datetime import datetime

    import jinja2.nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlock(Extension):
        """{% generation %} marks what a training learns from: rendered, it is its body."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    def as_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
            sort_keys=sort_keys,
        )  # fmt: skip

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = as_json
    environment.globals |= {
        "raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form),
    }  # fmt: skip
    return environment


class TokenStreamer:
    """A streamer of transformers' `generate` that hands on each new token."""

    def __init__(self, on_token: Callable[[int], None]):
        self._on_token, self._prompt_seen = on_token, False

    def put(self, value: Any) -> None:  # the prompt first, then each new token, on the host
        if self._prompt_seen:
            self._on_token(int(value))
        self._prompt_seen = True

    def end(self) -> None:
        pass
