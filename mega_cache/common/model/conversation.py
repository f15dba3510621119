"""A conversation on a terminal: a line is a turn, the chat template keeps the turns."""

import sys
from pathlib import Path

from common.cli import PromptFlags
from common.errors import UsageError
from common.model.tokenizer import Generate, TextCodec, text_printer


def wants_conversation(flags: PromptFlags, result: Path | None = None) -> bool:
    """Say whether `--chat` was given on a terminal, and nothing to ask; no `result` can hold it."""
    asked = flags.prompt != PromptFlags().prompt or flags.prompt_length or flags.prompts_file
    wanted = flags.chat and not asked and sys.stdin is not None and sys.stdin.isatty()
    if wanted and result:
        raise UsageError("--json keeps a run's result, and a conversation has none: ask --prompt")
    return wanted


def converse(codec: TextCodec, generate: Generate) -> None:
    """Answer each line that is typed, streaming to stdout, until Ctrl-D.

    What `generate` raises ends it: a conversation that has become too long is such an error.
    """
    messages = []
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = input()
        except EOFError:
            print(file=sys.stderr)
            return
        if line.strip():
            messages.append({"role": "user", "content": line})
            show = text_printer(codec)
            answer = generate(codec.encode(messages), show)
            show(None)
            messages.append({"role": "assistant", "content": codec.decode(answer)})
