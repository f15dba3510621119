"""Everything of this folder that is about `torch.compiler`'s portable cache.

from portable_cache import load

model = load("cache.bin", model="meta-llama/Llama-3.2-3B-Instruct")
model.generate(**inputs, past_key_values=model.new_cache(tokens=200), max_new_tokens=64)
"""

import atexit
import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def no_collections() -> Iterator[None]:
    """Within, Python looks for no garbage.

    Among the million objects that importing torch and transformers makes there is none, and looking
    for it is a sixth of that time.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def load(
    path: str | Path, model: str | None = None, device: str = "auto", dtype: str = "auto",
    trust: bool = False, expect_sha256: str | None = None,
) -> "PreTrainedModel":  # fmt: skip
    """Return transformers' model, whose `generate` runs what the artifact at `path` brings.

    `model` is a Hub id, a checkpoint folder or a preset; without it, the one that the artifact was
    built from. `trust` consents to an artifact that others could have written, `expect_sha256` pins
    its metadata file. The model has one method more: `new_cache(tokens=N)` returns a KV cache that
    `generate` hits with, for prompts and new tokens of N at most, of batch 1. Raises the exceptions
    of common.errors, by kind of problem.
    """
    with no_collections():
        from common.artifact.disk import TrustFlags, read_manifest
        from common.cli import Console, SharedFlags
        from common.compiler.caches import private_compiler_caches
        from portable_cache.flags import CacheFileFlags, Wanted
        from portable_cache.start import opening

        # that nobody else can write to, until the process ends; the program's own temporary files
        # are to outlive it
        caches = ExitStack()
        caches.enter_context(private_compiler_caches(temporary_files=False))
        atexit.register(caches.close)
        console = Console(quiet=True)
        pair, flags = CacheFileFlags(Path(path)).pair(), TrustFlags(trust, expect_sha256)
        shared = SharedFlags(model or read_manifest(pair, flags).model["id"], device, dtype)
        target = opening.choose_built_target(shared, pair, console)
        wanted = Wanted(trust=flags)
        opened = opening.open_model(target, pair, wanted, console)
    opened.model.new_cache = opened.make_cache
    return opened.model
