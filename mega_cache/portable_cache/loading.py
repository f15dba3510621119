"""From the artifact on disk into this process's compiler caches."""

from dataclasses import dataclass

from transformers import Cache, PreTrainedModel

from common.artifacts import ArtifactPair, TrustFlags, open_verified, read_blob
from common.cli import Console
from common.compile_counts import Watch
from common.errors import ArtifactDamagedError, ArtifactMismatchError
from common.manifest import Manifest, describe, differences, raise_if_different
from common.report import environment
from common.target import Target
from portable_cache import bundle, decode_ahead, hits
from portable_cache.flags import APPROACH, CompileFlags
from portable_cache.recipe import find_differences


@dataclass(frozen=True)
class Loaded:
    """What came out of an artifact."""

    pair: ArtifactPair
    manifest: Manifest
    verify_seconds: float
    bundle: bundle.LoadedBundle
    lookups: list[hits.Lookup]  # those of the build

    def as_json(self) -> dict:
        return {
            "name": self.pair.path.name,
            "sha256": self.manifest.file["sha256"],
            "bytes": self.manifest.file["bytes"],
            "verify_seconds": self.verify_seconds,
            "entries": self.bundle.entries,
        }


def load_artifact(
    pair: ArtifactPair,
    target: Target,
    flags: CompileFlags,
    trust: TrustFlags,
    watch: Watch,
    console: Console,
) -> Loaded:
    """Check the artifact against this run, then load it; any doubt is an error of its own kind."""
    bundle.check_caches_are_on()
    with open_verified(pair, APPROACH, trust, console) as verified:
        manifest = verified.manifest
        lookups = _lookups_of(pair, manifest)
        raise_if_different(pair.path, find_differences(manifest, target, flags))
        for difference in differences(manifest.environment, environment(), ("driver",)):
            console.warn(f"{describe([difference])}: usually harmless")
        blob = read_blob(verified)
    try:
        loaded = bundle.load_bundle(blob)
    except (ArtifactDamagedError, ArtifactMismatchError) as error:
        raise type(error)(f"{pair.path}: {error}") from error
    watch.restored.update(loaded.restored)
    return Loaded(pair, manifest, verified.verify_seconds, loaded, lookups)


def use_decode_step(
    loaded: Loaded | None,
    slots: int,
    wanted: bool | None,
    model: PreTrainedModel,
    cache: Cache | None,
    console: Console,
) -> bool:
    """Hand the artifact's decode step for this cache to `generate`; return whether it is in use.

    `wanted` None takes it when it is there and fits, with one warning when it does not fit.
    """
    contract = loaded.manifest.details["decode_steps"].get(str(slots)) if loaded else None
    if wanted is False or (contract is None and wanted is None):
        return False
    try:
        if contract is None:
            raise decode_ahead.PrecompileMismatch(
                f"the artifact has no precompiled decode step for {slots} slots: ./build.sh "
                "--precompile makes one"
            )
        content = loaded.bundle.decode_steps[slots]
        decode = decode_ahead.load(content, contract, model, cache)
    except (decode_ahead.PrecompileMismatch, *decode_ahead.FAILURES) as error:
        if wanted:
            raise ArtifactMismatchError(str(error)) from error
        console.warn(f"{error}; tracing instead")
        return False
    decode_ahead.install(model, decode)
    return True


def _lookups_of(pair: ArtifactPair, manifest: Manifest) -> list[hits.Lookup]:
    try:
        if not isinstance(manifest.details["decode_steps"], dict):
            raise TypeError("decode_steps")
        return [hits.Lookup(**record) for record in manifest.details["graphs"]]
    except (KeyError, TypeError) as error:
        raise ArtifactDamagedError(
            f"{pair.metadata_path} does not list the graphs of its build ({error}): "
            "build it again with ./build.sh"
        ) from error
