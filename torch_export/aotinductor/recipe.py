"""What a package was built for, and whether this run is that."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from aotinductor.bounds import (
    Bounds,
    check_kv_request,
    check_request,
    override,
    parse_bounds,
)
from aotinductor.fingerprint import weights_fingerprint
from aotinductor.flags import APPROACH, ExpectedShapeFlags, GraphFlags, PackageFileFlags
from common.artifacts import ArtifactPair, peek_manifest
from common.manifest import Difference, Manifest, differences, raise_if_different
from common.targets import Target
from common.versions import package_version
from common.weights import list_checkpoint

if TYPE_CHECKING:
    import torch

# its code calls into torch's libraries, and its kernels are machine code for one architecture
_ENVIRONMENT_FIELDS = ("torch", "cuda", "compute_capability")
_MODEL_FIELDS = ("config_digest", "dtype")
_RECIPE_FIELDS = ("weights_fingerprint", "batch_size", "device", "cpu_capability")


@dataclass(frozen=True)
class Plan:
    """How this run serves a request: within which lengths, and as which package was built.

    `built` is the recipe of the package at hand, {} when there is none.
    """

    bounds: Bounds
    built: dict[str, Any]

    @property
    def slots(self) -> int | None:
        """Return the KV cache's slots, or None for the base graph."""
        return self.built.get("max_cache_len") if self.built.get("kv_cache") else None

    def check_request(self, prompt_tokens: int, max_new_tokens: int, bucket_pad: bool) -> None:
        """Raise UsageError, naming the limit, for a request that the graphs cannot serve."""
        if self.slots is None:
            check_request(self.bounds, prompt_tokens, max_new_tokens)
        else:
            check_kv_request(self.bounds, self.slots, prompt_tokens, max_new_tokens, bucket_pad)


def recipe(
    target: Target, bounds: Bounds, example_seq_len: int, graph: GraphFlags, slots: int | None,
    max_autotune: bool,
) -> dict:  # fmt: skip
    """Return every setting that shapes the package."""
    return {
        **_fixed_recipe(target),
        **bounds.as_json(),
        "example_seq_len": example_seq_len,
        "kv_cache": graph.kv_cache,
        "max_cache_len": slots,
        "max_autotune": max_autotune,
        "embed_weights": graph.weights_embedded,
        "cast_weights": _converts_weights(target),
    }


def _converts_weights(target: Target) -> bool:
    """Return whether the checkpoint's own dtype is another than the one asked for."""
    stored = list_checkpoint(target.checkpoint.folder).values()
    return any(one.dtype != target.dtype for one in stored if one.dtype.is_floating_point)


def _fixed_recipe(target: Target) -> dict[str, Any]:
    """Return the settings that a run has no flag for."""
    import torch

    return {
        "weights_fingerprint": weights_fingerprint(target.checkpoint.folder),
        "batch_size": 1,
        "device": target.device.type,
        # the compiler writes for this machine's vector instructions: elsewhere they may not exist
        "cpu_capability": torch.backends.cpu.get_cpu_capability()
        if target.device.type == "cpu"
        else None,
    }


def find_differences(manifest: Manifest, target: Target) -> list[Difference]:
    """Return every field in which this run is not what the package was built for."""
    found_recipe = _fixed_recipe(target)
    fields = list(_RECIPE_FIELDS)
    # a package of code only is bound to whatever weights of its architecture are there; and a
    # folder may hold the configuration only
    if not manifest.recipe.get("embed_weights") or found_recipe["weights_fingerprint"] is None:
        fields.remove("weights_fingerprint")
    return (
        differences(manifest.environment, _environment(target.device), _ENVIRONMENT_FIELDS)
        + differences(manifest.model, target.describe_model(), _MODEL_FIELDS)
        + differences(manifest.recipe, found_recipe, fields)
    )


def _environment(device: "torch.device") -> dict[str, Any]:
    """Return what must be equal, without the driver and the commit, which cost a process each."""
    import torch

    # as common.results.environment() says it: of the machine's GPU, whatever --device is
    seen = torch.cuda.is_available()
    capability = ".".join(map(str, torch.cuda.get_device_capability())) if seen else None
    return {
        "torch": package_version("torch"),
        "cuda": torch.version.cuda if seen else None,
        "compute_capability": capability,
    }


def find_plan(files: PackageFileFlags, expected: ExpectedShapeFlags, loading: bool) -> Plan:
    """Return the sequence lengths of this run, and the recipe of the package at hand.

    Lengths only choose the padding, so unlike the package itself they need no trust. Flags that
    disagree with the metadata are an error, or, for a graph compiled at runtime, win.
    """
    built = _read_recipe(files.pair())
    given = {name: value for name, value in asdict(expected).items() if value is not None}
    found = differences(built, given, given) if built else []
    if loading:
        raise_if_different(files.package_path, found)
    return Plan(override(expected) if found or not built else parse_bounds(built), built)


def _read_recipe(pair: ArtifactPair) -> dict[str, Any]:
    """Return the recipe in the metadata at hand, or {} when there is none to be read."""
    manifest = peek_manifest(pair)
    return manifest.recipe if manifest and manifest.approach == APPROACH else {}
