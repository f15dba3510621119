"""From the artifact on disk into this process's compiler caches."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.artifacts import ArtifactPair, open_verified, peek_manifest, read_blob
from common.compile_evidence import GraphLookup, parse_graphs, watch_compilation
from common.console import Console
from common.errors import ArtifactDamagedError, ArtifactMismatchError
from common.manifest import Manifest, describe, differences, raise_if_different
from common.results import environment
from common.targets import Target
from common.trust import TrustFlags
from portable_cache.flags import APPROACH, CompileFlags
from portable_cache.recipe import find_differences, recipe

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

    from common.compile_evidence import Watch


@dataclass(frozen=True)
class Loaded:
    """What came out of an artifact."""

    manifest: Manifest
    verify_seconds: float
    entries: dict[str, int]
    decode_steps: dict[int, bytes]
    graphs: list[GraphLookup]  # what the build looked up

    def as_json(self) -> dict:
        return {
            "sha256": self.manifest.file["sha256"],
            "bytes": self.manifest.file["bytes"],
            "verify_seconds": self.verify_seconds,
            "entries": self.entries,
        }


def load_artifact(
    pair: ArtifactPair,
    target: Target,
    compilation: CompileFlags,
    padded_length: int,
    trust: TrustFlags,
    watch: "Watch",
    console: Console,
) -> Loaded:
    """Check the artifact against this run, then load it; any doubt is an error of its own kind."""
    from portable_cache import bundle

    bundle.check_caches_are_on()
    with open_verified(pair, APPROACH, trust, console) as verified:
        manifest = verified.manifest
        graphs = _graphs_of(pair, manifest)
        found = find_differences(
            manifest,
            environment(),
            target.describe_model(),
            recipe(compilation, (), target.device),
            padded_length,
        )
        raise_if_different(pair.path, found)
        for difference in differences(manifest.environment, environment(), ("driver",)):
            console.warn(f"{describe([difference])}: usually harmless")
        blob = read_blob(verified)
    try:
        loaded = bundle.load_bundle(blob)
    except (ArtifactDamagedError, ArtifactMismatchError) as error:
        raise type(error)(f"{pair.path}: {error}") from error
    watch.restored.update(loaded.restored)
    # keys that are known need no spelling out when they are looked up
    watch_compilation(frozenset(key for keys in loaded.graph_keys.values() for key in keys))
    return Loaded(manifest, verified.verify_seconds, loaded.entries, loaded.decode_steps, graphs)


def use_decode_step(
    loaded: Loaded | None,
    wanted: bool | None,
    model: "PreTrainedModel",
    cache: "Cache",
    console: Console,
) -> bool:
    """Hand the artifact's precompiled decode step to `generate`; return whether it is in use.

    `wanted` None takes it when it is there and fits, with one warning when it does not fit.
    """
    slots = str(cache.layers[0].max_cache_len) if cache is not None else ""
    contract = loaded.manifest.details.get("decode_steps", {}).get(slots) if loaded else None
    if wanted is False or (contract is None and wanted is None):
        return False
    from portable_cache import decode_ahead

    try:
        if contract is None or int(slots) not in loaded.decode_steps:
            raise decode_ahead.PrecompileMismatch(
                "the artifact has no precompiled decode step: ./build.sh --precompile makes one"
            )
        decode = decode_ahead.load(loaded.decode_steps[int(slots)], contract, model, cache)
    except (decode_ahead.PrecompileMismatch, *decode_ahead.FAILURES) as error:
        if wanted:
            raise ArtifactMismatchError(str(error)) from error
        console.warn(f"{error}; tracing instead")
        return False
    decode_ahead.install(model, decode)
    return True


def warmed_lengths(pair: ArtifactPair) -> tuple[int, ...]:
    """Return the prefill lengths of the artifact at hand, or none when there is no such thing.

    Lengths only choose the padding, so unlike the artifact itself they need no trust.
    """
    manifest = peek_manifest(pair)
    lengths = manifest.recipe.get("prefill_lengths") if manifest else None
    valid = isinstance(lengths, list) and all(type(length) is int for length in lengths)
    return tuple(lengths) if valid else ()


def _graphs_of(pair: ArtifactPair, manifest: Manifest) -> list[GraphLookup]:
    try:
        return parse_graphs(manifest.details["graphs"])
    except (KeyError, TypeError) as error:
        raise ArtifactDamagedError(
            f"{pair.metadata_path} does not list the graphs of its build ({error}): "
            "build it again with ./build.sh"
        ) from error
