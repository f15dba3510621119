"""The results in the READMEs: generated from the committed files in results/, never typed.

python .ci/readme_tables.py           fill what is between the markers
python .ci/readme_tables.py --check   exit status 1 when a README says something else

A folder's README gets every measurement of its folder, the repository's one row for each. The text
stands between `<!-- results -->` and `<!-- /results -->`.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "mega_cache"))

from common.measure.report import benchmark_table, compare_table, markdown_table, sweep_table

REPOSITORY = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results -->", "<!-- /results -->"
FOLDERS = ("mega_cache", "torch_export")
STEPS = ("build", "compare", "benchmark", "sweep")
PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_bytes())
ON_CPU = "on a CPU: shows the mechanism, not the size of the gain on a GPU"


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
    texts = {REPOSITORY / "README.md": overview()}
    for name in FOLDERS:
        texts[REPOSITORY / name / "README.md"] = folder_text(name)
    return {readme: filled(readme.read_text(), text) for readme, text in texts.items()}


def filled(readme: str, text: str) -> str:
    """Return `readme` with `text` between its markers."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        sys.exit(f"a README lacks {BEGIN} or {END}: put it back")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def measurements(folder: str) -> dict[str, dict]:
    """Return the steps' results of each measurement of a folder by name, a GPU's first."""
    found = {}
    for place in sorted((REPOSITORY / folder / "results").glob("*/")):
        files = {step: place / f"{step}.json" for step in STEPS}
        steps = {step: json.loads(f.read_bytes()) for step, f in files.items() if f.exists()}
        if "compare" in steps:
            found[place.name] = steps
    return dict(sorted(found.items(), key=lambda item: not gpu_of(item[1])))


def gpu_of(steps: dict) -> str | None:
    return steps["compare"]["environment"].get("gpu")


def overview() -> str:
    """Return one row for each measurement: what one decides by."""
    header = [
        "",
        "model",
        "load (s)",
        "skip (s)",
        "benefit",
        "kernels compiled",
        "tokens/s",
        "eager",
    ]
    rows = [published_row(folder) for folder in FOLDERS]
    for folder in FOLDERS:
        for name, steps in measurements(folder).items():
            rows.append(
                [f"[{folder}]({folder}/README.md#results), {label_of(name)}", *facts(steps)]
            )
    return markdown_table(header, rows)


def published_row(folder: str) -> list[str]:
    total = PUBLISHED[folder]["total"]
    seconds = [f"{total[mode]:.2f}" for mode in ("load", "skip")]
    return [f"published {folder}", "3B, a GPU", *seconds, f"{total['benefit']:.2f}x", "-", "-", "-"]


def facts(steps: dict) -> list[str]:
    summary = steps["compare"]["summary"]
    total = summary["total"]
    modes = steps.get("benchmark", {}).get("summary", {})
    rates = [
        modes.get(mode, {}).get("tail_tokens_per_second") for mode in ("compile_preload", "eager")
    ]
    where = gpu_of(steps) or "CPU"
    return [
        f"{steps['compare']['config']['model_id']}, {where}",
        *(f"{total[mode]['mean']:.2f}" for mode in ("load", "skip")),
        f"{total['benefit']:.2f}x",
        f"{summary['kernels_compiled']['load']['mean']:g}",
        *("-" if rate is None else f"{rate['mean']:.0f}" for rate in rates),
    ]


def folder_text(folder: str) -> str:
    """Return every measurement of a folder: what was measured where, and its tables."""
    parts = [measurement_text(folder, *one) for one in measurements(folder).items()]
    return "\n\n".join(parts or ["Nothing is measured yet: `.ci/measure` does it."])


def measurement_text(folder: str, name: str, steps: dict) -> str:
    compared = steps["compare"]
    model, where = compared["config"]["model_id"], gpu_of(steps) or ON_CPU
    total = compared["summary"]["total"]
    parts = [
        f"**{model}, {label_of(name)}, {where}**",
        stack(compared["environment"]),
        f"Load against skip, means of {total['load']['n']} fresh processes a side:",
        compare_table(compared, verbose=True),
    ]
    if gpu_of(steps):
        parts.append(f"{PUBLISHED['source']}: {published_words(folder)}.")
    if benchmark := steps.get("benchmark"):
        count = next(iter(benchmark["summary"].values()))["total_script_seconds"]["n"]
        parts += [f"The modes, means of {count} processes each:", benchmark_table(benchmark, True)]
    if sweep := steps.get("sweep", {}).get("sweep"):
        parts += ["How cost grows with the prompt:", sweep_table(sweep)]
    return "\n\n".join([*parts, f"From `results/{name}/`."])


def published_words(folder: str) -> str:
    rows = PUBLISHED[folder]
    return "; ".join(
        f"{name} {row['load']} s against {row['skip']} s"
        for name, row in rows.items()
        if "benefit" in row
    )


def label_of(name: str) -> str:
    return name.rpartition("_")[2]


def stack(environment: dict) -> str:
    names = ("torch", "transformers", "triton", "cuda", "driver", "python", "cpu", "commit")
    known = [f"{name} {environment[name]}" for name in names if environment.get(name)]
    return f"{', '.join(known)}. Compiler caches empty, page cache warm."


if __name__ == "__main__":
    main()
