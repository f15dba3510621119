"""The flags that belong to this folder."""

from dataclasses import dataclass
from pathlib import Path

from common.artifacts import ArtifactPair
from common.cli import flag, non_negative_int, positive_int, positive_ints

FOLDER = Path(__file__).resolve().parent.parent
APPROACH = "mega_cache"
CHECKPOINTS = FOLDER / "artifacts/checkpoints"  # where presets are written

_DYNAMIC = ("auto", "true", "false")
_COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class CacheFileFlags:
    """artifact"""

    cache_path: Path = flag(
        FOLDER / "artifacts/llama3b_torchcompile_cache.bin", "file of the portable cache"
    )
    metadata_path: Path | None = flag(
        None, "its metadata; without it NAME_meta.json beside the artifact NAME.bin"
    )

    def pair(self) -> ArtifactPair:
        beside = self.cache_path.with_name(self.cache_path.stem + "_meta.json")
        return ArtifactPair(self.cache_path, self.metadata_path or beside)


@dataclass(frozen=True)
class CompileFlags:
    """compilation: what shapes the graphs, and so must be the same at build and at run"""

    max_cache_len: int = flag(
        0,
        "slots (tokens) of one KV cache for every prompt; 0 makes a cache per prefill length",
        parse=non_negative_int,
    )
    decode_length: int = flag(
        128,
        "tokens to generate while warming up; without --max-cache-len also "
        "the slots that a cache has beyond its prefill length",
        parse=positive_int,
    )
    cache_implementation: str = flag(
        "static",
        "KV cache of `generate`; only static ones compile",
        choices=("static", "offloaded_static"),
    )
    compile_dynamic: str = flag("auto", "torch.compile's `dynamic`", choices=_DYNAMIC)
    compile_mode: str = flag("max-autotune", "torch.compile's `mode`", choices=_COMPILE_MODES)
    fullgraph: bool = flag(False, "fail on a graph break instead of compiling around it")


@dataclass(frozen=True)
class BuildFlags:
    """warm-up"""

    prefill_lengths: tuple[int, ...] = flag(
        (128, 256, 512, 1024), "prompt lengths in tokens to warm up with", parse=positive_ints
    )
    precompile: bool = flag(
        False,
        "also compile the decode step ahead of time, so that a run traces nothing",
    )


@dataclass(frozen=True)
class LoadFlags:
    """loading"""

    load_artifacts: bool | None = flag(
        None,
        "must load the artifact, or must not; without either: load it if it is there and fits, "
        "else warn and compile",
    )
    eager: bool = flag(False, "do not compile at all: generate(..., disable_compile=True)")
    bucket_pad: bool = flag(
        False,
        "pad the prompt on the left to the nearest warmed length "
        "(with --max-cache-len every length fits, and nothing is padded)",
    )
    prefill_buckets: tuple[int, ...] = flag(
        (), "lengths in tokens to pad to instead of the metadata's", parse=positive_ints
    )
    precompile: bool | None = flag(
        None,
        "must use the decode step that was compiled ahead of time, or must not; without either: "
        "use it if the artifact has one that fits, else warn and trace",
    )
    require_hit: bool = flag(False, "end with status 4 when anything had to be compiled")

    def __post_init__(self):
        if self.eager and self.load_artifacts:
            raise ValueError("--eager compiles nothing, so there is nothing to --load-artifacts")
        if self.eager and self.require_hit:
            raise ValueError("--eager compiles nothing, so --require-hit has nothing to check")
        if self.precompile and (self.eager or self.load_artifacts is False):
            raise ValueError("--precompile takes its decode step from the artifact: load it")
