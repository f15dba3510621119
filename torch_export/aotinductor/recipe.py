"""What a package was built for, and whether this run is that."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.artifacts import ArtifactPair
from common.checkpoints import Checkpoint, resolve_checkpoint
from common.console import Console
from common.devices import choose_device, choose_dtype, quiet_compiler_logs
from common.errors import ArtifactDamagedError, ArtifactMismatchError
from common.flags import SharedFlags
from common.manifest import Difference, Manifest, describe, differences, parse_manifest
from common.versions import package_version

from aotinductor.bounds import Bounds, override, parse_bounds
from aotinductor.fingerprint import weights_fingerprint
from aotinductor.flags import ExpectedShapeFlags, PackageFileFlags

if TYPE_CHECKING:
    import torch

# its code calls into torch's libraries, and its kernels are machine code for one architecture
_ENVIRONMENT_FIELDS = ("torch", "cuda", "compute_capability")
_MODEL_FIELDS = ("config_digest", "dtype")
_RECIPE_FIELDS = ("kv_cache", "weights_fingerprint", "batch_size", "device", "cpu_capability")


@dataclass(frozen=True)
class Target:
    """The model to run, and where and in what precision."""

    checkpoint: Checkpoint
    device: "torch.device"
    dtype: "torch.dtype"

    def describe_model(self) -> dict[str, Any]:
        return self.checkpoint.describe() | {"dtype": str(self.dtype).removeprefix("torch.")}


def choose_target(flags: SharedFlags, presets_folder: Path, console: Console) -> Target:
    device = choose_device(flags.device)
    quiet_compiler_logs(device)
    checkpoint = resolve_checkpoint(flags.model_id, presets_folder, console)
    return Target(checkpoint, device, choose_dtype(flags.dtype, device))


def recipe(target: Target, bounds: Bounds, example_seq_len: int, max_autotune: bool) -> dict:
    """Return every setting that shapes the package."""
    return {
        **_fixed_recipe(target),
        **bounds.as_json(),
        "example_seq_len": example_seq_len,
        "max_autotune": max_autotune,
        "embed_weights": True,
    }


def _fixed_recipe(target: Target) -> dict[str, Any]:
    """Return the settings that a run has no flag for."""
    import torch

    return {
        "kv_cache": False,
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
    if found_recipe["weights_fingerprint"] is None:  # the folder holds configuration only
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


def find_bounds(
    files: PackageFileFlags, expected: ExpectedShapeFlags, loading: bool
) -> tuple[Bounds, dict[str, Any]]:
    """Return the sequence lengths of this run, and the recipe of the package at hand, maybe {}.

    Lengths only choose the padding, so unlike the package itself they need no trust. Flags that
    disagree with the metadata are an error, or, for a graph compiled at runtime, win.
    """
    built = _read_recipe(files.pair())
    given = {name: value for name, value in asdict(expected).items() if value is not None}
    found = differences(built, given, given) if built else []
    if found and loading:
        raise ArtifactMismatchError(
            f"{files.package_path} was built for something else: {describe(found)}; "
            "rebuild it with ./build.sh and the same flags, or run with the build's"
        )
    return (override(expected) if found or not built else parse_bounds(built)), built


def _read_recipe(pair: ArtifactPair) -> dict[str, Any]:
    """Return the recipe in the metadata at hand, or {} when there is none to be read."""
    try:
        return parse_manifest(pair.metadata_path.read_bytes()).recipe
    except (OSError, ArtifactDamagedError):
        return {}
