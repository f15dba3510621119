"""The flags that belong to this folder, and how its scripts group them."""

from dataclasses import dataclass, fields
from pathlib import Path

from common.artifacts import ArtifactPair, TrustFlags
from common.cli import (
    PromptFlags,
    SamplingFlags,
    SharedFlags,
    flag,
    non_negative_int,
    positive_int,
    positive_ints,
)
from common.store import FetchFlags, PublishFlags

FOLDER = Path(__file__).resolve().parent.parent
APPROACH = "mega_cache"
RUN_SCRIPT = FOLDER / "run_llama_with_portable_cache.py"

DYNAMIC = {"auto": None, "true": True, "false": False}  # as torch.compile wants it
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
CACHE_IMPLEMENTATIONS = ("static", "offloaded_static")


@dataclass(frozen=True)
class CacheFileFlags:
    """artifact"""

    cache_path: Path = flag(
        FOLDER / "artifacts/llama3b_torchcompile_cache.bin",
        "file of the portable cache",
        often=True,
    )
    metadata_path: Path | None = flag(
        None, "its metadata; without it NAME_meta.json beside the artifact NAME.bin"
    )

    def pair(self) -> ArtifactPair:
        beside = self.cache_path.with_name(self.cache_path.stem + "_meta.json")
        return ArtifactPair(self.cache_path, self.metadata_path or beside)


@dataclass(frozen=True)
class CompileFlags:
    """compilation: what shapes the graphs; a run takes from the artifact what it is not told"""

    prefill_lengths: tuple[int, ...] = flag(
        (128, 256, 512, 1024),
        "prompt lengths in tokens: for each one a KV cache of so many slots and --decode-length "
        "more is warmed up",
        parse=positive_ints,
    )
    decode_length: int = flag(
        128,
        "slots (tokens) that a KV cache has beyond its prefill length; as many tokens are "
        "generated to warm it up",
        parse=positive_int,
    )
    max_cache_len: int = flag(
        2048, "slots (tokens) of one more KV cache, for all other prompts; 0 is none",
        parse=non_negative_int,
    )  # fmt: skip
    cache_implementation: str = flag(
        "static", "KV cache of `generate`; only static ones compile", choices=CACHE_IMPLEMENTATIONS
    )
    compile_dynamic: str = flag("auto", "torch.compile's `dynamic`", choices=tuple(DYNAMIC))
    compile_mode: str = flag("max-autotune", "torch.compile's `mode`", choices=COMPILE_MODES)
    fullgraph: bool = flag(False, "fail on a graph break instead of compiling around it")

    def __post_init__(self):
        if self.max_cache_len == 1:
            raise ValueError("--max-cache-len 1 leaves no room for a token after the prompt")

    def cache_lengths(self) -> dict[int, int]:
        """Return {slots of a KV cache: prompt length in tokens to warm it up with}, ascending."""
        lengths = {prefill + self.decode_length: prefill for prefill in self.prefill_lengths}
        if self.max_cache_len:
            shortest = min(self.prefill_lengths)
            lengths.setdefault(self.max_cache_len, min(shortest, self.max_cache_len - 1))
        return dict(sorted(lengths.items()))


# what makes a trial of the run script one of its mode, after the user's own words
MODE_WORDS = {
    "load": ["--no-eager", "--load-artifacts"],
    "skip": ["--no-eager", "--no-load-artifacts", "--no-precompile", "--no-require-hit"],
    "eager": ["--eager", "--no-load-artifacts", "--no-precompile", "--no-require-hit"],
}

# a run's own defaults: what it is not told comes from the artifact
UNTOLD = dict.fromkeys((field.name for field in fields(CompileFlags)), None)


@dataclass(frozen=True)
class BuildFlags:
    """build"""

    precompile: bool = flag(
        True, "also compile each decode step ahead of time, so that a run traces nothing"
    )
    verify: bool = flag(True, "load the artifact in fresh processes before it is published")


@dataclass(frozen=True)
class LoadFlags:
    """loading"""

    load_artifacts: bool | None = flag(
        None,
        "must load the artifact, or must not; without either: load it if it is there and fits, "
        "else warn and compile",
        often=True,
    )
    eager: bool = flag(False, "do not compile at all: generate(..., disable_compile=True)")
    bucket_pad: bool = flag(
        False, "pad the prompt on the left to the nearest prefill length; no hit needs it"
    )
    prefill_buckets: tuple[int, ...] = flag(
        (), "lengths in tokens to pad to instead of the artifact's", parse=positive_ints
    )
    precompile: bool | None = flag(
        None,
        "must use the decode step that was compiled ahead of time, or must not; without either: "
        "use it if the artifact has one that fits, else warn and trace",
    )
    require_hit: bool = flag(False, "end with status 4 when anything had to be compiled or tuned")

    def __post_init__(self):
        if self.eager and self.load_artifacts:
            raise ValueError("--eager compiles nothing, so there is nothing to --load-artifacts")
        if self.eager and self.require_hit:
            raise ValueError("--eager compiles nothing, so --require-hit has nothing to check")
        if self.precompile and (self.eager or self.load_artifacts is False):
            raise ValueError("--precompile takes its decode step from the artifact: load it")

    @property
    def must_load(self) -> bool:
        """Whether a run without the artifact is an error."""
        return bool(self.load_artifacts or self.require_hit)


@dataclass(frozen=True)
class BuildSettings:
    """Every flag of a build, by group."""

    shared: SharedFlags
    compilation: CompileFlags
    build: BuildFlags
    files: CacheFileFlags
    store: PublishFlags


@dataclass(frozen=True)
class RunSettings:
    """Every flag of one run, by group."""

    shared: SharedFlags
    prompt: PromptFlags
    sampling: SamplingFlags
    loading: LoadFlags
    compilation: CompileFlags  # None in a field: not told
    files: CacheFileFlags
    store: FetchFlags
    trust: TrustFlags
