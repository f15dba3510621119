"""One start, top to bottom: load the artifact, make the model, hand it the decode step."""

import atexit
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from common.artifact import disk
from common.artifact.disk import ArtifactPair
from common.artifact.store import fetch
from common.cli import Console
from common.compiler import toolchain
from common.compiler.caches import private_compiler_caches
from common.errors import ScriptError
from common.model.target import Target
from portable_cache import torch_private
from portable_cache.flags import APPROACH, CompileFlags, Wanted
from portable_cache.recipe import find_differences, settle
from portable_cache.start import tensors

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

    from portable_cache.start.compiler import Compiler


@dataclass(frozen=True)
class Opened:
    """A model that is ready to generate."""

    model: "PreTrainedModel"
    flags: CompileFlags  # settled
    compiler: "Compiler | None"  # None: eager
    make_cache: Callable[[int], "Cache | None"]  # for so many tokens


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
    from portable_cache.start import generation

    on_stage("imports")
    pair, flags, may_load = _choose_artifact(target, pair, wanted, console)
    compiler = None
    if wanted.mode != "eager":
        from portable_cache.start.compiler import prepare_to_compile, start_compiler

        compiler = start_compiler(target)
        if may_load:
            with _or_compile(wanted.must_load, console):
                compiler.load(pair, flags, target, wanted.trust, console)
        if not compiler.artifact:
            prepare_to_compile(target, console)
    on_stage("artifact")
    attention = generation.attention.NAME if compiler else generation.STOCK_ATTENTION
    model = generation.make_model(target, weights_there(), attention)
    on_stage("weights")
    if not compiler:
        return Opened(model, flags, None, lambda tokens: None)
    model.generation_config.compile_config = generation.compile_config(flags)
    compiler.use_decode_step(wanted.precompile, model, console)
    for line in torch_private.lost:
        console.warn(line)
    on_stage("compile")
    return Opened(
        model, flags, compiler, partial(compiler.make_cache, model, flags, wanted.must_load)
    )


def known_checkpoint(pair: ArtifactPair) -> dict[str, Any] | None:
    """Return what an artifact's metadata says of its checkpoint, for `choose_target`."""
    built = disk.peek_manifest(pair)
    return built and built.details.get("checkpoint")


@contextmanager
def _or_compile(insists: bool, console: Console) -> Iterator[None]:
    """Within, an artifact that can't be loaded is one warning where nobody insists on it."""
    try:
        yield
    except ScriptError as error:
        if insists:
            raise
        console.warn(f"{error}; compiling instead")


def _choose_artifact(
    target: Target, pair: ArtifactPair, wanted: Wanted, console: Console
) -> tuple[ArtifactPair, CompileFlags, bool]:
    """Return the artifact, from the store if one is named, the settled flags, and whether to load.

    What is not told is taken from the artifact, else from the defaults.
    """
    told, may_load = wanted.compilation, wanted.mode == "load"
    if may_load:
        unlike = partial(find_differences, target=target, flags=told)
        may_load = False
        with _or_compile(wanted.must_load, console):
            pair = fetch(pair, wanted.fetch_from, APPROACH, unlike, wanted.trust, console)
            may_load = True
    return pair, settle(told, disk.peek_manifest(pair)), may_load


def own_compiler_caches() -> None:
    """Give this process compiler caches that nobody else can write to, until it ends."""
    until_the_end = ExitStack()
    until_the_end.enter_context(private_compiler_caches())
    atexit.register(until_the_end.close)
