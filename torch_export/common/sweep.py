"""How cost grows with the prompt: every mode at every length, each in a fresh process."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from common.console import Console
from common.kept_trials import run_or_recall
from common.ratios import FLOOR, seconds_per_token
from common.trials import Outcome

# the command of a trial by mode and prompt length in tokens: script first, then its flags
SweepCommands = Mapping[tuple[str, int], Sequence[str]]
# the first request of a process pays for compilation and warming up: the second is measured
REQUESTS = 2


def sweep_commands(
    command: Callable[[Any, str], Sequence[str]],
    settings: Any,
    modes: Sequence[str],
    lengths: Sequence[int],
) -> SweepCommands:
    """Return `command(settings, mode)` at every prompt length; the floor has no prompt."""
    commands = {}
    for length in lengths:
        prompt = replace(settings.prompt, prompt_length=length, num_requests=REQUESTS)
        for mode in modes:
            if mode != FLOOR:
                commands[mode, length] = command(replace(settings, prompt=prompt), mode)
    return commands


def run_sweep(commands: SweepCommands, console: Console) -> list[dict]:
    """Return one entry per mode and prompt length in tokens; a failure keeps its error."""
    entries = []
    bar = console.bar(commands.items(), "sweep", "length")
    for (mode, length), command in bar:
        bar.set_postfix_str(f"{mode} {length}")
        outcome = run_or_recall(command, 1)
        entries.append(_entry(mode, length, outcome))
        if not outcome.ok:
            console.warn(f"sweep, {mode} at {length} tokens: {outcome.error}")
    return entries


def _entry(mode: str, length: int, outcome: Outcome) -> dict:
    entry = {
        "mode": mode,
        "prompt_length": length,
        "ok": outcome.ok,
        "error": outcome.error,
        "wall_seconds": outcome.wall_seconds,
        "ttft_seconds": None,
        "seconds_per_token": None,
    }
    if not outcome.ok:
        return entry
    document = outcome.document
    return entry | {
        "ttft_seconds": document["requests"][-1]["ttft_seconds"],
        "seconds_per_token": seconds_per_token(document["requests"]),
        "ttft_cold_start_seconds": document["metrics"]["ttft_cold_start_seconds"],
        "new_tokens": document["output"]["new_tokens"],
        "recompiles": document["compile"].get("recompiles"),
        "requests": document["requests"],
    }
