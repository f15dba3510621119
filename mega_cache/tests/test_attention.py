"""Attention and mask for a fixed-length cache: what transformers computes, for any Llama."""

import random

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import CompileConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from portable_cache import torch_private
from portable_cache.start import attention
from portable_cache.start.generation import make_cache, make_generate

SLOTS, NEW_TOKENS = 96, 12
SHAPES = {
    "grouped, 4 heads to one": {"num_attention_heads": 8, "num_key_value_heads": 2},
    "grouped, 3 heads to one, biases": {
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "one KV head, untied": {
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
    },
    "no groups, heads of another size": {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 24,
    },
}


def llama(shape: dict, attn_implementation: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    attention.register()
    config = LlamaConfig(
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=2,
        vocab_size=300,
        initializer_range=0.25,  # at the usual 0.02 the tokens would not depend on the context
        attn_implementation=attn_implementation,
        **{"tie_word_embeddings": True} | shape,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(params=SHAPES)
def served(request):
    """Return greedy tokens of the same model, eager and compiled over one fixed-length cache."""
    torch._dynamo.reset()
    eager, own = (llama(SHAPES[request.param], name) for name in ("sdpa", attention.NAME))
    # traced as for Inductor, and run as traced: what is compiled is another test's matter
    compiling = CompileConfig(backend="eager", fullgraph=True, dynamic=None, mode=None)
    compiling._compile_all_devices = True
    same = {"max_new_tokens": NEW_TOKENS, "pad_token_id": 0, "eos_token_id": None}
    eager.generation_config = GenerationConfig(disable_compile=True, **same)
    own.generation_config = GenerationConfig(compile_config=compiling, **same)
    torch_private.forget_compiled_state(own)
    cache = make_cache(own, SLOTS)

    def tokens(prompt: list[int], padding: int) -> tuple[list[int], list[int]]:
        with torch.no_grad():
            return tuple(
                make_generate(model, cache_of, 0, lambda prompt: len(prompt) + padding)(
                    prompt, lambda token_id: None
                )
                for model, cache_of in ((eager, None), (own, cache))
            )

    return tokens


def test_tokens_equal_eager_with_any_padding_and_one_graph(served):
    numbers = random.Random(1)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    seen = set()
    for padding in (0, 1, 5, 17, 34, 0):
        for length in (1, 2, 33):
            prompt = [numbers.randrange(1, 300) for _ in range(length)]
            expected, found = served(prompt, padding)
            assert found == expected, (length, padding)
            seen.update(found)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1
    assert len(seen) > 50  # the model says something, so that equality means something


@pytest.mark.parametrize(("kv_heads", "group", "width"), [(2, 4, 32), (8, 3, 128), (1, 1, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_what_sdpa_computes(kv_heads, group, width, dtype):
    torch.manual_seed(0)
    rows = torch.randn(1, kv_heads, group, width)
    key, value = torch.randn(2, 1, kv_heads, 40, width)
    seen = torch.zeros(1, 1, 1, 40, dtype=torch.bool)
    seen[..., 3:29] = True
    expected = scaled_dot_product_attention(rows, key, value, attn_mask=seen, scale=0.2)
    found = attention.attend_in_sums(*(x.to(dtype) for x in (rows, key, value)), seen, 0.2)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert torch.allclose(found.float(), expected, atol=tolerance)


def test_slots_beyond_the_tokens_never_reach_the_output():
    rows, (key, value) = torch.randn(1, 2, 2, 8), torch.randn(2, 1, 2, 12, 8)
    seen = torch.arange(12) < 7
    clean = attention.attend_in_sums(rows, key, value, seen, 0.3)
    key[:, :, 7:], value[:, :, 7:] = 1e4, -1e4
    assert torch.equal(attention.attend_in_sums(rows, key, value, seen, 0.3), clean)
