"""The whole measurement of a model: build, compare, benchmark, sweep, equivalence; one result file.

Each step is the command that a user would type, bounded in time; what is finished is kept, so that
a measurement that was stopped goes on where it was: run the same command again.
"""

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.cli import flag, names_from, non_negative_float, parse_flags, to_argv
from common.console import Console
from common.equivalence import error_text
from common.errors import ScriptError
from common.flags import MODES, SharedFlags
from common.plots import draw, has_matplotlib
from common.results import SCHEMA, write_json
from common.steps import StateFolder
from common.tables import markdown_table, number
from common.versions import package_version

FOLDER = Path(__file__).resolve().parent.parent
STEPS = ("build", "compare", "benchmark", "sweep", "equivalence")
SIZE_STEPS = ("build", "speed", "equivalence")
SWEEP_LENGTHS = "8,128,512,1024,1900"
PAGE_CACHE = "warm: the checkpoint was read by the steps and trials before"


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


@dataclass(frozen=True)
class MeasureFlags:
    """measurement"""

    steps: tuple[str, ...] = flag(STEPS, "to run", parse=names_from(*STEPS))
    step_timeout: float = flag(3600.0, "seconds that one step may take", parse=non_negative_float)
    time_limit: float = flag(
        0.0,
        "seconds after which everything stops, to be gone on with by the same command; 0 is off",
        parse=non_negative_float,
    )
    fresh: bool = flag(False, "forget the finished steps named by --steps and start over")
    sizes: tuple[str, ...] = flag(
        (),
        "models like random:1b,random:3b: instead of the steps, compiled against eager "
        "steady-state speed and numerical difference of each",
        parse=_words,
    )
    label: str = flag("", "of a variant of the build, like kv-cache: part of the result's name")
    results_folder: Path = flag(FOLDER / "results", "where the result file goes")
    plots: bool = flag(True, "draw the result too, where matplotlib is installed")


@dataclass(frozen=True)
class StepFlags:
    """flags for single steps; those after -- go to every step"""

    build_flags: str = flag("", "flags of build, in one word: --build-flags='--x 1 --y'")
    run_flags: str = flag("", "flags of compare, benchmark, sweep and equivalence")
    compare_flags: str = flag("", "flags of compare alone")
    benchmark_flags: str = flag("", "flags of benchmark alone")
    sweep_flags: str = flag("", "flags of the sweep alone")
    equivalence_flags: str = flag("", "flags of equivalence alone")


@dataclass(frozen=True)
class Plan:
    """What differs between folders: `artifact_flags` name the artifact at a path's stem."""

    approach: str
    artifact_flags: Callable[[Path], list[str]]


@dataclass(frozen=True)
class Measurement:
    """One model's measurement."""

    plan: Plan
    shared: SharedFlags
    flags: MeasureFlags
    step_flags: StepFlags
    extra: tuple[str, ...]
    console: Console
    began: float

    def state(self, kind: str) -> StateFolder:
        shared = self.shared
        name = "-".join(
            (kind, slug(shared.model_id), shared.device, shared.dtype, torch_name())
            + ((slug(self.flags.label),) if self.flags.label else ())
        )
        return StateFolder(FOLDER / "artifacts" / "measure" / name)

    def seconds_left(self) -> float:
        limit = self.flags.time_limit
        left = limit - (time.monotonic() - self.began) if limit else float("inf")
        return min(left, self.flags.step_timeout)


def main(plan: Plan, description: str, argv: Sequence[str]) -> None:
    """Parse, measure what is not measured yet, write the result, and say what is missing."""
    cut = list(argv).index("--") if "--" in argv else len(argv)
    groups = (SharedFlags, MeasureFlags, StepFlags)
    shared, flags, step_flags = parse_flags(description, groups, argv[:cut])
    console = Console(shared.quiet)
    extra, began = tuple(argv[cut + 1 :]), time.monotonic()
    measurement = Measurement(plan, shared, flags, step_flags, extra, console, began)
    failures = measure_sizes(measurement) if flags.sizes else measure_model(measurement)
    if failures:
        named = "; ".join(f"{step}: {error}" for step, error in failures.items())
        raise ScriptError(
            f"not everything is measured ({named}); what is finished is kept: "
            "run the same command again to go on"
        )


def measure_model(measurement: Measurement) -> dict[str, str]:
    """Measure one model in all steps, write and draw the result; return the failures by step."""
    state = measurement.state("model")
    commands = step_commands(measurement, state)
    failures = run_steps(measurement, state, commands, measurement.flags.steps)
    document = compose(measurement, state)
    if document is not None:
        _publish(measurement, document, result_name(document))
    return failures


def measure_sizes(measurement: Measurement) -> dict[str, str]:
    """Measure speed and numerical difference of each size; return the failures by model, step."""
    rows, found, dates, failures = [], None, [], {}
    for model_id in measurement.flags.sizes:
        one = replace(measurement, shared=replace(measurement.shared, model_id=model_id))
        state = one.state("size")
        failed = run_steps(one, state, size_commands(one, state), SIZE_STEPS)
        failures |= {f"{model_id} {step}": error for step, error in failed.items()}
        speed, difference = state.read("speed"), state.read("equivalence")
        if speed is None:
            continue
        found = found or speed["result"]["environment"]
        dates.append(speed["finished"])
        rows.append(size_row(model_id, speed["result"], difference and difference["result"]))
    if rows:
        document = {
            "schema": SCHEMA,
            "kind": "sizes",
            "approach": measurement.plan.approach,
            "model_id": "sizes",
            "label": measurement.flags.label,
            "finished": min(dates),
            "environment": found,
            "page_cache": PAGE_CACHE,
            "sizes": rows,
        }
        measurement.console.result(sizes_table(rows))
        _publish(measurement, document, result_name(document))
    return failures


def run_steps(
    measurement: Measurement,
    state: StateFolder,
    commands: dict[str, list[str]],
    steps: Sequence[str],
) -> dict[str, str]:
    """Run what is not finished yet; return what went wrong by step."""
    console, failures = measurement.console, {}
    if measurement.flags.fresh:
        state.forget(steps)
    for step in steps:
        if state.recall(step, commands[step]) is not None:
            console.say(f"== {step}: finished before, kept (--fresh measures it again)")
            continue
        left = measurement.seconds_left()
        if left < 1:
            failures[step] = "--time-limit was reached"
            continue
        console.say(f"== {step}: {shlex.join(commands[step])}")
        if step == "build":
            state.forget(list(commands))  # what was measured with another artifact does not count
        quiet = ["--quiet"] if console.quiet else []
        error = state.run(step, commands[step], left, *quiet)
        if error is not None:
            console.warn(f"{step}: {error}")
            failures[step] = error
            if step == "build":
                break  # nothing to load: the other steps would fail one after another
    return failures


def step_commands(measurement: Measurement, state: StateFolder) -> dict[str, list[str]]:
    """Return the command of each step: the folder's own wrappers, which hold the defaults."""
    flags = measurement.step_flags
    run = shlex.split(flags.run_flags)
    # a near tie in bfloat16 is no failure here: the equivalence step checks tokens in float32
    lenient = ["--tokens-may-differ"]
    sweep = ["--modes=compile_preload,eager", "--repeats=1", "--num-requests=2"]
    own = {
        "build": ["build.sh", shlex.split(flags.build_flags)],
        "compare": ["compare.sh", lenient + run + shlex.split(flags.compare_flags)],
        "benchmark": [
            "benchmark.sh",
            [*lenient, f"--modes={','.join(MODES)}", *run, *shlex.split(flags.benchmark_flags)],
        ],
        "sweep": [
            "benchmark.sh",
            [*lenient, *sweep, f"--sweep-prompt-lengths={SWEEP_LENGTHS}", *run]
            + shlex.split(flags.sweep_flags),
        ],
        "equivalence": [
            "check_equivalence.sh",
            # tokens are checked on an artifact of the same kind
            [f"--token-build-flags={flags.build_flags}", *run]
            + shlex.split(flags.equivalence_flags),
        ],
    }
    return _with_shared_flags(measurement, state, own)


def size_commands(measurement: Measurement, state: StateFolder) -> dict[str, list[str]]:
    flags = measurement.step_flags
    run = shlex.split(flags.run_flags)
    speed = ["--tokens-may-differ", "--modes=compile_preload,eager", "--repeats=1"]
    own = {
        "build": ["build.sh", shlex.split(flags.build_flags)],
        "speed": ["benchmark.sh", [*speed, "--num-requests=4", *run]],
        "equivalence": [
            "check_equivalence.sh",
            ["--no-check-tokens", *run, *shlex.split(flags.equivalence_flags)],
        ],
    }
    return _with_shared_flags(measurement, state, own)


def _with_shared_flags(
    measurement: Measurement, state: StateFolder, own: dict[str, list]
) -> dict[str, list[str]]:
    shared = to_argv(replace(measurement.shared, json=None, quiet=False, debug=False))
    artifact = measurement.plan.artifact_flags(state.path / "artifact")
    return {
        step: [str(FOLDER / wrapper), *shared, *artifact, *flags, *measurement.extra]
        for step, (wrapper, flags) in own.items()
    }


def compose(measurement: Measurement, state: StateFolder) -> dict | None:
    """Return the result of all finished steps together, or None when there is none."""
    records = {step: record for step in STEPS if (record := state.read(step)) is not None}
    results = {step: record["result"] for step, record in records.items()}
    measured = next((results[step] for step in STEPS[1:] if step in results), None)
    if measured is None:
        return None
    return {
        "schema": SCHEMA,
        "kind": "measurement",
        "approach": measurement.plan.approach,
        "model_id": measurement.shared.model_id,
        "label": measurement.flags.label,
        "finished": max(record["finished"] for record in records.values()),
        "date": min(record["finished"] for record in records.values())[:10],
        "environment": measured["environment"],
        "page_cache": PAGE_CACHE,
        "commands": {step: record["command"] for step, record in records.items()},
        "seconds": {step: record["seconds"] for step, record in records.items()},
        "missing": [step for step in STEPS if step not in records],
        **{step: results.get(step) for step in STEPS if step != "sweep"},
        "sweep": results.get("sweep", {}).get("sweep"),
    }


def result_name(document: dict) -> str:
    """Return `<gpu or cpu>_<model>[_<label>]_torch<version>_<date>`."""
    found = document["environment"]
    device = slug(found["gpu"]) if found.get("gpu") else "cpu"
    version = (found.get("torch") or "unknown").partition("+")[0]
    date = document.get("date") or document["finished"][:10]
    label = f"_{slug(document['label'])}" if document["label"] else ""
    return f"{device}_{slug(document['model_id'])}{label}_torch{version}_{date}"


def slug(name: str) -> str:
    """Return a name fit for a file: its last part, in small letters."""
    last = name.rstrip("/").rpartition("/")[2].lower()
    return "".join(letter if letter.isalnum() or letter == "." else "-" for letter in last)


def torch_name() -> str:
    return f"torch{(package_version('torch') or 'unknown').partition('+')[0]}"


def size_row(model_id: str, speed: dict, difference: dict | None) -> dict:
    """Return one size: steady-state tokens/s of both modes, and the errors of the logits."""
    rates = {
        mode: (entry["tail_tokens_per_second"] or {}).get("mean")
        for mode, entry in speed["summary"].items()
    }
    compiled, eager = rates.get("compile_preload"), rates.get("eager")
    return {
        "model_id": model_id,
        "compiled_tokens_per_second": compiled,
        "eager_tokens_per_second": eager,
        "speedup": compiled / eager if compiled and eager else None,
        "outputs_identical": speed["outputs_identical"],
        "logits": difference and difference["logits"],
    }


def sizes_table(rows: list[dict]) -> str:
    header = ["model", "eager (tokens/s)", "compiled (tokens/s)", "speed-up"]
    cells = []
    for row in rows:
        errors = {entry["mode"]: entry for entry in (row["logits"] or {}).get("rows", [])}
        cells.append(
            [
                row["model_id"],
                number(row["eager_tokens_per_second"], 1),
                number(row["compiled_tokens_per_second"], 1),
                "-" if row["speedup"] is None else f"{row['speedup']:.2f}x",
                *(
                    f"{error_text(errors.get(mode, {}).get('mean_abs_error'))} / "
                    f"{error_text(errors.get(mode, {}).get('max_abs_error'))}"
                    for mode in ("eager", "load")
                ),
            ]
        )
    errors = ["eager logits, mean / max error", "compiled logits, mean / max error"]
    return markdown_table(header + errors, cells)


def _publish(measurement: Measurement, document: dict, name: str) -> None:
    """Write the result file, draw it, and say where it is."""
    flags, console = measurement.flags, measurement.console
    path = flags.results_folder / f"{name}.json"
    write_json(document, path)
    write_json(document, measurement.shared.json)
    console.result(f"written: {path}")
    if flags.plots and document.get("benchmark"):
        if not has_matplotlib():
            console.say("no pictures: pip install matplotlib")
            return
        sweep = {"sweep": document["sweep"]} if document["sweep"] else {}
        for picture in draw(document["benchmark"] | sweep, path.with_suffix(".png")):
            console.result(f"drawn: {picture}")
