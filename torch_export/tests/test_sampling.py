"""Sampling draws from what transformers' own warpers leave, and a seed repeats it."""

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from aotinductor.start.sampling import Sampler

DRAWS = 2000
LIMITS = [
    (1.0, 0, 1.0),
    (0.7, 0, 1.0),
    (1.3, 5, 1.0),
    (1.0, 0, 0.6),
    (0.8, 50, 0.9),
    (1.0, 1000, 0.01),  # more than the vocabulary, and less than the likeliest token
]


def make_logits(seed: int) -> np.ndarray:
    """Return (64,) float32 logits with a tie among the large ones."""
    logits = np.random.default_rng(seed).standard_normal(64, np.float32) * 2
    logits[[3, 40]] = logits.max() - 0.5
    return logits


def transformers_weights(logits, temperature, top_k, top_p) -> np.ndarray:
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    scores = torch.from_numpy(logits)[None]
    for warper in warpers:
        scores = warper(None, scores)
    return scores.softmax(-1)[0].double().numpy()


@pytest.mark.parametrize("limits", LIMITS)
def test_the_limits_leave_what_transformers_leaves(limits):
    for seed in range(20):
        logits = make_logits(seed)
        kept, ids = Sampler(*limits).limit(logits)
        expected = logits[transformers_weights(logits, *limits) > 0]
        # of equal ones that a limit parts, either may stay
        assert sorted(kept) == sorted(expected)
        assert (logits[ids] == kept).all()
        assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("limits", LIMITS)
def test_draws_follow_the_distribution_of_transformers(limits):
    logits = make_logits(0)
    expected = transformers_weights(logits, *limits)
    sampler = Sampler(*limits, seed=1)
    generator = sampler.generator()
    drawn = [sampler.draw(logits, generator) for _ in range(DRAWS)]
    counts = np.bincount(drawn, minlength=len(expected))
    # equal logits together: of those that a limit parts, either may stay
    alike = logits[:, None] == np.unique(logits)  # (vocab, values)
    expected, counts = expected @ alike, counts @ alike
    assert (counts[expected == 0] == 0).all()
    # five standard deviations of a binomial, and one draw for those that are hardly ever drawn
    bound = 5 * np.sqrt(DRAWS * expected * (1 - expected)) + 1
    assert (np.abs(counts - DRAWS * expected) <= bound).all()


@pytest.mark.parametrize("temperature", (1e-5, 1e-30, 1e-300))
def test_a_temperature_near_zero_draws_the_likeliest_token(temperature):
    for seed in range(20):
        logits = make_logits(seed)
        for limits in ((0, 1.0), (5, 0.9)):
            sampler = Sampler(temperature, *limits, seed)
            assert logits[sampler.draw(logits, sampler.generator())] == logits.max()


def test_a_seed_repeats_its_draws_and_another_one_does_not():
    def draws(seed):
        sampler = Sampler(1.0, seed=seed)
        generator = sampler.generator()
        return [sampler.draw(make_logits(0), generator) for _ in range(40)]

    assert draws(3) == draws(3)
    assert draws(3) != draws(4)
