"""One start, top to bottom: load the artifact, make the model, hand it the decode step."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from common.artifact import disk, manifest
from common.artifact.disk import ArtifactPair
from common.artifact.store import fetch
from common.cli import Console, SharedFlags
from common.compiler import counts, toolchain
from common.errors import ArtifactDamagedError, ArtifactMismatchError, ScriptError
from common.machine import environment
from common.model.target import Target, as_built, choose_target
from portable_cache import torch_private
from portable_cache.flags import APPROACH, CompileFlags, Wanted
from portable_cache.recipe import find_differences, settle
from portable_cache.start import tensors

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

    from portable_cache.start.decode_step import SavedStep

# counts of what is made in a process where everything should have been loaded
_MADE_ANEW = {
    "unique_graphs": "graphs traced",
    "fxgraph_cache_miss": "graphs compiled",
    "kernels_compiled": "kernels compiled",
    "kernels_tuned": "kernels tuned",
    "helpers_built": "C helpers built",
    "compile_workers": "pools of compile workers started",
}


@dataclass(frozen=True)
class Opened:
    """A model that is ready to generate, and what it runs."""

    model: "PreTrainedModel"
    flags: CompileFlags  # settled
    watch: counts.Watch | None  # what the compiler does in this process; None: eager
    artifact: dict[str, Any] | None  # as a run's result tells it
    must_hit: bool

    def make_cache(self, tokens: int) -> "Cache | None":
        """Return the shortest KV cache that was warmed up and holds `tokens`, else one for them.

        The decode step serves any, a traced graph may be one cache length's. None in eager. Raises
        ArtifactMismatchError where that must hit and cannot.
        """
        from portable_cache.start import generation

        if self.watch is None:
            return None
        slots, longest = self.flags.slots_for(tokens), max(self.flags.cache_lengths())
        if self.artifact:
            self.artifact["slots"] = slots
            if slots > longest and self.must_hit and not self.artifact["precompiled"]:
                raise ArtifactMismatchError(
                    f"prompt and new tokens need {slots} slots, the longest KV cache of "
                    f"{self.artifact['name']} has {longest}: shorten them, or rebuild with a "
                    "larger --max-cache-len"
                )
        return generation.make_cache(self.model, slots)

    def describe(self, counted: dict[str, int | None], may_trace: bool) -> dict[str, Any]:
        """Return what was loaded, and a line for each kind of thing that was made anew.

        `may_trace`: a graph that was traced and then found in the caches is a hit.
        """
        misses = []
        if self.watch:
            names = [one for one in _MADE_ANEW if not (may_trace and one == "unique_graphs")]
            misses = [f"{counted[one]} {_MADE_ANEW[one]}" for one in names if counted[one]]
            if kernels := counts.compiled_kernels(self.watch):
                misses.append(", ".join(path.name for path in kernels[:5]))
        return {"artifact": self.artifact, "misses": misses}


def open_model(
    target: Target, pair: ArtifactPair, wanted: Wanted, console: Console,
    on_stage: Callable[[str], None] = lambda name: None,
) -> Opened:  # fmt: skip
    """Bring model and artifact into this process; `on_stage` is called as each stage ends."""
    toolchain.quieten(target.device, console)
    target.checkpoint.require_weights()
    torch.empty(1, device=target.device)  # opens the device
    on_stage("device")
    weights_there = tensors.start_upload(target)
    on_stage("weights")
    # late: the weights are on their way meanwhile
    from portable_cache.start import bundle, generation

    on_stage("imports")
    eager, artifact, step, watch = wanted.mode == "eager", None, None, None
    if not eager:
        bundle.configure(target.device)
        watch = counts.watch_compilation()
    if wanted.mode == "load":
        unlike = partial(find_differences, target=target, flags=wanted.compilation)
        try:
            pair = fetch(pair, wanted.fetch_from, APPROACH, unlike, wanted.trust, console)
            artifact, step = _load(pair, unlike, watch, wanted, console)
        except ScriptError as error:
            if wanted.must_load:
                raise
            console.warn(f"{error}; compiling instead")
    if not (eager or artifact):
        toolchain.prepare_toolchain(target.device, host_code=False, console=console)
    on_stage("artifact")
    attention = generation.STOCK_ATTENTION if eager else generation.attention.NAME
    model = generation.make_model(target, weights_there(), attention)
    on_stage("weights")
    # what is not told is as the artifact was built
    flags = settle(wanted.compilation, disk.peek_manifest(pair))
    if not eager:
        model.generation_config.compile_config = generation.compile_config(flags)
        if artifact:
            artifact["precompiled"] = _use_decode_step(model, step, wanted.precompile, console)
        if not (artifact and artifact["precompiled"]):
            assert torch_private.compile_fx  # imported now, or request 1 would pay for it
        for line in torch_private.lost:
            console.warn(line)
    on_stage("compile")
    return Opened(model, flags, watch, artifact, wanted.must_load)


def choose_built_target(shared: SharedFlags, pair: ArtifactPair, console: Console) -> Target:
    """Return what the flags name, as the artifact has it where they leave something open."""
    built = disk.peek_manifest(pair)
    known = built.details.get("checkpoint") if built else None
    return choose_target(as_built(shared, built), console, known)


def _load(
    pair: ArtifactPair, unlike: Callable[[manifest.Manifest], list[manifest.Difference]],
    watch: counts.Watch, wanted: Wanted, console: Console,
) -> tuple[dict[str, Any], "SavedStep | None"]:  # fmt: skip
    """Check the artifact against this run, then load it; each doubt is an error of its kind."""
    from portable_cache.start import bundle, decode_step

    bundle.check_caches_are_on()
    with disk.open_verified(pair, APPROACH, wanted.trust, console) as verified:
        built = verified.manifest
        manifest.raise_if_different(pair.path, unlike(built))
        for one in manifest.differences(built.environment, environment(), ("driver",)):
            console.warn(f"{manifest.describe([one])}: usually harmless")
        blob = disk.read_blob(verified)
    try:
        step, restored = bundle.load_bundle(blob)
    except (ArtifactDamagedError, ArtifactMismatchError) as error:
        raise type(error)(f"{pair.path}: {error}") from error
    watch.restored.update(restored)
    artifact = {
        "name": pair.path.name,
        **built.file,
        "verify_seconds": verified.verify_seconds,
        "entries": built.details["entries"],
    }
    if step is None:
        return artifact, None
    return artifact, decode_step.SavedStep(step, built.details["decode_step"])


def _use_decode_step(
    model: "PreTrainedModel", step: "SavedStep | None", wanted: bool | None, console: Console
) -> bool:
    """Hand the artifact's decode step to `generate`, which traces one without it.

    `wanted` None takes it when it is there and fits, with one warning when it does not fit.
    """
    from portable_cache.start import decode_step

    if wanted and step is None:
        raise ArtifactMismatchError(
            "the artifact has no precompiled decode step: ./build.sh --precompile makes one"
        )
    if step is None or wanted is False:
        return False
    try:
        torch_private.use_decode_step(model, decode_step.load(step, model))
    except (ArtifactMismatchError, torch_private.MissingNameError) as error:
        if wanted:
            raise ArtifactMismatchError(str(error)) from error
        console.warn(f"{error}; tracing instead")
        return False
    return True
