"""The results in the READMEs: generated from the committed files in results/, never typed.

python .ci/readme_tables.py           fill what is between the markers
python .ci/readme_tables.py --check   exit status 1 when a README says something else

A folder's README gets every measurement of its folder, a real model's first. The repository's gets
the rows of one model on one machine, and a session as run.json kept it.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "mega_cache"))

from common.measure.measures import COUNTERS
from common.measure.report import benchmark_table, compare_table, markdown_table, sweep_table
from common.measure.requests import run_lines

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDERS = ("torch_export", "mega_cache")
STEPS = ("build", "run", "compare", "benchmark", "sweep")
ON_CPU = "on a CPU: shows the mechanism, not the size of the gain on a GPU"
MODES = {"compile_preload": "load", "compile_no_preload": "skip (compiled at runtime)"}


def main() -> None:
    stale = [readme for readme, text in expected().items() if readme.read_text() != text]
    if "--check" in sys.argv[1:]:
        if stale:
            names = ", ".join(str(readme) for readme in stale)
            sys.exit(f"{names} differ from results/: mend it with `python {__file__}`")
        return
    for readme in stale:
        readme.write_text(expected()[readme])
        print(f"filled: {readme}")


def expected() -> dict[Path, str]:
    """Return what each README should say, whole."""
    root = REPOSITORY / "README.md"
    texts = {root: filled(filled(root.read_text(), "results", overview()), "session", session())}
    for name in FOLDERS:
        readme = REPOSITORY / name / "README.md"
        texts[readme] = filled(readme.read_text(), "results", folder_text(name))
    return texts


def filled(readme: str, marker: str, text: str) -> str:
    """Return `readme` with `text` between its markers."""
    begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    before, found, rest = readme.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        sys.exit(f"a README lacks {begin} or {end}: put it back")
    return f"{before}{begin}\n{text}\n{end}{after}"


def measurements(folder: str) -> dict[str, dict]:
    """Return the steps' results of each measurement of a folder by name, real models first."""
    found = {}
    for place in sorted((REPOSITORY / folder / "results").glob("*/")):
        files = {step: place / f"{step}.json" for step in STEPS}
        steps = {step: json.loads(f.read_bytes()) for step, f in files.items() if f.exists()}
        if "compare" in steps:
            found[place.name] = steps
    return dict(sorted(found.items(), key=lambda item: model_of(item[1]).startswith("random")))


def model_of(steps: dict) -> str:
    """Return the model's name: the last part of a folder's path, or of a Hub id."""
    return steps["compare"]["config"]["model_id"].rstrip("/").rpartition("/")[2]


def dtype_of(steps: dict) -> str:
    return steps["build"]["model"]["dtype"]


def where(steps: dict) -> str:
    environment = steps["compare"]["environment"]
    return environment.get("gpu") or environment.get("cpu")


def featured() -> list[tuple[str, str, dict]]:
    """Return (folder, name, steps) of what the root README shows: one model on one machine."""
    every = [(f, name, steps) for f in FOLDERS for name, steps in measurements(f).items()]
    every = [one for one in every if "benchmark" in one[2]]
    if not every:
        return []
    chosen = (model_of(every[0][2]), where(every[0][2]))
    return [one for one in every if (model_of(one[2]), where(one[2])) == chosen]


def overview() -> str:
    """Return a row for each way to start the model that is featured."""
    rows, shown = [], featured()
    if not shown:
        return "Nothing is measured yet: `.ci/measure` does it."
    seen_eager = set()
    for folder, _, steps in shown:
        dtype = dtype_of(steps)
        for mode, entry in steps["benchmark"]["summary"].items():
            if mode == "floor" or (mode == "eager" and dtype in seen_eager):
                continue
            if mode == "eager":
                seen_eager.add(dtype)
            link = f"[{folder}]({folder}/README.md#results)"
            what = f"{link}, {MODES[mode]}" if mode in MODES else "transformers, eager"
            rows.append([what, dtype, *facts(entry)])
    rows.sort(key=lambda row: row[1] != "float32")
    header = ["", "dtype", "first token (s)", "process (s)", "steady tokens/s", "GB/s"]
    steps = shown[0][2]
    count = steps["benchmark"]["config"]["num_requests"]
    new = steps["benchmark"]["config"]["max_new_tokens"]
    about = f"{model_of(steps)} on {where(steps)}: {count} requests of {new} new tokens a process."
    return f"{about}\n\n{markdown_table(header, rows)}"


def facts(entry: dict) -> list[str]:
    keys = ("ttft_cold_start_seconds", "total_script_seconds", "tail_tokens_per_second")
    shown = [f"{entry[key]['mean']:.2f}" if entry.get(key) else "-" for key in keys[:2]]
    rate, read = entry[keys[2]], entry.get("decode_bytes_per_second")
    shown.append(f"{rate['mean']:.1f}" if rate else "-")
    return [*shown, f"{read['mean'] / 1e9:.1f}" if read else "-"]


def session() -> str:
    """Return a run as a terminal showed it."""
    for folder, _, steps in featured():
        if "run" in steps:
            run = steps["run"]
            command = f'$ {folder}/run.sh --model-id {model_of(steps)} --prompt "{prompt_of(run)}"'
            lines = [command, *run["completions"][0].splitlines(), *run_lines(run)]
            return "\n".join(["```text", *lines, "```"])
    return ""


def prompt_of(run: dict) -> str:
    return run["config"]["prompt"]


def folder_text(folder: str) -> str:
    """Return every measurement of a folder: what was measured where, and its tables."""
    parts = [measurement_text(*one) for one in measurements(folder).items()]
    return "\n\n".join(parts or ["Nothing is measured yet: `.ci/measure` does it."])


def measurement_text(name: str, steps: dict) -> str:
    compared = without_zeros(steps["compare"])
    total = compared["summary"]["total"]
    place = compared["environment"].get("gpu") or ON_CPU
    parts = [
        f"**{model_of(steps)}, {dtype_of(steps)}, {name.rpartition('_')[2]}, {place}**",
        f"{stack(compared['environment'])} Built in {steps['build']['build_seconds']:.0f} s, "
        f"{steps['build']['file']['bytes'] / 1e6:.2f} MB.",
        f"Load against skip, means of {total['load']['n']} fresh processes a side:",
        compare_table(compared, verbose=True),
    ]
    if benchmark := steps.get("benchmark"):
        count = next(iter(benchmark["summary"].values()))["total_script_seconds"]["n"]
        shown = without_zeros(benchmark)
        parts += [f"The modes, means of {count} processes each:", benchmark_table(shown, True)]
    if sweep := steps.get("sweep", {}).get("sweep"):
        parts += ["How cost grows with the prompt:", sweep_table(sweep)]
    return "\n\n".join([*parts, f"From `results/{name}/`."])


def without_zeros(document: dict) -> dict:
    """Return a result without the counters that are 0 or unknown in every mode."""
    summary = document["summary"]
    if document["kind"] == "compare":

        def idle(name: str) -> bool:
            sides = (summary[name]["load"], summary[name]["skip"])
            return name in COUNTERS and not any(side and side["max"] for side in sides)

        kept = {name: entry for name, entry in summary.items() if not idle(name)}
    else:
        counted = [entry["compile"] for entry in summary.values()]
        busy = [name for name in COUNTERS if any(c[name] and c[name]["max"] for c in counted)]
        kept = {
            mode: entry | {"compile": {name: entry["compile"][name] for name in busy}}
            for mode, entry in summary.items()
        }
    return document | {"summary": kept}


def stack(environment: dict) -> str:
    names = ("torch", "transformers", "triton", "cuda", "driver", "python", "cpu", "commit")
    known = [f"{name} {environment[name]}" for name in names if environment.get(name)]
    return f"{', '.join(known)}. Compiler caches empty, page cache warm."


if __name__ == "__main__":
    main()
