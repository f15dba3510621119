"""The flags that belong to this folder, and how its scripts group them."""

from pathlib import Path
from typing import NamedTuple

from common import cli
from common.artifact.disk import ArtifactPair, TrustFlags
from common.cli import Flags, flag, non_negative_int, positive_int, positive_ints

FOLDER = Path(__file__).resolve().parent.parent
APPROACH = "mega_cache"
RUN_SCRIPT = FOLDER / "run_llama_with_portable_cache.py"

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


class CacheFileFlags(Flags):
    """artifact"""

    cache_path: Path = flag(
        FOLDER / "artifacts/llama3b_torchcompile_cache.bin", "the portable cache", often=True
    )
    metadata_path: Path | None = flag(
        None, "its metadata; without it NAME_meta.json beside the artifact NAME.bin"
    )

    def pair(self) -> ArtifactPair:
        beside = self.cache_path.with_name(self.cache_path.stem + "_meta.json")
        return ArtifactPair(self.cache_path, self.metadata_path or beside)


class CompileFlags(Flags):
    """compilation: what shapes the graphs; a run takes from the artifact what it is not told"""

    prefill_lengths: tuple[int, ...] = flag(
        (128, 256, 512, 1024),
        "prompt lengths in tokens: each one warms a KV cache with --decode-length slots more",
        parse=positive_ints,
    )
    decode_length: int = flag(
        128, "slots (tokens) of a KV cache beyond its prefill length", parse=positive_int
    )
    max_cache_len: int = flag(
        2048, "slots (tokens) of a KV cache for all other prompts; 0: none", parse=non_negative_int
    )
    cache_implementation: str = flag(
        "static", "KV cache of `generate`: the one that compiles", choices=("static",)
    )
    compile_dynamic: str = flag(
        "auto", "true: a graph for KV caches of any length; false: one each; auto: true if several",
        choices=("auto", "true", "false"),
    )  # fmt: skip
    compile_mode: str = flag("max-autotune", "torch.compile's `mode`", choices=COMPILE_MODES)
    fullgraph: bool = flag(False, "fail on a graph break instead of compiling around it")

    def cache_lengths(self) -> dict[int, int]:
        """Return {slots of a KV cache: prompt length in tokens to warm it up with}, ascending."""
        lengths = {prefill + self.decode_length: prefill for prefill in self.prefill_lengths}
        if self.max_cache_len:
            shortest = min(self.prefill_lengths)
            lengths.setdefault(self.max_cache_len, min(shortest, self.max_cache_len - 1))
        return dict(sorted(lengths.items()))

    def dynamic(self) -> bool:
        """Return torch.compile's `dynamic`: whether one graph serves KV caches of any length."""
        several = len(self.cache_lengths()) > 1
        return several if self.compile_dynamic == "auto" else self.compile_dynamic == "true"

    def slots_for(self, tokens: int) -> int:
        """Return the slots of the shortest warmed KV cache that holds `tokens`, else `tokens`."""
        return min((slots for slots in self.cache_lengths() if slots >= tokens), default=tokens)


# what makes a trial of the run script one of its mode, after the user's own words
MODE_WORDS = {
    "load": ["--no-eager", "--load-artifacts"],
    "skip": ["--no-eager", "--no-load-artifacts", "--no-precompile", "--no-require-hit"],
    "eager": ["--eager", "--no-load-artifacts", "--no-precompile", "--no-require-hit"],
}

# a run's own defaults: what it is not told comes from the artifact
UNTOLD = dict.fromkeys(vars(CompileFlags()))


class BuildFlags(Flags):
    """build"""

    precompile: bool = flag(
        True, "also compile the decode step ahead of time, so that a run traces nothing"
    )
    verify: bool = flag(True, "load the artifact in fresh processes before it is published")


class LoadFlags(Flags):
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
    require_hit: bool = flag(
        False,
        "end with status 4 when anything was compiled, tuned or traced; with --no-precompile, "
        "where every start traces, when anything was compiled or tuned",
    )

    def check(self) -> None:
        if self.eager and (self.load_artifacts or self.require_hit):
            raise ValueError("--eager compiles nothing: nothing to load, nothing to check")
        if self.precompile and self.mode != "load":
            raise ValueError("--precompile takes its decode step from the artifact: load it")

    @property
    def mode(self) -> str:
        if self.eager:
            return "eager"
        return "skip" if self.load_artifacts is False else "load"

    @property
    def must_load(self) -> bool:
        return bool(self.load_artifacts or self.require_hit or self.precompile)

    def buckets(self, flags: CompileFlags) -> tuple[int, ...]:
        """Return the lengths in tokens that prompts are padded to; empty: they aren't."""
        return (self.prefill_buckets or flags.prefill_lengths) if self.bucket_pad else ()


class Wanted(NamedTuple):
    """What a start asks for; as it stands here: the artifact must load, its decode step may."""

    mode: str = "load"  # or "skip": compile from nothing; or "eager"
    must_load: bool = True  # else compile, with a warning, where it can't be loaded
    precompile: bool | None = None  # must use the decode step, or must not; None: if it fits
    compilation: CompileFlags = CompileFlags(**UNTOLD)  # None in a field: as the artifact was built
    fetch_from: str | None = None  # URL of a store
    trust: TrustFlags = TrustFlags()


class BuildSettings(Flags):
    """Every flag of a build, by group."""

    shared: cli.SharedFlags
    compilation: CompileFlags
    build: BuildFlags
    files: CacheFileFlags
    store: cli.PublishFlags


class RunSettings(Flags):
    """Every flag of one run, by group."""

    shared: cli.SharedFlags
    prompt: cli.PromptFlags
    sampling: cli.SamplingFlags
    loading: LoadFlags
    compilation: CompileFlags  # None in a field: not told
    files: CacheFileFlags
    store: cli.FetchFlags
    trust: TrustFlags

    def wanted(self) -> Wanted:
        loading = self.loading
        return Wanted(
            loading.mode, loading.must_load, loading.precompile, self.compilation,
            self.store.fetch, self.trust,
        )  # fmt: skip
