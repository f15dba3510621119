"""The tensors that a package of code only is bound to: the checkpoint's own."""

import torch

from common.errors import ArtifactMismatchError
from common.manifest import Manifest
from common.targets import Target
from common.weights import Expected, load_weights


def load_constants(manifest: Manifest, target: Target) -> dict[str, torch.Tensor]:
    """Return what the graphs expect, by their names, on the device: one copy, and none besides.

    Missing, left-over or misshapen tensors are an ArtifactMismatchError, before a byte is read.
    """
    expected = [Expected.from_json(row) for row in manifest.details["constants"]]
    # only a build that converted the weights asks for a conversion again
    cast = bool(manifest.recipe["cast_weights"])
    try:
        with torch.no_grad():
            return load_weights(target.checkpoint.folder, expected, target.device, cast)
    except (ValueError, FileNotFoundError) as error:
        raise ArtifactMismatchError(f"{target.checkpoint.folder}: {error}") from error
