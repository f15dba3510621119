"""The flags that belong to this folder."""

from functools import partial
from pathlib import Path

from common.artifact.disk import ArtifactPair, TrustFlags
from common.cli import (
    FetchFlags,
    Flags,
    PromptFlags,
    PublishFlags,
    SamplingFlags,
    SharedFlags,
    flag,
    positive_int,
)

APPROACH = "torch_export"
# what a trial of compare or benchmark adds to the user's words, by mode
LOAD = ["--load-artifacts", "--no-eager"]
SKIP = ["--no-load-artifacts", "--no-eager"]
EAGER = ["--eager"]
_PACKAGE = Path(__file__).resolve().parents[1] / "artifacts" / "llama3b_aotinductor.pt2"

length_flag = partial(flag, parse=positive_int)


class PackageFileFlags(Flags):
    """artifact"""

    package_path: Path = flag(_PACKAGE, "file of the AOTInductor package", often=True)
    metadata_path: Path | None = flag(None, "its metadata; else NAME_meta.json beside NAME.pt2")

    def pair(self) -> ArtifactPair:
        beside = self.package_path.with_name(self.package_path.stem + "_meta.json")
        return ArtifactPair(self.package_path, self.metadata_path or beside)


class ShapeFlags(Flags):
    """sequence lengths: what the exported graph accepts, prompt and new tokens together"""

    example_seq_len: int = length_flag(128, "tokens of the example that is traced")
    dynamic_seq_len: bool = flag(True, "every length within the bounds; off: the example's alone")
    min_seq_len: int = length_flag(1, "shortest sequence in tokens, before padding")
    max_seq_len: int = length_flag(2048, "longest sequence in tokens", often=True)
    dynamic_seq_multiple: int = length_flag(8, "tokens that a padded sequence is a multiple of")

    def check(self) -> None:
        shortest, longest, multiple = self.min_seq_len, self.max_seq_len, self.dynamic_seq_multiple
        if self.dynamic_seq_len and longest % multiple:
            raise ValueError(
                f"--max-seq-len {longest} is no multiple of --dynamic-seq-multiple {multiple}: "
                f"try {longest // multiple * multiple or multiple}"
            )
        if self.dynamic_seq_len and shortest > longest - multiple:
            raise ValueError(
                f"from --min-seq-len {shortest} to --max-seq-len {longest} there are not two "
                f"multiples of {multiple}: for one length, use --no-dynamic-seq-len "
                f"--example-seq-len {longest}"
            )


class GraphFlags(Flags):
    """graphs and weights"""

    kv_cache: bool = flag(
        False,
        "build a prefill and a decode graph over one static KV cache instead of the base graph, "
        "which recomputes the whole sequence for every token",
        often=True,
    )
    max_cache_len: int | None = length_flag(None, "tokens in the KV cache; else --max-seq-len")
    embed_weights: bool | None = flag(
        None,
        "put the weights into the package; without them it holds code only and is bound to the "
        "checkpoint's own at load (without either: yes for the base graph, no with --kv-cache)",
    )
    max_autotune: bool = flag(
        True, "measure several kernels for each matrix product, keep the fastest", often=True
    )

    def check(self) -> None:
        if self.max_cache_len and not self.kv_cache:
            raise ValueError("--max-cache-len is the length of the KV cache: add --kv-cache")


class ExpectedShapeFlags(Flags):
    """sequence lengths that the package must have been built for; without: its own"""

    min_seq_len: int | None = length_flag(None, "shortest sequence in tokens")
    max_seq_len: int | None = length_flag(None, "longest sequence in tokens")
    dynamic_seq_multiple: int | None = length_flag(None, "what padded lengths are multiples of")

    @property
    def given(self) -> dict[str, int]:
        """What the user asks for."""
        return {name: value for name, value in vars(self).items() if value is not None}


class LoadFlags(Flags):
    """loading, or what to do instead"""

    load_artifacts: bool = flag(True, "load the package; off: compile at runtime", often=True)
    eager: bool = flag(False, "neither: Hugging Face generate(..., disable_compile=True)")
    no_preload_method: str = flag(
        "torch-compile",
        "how --no-load-artifacts compiles: torch.compile of the same graph, or export and "
        "compile a package in a temporary folder",
        choices=("torch-compile", "export"),
    )
    compile_dynamic_seq_len: bool = flag(
        True,
        "torch.compile one graph for every length; off: first one for a single length, then, at "
        "the second length, one for all",
    )
    max_autotune: bool | None = flag(
        None, "of --no-load-artifacts; without either: as the package at hand was built, else on"
    )
    library: str = flag(
        "auto",
        "behind the package's calls: its own runtime library, which needs no torch, or libtorch; "
        "auto: the runtime library where it has all that the package calls",
        choices=("auto", "runtime", "libtorch"),
    )
    cuda_graph: bool | None = flag(
        None, "replay a KV-cache package's decode as one CUDA graph; without either: on for CUDA"
    )
    bucket_pad: bool = flag(False, "pad to the metadata's buckets: fewer shapes, more work")


class BuildSettings(Flags):
    """Every flag of a build, by group."""

    shared: SharedFlags
    graph: GraphFlags
    shape: ShapeFlags
    files: PackageFileFlags
    store: PublishFlags

    def check(self) -> None:
        slots, longest = self.slots, self.shape.max_seq_len
        if slots and not self.shape.dynamic_seq_len:
            raise ValueError(
                "--kv-cache takes prompts of any length: leave --no-dynamic-seq-len out"
            )
        if slots and slots < longest:
            raise ValueError(
                f"--max-cache-len {slots} cannot hold a prompt of --max-seq-len {longest} tokens: "
                "lower the one or raise the other"
            )

    @property
    def slots(self) -> int | None:
        """The KV cache's slots, or None for the base graph."""
        longest = self.graph.max_cache_len or self.shape.max_seq_len
        return longest if self.graph.kv_cache else None

    @property
    def weights_embedded(self) -> bool:
        told = self.graph.embed_weights
        return not self.graph.kv_cache if told is None else told


class RunSettings(Flags):
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
