"""Sampling draws from what transformers' own warpers leave, and a seed repeats it."""

import pytest
import torch
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from aotinductor.kv_generation import CacheShape, Generator, Sampler
from common.cli import SamplingFlags

DRAWS = 2000
LIMITS = [
    (1.0, 0, 1.0),
    (0.7, 0, 1.0),
    (1.3, 5, 1.0),
    (1.0, 0, 0.6),
    (0.8, 50, 0.9),
    (1.0, 1000, 0.01),  # more than the vocabulary, and less than the likeliest token
]


def make_sampler(*limits, seed: int) -> Sampler:
    return Sampler(SamplingFlags(*limits), torch.Generator().manual_seed(seed))


def make_logits(seed: int) -> torch.Tensor:
    """Return (1, 64) logits with a tie among the large ones."""
    logits = torch.randn(1, 64, generator=torch.Generator().manual_seed(seed)) * 2
    return logits.index_fill(1, torch.tensor([3, 40]), logits.max().item() - 0.5)


def transformers_weights(logits, temperature, top_k, top_p) -> torch.Tensor:
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    for warper in warpers:
        logits = warper(None, logits)
    return logits.softmax(-1)


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_distribution_is_that_of_transformers(limits, dtype):
    sampler = make_sampler(*limits, seed=0)
    for seed in range(20):
        logits = make_logits(seed).to(dtype)
        expected = transformers_weights(logits.float(), *limits)
        torch.testing.assert_close(sampler.warp(logits).softmax(-1), expected)


@pytest.mark.parametrize("limits", LIMITS)
def test_draws_follow_the_distribution(limits):
    logits = make_logits(0)
    expected = transformers_weights(logits, *limits)[0].double()
    sampler = make_sampler(*limits, seed=1)
    drawn = torch.cat([sampler.draw(logits) for _ in range(DRAWS)]).flatten()
    counts = drawn.bincount(minlength=expected.numel())
    assert (counts[expected == 0] == 0).all()
    # five standard deviations of a binomial, and one draw for those that are hardly ever drawn
    bound = 5 * (DRAWS * expected * (1 - expected)).sqrt() + 1
    assert ((counts - DRAWS * expected).abs() <= bound).all()


def test_a_seed_repeats_its_draws_and_another_one_does_not():
    def draws(seed):
        sampler = make_sampler(1.0, seed=seed)
        return [sampler.draw(make_logits(0)).item() for _ in range(40)]

    assert draws(3) == draws(3)
    assert draws(3) != draws(4)


class Recorder:
    """A graph that keeps the token it is given, and puts its own greedy choice in its place."""

    def __init__(self, token_at: int):
        self.token_at = token_at
        self.given = []

    def __call__(self, inputs):
        token = inputs[self.token_at]
        self.given.append(token.item())
        logits = make_logits(len(self.given))
        token.copy_(logits.argmax(-1, keepdim=True))
        return [logits]


def test_the_drawn_token_is_the_one_that_decode_goes_on_from():
    def generate(seed):
        decode = Recorder(token_at=0)
        cache = CacheShape(layers=1, kv_heads=1, slots=64, head_dim=2)
        generator = Generator(Recorder(token_at=1), decode, cache, torch.zeros(2, 64, 2))
        streamed = []
        sampler = make_sampler(1.0, seed=seed)
        tokens = generator.generate([1, 2], 8, 32, on_token=streamed.append, sampler=sampler)
        assert streamed == tokens
        assert decode.given == tokens[:-1]
        return tokens

    assert generate(5) == generate(5)
    assert generate(5) != generate(6)
