"""compare and benchmark: alternate the modes over fresh processes, check outputs, summarise."""

from collections.abc import Mapping, Sequence

from common.console import Console
from common.errors import ScriptError
from common.kept_trials import run_or_recall
from common.measures import COUNTERS, MEASURES, benefit, summarize, with_wall_time
from common.ratios import add_ratios
from common.results import SCHEMA, environment
from common.sweep import SweepCommands, run_sweep
from common.trials import Outcome

# the command of a trial by its mode: script first, then its flags
Commands = Mapping[str, Sequence[str]]


def run_compare(
    approach: str, commands: Commands, runs: int, config: dict, console: Console
) -> dict:
    """Return the compare result of `load` against `skip`, each in `runs` fresh processes."""
    trials, found = _run_trials(commands, runs, "trial", console)
    summary = {
        "setup": _compared(trials, "setup_seconds"),
        "generation": _compared(trials, "generation_seconds"),
        "total": _compared(trials, "total_script_seconds"),
        "gen_tps": _compared(trials, "generation_tokens_per_second"),
    }
    # throughput is better when it is higher: its benefit is the other way round
    summary["gen_tps"]["benefit"] = benefit(summary["gen_tps"]["skip"], summary["gen_tps"]["load"])
    for name in COUNTERS:
        summary[name] = {mode: _counter(trials, mode, name) for mode in commands}
    return _document("compare", approach, found, config, trials, summary)


def run_benchmark(
    approach: str,
    commands: Commands,
    repeats: int,
    config: dict,
    console: Console,
    sweep: SweepCommands | None = None,
) -> dict:
    """Return the benchmark result of every mode, each in `repeats` fresh processes."""
    trials, found = _run_trials(commands, repeats, "repeat", console)
    summary = {}
    for mode in commands:
        summary[mode] = {
            measure.key: summarize(_values(trials, mode, measure.key)) for measure in MEASURES
        }
        summary[mode]["compile"] = {name: _counter(trials, mode, name) for name in COUNTERS}
    add_ratios(trials, summary)
    document = _document("benchmark", approach, found, config, trials, summary)
    return document | ({"sweep": run_sweep(sweep, console)} if sweep else {})


def check_outcome(document: dict, tokens_may_differ: bool = False) -> None:
    """Raise when a trial failed or when the modes disagree about the tokens."""
    trials = document["trials"] + document.get("sweep", [])
    failed = [trial for trial in trials if not trial["ok"]]
    if failed:
        lines = "; ".join(f"{trial['mode']}: {trial['error']}" for trial in failed)
        raise ScriptError(f"{len(failed)} of {len(trials)} trials failed: {lines}")
    if document["outputs_identical"] is False and not tokens_may_differ:
        raise ScriptError(f"the modes disagree: {document['difference']}")


def show_trials(document: dict, completions: bool, console: Console) -> None:
    """Print what must be known beside the table: failures, and the texts when asked for."""
    for trial in document["trials"]:
        if completions and trial["ok"]:
            console.result(f"[{trial['mode']}] {trial['output']['text']}")


def _run_trials(
    commands: Commands, count: int, counter: str, console: Console
) -> tuple[list[dict], dict | None]:
    """Return all trials and the environment that they report."""
    order = []
    for number in range(1, count + 1):
        # every other round backwards, so that no mode always follows the same one
        order += [(mode, number) for mode in (commands if number % 2 else reversed(commands))]
    trials, found = [], None
    bar = console.bar(order, "trials", "trial")
    for mode, number in bar:
        bar.set_postfix_str(mode)
        outcome = run_or_recall(commands[mode], number)
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
    if outcome.document is None:
        return trial
    kept = (
        "metrics",
        "compile",
        "output",
        "requests",
        "stages",
        "artifact",
        "device_memory",
        "bandwidth",
    )
    trial |= {name: outcome.document[name] for name in kept if name in outcome.document}
    trial["metrics"] = with_wall_time(trial["metrics"], outcome.wall_seconds)
    return trial


def _document(
    kind: str, approach: str, found: dict | None, config: dict, trials: list[dict], summary: dict
) -> dict:
    identical, difference = _compare_outputs(trials)
    return {
        "schema": SCHEMA,
        "kind": kind,
        "approach": approach,
        # as the trials saw it: this process never opens the GPU
        "environment": found or environment(),
        "config": config,
        "trials": trials,
        "summary": summary,
        "outputs_identical": identical,
        "difference": difference,
    }


def _compare_outputs(trials: list[dict]) -> tuple[bool | None, str | None]:
    """Return whether all trials gave the same tokens, and the first difference in words."""
    outputs = [trial for trial in trials if trial["ok"] and trial.get("output")]
    if len(outputs) < 2:
        return None, None
    first = outputs[0]
    for other in outputs:
        if other["output"].get("requests_identical") is False:
            return False, f"{other['mode']} gave other tokens for the same prompt later on"
        mine, theirs = first["output"]["token_ids"], other["output"]["token_ids"]
        if mine != theirs:
            place = next(
                (i for i, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1]),
                min(len(mine), len(theirs)),
            )
            return False, (
                f"{first['mode']} and {other['mode']} differ from new token {place} on "
                f"({len(mine)} and {len(theirs)} tokens)"
            )
    return True, None


def _values(trials: list[dict], mode: str, key: str) -> list[float | None]:
    return [
        trial["metrics"][key]
        for trial in trials
        if trial["mode"] == mode and trial["ok"] and "metrics" in trial
    ]


def _compared(trials: list[dict], key: str) -> dict:
    load = summarize(_values(trials, "load", key))
    skip = summarize(_values(trials, "skip", key))
    return {"load": load, "skip": skip, "benefit": benefit(load, skip)}


def _counter(trials: list[dict], mode: str, name: str) -> dict | None:
    return summarize(
        trial["compile"].get(name)
        for trial in trials
        if trial["mode"] == mode and trial["ok"] and "compile" in trial
    )
