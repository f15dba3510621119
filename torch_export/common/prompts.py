"""From text to token ids and back, the same in every mode.

`tokenizers` and the checkpoint's own files are all it takes: transformers costs a lean start
1.7 s, and two tokenising paths could disagree.
"""

import datetime
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from common.checkpoints import Checkpoint
    from common.flags import PromptFlags


@dataclass(frozen=True)
class TextCodec:
    """A checkpoint's tokenizer with its chat template."""

    tokenizer: "Tokenizer"
    settings: dict[str, Any]
    chat_template: str | None

    def encode_prompt(self, prompt: str) -> list[int]:
        """Return the token ids of one user message, or of the bare text without a template."""
        if self.chat_template is None:
            return self.tokenizer.encode(prompt).ids
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


def prompt_token_ids(codec: TextCodec, prompt: "PromptFlags", seed: int) -> list[int]:
    """Return the prompt that the flags ask for."""
    if prompt.prompt_length:
        return codec.synthetic_prompt(prompt.prompt_length, seed)
    token_ids = codec.encode_prompt(prompt.prompt)
    if not token_ids:
        raise UsageError("the prompt has no tokens: give some text, or --prompt-length N")
    return token_ids


def padding_token_id(codec: TextCodec, checkpoint: "Checkpoint") -> int:
    """Return a token id to pad with; masked positions never reach the output."""
    name = _token_text(codec.settings.get("pad_token"))
    token_id = codec.tokenizer.token_to_id(name) if name else None
    if token_id is not None:
        return token_id
    return checkpoint.eos_token_ids[0] if checkpoint.eos_token_ids else 0


def pad_left(token_ids: list[int], length: int, padding_id: int) -> tuple[list[int], list[int]]:
    """Return ids and attention mask of `length`, the prompt at the right end."""
    missing = length - len(token_ids)
    return [padding_id] * missing + token_ids, [0] * missing + [1] * len(token_ids)


def bucket_for(length: int, buckets: tuple[int, ...]) -> int | None:
    """Return the smallest bucket that holds `length` tokens, or None beyond all of them."""
    return min((bucket for bucket in buckets if bucket >= length), default=None)


def _render(template: str, prompt: str, settings: dict[str, Any]) -> str:
    """Render a chat template as transformers does: same sandbox, same trimming, same helpers."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.globals["raise_exception"] = _raise_template_error
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
    tokens = {
        name: _token_text(settings[name])
        for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        if settings.get(name) is not None
    }
    messages = [{"role": "user", "content": prompt}]
    return environment.from_string(template).render(
        messages=messages, add_generation_prompt=True, tools=None, **tokens
    )


def _raise_template_error(message: str) -> None:
    raise UsageError(f"the checkpoint's chat template refuses this prompt: {message}")


def _token_text(token: str | dict | None) -> str | None:
    # older tokenizer_config.json files store a token with its stripping rules
    return token["content"] if isinstance(token, dict) else token
