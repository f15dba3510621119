"""A compiled Llama in a package, and the way to it from a program: `load`."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aotinductor.start.engine import Engine


def load(
    path: str | Path, model: str | None = None, device: str = "auto", dtype: str = "auto",
    trust: bool = False, expect_sha256: str | None = None,
) -> "Engine":  # fmt: skip
    """Return an engine over the package at `path`; torch is not imported for it.

    `model` is a Hub id, a checkpoint folder or a preset; without it, the one that the package was
    built from. `trust` consents to a package that others could have written, `expect_sha256` pins
    its metadata file. Raises the exceptions of common.errors, by kind of problem.
    """
    from aotinductor.flags import ExpectedShapeFlags, PackageFileFlags
    from aotinductor.lengths import find_plan
    from aotinductor.models import refuse_unsupported
    from aotinductor.start.loading import make_opening
    from common.artifact.disk import TrustFlags, read_manifest
    from common.cli import Console, SharedFlags

    pair, quiet = PackageFileFlags(Path(path)).pair(), Console(quiet=True)
    flags = TrustFlags(trust, expect_sha256)
    wanted = SharedFlags(model or read_manifest(pair, flags).model["id"], device, dtype)
    plan = find_plan(pair, ExpectedShapeFlags(), must_agree=True)
    opening = make_opening(pair, wanted, flags, plan, quiet)
    refuse_unsupported(opening.target.checkpoint, plan.slots is not None)
    return opening.load(quiet)
