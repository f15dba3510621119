"""From text to token ids and back, the same in every mode; and onto the user's screen.

`tokenizers` and the checkpoint's own files are all it takes: transformers costs a lean start
1.7 s, and two tokenising paths could disagree.
"""

import datetime
import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from common.checkpoints import Checkpoint
    from common.cli import PromptFlags


@dataclass(frozen=True)
class TextCodec:
    """A checkpoint's tokenizer with its chat template."""

    tokenizer: "Tokenizer"
    settings: dict[str, Any]
    chat_template: str | None

    def encode(self, prompt: str, chat: bool = False) -> list[int]:
        """Return the token ids of the bare text, or of one user message in the chat template."""
        if not chat:
            return self.tokenizer.encode(prompt).ids
        if self.chat_template is None:
            raise UsageError("the checkpoint has no chat template: leave --chat out")
        text = _render(self.chat_template, prompt, self.settings)
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def synthetic_prompt(self, length: int, seed: int) -> list[int]:
        """Return `length` seeded random token ids, none of them special."""
        generator = random.Random(seed)
        ordinary = self.tokenizer.get_vocab_size(with_added_tokens=False)
        return [generator.randrange(ordinary) for _ in range(length)]


def load_codec(folder: Path) -> TextCodec:
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UsageError(f"{folder} has no tokenizer.json: a fast tokenizer is needed")
    settings_path = folder / "tokenizer_config.json"
    settings = json.loads(settings_path.read_bytes()) if settings_path.exists() else {}
    template = folder / "chat_template.jinja"  # where newer checkpoints keep it
    chat_template = template.read_text() if template.exists() else settings.get("chat_template")
    if isinstance(chat_template, list):
        chat_template = next(
            entry["template"] for entry in chat_template if entry["name"] == "default"
        )
    return TextCodec(Tokenizer.from_file(str(path)), settings, chat_template)


def prompts_of(flags: "PromptFlags", codec: TextCodec, seed: int) -> list[list[int]]:
    """Return the token ids of every request that the flags ask for, in order."""
    if flags.prompt_length:
        return [codec.synthetic_prompt(flags.prompt_length, seed)] * flags.num_requests
    prompts = [codec.encode(text, flags.chat) for text in prompt_texts(flags)]
    if not prompts or not all(prompts):
        raise UsageError("a prompt has no tokens: give some text, or --prompt-length N")
    return prompts * flags.num_requests


def prompt_texts(flags: "PromptFlags") -> list[str]:
    if flags.prompts_file is None:
        return [sys.stdin.read() if flags.prompt == "-" else flags.prompt]
    try:
        lines = flags.prompts_file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts-file {flags.prompts_file}: {error}") from error
    return [line for line in lines if line.strip()]


class Printer:
    """Writes the text of requests to stdout while it is generated."""

    def __init__(self, flags: "PromptFlags", codec: TextCodec):
        self._codec = codec
        # the same prompt again and again is shown once
        self.shows_all = flags.show_completions or flags.prompts_file is not None

    def of_request(self, number: int) -> Callable[[int | None], None]:
        """Return what takes each new token id of request `number`, and None at its end."""
        if number > 0 and not self.shows_all:
            return lambda token_id: None
        from tokenizers.decoders import DecodeStream

        # holds back the bytes of a character that is not whole yet
        stream = DecodeStream(skip_special_tokens=True)
        token_ids: list[int] = []
        shown: list[str] = []

        def show(token_id: int | None) -> None:
            if token_id is None:
                text = self._codec.decode(token_ids)[len("".join(shown)) :] + "\n"
            else:
                token_ids.append(token_id)
                text = stream.step(self._codec.tokenizer, token_id)
            if text:
                shown.append(text)
                sys.stdout.write(text)
                sys.stdout.flush()

        return show


def padding_token_id(codec: TextCodec, checkpoint: "Checkpoint") -> int:
    """Return a token id to pad with; masked positions never reach the output."""
    name = _token_text(codec.settings.get("pad_token"))
    token_id = codec.tokenizer.token_to_id(name) if name else None
    if token_id is not None:
        return token_id
    return checkpoint.eos_token_ids[0] if checkpoint.eos_token_ids else 0


def bucket_for(length: int, buckets: tuple[int, ...]) -> int | None:
    """Return the smallest bucket that holds `length` tokens, or None beyond all of them."""
    return min((bucket for bucket in buckets if bucket >= length), default=None)


def _render(template: str, prompt: str, settings: dict[str, Any]) -> str:
    """Render a chat template as transformers does: same sandbox, same trimming, same helpers."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
    tokens = {
        name: _token_text(settings[name])
        for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        if settings.get(name) is not None
    }
    messages = [{"role": "user", "content": prompt}]
    helpers = {
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "raise_exception": _raise_template_error,
    }
    return environment.from_string(template, globals=helpers).render(
        messages=messages, add_generation_prompt=True, tools=None, **tokens
    )


def _raise_template_error(message: str) -> None:
    raise UsageError(f"the checkpoint's chat template refuses this prompt: {message}")


def _token_text(token: str | dict | None) -> str | None:
    # older tokenizer_config.json files store a token with its stripping rules
    return token["content"] if isinstance(token, dict) else token
