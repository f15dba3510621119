"""Results in the READMEs: generated from the newest committed files in results/, never typed.

    python common/readme_tables.py           fill what is between the markers
    python common/readme_tables.py --check   exit status 1 when a README says something else

Fills this folder's README.md and, where this folder lies beside others of its kind, theirs and the
repository's. The text stands between `<!-- results -->` and `<!-- /results -->`.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a script of its own

from common.equivalence import equivalence_table
from common.errors import ScriptError, UsageError, run_script
from common.measuring import sizes_table
from common.tables import benchmark_table, markdown_table, number, sweep_table

BEGIN, END = "<!-- results -->", "<!-- /results -->"
FOLDER = Path(__file__).resolve().parent.parent
PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_bytes())
REFERENCE = {"torch": "2.9.1", "transformers": "4.57.5"}
NO_GPU = "No GPU measurement of ours is recorded yet: `{}measure.sh` makes one."
CPU_LABEL = "{model} on {cores} CPU: shows the mechanism, not the size of the gain on a GPU"


def main(argv: Sequence[str]) -> None:
    unknown = set(argv) - {"--check", "--debug"}
    if unknown:
        raise UsageError(f"{sorted(unknown)[0]}: the only flag is --check")
    stale = [readme for readme, text in expected(FOLDER).items() if readme.read_text() != text]
    if "--check" in argv and stale:
        names = ", ".join(str(readme) for readme in stale)
        raise ScriptError(f"{names} differ from results/: mend it with `python {__file__}`")
    for readme, text in expected(FOLDER).items() if "--check" not in argv else ():
        if readme in stale:
            readme.write_text(text)
            print(f"filled: {readme}")


def expected(folder: Path) -> dict[Path, str]:
    """Return what each README with markers should say, whole."""
    repository = folder.parent
    kin = sorted(path.parents[1] for path in repository.glob("*/common/readme_tables.py"))
    folders = kin if (repository / "README.md").is_file() else [folder]
    texts = {one / "README.md": folder_text(one) for one in folders}
    if folders is kin:
        parts = [f"### {one.name}\n\n{folder_text(one, f'{one.name}/')}" for one in kin]
        texts[repository / "README.md"] = "\n\n".join(parts)
    return {
        readme: filled(readme.read_text(), text)
        for readme, text in texts.items()
        if readme.is_file() and BEGIN in readme.read_text()
    }


def filled(readme: str, text: str) -> str:
    """Return `readme` with `text` between its markers."""
    before, _, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ScriptError(f"a README has {BEGIN} without {END}: put it back")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def folder_text(folder: Path, prefix: str = "") -> str:
    """Return the newest results of a folder: on a GPU, of the sizes, on a CPU."""
    results = load_results(folder)
    on_gpu = newest(results, "measurement", on_gpu=True)
    parts = [measurement_text(name, on_gpu[name], folder, prefix) for name in on_gpu]
    parts = parts or [NO_GPU.format(prefix or "./")]
    for document in newest(results, "sizes", on_gpu=True).values():
        heading = f"**{labelled('Sizes', document)}**\n\n{stack(document)}"
        parts.append(f"{heading}\n\n{sizes_table(document['sizes'])}")
    on_cpu = newest(results, "measurement", on_gpu=False)
    parts += [measurement_text(name, on_cpu[name], folder, prefix) for name in on_cpu]
    return "\n\n".join(parts)


def load_results(folder: Path) -> dict[str, dict]:
    """Return the result files of a folder by name."""
    files = sorted((folder / "results").glob("*.json"))
    return {file.name: json.loads(file.read_bytes()) for file in files}


def newest(results: dict[str, dict], kind: str, on_gpu: bool) -> dict[str, dict]:
    """Return the newest result of a kind by name, one for each label."""
    fitting = {
        name: document
        for name, document in results.items()
        if document.get("kind") == kind and bool(document["environment"].get("gpu")) == on_gpu
    }
    by_date = sorted(fitting, key=lambda name: (fitting[name]["finished"], name))
    of_label = {fitting[name].get("label", ""): name for name in by_date}
    return {of_label[label]: fitting[of_label[label]] for label in sorted(of_label)}


def measurement_text(name: str, document: dict, folder: Path, prefix: str) -> str:
    """Return one measurement: what was measured where, every table, and the pictures.

    In the repository's README, where `prefix` is the folder, it is cut to what one decides by.
    """
    parts = [f"**{title(document)}**", stack(document)]
    if document.get("compare"):
        trials = document["compare"]["summary"]["total"]["load"]
        count = f"{trials['n']} fresh processes a side" if trials else "fresh processes"
        parts += [f"Load against skip, means of {count}:", compared_table(document)]
        if document["environment"].get("gpu"):
            parts.append(f"Beside it: {PUBLISHED['source']}.")
    if document.get("benchmark"):
        shown = brief_modes_table if prefix else benchmark_table
        parts += ["The modes, means over fresh processes:", shown(document["benchmark"])]
        parts.append(agreement(document["benchmark"]))
    if document.get("sweep") and not prefix:
        parts += ["How cost grows with the prompt:", sweep_table(document["sweep"])]
    if document.get("equivalence") and not prefix:
        parts += ["The same model, loaded and eager:", equivalence_table(document["equivalence"])]
    for ending, what in (("", "cold start and latency"), ("_sweep", "growth with the prompt")):
        picture = f"results/{Path(name).stem}{ending}.png"
        if (folder / picture).is_file() and not (prefix and ending):
            parts.append(f"![{what}]({prefix}{picture})")
    source = f"From [`{prefix}results/{name}`]({prefix}results/{name})."
    if document["missing"]:
        source += f" Not measured: {', '.join(document['missing'])}."
    if prefix:
        source += f" Every measure and the sweep: [{prefix}README.md]({prefix}README.md)."
    return "\n\n".join([*parts, source])


def labelled(text: str, document: dict) -> str:
    return f"{text} ({document['label']})" if document.get("label") else text


def title(document: dict) -> str:
    found, model = document["environment"], labelled(document["model_id"], document)
    if found.get("gpu"):
        return f"{model} on one {found['gpu']}"
    count = (found.get("cpu") or "").rpartition(" x")[2]
    cores = f"a {count}-core" if count.isdigit() else "a"
    return CPU_LABEL.format(model=model, cores=cores)


def stack(document: dict) -> str:
    """Return date and environment in one line; another stack than the reference one says so."""
    found = document["environment"]
    names = ("torch", "transformers", "triton", "cuda", "driver", "python", "cpu", "commit")
    known = [f"{name} {found[name]}" for name in names if found.get(name)]
    text = f"{document['finished'][:10]}; {', '.join(known)}; page cache {document['page_cache']}."
    other = [
        f"{name} {version}"
        for name, version in REFERENCE.items()
        if (found.get(name) or "").partition("+")[0] != version
    ]
    if other:
        text += f" **Not the reference stack**, which has {' and '.join(other)}."
    return text


def compared_table(document: dict) -> str:
    """Return load, skip and benefit; for a GPU with the published figures beside them."""
    summary = document["compare"]["summary"]
    beside = PUBLISHED.get(document["approach"], {}) if document["environment"].get("gpu") else {}
    header = ["", "load", "skip", "benefit"]
    rows = []
    for name in ("setup", "generation", "total", "unique_graphs", "async_compile_miss"):
        unit = " (s)" if "benefit" in summary[name] else ""
        row = [name + unit, *_three(summary[name])]
        rows.append(row + (_three(beside[name]) if beside else []))
    kernels = ["kernels_compiled", *_three(summary["kernels_compiled"])]
    rows.append(kernels + ["-", "-", ""] if beside else kernels)
    if beside:
        header += ["published load", "published skip", "published benefit"]
    return markdown_table(header, rows)


def brief_modes_table(benchmark: dict) -> str:
    """Return a row per mode with the measures that one chooses an approach by."""
    columns = (
        ("ttft_cold (s)", "ttft_cold_start_seconds"),
        ("x floor", "ttft_cold_over_floor"),
        ("first request (s)", "first_request_seconds"),
        ("tail mean (s)", "tail_mean_seconds"),
        ("tail tokens/s", "tail_tokens_per_second"),
        ("total (s)", "total_script_seconds"),
    )
    rows = [
        [mode, *(number(summary.get(key), 2) for _, key in columns)]
        for mode, summary in benchmark["summary"].items()
    ]
    return markdown_table(["mode", *(label for label, _ in columns)], rows)


def agreement(benchmark: dict) -> str:
    same = benchmark["outputs_identical"]
    if same is None:
        return "Too few modes with tokens to compare them."
    return "All modes gave the same tokens." if same else f"Tokens: {benchmark['difference']}."


def _three(entry: dict) -> list[str]:
    """Return load, skip and benefit; of counters, which have none, it is empty."""
    pair = [_mean(entry["load"]), _mean(entry["skip"])]
    if "benefit" not in entry:
        return [*("-" if value is None else f"{value:g}" for value in pair), ""]
    gain = entry["benefit"]
    return [*(number(value, 2) for value in pair), "-" if gain is None else f"{gain:.2f}x"]


def _mean(value: dict | float | None) -> float | None:
    return value["mean"] if isinstance(value, dict) else value


if __name__ == "__main__":
    run_script(main)
