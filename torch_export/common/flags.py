"""The flags that scripts of both folders share, grouped as they appear in `--help`."""

from dataclasses import dataclass
from pathlib import Path

from common.cli import (
    flag,
    names_from,
    non_negative_float,
    non_negative_int,
    positive_int,
    positive_ints,
    probability,
)

DEVICES = ("auto", "cuda", "cpu")
DTYPES = ("auto", "bfloat16", "float16", "float32")
FLOOR = "floor"
MODES = ("compile_preload", "compile_no_preload", "eager", FLOOR)


@dataclass(frozen=True)
class SharedFlags:
    """every script"""

    model_id: str = flag(
        "meta-llama/Llama-3.2-3B-Instruct",
        "Hub id, checkpoint folder, or a preset that needs no download: "
        "random:tiny, random:1b, random:3b, random:8b",
        often=True,
    )
    device: str = flag("auto", "where to run; auto is CUDA when there is one", choices=DEVICES)
    dtype: str = flag(
        "auto", "of weights; auto is bfloat16 on CUDA and float32 on CPU", choices=DTYPES
    )
    seed: int = flag(0, "of sampling and of synthetic prompts", parse=non_negative_int)
    json: Path | None = flag(None, "file to write the whole result to, as JSON", often=True)
    verbose: bool = flag(False, "print every measure", often=True)
    quiet: bool = flag(False, "no progress on stderr; results and warnings only")
    debug: bool = flag(False, "add the traceback to an error")


@dataclass(frozen=True)
class PromptFlags:
    """prompt and generation"""

    prompt: str = flag(
        "Write a short explanation of portable torch.compile caches.",
        "text, or - to read it from stdin",
        often=True,
    )
    prompts_file: Path | None = flag(
        None, "file with one prompt a line, each a request of this process"
    )
    chat: bool = flag(False, "put the prompt through the tokenizer's chat template")
    prompt_length: int = flag(
        0,
        "tokens of a synthetic prompt to use instead of the text; 0 is off",
        parse=non_negative_int,
    )
    max_new_tokens: int = flag(128, "tokens to generate at most", parse=positive_int, often=True)
    ignore_eos: bool = flag(False, "go on to --max-new-tokens past an end-of-sequence token")
    num_requests: int = flag(1, "requests to serve one after another", parse=positive_int)
    show_completions: bool = flag(
        False, "print the text of every request (compare, benchmark: of every trial)"
    )

    def __post_init__(self):
        if not (self.prompt or self.prompt_length or self.prompts_file):
            raise ValueError("--prompt is empty: give some text, or --prompt-length N")


@dataclass(frozen=True)
class SamplingFlags:
    """sampling"""

    temperature: float = flag(0.0, "of sampling; 0 is greedy decoding", parse=non_negative_float)
    top_k: int = flag(0, "sample from the K likeliest tokens; 0 is off", parse=non_negative_int)
    top_p: float = flag(
        1.0, "sample from the likeliest tokens that hold this share; 1 is off", parse=probability
    )

    def __post_init__(self):
        if not self.temperature and (self.top_k or self.top_p < 1.0):
            raise ValueError("--top-k and --top-p choose among samples: give --temperature too")


@dataclass(frozen=True)
class CompareFlags:
    """compare: load against skip, in isolated processes"""

    compare_load_vs_skip: bool = flag(
        False, "run this command with and without the artifact in fresh processes and compare"
    )
    compare_runs: int = flag(2, "processes per side", parse=positive_int)


@dataclass(frozen=True)
class ComparisonFlags:
    """results of compare and benchmark"""

    plot: Path | None = flag(None, "PNG or SVG file to draw the result into (needs matplotlib)")
    tokens_may_differ: bool = flag(
        False,
        "report different token ids between modes without failing: in bfloat16 two kernels "
        "may break a near tie differently",
    )


@dataclass(frozen=True)
class BenchmarkFlags:
    """benchmark"""

    modes: tuple[str, ...] = flag(MODES[:3], "to measure", parse=names_from(*MODES), often=True)
    repeats: int = flag(2, "processes per mode", parse=positive_int, often=True)
    sweep_prompt_lengths: tuple[int, ...] = flag(
        (),
        "also measure each mode at these prompt lengths in tokens, like 8,128,512",
        parse=positive_ints,
    )
