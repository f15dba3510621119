"""The compiler of a run, and the artifact on its way from disk into the compiler's caches."""

from dataclasses import dataclass, field
from typing import Any

from transformers import Cache, PreTrainedModel

from common.artifact import disk, manifest
from common.cli import Console
from common.compiler import counts, toolchain
from common.errors import ArtifactDamagedError, ArtifactMismatchError, ScriptError
from common.measure import report
from common.model.target import Target
from portable_cache import bundle, decode_ahead, hits
from portable_cache.flags import APPROACH, RunSettings
from portable_cache.recipe import find_differences


@dataclass
class Compiler:
    """What is watched of the compiler, and what an artifact brought, if one was loaded."""

    watch: counts.Watch
    lookups: list[hits.Lookup]  # of this process: it grows
    built: list[hits.Lookup] = field(default_factory=list)  # those of the build
    step: decode_ahead.SavedStep | None = None
    artifact: dict[str, Any] | None = None  # as the result tells it

    def load(self, settings: RunSettings, target: Target, slots: int, console: Console) -> None:
        """Check the artifact against this run, then load it; each doubt is an error of its kind."""
        bundle.check_caches_are_on()
        pair, flags = settings.files.pair(), settings.compilation
        with disk.open_verified(pair, APPROACH, settings.trust, console) as verified:
            built = verified.manifest
            manifest.raise_if_different(pair.path, find_differences(built, target, flags))
            if slots not in flags.cache_lengths():
                raise ArtifactMismatchError(
                    f"prompt and new tokens need {slots} slots, the longest KV cache of "
                    f"{pair.path} has {max(flags.cache_lengths())}: shorten them, or rebuild with "
                    "a larger --max-cache-len"
                )
            for one in manifest.differences(built.environment, report.environment(), ("driver",)):
                console.warn(f"{manifest.describe([one])}: usually harmless")
            blob = disk.read_blob(verified)
        try:
            loaded = bundle.load_bundle(blob)
        except (ArtifactDamagedError, ArtifactMismatchError) as error:
            raise type(error)(f"{pair.path}: {error}") from error
        self.watch.restored.update(loaded.restored)
        self.built = [hits.Lookup(**record) for record in built.details["graphs"]]
        if content := loaded.decode_steps.get(slots):
            contract = built.details["decode_steps"][str(slots)]
            self.step = decode_ahead.SavedStep(content, contract)
        self.artifact = {
            "name": pair.path.name,
            **built.file,
            "verify_seconds": verified.verify_seconds,
            "entries": built.details["entries"],
            "precompiled": False,
            "slots": slots,
        }

    def use_decode_step(
        self, wanted: bool | None, model: PreTrainedModel, cache: Cache, console: Console
    ) -> None:
        """Hand the artifact's decode step to `generate`, which traces one without it.

        `wanted` None takes it when it is there and fits, with one warning when it does not fit.
        """
        if wanted and self.step is None:
            slots = cache.layers[0].keys.shape[2]
            raise ArtifactMismatchError(
                f"the artifact has no precompiled decode step for {slots} slots: ./build.sh "
                "--precompile makes one"
            )
        if self.step and self.artifact and wanted is not False:
            try:
                decode_ahead.install(model, decode_ahead.load(self.step, model, cache))
                self.artifact["precompiled"] = True
                return
            except decode_ahead.FAILURES as error:
                if wanted:
                    raise ArtifactMismatchError(str(error)) from error
                console.warn(f"{error}; tracing instead")
        import torch._inductor.compile_fx  # noqa: F401  or request 1 would pay for it

    def describe(self, counted: dict[str, int | None]) -> dict[str, Any]:
        """Return what was loaded, what was looked up, and what did not hit."""
        graphs = [{"cache": one.cache, "key": one.key, "hit": one.hit} for one in self.lookups]
        kernels = counts.compiled_kernels(self.watch)
        misses = hits.missed(self.lookups, self.built) + hits.made_anew(counted, kernels)
        return {"artifact": self.artifact, "graphs": graphs, "misses": misses}


def open_compiler(settings: RunSettings, target: Target, slots: int, console: Console) -> Compiler:
    """Set the compiler up, and load the artifact: must, must not, or if it can be."""
    bundle.configure()
    compiler = Compiler(counts.watch_compilation(), hits.watch_lookups())
    if settings.loading.mode == "load":
        try:
            compiler.load(settings, target, slots, console)
            return compiler
        except ScriptError as error:
            if settings.loading.must_load:
                raise
            console.warn(f"{error}; compiling instead")
    toolchain.prepare_toolchain(target.device, host_code=False, console=console)
    return compiler
