"""The flags that belong to this folder."""

from dataclasses import dataclass
from pathlib import Path

from common.artifacts import ArtifactPair, TrustFlags
from common.cli import PromptFlags, SamplingFlags, SharedFlags, flag, positive_int
from common.store import FetchFlags, PublishFlags

FOLDER = Path(__file__).resolve().parent.parent
APPROACH = "torch_export"
# what a trial of compare or benchmark adds to the user's words, by mode
LOAD = ["--load-artifacts", "--no-eager"]
SKIP = ["--no-load-artifacts", "--no-eager"]
EAGER = ["--eager"]

_NO_PRELOAD_METHODS = ("torch-compile", "export")


@dataclass(frozen=True)
class PackageFileFlags:
    """artifact"""

    package_path: Path = flag(
        FOLDER / "artifacts/llama3b_aotinductor.pt2", "file of the AOTInductor package", often=True
    )
    metadata_path: Path | None = flag(
        None, "its metadata; without it NAME_meta.json beside the package NAME.pt2"
    )

    def pair(self) -> ArtifactPair:
        beside = self.package_path.with_name(self.package_path.stem + "_meta.json")
        return ArtifactPair(self.package_path, self.metadata_path or beside)


@dataclass(frozen=True)
class ShapeFlags:
    """sequence lengths: what the exported graph accepts, prompt and new tokens together"""

    example_seq_len: int = flag(
        128,
        "tokens of the example that is traced; without --dynamic-seq-len the only length",
        parse=positive_int,
    )
    dynamic_seq_len: bool = flag(
        True, "export for every length within the bounds instead of for the example's alone"
    )
    min_seq_len: int = flag(1, "shortest sequence in tokens, before padding", parse=positive_int)
    max_seq_len: int = flag(2048, "longest sequence in tokens", parse=positive_int, often=True)
    dynamic_seq_multiple: int = flag(
        8, "tokens that a padded sequence is a multiple of", parse=positive_int
    )

    def __post_init__(self):
        if not self.dynamic_seq_len:
            return
        multiple, longest = self.dynamic_seq_multiple, self.max_seq_len
        if longest % multiple:
            raise ValueError(
                f"--max-seq-len {longest} is no multiple of --dynamic-seq-multiple {multiple}: "
                f"try {longest // multiple * multiple or multiple}"
            )
        if self.min_seq_len > longest:
            raise ValueError(
                f"--min-seq-len {self.min_seq_len} is more than --max-seq-len {longest}"
            )
        if self.min_seq_len > longest - multiple:
            raise ValueError(
                f"between --min-seq-len {self.min_seq_len} and --max-seq-len {longest} there is "
                f"one padded length only: use --no-dynamic-seq-len --example-seq-len {longest}"
            )


@dataclass(frozen=True)
class GraphFlags:
    """graphs and weights"""

    kv_cache: bool = flag(
        False,
        "build a prefill and a decode graph over one static KV cache instead of the base graph, "
        "which recomputes the whole sequence for every token",
        often=True,
    )
    max_cache_len: int | None = flag(
        None, "slots (tokens) of the KV cache; without: --max-seq-len", parse=positive_int
    )
    embed_weights: bool | None = flag(
        None,
        "put the weights into the package; without them it holds code only and is bound to the "
        "checkpoint's own at load (without either: yes for the base graph, no with --kv-cache)",
    )

    def __post_init__(self):
        if self.max_cache_len and not self.kv_cache:
            raise ValueError("--max-cache-len is the length of the KV cache: add --kv-cache")

    @property
    def weights_embedded(self) -> bool:
        return not self.kv_cache if self.embed_weights is None else self.embed_weights

    def slots(self, shape: ShapeFlags) -> int | None:
        """Return the KV cache's slots, or None for the base graph."""
        return (self.max_cache_len or shape.max_seq_len) if self.kv_cache else None


@dataclass(frozen=True)
class CompileFlags:
    """compilation"""

    max_autotune: bool = flag(
        True, "measure several kernels for each matrix product and keep the fastest", often=True
    )


@dataclass(frozen=True)
class ExpectedShapeFlags:
    """sequence lengths that the package must have been built for; without: its own"""

    min_seq_len: int | None = flag(None, "shortest sequence in tokens", parse=positive_int)
    max_seq_len: int | None = flag(None, "longest sequence in tokens", parse=positive_int)
    dynamic_seq_multiple: int | None = flag(
        None, "tokens that a padded sequence is a multiple of", parse=positive_int
    )


@dataclass(frozen=True)
class LoadFlags:
    """loading, or what to do instead"""

    load_artifacts: bool = flag(
        True, "generate from the package; --no-load-artifacts compiles at runtime", often=True
    )
    eager: bool = flag(
        False, "neither load nor compile: Hugging Face generate(..., disable_compile=True)"
    )
    no_preload_method: str = flag(
        "torch-compile",
        "how --no-load-artifacts compiles: torch.compile of the same graph, or export and "
        "compile a package in a temporary folder",
        choices=_NO_PRELOAD_METHODS,
    )
    compile_dynamic_seq_len: bool = flag(
        True,
        "torch.compile one graph for every length; off: first one for a single length, then, at "
        "the second length, one for all",
    )
    max_autotune: bool | None = flag(
        None, "of --no-load-artifacts; without either: as the package at hand was built, else on"
    )
    cuda_graph: bool | None = flag(
        None,
        "replay a KV-cache package's decode as one CUDA graph; without either: on for CUDA",
    )
    bucket_pad: bool = flag(
        False,
        "pad each sequence to the next of the metadata's buckets instead of the next multiple: "
        "fewer shapes, more work",
    )


@dataclass(frozen=True)
class BuildSettings:
    """Every flag of a build, by group."""

    shared: SharedFlags
    graph: GraphFlags
    shape: ShapeFlags
    compilation: CompileFlags
    files: PackageFileFlags
    store: PublishFlags

    def __post_init__(self):
        slots, longest = self.graph.slots(self.shape), self.shape.max_seq_len
        if slots is None:
            return
        if not self.shape.dynamic_seq_len:
            raise ValueError(
                "--kv-cache needs prompts of any length: leave --no-dynamic-seq-len out"
            )
        if slots < longest:
            raise ValueError(
                f"--max-cache-len {slots} cannot hold a prompt of --max-seq-len {longest} tokens: "
                "lower the one or raise the other"
            )


@dataclass(frozen=True)
class RunSettings:
    """Every flag of a run, by group."""

    shared: SharedFlags
    prompt: PromptFlags
    sampling: SamplingFlags
    loading: LoadFlags
    shape: ExpectedShapeFlags
    files: PackageFileFlags
    store: FetchFlags
    trust: TrustFlags

    @property
    def mode(self) -> str:
        if self.loading.eager:
            return "eager"
        return "load" if self.loading.load_artifacts else "skip"
