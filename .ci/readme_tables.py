"""The results in the READMEs: generated from the committed files in results/, never typed.

python .ci/readme_tables.py           fill what is between the markers
python .ci/readme_tables.py --check   exit status 1 when a README says something else

A folder's README gets every measurement of its folder, a real model's first. What
alternatives/measure.py found of a real model stands in the repository's, beside a session as
run.json kept it, and of a preset in torch_export's.
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
DTYPES = ("float32", "bfloat16", "float16")


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
    text = filled(filled(root.read_text(), "results", overview()), "session", session())
    texts = {root: filled(text, "gpu", on_a_gpu())}
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
        steps = steps_of(place)
        if "compare" in steps:
            found[place.name] = steps
    return dict(sorted(found.items(), key=lambda item: model_of(item[1]).startswith("random")))


def steps_of(place: Path) -> dict[str, dict]:
    """Return the results of one measurement, by the step that gave them."""
    files = {step: place / f"{step}.json" for step in STEPS}
    return {step: json.loads(f.read_bytes()) for step, f in files.items() if f.exists()}


def model_of(steps: dict) -> str:
    """Return the model's name: the last part of a folder's path, or of a Hub id."""
    return steps["compare"]["config"]["model_id"].rstrip("/").rpartition("/")[2]


def dtype_of(steps: dict) -> str:
    return steps["build"]["model"]["dtype"]


def alternatives() -> list[dict]:
    """Return what alternatives/measure.py found, a real model first."""
    files = sorted(REPOSITORY.glob("torch_export/results/*/alternatives.json"))
    results = [json.loads(file.read_bytes()) for file in files]
    return sorted(results, key=lambda one: one["config"]["model_id"].startswith("random"))


def overview() -> str:
    """Return a row for each way to serve one real model on one machine, measured in one run."""
    for result in alternatives():
        return alternatives_table(result, linked=True)
    return "Nothing is measured yet: `.ci/alternatives/measure.py` does it."


def alternatives_table(result: dict, linked: bool) -> str:
    lengths = list(result["rows"][0]["prompt_tokens_per_second"])
    header = ["", "dtype", "first token (s)", "decode tokens/s", "GB/s", "of reads"]
    header += [f"prompt of {length}" for length in lengths]
    rows = [alternatives_row(row, lengths, linked) for row in result["rows"]]
    rows.sort(key=lambda row: DTYPES.index(row[1]))
    read = result["read_bytes_per_second"]["mean"] / 1e9
    counts = sorted({row["decode_tokens_per_second"]["n"] for row in result["rows"]}, reverse=True)
    trials = " or ".join(map(counted, counts))
    about = (
        f"{result['config']['model_id']} on {result['environment']['cpu']}, which reads {read:.1f} "
        f"GB/s; {trials}; llama-cpp-python {result['llama_cpp_python']}. "
        "Prompts: tokens per second, by their tokens."
    )
    return f"{about}\n\n{markdown_table(header, rows)}"


def alternatives_row(row: dict, lengths: list[str], linked: bool) -> list[str]:
    folder, _, mode = row["name"].partition(", ")
    name, prompts = row["name"], row["prompt_tokens_per_second"]
    if linked and folder in FOLDERS:
        name = f"[{folder}]({folder}/README.md#results), {mode}"
    return [
        name,
        row["dtype"],
        f"{row['first_token_seconds']['mean']:.2f}",
        f"{row['decode_tokens_per_second']['mean']:.1f}",
        f"{row['decode_bytes_per_second'] / 1e9:.1f}",
        f"{row['read_bandwidth_share']:.0%}",
        *(f"{prompts[length]:.0f}" if prompts else "-" for length in lengths),
    ]


def session() -> str:
    """Return a run of a real model as a terminal showed it."""
    for steps in measurements("torch_export").values():
        if "run" in steps:
            run = steps["run"]
            asked = f'--chat --prompt "{run["config"]["prompt"]}"'
            command = f"$ torch_export/run.sh --model-id {model_of(steps)} {asked}"
            lines = [command, *run["completions"][0].splitlines(), *run_lines(run)]
            return "\n".join(["```text", *lines, "```"])
    return ""


def on_a_gpu() -> str:
    """Return what one run on a GPU took, beside transformers' eager mode on the same kind."""
    for place in sorted(REPOSITORY.glob("torch_export/results/*/"), reverse=True):
        steps = steps_of(place)
        if not (
            steps.keys() >= {"build", "run", "benchmark"} and steps["run"]["environment"]["gpu"]
        ):
            continue
        run, eager = steps["run"], steps["benchmark"]["summary"]["eager"]
        environment, speed = run["environment"], run["decode"]
        files = f"torch_export/results/{place.name}"
        return (
            f"**On an {environment['gpu']}** ([files]({files})) `torch_export` starts "
            f"`{run['config']['model_id']}` ({dtype_of(steps)}, torch "
            f"{environment['torch']}) with its first token after "
            f"{run['metrics']['ttft_cold_start_seconds']:.2f} s and decodes "
            f"{speed['tokens_per_second']:.0f} tokens/s, {speed['bandwidth_share']:.0%} of the "
            f"GPU's bandwidth; {run['output']['new_tokens']} tokens take a process "
            f"{run['metrics']['total_script_seconds']:.2f} s. Eager decodes "
            f"{eager['tail_tokens_per_second']['mean']:.0f} tokens/s there."
        )
    return ""


def folder_text(folder: str) -> str:
    """Return every measurement of a folder: what was measured where, and its tables."""
    parts = [measurement_text(*one) for one in measurements(folder).items()]
    if folder == "torch_export":
        parts += [alternatives_table(one, linked=False) for one in alternatives()[1:]]
    return "\n\n".join(parts or ["Nothing is measured yet: `.ci/measure` does it."])


def measurement_text(name: str, steps: dict) -> str:
    compared = without_zeros(steps["compare"])
    total = compared["summary"]["total"]
    place = compared["environment"].get("gpu") or ON_CPU
    what = ", ".join(dict.fromkeys([dtype_of(steps), name.rpartition("_")[2]]))
    parts = [
        f"**{model_of(steps)}, {what}, {place}**",
        f"{stack(compared['environment'])} Built in {steps['build']['build_seconds']:.0f} s, "
        f"{steps['build']['file']['bytes'] / 1e6:.2f} MB.",
        f"Load against skip, means of {total['load']['n']} fresh processes a side:",
        compare_table(compared),
    ]
    if benchmark := steps.get("benchmark"):
        count = next(iter(benchmark["summary"].values()))["total_script_seconds"]["n"]
        parts += [f"The modes, {counted(count)} each:", benchmark_table(benchmark)]
    if sweep := steps.get("sweep", {}).get("sweep"):
        parts += ["How cost grows with the prompt:", sweep_table(sweep)]
    return "\n\n".join([*parts, f"From `results/{name}/`."])


def without_zeros(document: dict) -> dict:
    """Return a result of compare without the counters that are 0 or unknown on both sides."""

    def idle(name: str, entry: dict) -> bool:
        sides = (entry["load"], entry["skip"])
        return name in COUNTERS and not any(side and side["max"] for side in sides)

    summary = document["summary"]
    kept = {name: entry for name, entry in summary.items() if not idle(name, entry)}
    return document | {"summary": kept}


def counted(count: int) -> str:
    return "1 process" if count == 1 else f"means of {count} processes"


def stack(environment: dict) -> str:
    names = ("torch", "transformers", "triton", "cuda", "driver", "python", "cpu", "commit")
    known = [f"{name} {environment[name]}" for name in names if environment.get(name)]
    return f"{', '.join(known)}. Compiler caches empty, page cache warm."


if __name__ == "__main__":
    main()
