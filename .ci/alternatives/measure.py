"""One model on one machine in one run: what this repository starts, and what else could be taken.

    python -m pip install llama-cpp-python        beside torch and transformers
    python .ci/alternatives/measure.py MODEL MODEL.gguf RESULT.json

MODEL is a checkpoint's folder or a preset; MODEL.gguf the same model in any kind of GGUF
(to_gguf.py makes one of a preset), of which llama.cpp's own conversion makes F32, BF16 and F16. The
artifacts are those that .ci/measure built under the labels float32 and bfloat16. A trial is a fresh
process with empty compiler caches. Rows alternate, those of a dtype side by side: a shared host's
memory is twice as fast in one minute as in another. What compiles at runtime comes once.

Two kinds of trials. Decode: a short prompt, several requests of --new-tokens each: seconds to the
first token, interpreter start included, and tokens per second of decode after request 1. Prefill:
prompts of 16, 128 and 1,000 tokens, each twice, of which the second is taken.
"""

import argparse
import ctypes
import importlib.metadata
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "mega_cache"))

from common.measure.measures import Request, decode_seconds_per_token, quotient, summarize
from common.measure.report import SCHEMA, write_json
from common.measure.trials import run_trial
from common.model.presets import CONFIGS, preset_folder

REPOSITORY = Path(__file__).resolve().parents[2]
PROMPT = "The capital of France is"
LENGTHS = (16, 128, 1000)
# kind of file: llama.cpp's number for it (its enum llama_ftype)
KINDS = {"float32": ("F32", 0), "bfloat16": ("BF16", 32), "float16": ("F16", 1)}


@dataclass
class Row:
    """One way to serve the model, and the trials that it had."""

    name: str
    dtype: str
    command: list[str]
    requests: int = 3  # in a process
    compiles: bool = False  # at runtime: prefill would measure the compiler
    trials: list[dict] = field(default_factory=list)
    prompts: dict | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("gguf", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2, help="decode trials of each row")
    parser.add_argument("--loads-only", action="store_true", help="leave out what compiles")
    asked = parser.parse_args()
    folder = preset_folder(asked.model) if asked.model in CONFIGS else Path(asked.model)
    with tempfile.TemporaryDirectory(prefix="llama-alternatives-") as place:
        rows, bos = own_rows(asked.model, folder), begins_with_bos(folder)
        for dtype, (kind, number) in KINDS.items():
            converted = Path(place, f"{kind}.gguf")
            convert(asked.gguf, number, converted)
            command = [script(".ci/alternatives/trial.py"), f"--model-id={converted}"]
            command += ["--engine=llama.cpp", "--bos" if bos else "--no-bos"]
            rows.append(Row("llama.cpp", dtype, command))
        rows.sort(key=lambda row: (row.compiles, list(KINDS).index(row.dtype)))
        rows = [row for row in rows if not (row.compiles and asked.loads_only)]
        lines = Path(place, "prompts.txt")
        twice = [text for text in prompts_of(folder) for _ in range(2)]
        lines.write_text("".join(f"{text}\n" for text in twice))
        document = measure(rows, lines, asked)
    write_json(document, asked.result)


def script(path: str) -> str:
    return str(REPOSITORY / path)


def own_rows(name: str, folder: Path) -> list[Row]:
    """Return the rows of this repository and of transformers."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        label = f"artifacts/measure_{label_of(name)}_{dtype}"
        model = [f"--model-id={name}", f"--dtype={dtype}", "--device=cpu"]
        export = [script("torch_export/run_llama_aotinductor.py"), *model]
        export += [f"--package-path={script(f'torch_export/{label}.pt2')}"]
        mega = [script("mega_cache/run_llama_with_portable_cache.py"), *model]
        mega += [f"--cache-path={script(f'mega_cache/{label}.bin')}"]
        rows.append(Row("torch_export, load", dtype, export))
        rows.append(Row("mega_cache, load", dtype, [*mega, "--load-artifacts"]))
        rows.append(Row("transformers, eager", dtype, [*export, "--eager"]))
        if dtype == "float32":
            skip, trial = "--no-load-artifacts", script(".ci/alternatives/trial.py")
            rows.append(Row("torch_export, skip", dtype, [*export, skip], 2, True))
            rows.append(Row("mega_cache, skip", dtype, [*mega, skip], 2, True))
            compiled = [trial, "--engine=torch.compile", f"--model-id={folder}"]
            rows.append(Row("transformers, torch.compile", dtype, compiled, 2, True))
    return rows


def label_of(model: str) -> str:
    """Return a model's name in file names, as .ci/measure has it."""
    return Path(model).name.replace(":", "-")


def convert(gguf: Path, kind: int, target: Path) -> None:
    """Write the model in another kind, by llama.cpp's own quantise call."""
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda *line: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p())
    choices = llama_cpp.llama_model_quantize_default_params()
    choices.ftype, choices.allow_requantize, choices.nthread = kind, True, 2
    files = (str(gguf).encode(), str(target).encode())
    if llama_cpp.llama_model_quantize(*files, ctypes.byref(choices)):
        sys.exit(f"llama.cpp cannot convert {gguf}")


def begins_with_bos(folder: Path) -> bool:
    """Say whether transformers begins a prompt with BOS, which a GGUF file may have otherwise."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer("text").input_ids[0] == tokenizer.bos_token_id


def prompts_of(folder: Path) -> list[str]:
    """Return a text of each length in tokens, no line break in it."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = " ".join(f"The capital of country {number} is a large city." for number in range(200))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    texts = [tokenizer.decode(ids[:length]) for length in LENGTHS]
    counts = [len(tokenizer.encode(one, add_special_tokens=False).ids) for one in texts]
    assert counts == list(LENGTHS), counts
    return texts


def measure(rows: list[Row], lines: Path, asked: argparse.Namespace) -> dict:
    """Return the result: of each row what the table shows, summarised over its trials."""
    floor = [
        script("mega_cache/common/measure/floor.py"),
        f"--model-id={asked.model}",
        "--device=cpu",
    ]
    floors = [run(floor)]
    for turn in range(asked.rounds):
        due = [row for row in rows if not (turn and row.compiles)]
        for row in due[:: -1 if turn % 2 else 1]:
            print(f"round {turn + 1}: {row.name}, {row.dtype}", file=sys.stderr, flush=True)
            words = [f"--prompt={PROMPT}", f"--num-requests={row.requests}", "--ignore-eos"]
            row.trials.append(run([*row.command, *words, f"--max-new-tokens={asked.new_tokens}"]))
        floors.append(run(floor))
    for row in rows:
        if not row.compiles:
            print(f"prompts: {row.name}, {row.dtype}", file=sys.stderr, flush=True)
            words = [f"--prompts-file={lines}", "--max-new-tokens=2", "--ignore-eos"]
            row.prompts = run([*row.command, *words])
    expected = next(row for row in rows if "eager" in row.name).trials[0]
    read = summarize(one["bandwidth"]["read_bytes_per_second"] for one in floors)
    # both 16-bit types cost the same
    loads = [row for row in rows if row.name == "torch_export, load"]
    needed = {row.dtype: row.trials[0]["decode"]["bytes_per_token"] for row in loads}
    needed["float16"] = needed["bfloat16"]
    return {
        "schema": SCHEMA,
        "kind": "alternatives",
        "environment": expected["environment"],
        "llama_cpp_python": importlib.metadata.version("llama-cpp-python"),
        "config": {
            "model_id": Path(asked.model).name,
            "prompt": PROMPT,
            "max_new_tokens": asked.new_tokens,
        },
        "read_bytes_per_second": read,
        "rows": [summary(row, needed[row.dtype], read["mean"], expected) for row in rows],
    }


def run(command: list[str]) -> dict:
    """Return the result of a trial, with the wall time of its process; end when it fails."""
    outcome = run_trial(command)
    if not outcome.ok:
        sys.exit(f"{' '.join(command)}: {outcome.error}")
    return outcome.document | {"wall_seconds": outcome.wall_seconds}


def summary(row: Row, bytes_per_token: int, read: float, expected: dict) -> dict:
    """Return mean, min and max of what the row's trials took, and whose tokens they gave."""
    rates = [quotient(1, decode_seconds_per_token(requests_of(one))) for one in row.trials]
    ids, theirs = (one["output"]["token_ids"] for one in (row.trials[0], expected))
    prefill = None
    if row.prompts:
        seconds = [one.ttft_seconds for one in requests_of(row.prompts)[1::2]]
        prefill = {n: n / took for n, took in zip(LENGTHS, seconds, strict=True)}
    decode = summarize(rates)
    return {
        "name": row.name,
        "dtype": row.dtype,
        "requests": row.requests,
        "first_token_seconds": summarize(
            one["metrics"]["ttft_cold_start_seconds"] for one in row.trials
        ),
        "wall_seconds": summarize(one["wall_seconds"] for one in row.trials),
        "decode_tokens_per_second": decode,
        "decode_bytes_per_second": decode["mean"] * bytes_per_token,
        "read_bandwidth_share": decode["mean"] * bytes_per_token / read,
        "prompt_tokens_per_second": prefill,
        # beginning with the first; a near tie in another dtype or kernel ends it
        "tokens_as_eager_float32": len(os.path.commonprefix([ids, theirs])),
    }


def requests_of(document: dict) -> list[Request]:
    return [Request(**one) for one in document["requests"]]


if __name__ == "__main__":
    main()
