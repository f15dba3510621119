"""compare and benchmark: one run script in several modes, each trial a fresh process.

A trial is the run script with the user's own words, and the words of its mode after them: the last
flag wins. Modes alternate; greedy tokens must be the same in all of them.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from common import report
from common.checkpoints import resolve_checkpoint
from common.cli import (
    FLOOR,
    BenchmarkFlags,
    CompareFlags,
    ComparisonFlags,
    Console,
    PromptFlags,
    SharedFlags,
    words_besides,
)
from common.errors import ScriptError
from common.measures import (
    COMPARED,
    COUNTERS,
    MEASURES,
    Request,
    decode_seconds_per_token,
    ratio,
    summarize,
    with_wall_time,
)
from common.plots import check_plot, draw
from common.trials import Outcome, run_trial

# the command of a trial by its mode: script first, then its flags
Commands = Mapping[str, Sequence[str]]
_SCRIPT_OF_FLOOR = Path(__file__).with_name("floor.py")
# the first request of a process pays for compilation and warming up: the second is measured
_SWEEP_REQUESTS = 2
_KEPT = (
    "metrics", "compile", "output", "requests", "stages", "hidden_stages", "artifact", "decode",
    "device_memory", "bandwidth",
)  # fmt: skip


def compare(
    approach: str,
    script: Path,
    words: Sequence[str],
    modes: Mapping[str, Sequence[str]],
    shared: SharedFlags,
    flags: CompareFlags,
    results: ComparisonFlags,
    config: dict,
) -> None:
    """Run `script` with `words` and each mode's own; tell, write and draw what came of it."""
    check_plot(results.plot)
    console = Console(shared.quiet, shared.verbose)
    commands = {mode: [str(script), *words, *own] for mode, own in modes.items()}
    _fetch_once(commands, config)
    trials, found = _run_trials(commands, flags.compare_runs, "trial", console)
    summary: dict = {
        name: {mode: _summary(trials, mode, key) for mode in ("load", "skip")}
        for name, key in COMPARED.items()
    }
    for name, entry in summary.items():
        # throughput is better when it is higher: its benefit is the other way round
        better = ("load", "skip") if name == "gen_tps" else ("skip", "load")
        entry["benefit"] = ratio(entry[better[0]], entry[better[1]])
    for name in COUNTERS:
        summary[name] = {mode: _counter(trials, mode, name) for mode in commands}
    document = _document("compare", approach, found, config, trials, summary)
    table = report.compare_table(document, shared.verbose)
    _finish(document, table, report.compare_words(document), shared, results, console)


def benchmark(
    approach: str,
    script: Path,
    words: Sequence[str],
    modes: Mapping[str, Sequence[str]],
    shared: SharedFlags,
    flags: BenchmarkFlags,
    results: ComparisonFlags,
    config: dict,
) -> None:
    """Serve the same requests in each of `flags.modes`; tell, write and draw what came of it."""
    check_plot(results.plot)
    console = Console(shared.quiet, shared.verbose)
    commands = {
        mode: [str(_SCRIPT_OF_FLOOR), *_floor_words(shared, console)]
        if mode == FLOOR
        else [str(script), *words, *modes[mode]]
        for mode in flags.modes
    }
    _fetch_once(commands, config)
    trials, found = _run_trials(commands, flags.repeats, "repeat", console)
    summary: dict = {}
    for mode in commands:
        summary[mode] = {one.key: _summary(trials, mode, one.key) for one in MEASURES}
        summary[mode]["compile"] = {name: _counter(trials, mode, name) for name in COUNTERS}
    _add_ratios(trials, summary)
    document = _document("benchmark", approach, found, config, trials, summary)
    if flags.sweep_prompt_lengths:
        _add_sweep(document, _run_sweep(commands, flags.sweep_prompt_lengths, console))
    table = report.benchmark_table(document, shared.verbose)
    _finish(document, table, report.benchmark_words(document), shared, results, console)


def trial_words(own: Sequence[type], argv: Sequence[str], prompt: PromptFlags) -> list[str]:
    """Return the user's words that a trial gets: all but the flags of the groups `own`."""
    words = words_besides(own, argv)
    # a trial has no stdin: what the user pipes in is read once, here
    return [*words, f"--prompt={sys.stdin.read()}"] if prompt.prompt == "-" else words


def _floor_words(shared: SharedFlags, console: Console) -> list[str]:
    # the model is looked up here: the floor must not pay for asking the Hub
    folder = resolve_checkpoint(shared.model_id, console).folder
    return [f"--model-id={folder}", f"--device={shared.device}", f"--dtype={shared.dtype}"]


def _finish(
    document: dict,
    table: str,
    in_words: str,
    shared: SharedFlags,
    results: ComparisonFlags,
    console: Console,
) -> None:
    report.write_json(document, shared.json)
    draw(document, results.plot)
    if document["config"].get("show_completions"):
        for trial in document["trials"]:
            if trial["ok"]:
                console.result(f"[{trial['mode']}] {trial['output']['text']}")
    console.result(f"{table}\n\n{in_words}")
    _check_outcome(document, results.tokens_may_differ)


def _check_outcome(document: dict, tokens_may_differ: bool) -> None:
    """Raise when a trial failed or when the modes disagree about the tokens."""
    trials = document["trials"] + document.get("sweep", [])
    failed = [trial for trial in trials if not trial["ok"]]
    if failed:
        lines = "; ".join(f"{trial['mode']}: {trial['error']}" for trial in failed)
        raise ScriptError(f"{len(failed)} of {len(trials)} trials failed: {lines}")
    if document["outputs_identical"] is False and not tokens_may_differ:
        raise ScriptError(f"the modes disagree: {document['difference']}")


def _fetch_once(commands: Commands, config: dict) -> None:
    """With --fetch, bring the artifact here before anything is measured."""
    if config.get("fetch"):
        for mode in commands.keys() & {"load", "compile_preload"}:
            run_trial([*commands[mode], "--max-new-tokens=1", "--num-requests=1"])


def _run_trials(
    commands: Commands, count: int, counter: str, console: Console
) -> tuple[list[dict], dict | None]:
    """Return all trials and the environment that they report."""
    order = []
    for number in range(1, count + 1):
        # every other round backwards, so that no mode always follows the same one
        order += [(mode, number) for mode in (commands if number % 2 else reversed(list(commands)))]
    trials, found = [], None
    with console.bar(order, "trials", "trial") as bar:
        for mode, number in bar:
            bar.set_postfix_str(mode)
            outcome = run_trial(commands[mode])
            trials.append({"mode": mode, counter: number, **_trial(outcome)})
            if outcome.document is not None:
                found = found or outcome.document["environment"]
            if not outcome.ok:
                console.warn(f"{mode}, {counter} {number}: {outcome.error}")
    return trials, found


def _trial(outcome: Outcome) -> dict:
    """Return what is kept of one trial: how it ended, and its run result if there is one."""
    trial = {
        "ok": outcome.ok,
        "error": outcome.error,
        "wall_seconds": outcome.wall_seconds,
        "peak_host_bytes": outcome.peak_host_bytes,
    }
    document = outcome.document
    if document is None:
        return trial
    trial |= {name: document[name] for name in _KEPT if name in document}
    return trial | {"metrics": with_wall_time(document["metrics"], outcome.wall_seconds)}


def _run_sweep(commands: Commands, lengths: Sequence[int], console: Console) -> list[dict]:
    """Return one entry per mode and prompt length in tokens; a failure keeps its error."""
    modes = [mode for mode in commands if mode != FLOOR]
    entries = []
    order = [(mode, length) for length in lengths for mode in modes]
    with console.bar(order, "sweep", "length") as bar:
        for mode, length in bar:
            bar.set_postfix_str(f"{mode} {length}")
            own = [f"--prompt-length={length}", f"--num-requests={_SWEEP_REQUESTS}"]
            outcome = run_trial([*commands[mode], *own])
            entries.append({"mode": mode, "prompt_length": length, **_sweep_entry(outcome)})
            if not outcome.ok:
                console.warn(f"sweep, {mode} at {length} tokens: {outcome.error}")
    return entries


def _add_sweep(document: dict, entries: list[dict]) -> None:
    """Add the sweep; other tokens at one of its lengths are a difference like any other."""
    document["sweep"] = entries
    for length in dict.fromkeys(entry["prompt_length"] for entry in entries):
        difference = _first_difference([e for e in entries if e["prompt_length"] == length])
        if difference is not None and document["difference"] is None:
            document["outputs_identical"] = False
            document["difference"] = f"at a prompt of {length} tokens {difference}"


def _sweep_entry(outcome: Outcome) -> dict:
    document = outcome.document if outcome.ok else None
    requests = document["requests"] if document else []
    return {
        "ok": outcome.ok,
        "error": outcome.error,
        "wall_seconds": outcome.wall_seconds,
        "ttft_seconds": requests[-1]["ttft_seconds"] if requests else None,
        "seconds_per_token": decode_seconds_per_token([Request(**one) for one in requests]),
        "output": document["output"] if document else None,
        "recompiles": document["compile"].get("recompiles") if document else None,
        "requests": requests,
    }


def _document(
    kind: str, approach: str, found: dict | None, config: dict, trials: list[dict], summary: dict
) -> dict:
    difference = _first_difference(trials)
    compared = [trial for trial in trials if trial["ok"] and trial.get("output")]
    return {
        "schema": report.SCHEMA,
        "kind": kind,
        "approach": approach,
        # as the trials saw it: this process never opens the GPU
        "environment": found or report.environment(),
        "config": config,
        "trials": trials,
        "summary": summary,
        "outputs_identical": difference is None if len(compared) > 1 else None,
        "difference": difference,
    }


def _first_difference(trials: list[dict]) -> str | None:
    """Return where two trials gave other tokens for the same prompt, in words; None is nowhere."""
    outputs = [trial for trial in trials if trial["ok"] and trial.get("output")]
    for other in outputs:
        if not other["output"]["requests_identical"]:
            return f"{other['mode']} gave other tokens for the same prompt later on"
        first, mine, theirs = (
            outputs[0]["mode"],
            *(trial["output"]["token_ids"] for trial in (outputs[0], other)),
        )
        if mine != theirs:
            pairs = enumerate(zip(mine, theirs, strict=False))
            place = next((i for i, (a, b) in pairs if a != b), min(len(mine), len(theirs)))
            return (
                f"{first} and {other['mode']} differ from new token {place} on "
                f"({len(mine)} and {len(theirs)} tokens)"
            )
    return None


def _summary(trials: list[dict], mode: str, key: str) -> dict | None:
    return summarize(trial["metrics"][key] for trial in _succeeded(trials, mode))


def _counter(trials: list[dict], mode: str, name: str) -> dict | None:
    return summarize(trial["compile"].get(name) for trial in _succeeded(trials, mode))


def _succeeded(trials: list[dict], mode: str) -> list[dict]:
    return [trial for trial in trials if trial["mode"] == mode and trial["ok"]]


def _add_ratios(trials: list[dict], summary: dict) -> None:
    """Add what makes seconds comparable between machines: start over floor, decode over copy.

    `ttft_cold_over_floor`: a mode's `ttft_cold` over the floor's, the moment when the checkpoint's
    bytes are on the device. `decode_bandwidth_share`: bytes that a token must read, per second of
    its decode, over the copy bandwidth that the floor measured. Both are None without the floor.
    """
    floors = _succeeded(trials, FLOOR)
    floor = summarize(trial["metrics"]["ttft_cold_start_seconds"] for trial in floors)
    copies = summarize(trial["bandwidth"]["copy_bytes_per_second"] for trial in floors)
    for mode, entry in summary.items():
        mine = _succeeded(trials, mode)
        decodes = [trial["decode"] for trial in mine if trial.get("decode")]
        start = entry["ttft_cold_start_seconds"]
        entry["ttft_cold_over_floor"] = ratio(start, floor)
        rates = summarize(decode["bytes_per_second"] for decode in decodes)
        entry["decode_seconds_per_token"] = summarize(
            decode["seconds_per_token"] for decode in decodes
        )
        entry["decode_bandwidth_share"] = ratio(rates, copies)
