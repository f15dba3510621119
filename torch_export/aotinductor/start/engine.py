"""What a program of one's own is given: text or token ids in, text or token ids out."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aotinductor.lengths import Plan
from aotinductor.start.kv_engine import KvEngine
from common.model.target import Target
from common.model.tokenizer import TextCodec, TextStream

if TYPE_CHECKING:
    from aotinductor.start.base_engine import BaseEngine


class Engine:
    """A loaded package over a checkpoint's weights. One sequence at a time, in one thread."""

    def __init__(
        self, generator: "KvEngine | BaseEngine", target: Target, plan: Plan, codec: TextCodec,
        artifact: Mapping[str, Any],
    ):  # fmt: skip
        self.generator, self.target, self.plan, self.codec = generator, target, plan, codec
        self.artifact = artifact  # what is told of the package: name, bytes, library, ...

    def stream(
        self, prompt: str | Sequence[Mapping[str, str]], max_new_tokens: int = 128, **sampling: Any
    ) -> Iterator[str]:
        """Yield the text that follows a prompt, piece by piece; together they are the whole text.

        A list of messages ({"role": ..., "content": ...}) goes through the chat template;
        `sampling` as for `generate`.
        """
        text = TextStream(self.codec)
        for token_id in self.tokens(self.codec.encode(prompt), max_new_tokens, **sampling):
            if piece := text.add(token_id):
                yield piece
        if piece := text.end():
            yield piece

    def generate(
        self, prompt: Sequence[int], max_new_tokens: int = 128, **sampling: Any
    ) -> list[int]:
        """Return the token ids that follow a prompt's, a stop id included.

        `sampling`: temperature (0 is greedy), top_k, top_p, seed, and stop_ids (the checkpoint's).
        Raises UsageError for what the package cannot serve.
        """
        return list(self.tokens(prompt, max_new_tokens, **sampling))

    def tokens(
        self, prompt: Sequence[int], max_new_tokens: int = 128,
        stop_ids: Sequence[int] | None = None, temperature: float = 0.0, **limits: Any,
    ) -> Iterator[int]:  # fmt: skip
        """Yield what `generate` returns, each id as it arrives."""
        self.plan.check_request(len(prompt), max_new_tokens, temperature)
        self.codec.check_ids(prompt)
        stops = self.target.checkpoint.eos_token_ids if stop_ids is None else stop_ids
        if not isinstance(self.generator, KvEngine):
            yield from self.generator.tokens(prompt, max_new_tokens, stops)
            return
        sampler = None
        if temperature:
            from aotinductor.start.sampling import Sampler  # brings numpy

            sampler = Sampler(temperature, **limits)
        padded = self.plan.padded(len(prompt))
        yield from self.generator.tokens(prompt, padded, max_new_tokens, stops, sampler)
