"""The compiler of a start, and the artifact on its way from disk into the compiler's caches."""

from dataclasses import dataclass, field
from typing import Any

from transformers import Cache, PreTrainedModel

from common.artifact import disk, manifest
from common.artifact.disk import ArtifactPair, TrustFlags
from common.cli import Console
from common.compiler import counts, toolchain
from common.errors import ArtifactDamagedError, ArtifactMismatchError
from common.model.target import Target
from portable_cache import recipe, torch_private
from portable_cache.flags import APPROACH, CompileFlags
from portable_cache.start import bundle, decode_step, generation, hits


@dataclass
class Compiler:
    """What is watched of the compiler, and what an artifact brought, if one was loaded."""

    watch: counts.Watch
    lookups: list[hits.Lookup]  # of this process: it grows
    built: list[hits.Lookup] = field(default_factory=list)  # those of the build
    step: decode_step.SavedStep | None = None
    artifact: dict[str, Any] | None = None  # as a run's result tells it

    def load(
        self, pair: ArtifactPair, flags: CompileFlags, target: Target, trust: TrustFlags,
        console: Console,
    ) -> None:  # fmt: skip
        """Check the artifact against this run, then load it; each doubt is an error of its kind."""
        bundle.check_caches_are_on()
        with disk.open_verified(pair, APPROACH, trust, console) as verified:
            built = verified.manifest
            manifest.raise_if_different(pair.path, recipe.find_differences(built, target, flags))
            for one in recipe.unlike_driver(built):
                console.warn(f"{manifest.describe([one])}: usually harmless")
            blob = disk.read_blob(verified)
        try:
            loaded = bundle.load_bundle(blob)
        except (ArtifactDamagedError, ArtifactMismatchError) as error:
            raise type(error)(f"{pair.path}: {error}") from error
        self.watch.restored.update(loaded.restored)
        self.built = [hits.Lookup(**record) for record in built.details["graphs"]]
        if loaded.decode_step:
            contract = built.details["decode_step"]
            self.step = decode_step.SavedStep(loaded.decode_step, contract)
        self.artifact = {
            "name": pair.path.name,
            **built.file,
            "verify_seconds": verified.verify_seconds,
            "entries": built.details["entries"],
            "precompiled": False,
        }

    def use_decode_step(
        self, wanted: bool | None, model: PreTrainedModel, console: Console
    ) -> None:
        """Hand the artifact's decode step to `generate`, which traces one without it.

        `wanted` None takes it when it is there and fits, with one warning when it does not fit.
        """
        if wanted and self.step is None:
            raise ArtifactMismatchError(
                "the artifact has no precompiled decode step: ./build.sh --precompile makes one"
            )
        if self.step and self.artifact and wanted is not False:
            try:
                torch_private.use_decode_step(model, decode_step.load(self.step, model))
                self.artifact["precompiled"] = True
                return
            except (decode_step.StepMismatchError, torch_private.MissingNameError) as error:
                if wanted:
                    raise ArtifactMismatchError(str(error)) from error
                console.warn(f"{error}; tracing instead")
        assert torch_private.compile_fx  # imported now, or request 1 would pay for it

    def make_cache(
        self, model: PreTrainedModel, flags: CompileFlags, must_hit: bool, tokens: int
    ) -> Cache:
        """Return the shortest KV cache that was warmed up and holds `tokens`, else one for them.

        The decode step serves any; a traced graph is one cache length's. Raises
        ArtifactMismatchError where that must hit and cannot.
        """
        slots, longest = flags.slots_for(tokens), max(flags.cache_lengths())
        if self.artifact:
            self.artifact["slots"] = slots
            if slots > longest and must_hit and not self.artifact["precompiled"]:
                raise ArtifactMismatchError(
                    f"prompt and new tokens need {slots} slots, the longest KV cache of "
                    f"{self.artifact['name']} has {longest}: shorten them, or rebuild with a "
                    "larger --max-cache-len"
                )
        return generation.make_cache(model, slots)

    def describe(self, counted: dict[str, int | None], may_trace: bool) -> dict[str, Any]:
        """Return what was loaded, what was looked up, and what did not hit.

        `may_trace`: a graph that was traced and then found in the caches is a hit.
        """
        graphs = [{"cache": one.cache, "key": one.key, "hit": one.hit} for one in self.lookups]
        kernels = counts.compiled_kernels(self.watch)
        misses = hits.missed(self.lookups, self.built)
        misses += hits.made_anew(counted, kernels, may_trace)
        return {"artifact": self.artifact, "graphs": graphs, "misses": misses}


def start_compiler(target: Target) -> Compiler:
    """Set the compiler up as at the build, and watch from now on what it does."""
    bundle.configure(target.device)
    return Compiler(counts.watch_compilation(), hits.watch_lookups())


def prepare_to_compile(target: Target, console: Console) -> None:
    """Make sure that this machine can compile what no artifact brings."""
    toolchain.prepare_toolchain(target.device, host_code=False, console=console)
