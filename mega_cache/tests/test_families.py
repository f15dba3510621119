"""Causal models of transformers over our static KV cache: eager's tokens, one graph, and a step."""

import random

import pytest
import torch
import transformers
from transformers import CompileConfig, GenerationConfig

from common.errors import UsageError
from portable_cache import torch_private
from portable_cache.build import export_step
from portable_cache.flags import CompileFlags
from portable_cache.start import attention
from portable_cache.start.decode_step import state_of, tensors_in
from portable_cache.start.generation import make_cache, make_generate

SLOTS, NEW_TOKENS, WINDOW = 96, 12, 16
SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 300,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "initializer_range": 0.3, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "mistral with a window": {"sliding_window": WINDOW},
    "qwen2": {},
    "qwen2 with a window": {
        "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1,
    },
    "qwen3": {"head_dim": 16},
    "smollm3": {"no_rope_layers": [1, 0]},
    "gemma3_text": {
        "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": False,
    },
    "granite": {},
    "phi3": {},
    "olmo2": {},
}  # fmt: skip


def models(family: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return a small model twice, with transformers' attention and with ours."""
    kind, attention_names = family.partition(" ")[0], ("sdpa", attention.NAME)
    attention.register()
    made = []
    for name in attention_names:
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind, **SMALL | FAMILIES[family])
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=name)
        made.append(model.eval())
    return made[0], made[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_eagers_beyond_any_window_with_one_graph(family):
    torch._dynamo.reset()
    eager, own = models(family)
    compiling = CompileConfig(backend="eager", fullgraph=True, dynamic=None, mode=None)
    torch_private.compile_everywhere(compiling)
    same = {"max_new_tokens": NEW_TOKENS, "pad_token_id": 0, "eos_token_id": None}
    eager.generation_config = GenerationConfig(disable_compile=True, **same)
    own.generation_config = GenerationConfig(compile_config=compiling, **same)
    cache, numbers, seen = make_cache(own, SLOTS), random.Random(1), set()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.no_grad():
        for length, padding in ((1, 0), (9, 0), (9, 4), (30, 0), (50, 3)):
            prompt = [numbers.randrange(1, 300) for _ in range(length)]
            expected, found = (
                make_generate(model, cache_of, 0, lambda prompt, more=padding: len(prompt) + more)(
                    prompt, lambda token_id: None
                )
                for model, cache_of in ((eager, None), (own, cache))
            )
            assert found == expected, (length, padding)
            seen.update(found)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1
    assert len(seen) > 15  # the model says something, so that equality means something


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decode_step_exports_for_every_cache_length(family):
    _, own = models(family)
    with torch.no_grad():
        call = export_step.capture_call(own, CompileFlags(max_cache_len=SLOTS), SLOTS)
        program = export_step.export(own, call, SLOTS)
    inputs = list(tensors_in(call.arguments)) + state_of(call.cache)
    assert len(program.graph_signature.user_inputs) == len(inputs)
    assert len(program.range_constraints) == 1  # the slots are the one size that is open


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("mamba", "MambaForCausalLM has no attention heads"),
        ("gemma2", "Gemma2ForCausalLM has soft-capped attention"),
        ("llama4_text", "Llama4ForCausalLM has attention in chunks"),
    ],
)
def test_what_no_static_cache_serves_is_refused_by_name(kind, words):
    config = transformers.AutoConfig.for_model(kind)
    with torch.device("meta"), pytest.raises(UsageError, match=words):
        make_cache(transformers.AutoModelForCausalLM.from_config(config), SLOTS)
