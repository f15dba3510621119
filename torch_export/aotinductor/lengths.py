"""Which sequence lengths the graphs take, what a sequence is padded to, and what a run asks for.

A loaded package checks nothing: a length it was not exported for ends in a size error from inside a
kernel, or in no error at all. So everything is checked here, before the call.
"""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from aotinductor.flags import APPROACH, ExpectedShapeFlags, RunSettings, ShapeFlags
from common.artifacts import peek_manifest
from common.cli import DTYPES, SharedFlags
from common.errors import ArtifactDamagedError, UsageError
from common.manifest import Difference, differences, raise_if_different

_REBUILD = "rebuild with ./build.sh"


@dataclass(frozen=True)
class Bounds:
    """The lengths of a graph in tokens; a static graph has one, `max_seq_len`.

    `buckets` are lengths that it also takes, few enough to meet each of them often.
    """

    dynamic_seq_len: bool
    min_seq_len: int
    max_seq_len: int
    dynamic_seq_multiple: int
    buckets: tuple[int, ...]

    @property
    def min_padded(self) -> int:
        return self.padded(self.min_seq_len)

    def padded(self, length: int, bucket_pad: bool = False) -> int:
        """Return the length that the graph is called with for `length` true tokens."""
        if bucket_pad:
            return min(bucket for bucket in self.buckets if bucket >= length)
        return -(-length // self.dynamic_seq_multiple) * self.dynamic_seq_multiple

    def example_and_dim(self, example_seq_len: int) -> tuple[int, dict | None]:
        """Return the length to trace with, and what is dynamic on dimension 1; None is static."""
        if not self.dynamic_seq_len:
            return self.max_seq_len, None
        import torch  # a lean start checks bounds without needing torch.export

        multiple = self.dynamic_seq_multiple
        first, last = self.min_padded // multiple, self.max_seq_len // multiple
        blocks = torch.export.Dim("blocks", min=first, max=last)
        # an example of one block would be taken for a constant, and so would one that is as long as
        # the KV cache: it stays below the longest
        longest = max(last - 1, first, 2)
        example = min(max(example_seq_len // multiple, first, 2), longest, last)
        return example * multiple, {1: blocks if multiple == 1 else multiple * blocks}

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"buckets": list(self.buckets)}


def make_bounds(flags: ShapeFlags) -> Bounds:
    """Return the bounds that a graph is exported with."""
    if not flags.dynamic_seq_len:
        length = flags.example_seq_len
        return Bounds(False, 1, length, length, (length,))
    multiple, longest = flags.dynamic_seq_multiple, flags.max_seq_len
    buckets = [-(-flags.min_seq_len // multiple) * multiple]
    while buckets[-1] * 2 < longest:
        buckets.append(buckets[-1] * 2)
    return Bounds(True, flags.min_seq_len, longest, multiple, (*buckets, longest))


def parse_bounds(recipe: dict[str, Any]) -> Bounds:
    """Return the bounds in a package's recipe; raise ArtifactDamagedError if there are none."""
    found = {field.name: recipe.get(field.name) for field in fields(Bounds)}
    lengths = [found["min_seq_len"], found["max_seq_len"], found["dynamic_seq_multiple"]]
    buckets = found["buckets"] if isinstance(found["buckets"], list) else []
    valid = all(type(number) is int and number > 0 for number in (*lengths, *buckets))
    if not valid or not buckets or type(found["dynamic_seq_len"]) is not bool:
        raise ArtifactDamagedError(f"the metadata's recipe has no sequence lengths: {_REBUILD}")
    bounds = Bounds(**found | {"buckets": tuple(buckets)})
    multiples = all(length % bounds.dynamic_seq_multiple == 0 for length in buckets)
    if not multiples or max(buckets) != bounds.max_seq_len:
        raise ArtifactDamagedError(f"the metadata's sequence lengths disagree: {_REBUILD}")
    return bounds


def override(flags: ExpectedShapeFlags) -> Bounds:
    """Return the bounds of a graph compiled at runtime: build's, changed by the flags given."""
    given = {name: value for name, value in asdict(flags).items() if value is not None}
    try:
        return make_bounds(replace(ShapeFlags(), **given))
    except ValueError as error:
        raise UsageError(str(error)) from None


@dataclass(frozen=True)
class Plan:
    """How this run serves a request: within which lengths, and as which package was built.

    `built` is the recipe of the package at hand and `dtype` its weights', {} and None without one.
    """

    bounds: Bounds
    built: dict[str, Any]
    dtype: str | None = None

    @property
    def slots(self) -> int | None:
        """Return the KV cache's slots, or None for the base graph."""
        return self.built.get("max_cache_len") if self.built.get("kv_cache") else None

    def check_request(self, prompt_tokens: int, max_new_tokens: int, bucket_pad: bool) -> None:
        """Raise UsageError, naming the limit, for a request that the graphs cannot serve."""
        if self.slots is None:
            check_request(self.bounds, prompt_tokens, max_new_tokens)
        else:
            check_kv_request(self.bounds, self.slots, prompt_tokens, max_new_tokens, bucket_pad)

    def fill_in(self, shared: SharedFlags) -> SharedFlags:
        """Return the flags with the package's device and dtype where the user left them open."""
        # where there is no GPU, a package for one is refused with all that differs
        on_cpu = shared.device == "auto" and self.built.get("device") == "cpu"
        told = shared.dtype != "auto" or self.dtype not in DTYPES
        return replace(
            shared,
            device="cpu" if on_cpu else shared.device,
            dtype=shared.dtype if told else self.dtype,
        )


def find_plan(settings: RunSettings) -> Plan:
    """Return the sequence lengths of this run, and the recipe of the package at hand.

    They only choose padding, device and dtype, so unlike the package itself they need no trust.
    Flags that disagree with the metadata are an error, or, for a graph compiled at runtime, win.
    """
    manifest = peek_manifest(settings.files.pair())
    if manifest is None or manifest.approach != APPROACH:
        return Plan(override(settings.shape), {})
    built = manifest.recipe
    found = shape_differences(built, settings)
    if settings.mode == "load":
        raise_if_different(settings.files.package_path, found)
    bounds = override(settings.shape) if found else parse_bounds(built)
    return Plan(bounds, built, manifest.model.get("dtype"))


def shape_differences(built: dict[str, Any], settings: RunSettings) -> list[Difference]:
    """Return the lengths that the user asks for and that the package was not built with."""
    given = {name: value for name, value in asdict(settings.shape).items() if value is not None}
    return differences(built, given, given)


def check_request(bounds: Bounds, prompt_tokens: int, max_new_tokens: int) -> None:
    """Raise UsageError if the graph cannot serve this request, saying which limit it meets."""
    total = prompt_tokens + max_new_tokens
    if not bounds.dynamic_seq_len:
        _check_static(bounds.max_seq_len, prompt_tokens, max_new_tokens)
    elif prompt_tokens < bounds.min_seq_len:
        raise UsageError(
            f"the prompt has {prompt_tokens} tokens, the graph takes at least "
            f"{bounds.min_seq_len}: use a longer prompt, or {_REBUILD} "
            f"--min-seq-len {prompt_tokens}"
        )
    elif total > bounds.max_seq_len:
        multiple = bounds.dynamic_seq_multiple
        raise UsageError(
            f"{prompt_tokens} prompt tokens + {max_new_tokens} new ones are more than the "
            f"{bounds.max_seq_len} tokens that the graph takes: shorten them, or {_REBUILD} "
            f"--max-seq-len {-(-total // multiple) * multiple}"
        )


def check_kv_request(
    bounds: Bounds, slots: int, prompt_tokens: int, max_new_tokens: int, bucket_pad: bool
) -> None:
    """Raise UsageError if prefill or the KV cache cannot take this request."""
    needed = prompt_tokens + max_new_tokens - 1  # the last new token is never stored
    if not bounds.min_seq_len <= prompt_tokens <= bounds.max_seq_len:
        raise UsageError(
            f"the prompt has {prompt_tokens} tokens, prefill takes {bounds.min_seq_len} to "
            f"{bounds.max_seq_len}: change the prompt, or {_REBUILD} --kv-cache with other "
            "--min-seq-len and --max-seq-len"
        )
    needed = max(needed, bounds.padded(prompt_tokens, bucket_pad))
    if needed > slots:
        raise UsageError(
            f"{prompt_tokens} prompt tokens + {max_new_tokens} new ones need {needed} slots of the "
            f"KV cache, which has {slots}: shorten them, or {_REBUILD} --kv-cache "
            f"--max-cache-len {needed}"
        )


def _check_static(length: int, prompt_tokens: int, max_new_tokens: int) -> None:
    if max_new_tokens > 1:
        raise UsageError(
            f"--max-new-tokens {max_new_tokens} with a static package: it was exported for one "
            f"length, {length} tokens, and every new token makes the sequence longer, so it can "
            f"give 1; use --max-new-tokens 1, or {_REBUILD} --dynamic-seq-len"
        )
    if prompt_tokens > length:
        raise UsageError(
            f"the prompt has {prompt_tokens} tokens, the static package takes {length}: shorten "
            f"it, or {_REBUILD} --no-dynamic-seq-len --example-seq-len {prompt_tokens}"
        )
