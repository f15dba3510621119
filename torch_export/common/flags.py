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
)
from common.devices import DEVICES, DTYPES

MODES = ("compile_preload", "compile_no_preload", "eager", "floor")
DEFAULT_MODES = MODES[:3]


@dataclass(frozen=True)
class SharedFlags:
    """every script"""

    model_id: str = flag(
        "meta-llama/Llama-3.2-3B-Instruct",
        "Hub id, checkpoint folder, or a preset that needs no download: "
        "random:tiny, random:1b, random:3b, random:8b",
    )
    device: str = flag("auto", "where to run; auto is CUDA when there is one", choices=DEVICES)
    dtype: str = flag(
        "auto", "of weights; auto is bfloat16 on CUDA and float32 on CPU", choices=DTYPES
    )
    seed: int = flag(0, "of sampling and of synthetic prompts", parse=non_negative_int)
    json: Path | None = flag(None, "file to write the whole result to, as JSON")
    quiet: bool = flag(False, "no progress on stderr; results and warnings only")
    debug: bool = flag(False, "add the traceback to an error")


@dataclass(frozen=True)
class PromptFlags:
    """prompt and generation"""

    prompt: str = flag("Write a short explanation of portable torch.compile caches.", "text")
    prompt_length: int = flag(
        0,
        "tokens of a synthetic prompt to use instead of the text; 0 is off",
        parse=non_negative_int,
    )
    max_new_tokens: int = flag(128, "tokens to generate at most", parse=positive_int)
    ignore_eos: bool = flag(False, "go on to --max-new-tokens past an end-of-sequence token")
    num_requests: int = flag(1, "requests to serve one after another", parse=positive_int)
    show_completions: bool = flag(
        False, "print the text of every request (compare, benchmark: of every trial)"
    )

    def __post_init__(self):
        if not self.prompt and not self.prompt_length:
            raise ValueError("--prompt is empty: give some text, or --prompt-length N")


@dataclass(frozen=True)
class SamplingFlags:
    """sampling"""

    temperature: float = flag(0.0, "of sampling; 0 is greedy decoding", parse=non_negative_float)


@dataclass(frozen=True)
class CompareFlags:
    """compare: load against skip, in isolated processes"""

    compare_load_vs_skip: bool = flag(
        False, "run this command with and without the artifact in fresh processes and compare"
    )
    compare_runs: int = flag(2, "processes per side", parse=positive_int)


@dataclass(frozen=True)
class OutcomeFlags:
    """what makes a comparison fail"""

    tokens_may_differ: bool = flag(
        False,
        "report different token ids between modes without failing: in bfloat16 two kernels "
        "may break a near tie differently",
    )


@dataclass(frozen=True)
class BenchmarkFlags:
    """benchmark"""

    modes: tuple[str, ...] = flag(DEFAULT_MODES, "to measure", parse=names_from(*MODES))
    repeats: int = flag(2, "processes per mode", parse=positive_int)


@dataclass(frozen=True)
class PlotFlags:
    """pictures"""

    plot: Path | None = flag(None, "PNG or SVG file to draw the result into (needs matplotlib)")


@dataclass(frozen=True)
class SweepFlags:
    """sweep"""

    sweep_prompt_lengths: tuple[int, ...] = flag(
        (),
        "prompt lengths in tokens to measure each mode at, like 8,128,512",
        parse=positive_ints,
    )
