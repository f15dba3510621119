"""Drawing a token from logits, limited as transformers' `generate` does it; in numpy."""

from typing import NamedTuple

import numpy as np


class Sampler(NamedTuple):
    """Draws tokens; two with the same seed draw the same ones."""

    temperature: float
    top_k: int = 0  # 0 is off
    top_p: float = 1.0  # 1 is off
    seed: int = 0

    def generator(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    def draw(self, logits: np.ndarray, generator: np.random.Generator) -> int:
        """Return a token id for logits (vocab,) float32."""
        if self.top_k or self.top_p < 1:
            logits, ids = self.limit(logits)
        else:
            ids = None
        # of scores with noise of Gumbel's kind the largest is a draw from their softmax: one pass
        noise = generator.random(len(logits), np.float32)
        with np.errstate(divide="ignore", over="ignore"):
            np.log(noise, out=noise)
            np.negative(noise, out=noise)
            np.log(noise, out=noise)
            # a float32 that is 0 would divide the likeliest one's 0
            scores = (logits - logits.max()) / np.float32(max(self.temperature, 1e-37))
        chosen = int(np.argmax(scores - noise))
        return chosen if ids is None else int(ids[chosen])

    def limit(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the logits that the limits leave, and their token ids."""
        ids = np.arange(len(logits))
        if 0 < self.top_k < len(logits):  # the largest, and what equals the smallest of them
            smallest = np.partition(logits, -self.top_k)[-self.top_k]
            ids = np.flatnonzero(logits >= smallest)
        if self.top_p < 1:  # the fewest most likely ones that hold this share together
            kept = logits[ids].astype(np.float64)
            order = np.argsort(-kept, kind="stable")
            weights = np.exp((kept[order] - kept[order[0]]) / self.temperature)
            held = np.cumsum(weights) / weights.sum()
            ids = ids[order[: int(np.searchsorted(held, self.top_p)) + 1]]
        return logits[ids], ids
