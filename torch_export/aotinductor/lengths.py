"""Which sequence lengths the graphs take, what a sequence is padded to, and what a run asks for.

A loaded package checks nothing: a length it was not exported for ends in a size error from inside a
kernel, or in no error at all. So everything is checked here, before the call.
"""

from typing import Any, NamedTuple

from aotinductor.flags import APPROACH, ExpectedShapeFlags, ShapeFlags
from common.artifact.disk import ArtifactPair, peek_manifest
from common.artifact.manifest import Manifest, differences, raise_if_different
from common.errors import UsageError

_REBUILD = "rebuild with ./build.sh"


class Bounds(NamedTuple):
    """The lengths of a graph in tokens; a static graph has one, `max_seq_len`."""

    example_seq_len: int
    dynamic_seq_len: bool
    min_seq_len: int
    max_seq_len: int
    dynamic_seq_multiple: int

    @property
    def buckets(self) -> list[int]:
        """Lengths that the graph also takes, few enough to meet each of them often."""
        buckets = [self.padded(self.min_seq_len)]
        while buckets[-1] < self.max_seq_len:
            buckets.append(min(2 * buckets[-1], self.max_seq_len))
        return buckets

    def padded(self, length: int, bucket_pad: bool = False) -> int:
        """Return the length that the graph is called with for `length` true tokens."""
        if bucket_pad:
            return min(bucket for bucket in self.buckets if bucket >= length)
        return -(-length // self.dynamic_seq_multiple) * self.dynamic_seq_multiple


def make_bounds(flags: ShapeFlags) -> Bounds:
    """Return the bounds that a graph is exported with."""
    if flags.dynamic_seq_len:
        return Bounds(**vars(flags))
    only = flags.example_seq_len
    return Bounds(only, False, 1, only, only)


def parse_bounds(recipe: dict[str, Any]) -> Bounds:
    """Return the bounds in a package's recipe."""
    return Bounds(*(recipe[name] for name in Bounds._fields))


class Plan(NamedTuple):
    """How requests are served: within which lengths, and as the package at hand was built, if any.

    `bucket_pad` pads to the bounds' buckets: fewer shapes, more work. `checkpoint` is what the
    metadata says of the one that it was built from, where the package is to be loaded: its origin
    is checked before anything is generated.
    """

    bounds: Bounds
    manifest: Manifest | None = None
    bucket_pad: bool = False
    checkpoint: dict[str, Any] | None = None

    @property
    def built(self) -> dict[str, Any]:
        return self.manifest.recipe if self.manifest else {}

    @property
    def slots(self) -> int | None:
        """Return the KV cache's slots, or None for the base graph."""
        return self.built.get("max_cache_len") if self.built.get("kv_cache") else None

    def padded(self, length: int) -> int:
        """Return the length that the graph is called with for `length` true tokens."""
        return self.bounds.padded(length, self.bucket_pad)

    def check_request(
        self, prompt_tokens: int, max_new_tokens: int, temperature: float = 0.0
    ) -> None:
        """Raise UsageError, naming the limit, for a request that the graphs cannot serve."""
        bounds, slots, longest = self.bounds, self.slots, self.bounds.max_seq_len
        static = not bounds.dynamic_seq_len
        if temperature and slots is None:
            raise UsageError(
                "--temperature samples from a package with a KV cache, the base graph is greedy: "
                "build one with ./build.sh --kv-cache, or leave --temperature out"
            )
        if static and max_new_tokens > 1:
            raise UsageError(
                f"--max-new-tokens {max_new_tokens} with a static package: it was exported for one "
                f"length, {longest} tokens, and every new token makes the sequence longer, so it "
                f"can give 1; use --max-new-tokens 1, or {_REBUILD} --dynamic-seq-len"
            )
        graph, kind = ("prefill", "--kv-cache ") if slots else ("the graph", "")
        taken = prompt_tokens if static or slots else prompt_tokens + max_new_tokens
        # into the KV cache goes the prompt's padding too, and never the last new token
        padded = self.padded(min(prompt_tokens, longest))
        stored = max(prompt_tokens + max_new_tokens - 1, padded)
        if prompt_tokens < bounds.min_seq_len:
            problem = f"{graph} takes at least {bounds.min_seq_len}"
            flags = f"{kind}--min-seq-len {prompt_tokens}"
        elif taken > longest:
            problem = f"{graph} takes at most {longest}"
            flags = f"{kind}--max-seq-len {bounds.padded(taken)}"
            if static:
                flags = f"--no-dynamic-seq-len --example-seq-len {taken}"
        elif slots and stored > slots:
            problem = f"they need {stored} slots of the KV cache, which has {slots}"
            flags = f"{kind}--max-cache-len {stored}"
        else:
            return
        raise UsageError(
            f"{prompt_tokens} prompt tokens + {max_new_tokens} new ones: {problem}; change the "
            f"prompt or --max-new-tokens, or {_REBUILD} {flags}"
        )


def find_plan(
    pair: ArtifactPair, asked: ExpectedShapeFlags, must_agree: bool, bucket_pad: bool = False
) -> Plan:
    """Return the sequence lengths of this run, and what the package at hand says of itself.

    They only choose padding, device and dtype, so unlike the package itself they need no trust.
    Flags that disagree with the metadata are an error, or, for a graph compiled at runtime, win.
    """
    manifest = peek_manifest(pair)
    if manifest is None or manifest.approach != APPROACH:
        return Plan(override(asked), None, bucket_pad)
    found = differences(manifest.recipe, asked.given, asked.given)
    if must_agree:
        raise_if_different(pair.path, found)
    bounds = override(asked) if found else parse_bounds(manifest.recipe)
    known = manifest.details.get("checkpoint") if must_agree else None
    return Plan(bounds, manifest, bucket_pad, known)


def override(flags: ExpectedShapeFlags) -> Bounds:
    """Return the bounds of a graph compiled at runtime: build's, changed by the flags given."""
    try:
        return make_bounds(ShapeFlags(**flags.given))
    except ValueError as error:
        raise UsageError(str(error)) from None
