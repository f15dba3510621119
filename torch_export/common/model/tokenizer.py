"""From text to token ids and back, the same in every mode; and onto the user's screen.

`tokenizers` and the checkpoint's own files are all it takes: transformers costs a lean start
1.7 s, and two tokenising paths could disagree.
"""

import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import PromptFlags
from common.errors import UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class TextCodec:
    """A checkpoint's tokenizer with its chat template."""

    tokenizer: "Tokenizer"
    special: dict[str, str]  # like bos_token -> its text
    chat_template: str | None

    def encode(self, prompt: str, chat: bool = False) -> list[int]:
        """Return the token ids of the bare text, or of one user message in the chat template."""
        if not chat:
            return self.tokenizer.encode(prompt).ids
        if self.chat_template is None:
            raise UsageError("the checkpoint has no chat template: leave --chat out")
        # rendered as transformers does: same sandbox, same trimming, same helpers
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise UsageError(f"the checkpoint's chat template refuses this prompt: {message}")

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False)
        environment.globals |= {"raise_exception": refuse, "strftime_now": time.strftime}
        messages = [{"role": "user", "content": prompt}]
        text = environment.from_string(self.chat_template).render(
            messages=messages, add_generation_prompt=True, tools=None, **self.special
        )
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
    special = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        if token := settings.get(name):  # in older files with its stripping rules
            special[name] = token["content"] if isinstance(token, dict) else token
    file = folder / "chat_template.jinja"  # where newer checkpoints keep it
    template = file.read_text() if file.exists() else settings.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}["default"]
    return TextCodec(Tokenizer.from_file(str(path)), special, template)


def prompts_of(flags: PromptFlags, codec: TextCodec, seed: int) -> list[list[int]]:
    """Return the token ids of every request that the flags ask for, in order."""
    if flags.prompt_length:
        return [codec.synthetic_prompt(flags.prompt_length, seed)] * flags.num_requests
    if flags.prompts_file is None:
        texts = [sys.stdin.read() if flags.prompt == "-" else flags.prompt]
    else:
        try:
            lines = flags.prompts_file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--prompts-file {flags.prompts_file}: {error}") from error
        texts = [line for line in lines if line.strip()]
    prompts = [codec.encode(text, flags.chat) for text in texts]
    if not prompts or not all(prompts):
        raise UsageError("a prompt has no tokens: give some text, or --prompt-length N")
    return prompts * flags.num_requests


def text_printer(codec: TextCodec) -> Callable[[int | None], None]:
    """Return what prints a text while it is generated: it takes each token id, None at the end."""
    from tokenizers.decoders import DecodeStream

    # holds back the bytes of a character that is not whole yet
    stream = DecodeStream(skip_special_tokens=True)
    token_ids: list[int] = []
    shown: list[str] = []

    def show(token_id: int | None) -> None:
        if token_id is None:
            text = codec.decode(token_ids)[len("".join(shown)) :] + "\n"
        else:
            token_ids.append(token_id)
            text = stream.step(codec.tokenizer, token_id)
        if text:
            shown.append(text)
            print(text, end="", flush=True)

    return show
