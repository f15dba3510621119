"""compare and benchmark: one run script in several modes, each trial a fresh process.

A trial is the run script with the user's own words, and the words of its mode after them: the last
flag wins. Modes alternate; greedy tokens must be the same in all of them.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import cli
from common.errors import ScriptError
from common.measure import measures, report
from common.measure.plots import check_plot, draw
from common.measure.trials import run_trial
from common.model.checkpoint import resolve_checkpoint
from common.model.tokenizer import read_stdin

_KEPT = (
    "environment", "metrics", "compile", "output", "requests", "stages", "artifact",
    "decode", "device_memory", "bandwidth",
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """What is measured: a run script, the user's words for it, and the words of each mode."""

    approach: str
    script: Path
    modes: Mapping[str, Sequence[str]]
    argv: Sequence[str]
    settings: Any  # a folder's RunSettings, parsed from argv: shared, prompt and store are used
    flags: Any  # CompareFlags or BenchmarkFlags
    results: cli.ComparisonFlags

    @property
    def console(self) -> cli.Console:
        return cli.Console(self.settings.shared.quiet, self.settings.shared.verbose)


def compare(subject: Subject) -> None:
    """Run with and without the artifact; tell, write and draw what came of it."""
    commands = _commands(subject, subject.modes)
    trials = _alternate(subject, commands, "trial", subject.flags.compare_runs)
    load, skip = (_summarize(trials, mode) for mode in ("load", "skip"))
    summary = {}
    for one in measures.COMPARED:
        sides = {"load": load[one.key], "skip": skip[one.key]}
        # throughput is better when it is higher: its benefit is the other way round
        above, below = ("load", "skip") if one.unit == "tokens/s" else ("skip", "load")
        summary[one.label] = sides | {"benefit": measures.ratio(sides[above], sides[below])}
    for name in measures.COUNTERS:
        summary[name] = {"load": load["compile"][name], "skip": skip["compile"][name]}
    _finish(subject, "compare", trials, summary, sweep=[])


def benchmark(subject: Subject) -> None:
    """Serve the same requests in each of `flags.modes`; tell, write and draw what came of it.

    Beside the mode floor seconds can be compared between machines: `ttft_cold` over its own, and
    the bytes per second that decode must read over the read bandwidth that it measured.
    """
    commands = _commands(subject, subject.flags.modes)
    trials = _alternate(subject, commands, "repeat", subject.flags.repeats)
    summary = {mode: _summarize(trials, mode) for mode in commands}
    floor = summary.get(cli.FLOOR, {})
    start, read = floor.get("ttft_cold_start_seconds"), floor.get("read_bytes_per_second")
    for entry in summary.values():
        entry["ttft_cold_over_floor"] = measures.ratio(entry["ttft_cold_start_seconds"], start)
        entry["decode_bandwidth_share"] = measures.ratio(entry["decode_bytes_per_second"], read)
    _finish(subject, "benchmark", trials, summary, _sweep(subject, commands))


def _commands(subject: Subject, modes: Iterable[str]) -> dict[str, list[str]]:
    """Return the command of a trial by its mode: script first, then its flags."""
    check_plot(subject.results.plot)
    shared, prompt = subject.settings.shared, subject.settings.prompt
    # before the user's words, which win
    words = [f"--num-requests={prompt.num_requests}"]
    words += cli.words_besides((type(subject.flags), cli.ComparisonFlags), subject.argv)
    if prompt.prompt == "-":  # a trial has no stdin: what the user pipes in is read once, here
        words.append(f"--prompt={read_stdin()}")
    commands = {mode: [str(subject.script), *words, *subject.modes.get(mode, ())] for mode in modes}
    if cli.FLOOR in commands:
        # the model is looked up here: the floor must not pay for asking the Hub
        folder = resolve_checkpoint(shared.model_id, subject.console).folder
        where = [f"--model-id={folder}", f"--device={shared.device}", f"--dtype={shared.dtype}"]
        commands[cli.FLOOR] = [str(Path(__file__).with_name("floor.py")), *where]
    return commands


def _alternate(subject: Subject, commands: dict, counter: str, count: int) -> list[dict]:
    """Return `count` trials of each command."""
    if subject.settings.store.fetch:  # bring the artifact here before anything is measured
        for mode in commands.keys() & {"load", "compile_preload"}:
            run_trial([*commands[mode], "--max-new-tokens=1", "--num-requests=1"])
    order = []
    for number in range(1, count + 1):
        # every other round backwards, so that no mode always follows the same one
        for mode in commands if number % 2 else reversed(commands):
            order.append(({"mode": mode, counter: number}, commands[mode]))
    return _run_trials(order, "trials", subject.console)


def _sweep(subject: Subject, commands: dict[str, list[str]]) -> list[dict]:
    """Return a trial of each mode at each prompt length in tokens."""
    order = []
    for length in subject.flags.sweep_prompt_lengths:
        # the first request of a process pays for compiling and warming up: the second is measured
        words = [f"--prompt-length={length}", "--num-requests=2"]
        for mode in commands:
            if mode != cli.FLOOR:
                order.append(({"mode": mode, "prompt_length": length}, commands[mode] + words))
    entries = _run_trials(order, "sweep", subject.console)
    for entry in entries:
        ok = entry["ok"]
        entry["ttft_seconds"] = entry["requests"][-1]["ttft_seconds"] if ok else None
        entry["seconds_per_token"] = entry["decode"]["seconds_per_token"] if ok else None
    return entries


def _run_trials(order: list[tuple], label: str, console: cli.Console) -> list[dict]:
    """Run each (name, command); return with the name how it ended, and its run result if any."""
    trials = []
    with console.bar(order, label, "trial") as bar:
        for name, command in bar:
            title = " ".join(map(str, name.values()))
            bar.set_postfix_str(title)
            outcome = run_trial(command)
            trial = name | {"ok": outcome.ok} | vars(outcome)
            document = trial.pop("document") or {}
            trial |= {key: document[key] for key in _KEPT if key in document}
            if document:
                trial["metrics"] = measures.with_wall_time(trial["metrics"], outcome.wall_seconds)
            if not outcome.ok:
                console.warn(f"{label}, {title}: {outcome.error}")
            trials.append(trial)
    return trials


def _summarize(trials: list[dict], mode: str) -> dict[str, Any]:
    """Return mean, min, max and n of all that is measured in the trials of a mode."""
    mine = measures.succeeded(trials, mode)

    def over(part: str, key: str) -> dict | None:
        return measures.summarize((trial.get(part) or {}).get(key) for trial in mine)

    return {
        **{one.key: over("metrics", one.key) for one in measures.MEASURES},
        "decode_seconds_per_token": over("decode", "seconds_per_token"),
        "decode_bytes_per_second": over("decode", "bytes_per_second"),
        "read_bytes_per_second": over("bandwidth", "read_bytes_per_second"),
        "compile": {name: over("compile", name) for name in measures.COUNTERS},
    }


def _finish(subject: Subject, kind: str, trials: list, summary: dict, sweep: list) -> None:
    """Write, draw and print the result; raise when a trial failed or the modes disagree."""
    console, every = subject.console, trials + sweep
    # as the trials saw it: this process never opens the GPU
    seen = [trial.pop("environment", None) for trial in every]
    outputs = [trial for trial in every if trial["ok"] and trial["output"]]
    difference = _first_difference(outputs)
    document = {
        "schema": report.SCHEMA,
        "kind": kind,
        "approach": subject.approach,
        "environment": next(filter(None, seen), None) or report.environment(),
        "config": cli.config_of(subject.settings, subject.flags),
        "trials": trials,
        "summary": summary,
        **({"sweep": sweep} if sweep else {}),
        "outputs_identical": difference is None if len(outputs) > 1 else None,
        "difference": difference,
    }
    report.write_json(document, subject.settings.shared.json)
    draw(document, subject.results.plot)
    if subject.settings.prompt.show_completions:
        for trial in outputs:
            console.result(f"[{trial['mode']}] {trial['output']['text']}")
    console.result(report.tell(document, console.verbose))
    failed = [f"{trial['mode']}: {trial['error']}" for trial in every if not trial["ok"]]
    if failed:
        raise ScriptError(f"{len(failed)} of {len(every)} trials failed: {'; '.join(failed)}")
    if difference and not subject.results.tokens_may_differ:
        raise ScriptError(f"the modes disagree: {difference}")


def _first_difference(trials: list[dict]) -> str | None:
    """Return where two trials gave other tokens for the same prompt, in words; None is nowhere."""
    firsts: dict[int | None, dict] = {}  # by the prompt length of the sweep
    for trial in trials:
        length = trial.get("prompt_length")
        first = firsts.setdefault(length, trial)
        at = f"at a prompt of {length} tokens " if length else ""
        if not trial["output"]["requests_identical"]:
            return f"{at}{trial['mode']} gave other tokens for the same prompt later on"
        mine, theirs = first["output"]["token_ids"], trial["output"]["token_ids"]
        if mine != theirs:
            place = len(os.path.commonprefix([mine, theirs]))  # of any sequences, not paths alone
            return (
                f"{at}{first['mode']} and {trial['mode']} differ from new token {place} on "
                f"({len(mine)} and {len(theirs)} tokens)"
            )
    return None
