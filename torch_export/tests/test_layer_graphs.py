"""The programs of a KV cache: eager's tokens for every kind of layer, and the code made of them.

A cache that is copied is as right as one that is not, only slow: so the generated code is read.
"""

import copy
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from aotinductor.build import layer_graphs, layer_package
from aotinductor.build.compiler import compile_program
from aotinductor.build.layer_graphs import export_program, make_programs
from aotinductor.build.runtime_compile import TorchSteps
from aotinductor.cache import CacheShape
from aotinductor.flags import ShapeFlags
from aotinductor.lengths import make_bounds
from aotinductor.start.kv_engine import KvEngine, State
from aotinductor.start.memory import HostMemory

SLOTS = 190  # no multiple of a block: the last one is filled up
LENGTHS = (100, 1, 7, 63, 64, 65, 129)  # a long one first: what it leaves must not leak
BOUNDS = make_bounds(ShapeFlags(64, max_seq_len=176, dynamic_seq_multiple=8))
VOCABULARY = 300
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def make_model(config=LlamaConfig, layers=2, dtype=torch.float32, device="cpu", **changes):
    """Return a small model whose biases and norms are noise too."""
    shape = {"hidden_size": 96, "intermediate_size": 136, "vocab_size": VOCABULARY, "head_dim": 32}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
    if config is Qwen2Config:  # it has no width of a head of its own
        shape["hidden_size"] = heads["num_attention_heads"] * shape.pop("head_dim")
    config = config(**shape | heads | {"num_hidden_layers": layers} | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.25)
    return model.to(device=device, dtype=dtype)


def shape_of(model) -> CacheShape:
    return layer_package.cache_shape(model, SLOTS)


def engine_of(model, programs: dict) -> KvEngine:
    """Return what generates with these programs over the model's own weights."""
    cache, memory = shape_of(model), HostMemory()
    details = layer_package.describe_package(model, cache, make_programs(model))
    state = State.make(memory, cache, model.config.num_hidden_layers, details)
    weights = dict(model.named_parameters())
    return KvEngine(TorchSteps(programs, details, weights, state, memory), state, cache, memory)


def uncompiled_engine(model) -> KvEngine:
    return engine_of(model, make_programs(model))


def make_prompt(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(VOCABULARY, (length,), generator=generator).tolist()


def eager_tokens(model, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
    return out[0, len(prompt) :].tolist()


def assert_tokens_equal_eager(engine: KvEngine, model) -> None:
    for length in LENGTHS:
        prompt = make_prompt(length)
        found = list(engine.tokens(prompt, BOUNDS.padded(length), 24))
        assert found == eager_tokens(model, prompt, 24)


KINDS = {
    "biases, untied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "no groups": {"num_attention_heads": 2, "num_key_value_heads": 2},
    "one KV head, tied": {
        "num_attention_heads": 8, "num_key_value_heads": 1, "tie_word_embeddings": True,
    },
    "half a head is no power of two": {"head_dim": 40},
    "gelu": {"head_dim": 64, "hidden_act": "gelu"},
    "Mistral": {"config": MistralConfig, "sliding_window": None},
    "Qwen2": {"config": Qwen2Config},  # biases of q, k and v alone
    "Qwen3": {"config": Qwen3Config},  # norms of each head of q and k
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_any_kind_of_layer_gives_eagers_tokens(kind):
    model = make_model(**KINDS[kind])
    assert_tokens_equal_eager(uncompiled_engine(model), model)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("kind", ("biases, untied", "Qwen3"))
def test_half_precision_is_as_near_to_float32_as_eager_is(kind, dtype):
    exact = make_model(**KINDS[kind])
    model = copy.deepcopy(exact).to(dtype)
    exact = copy.deepcopy(model).float()  # of the rounded weights
    engine, prompt = uncompiled_engine(model), make_prompt(65)
    engine.prefill(prompt, BOUNDS.padded(65))
    engine.force(7)
    engine.decode()
    ids = torch.tensor([[*prompt, 7]])
    with torch.no_grad():
        expected, eager = (one(ids).logits[0, -1].float() for one in (exact, model))
    spread = expected.std()
    found = (torch.tensor(engine.read_logits()) - expected).abs().max() / spread
    assert found <= 1.5 * (eager - expected).abs().max() / spread + 0.01


@pytest.mark.parametrize("vocab", (512, 300, 32001))
def test_of_equal_logits_the_first_one_wins_as_in_eager(vocab):
    compiled = torch.compile(layer_graphs.first_argmax, dynamic=False)
    logits = torch.zeros(4, 1, vocab)
    logits[1, 0, [7, 8, vocab - 1]] = 1
    logits[2, 0, [vocab // 2, vocab - 2]] = 1
    logits[3] = float("-inf")
    logits[3, 0, vocab - 1] = -3
    for row in logits:
        assert layer_graphs.first_argmax(row).tolist() == [[int(row.argmax())]]
        assert compiled(row).tolist() == [[int(row.argmax())]]


@dataclass(frozen=True)
class Compiled:
    """The programs of a model: what runs them, and the host code that was generated for each."""

    run: dict
    sources: dict[str, str]


def compile_programs(model) -> Compiled:
    run, sources = {}, {}
    for name, program in make_programs(model).items():
        exported = export_program(program, model, shape_of(model), BOUNDS)
        files = compile_program(exported, layer_package.program_options(name, model, False))
        (source,) = (file for file in files if file.endswith(".wrapper.cpp"))
        (library,) = (file for file in files if file.endswith(".so"))
        # linked with libtorch, as without `linked_with`, and run by torch's own runner
        runner = torch._C._aoti.AOTIModelContainerRunnerCpu(library, 1)
        run[name] = lambda *tensors, runner=runner: runner.run(list(tensors))
        sources[name] = Path(source).read_text()
    return Compiled(run, sources)


@pytest.fixture
def threads():
    """Set the process's threads; they are as before afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def biased():
    return make_model(attention_bias=True, mlp_bias=True, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def compiled(biased):
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as on a machine of one core
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_package, "ONE_THREAD_BYTES", 0)  # as a large model is compiled
        programs = compile_programs(biased)
    torch.set_num_threads(before)
    return programs


@pytest.mark.parametrize("count", (1, 2, 5))
def test_compiled_programs_give_eagers_tokens(biased, compiled, threads, count):
    threads(count)  # more than at build: each piece of work is still done once
    assert_tokens_equal_eager(engine_of(biased, compiled.run), biased)


def test_the_same_programs_serve_a_model_of_another_depth(compiled):
    deep = make_model(layers=5, attention_bias=True, mlp_bias=True, tie_word_embeddings=False)
    assert_tokens_equal_eager(engine_of(deep, compiled.run), deep)


def test_decode_of_a_small_model_on_a_cpu_is_one_threads_work(monkeypatch):
    model, one = make_model(), {"cpp.dynamic_threads": False, "cpp.threads": 1}
    assert layer_package.program_options("decode_layer", model, False).items() >= one.items()
    # an embedding that is no head is read one row of, whatever its size
    tables = model.model.embed_tokens.weight.nbytes
    total = sum(weight.nbytes for weight in model.parameters())
    untied = make_model(tie_word_embeddings=False)
    assert layer_graphs.bytes_of_a_step(model) == total - (0 if is_tied(model) else tables)
    assert layer_graphs.bytes_of_a_step(untied) == layer_graphs.bytes_of_a_step(model)
    monkeypatch.setattr(layer_package, "ONE_THREAD_BYTES", 0)
    assert "cpp.threads" not in layer_package.program_options("decode_layer", model, False)


def is_tied(model) -> bool:
    return model.lm_head.weight is model.model.embed_tokens.weight


def largest_allocation(source: str, symbol_value: int) -> int:
    """Return the elements of the largest tensor that the host code allocates.

    It names the sizes `int_array_N`; a dynamic one is a multiple of a symbol, given a value here.
    """
    sizes, largest = {}, 0
    for line in source.splitlines():
        if found := re.search(r"int64_t (int_array_\d+)\[\] = \{(.*?),? *\};", line):
            text = re.sub(r"\b[su]\d+\b", str(symbol_value), found[2].replace("L", ""))
            sizes[found[1]] = [eval(size) for size in text.split(",") if size.strip()]
        elif found := re.search(r"int64_t \*(int_array_\d+)=nullptr;", line):
            sizes[found[1]] = []
        elif found := re.search(r"aoti_torch_empty_strided\w*\(\d+, (int_array_\d+)", line):
            largest = max(largest, torch.Size(sizes[found[1]]).numel())
    assert largest, "no allocation found: the generated code has changed its looks"
    return largest


def assert_no_table_is_copied(sources: dict[str, str], model) -> None:
    """A copy of a table needs a place: no tensor as large as the smallest table is allocated."""
    cache = shape_of(model)
    # of the shortest prompt, of 1 * 8 tokens, and of one token activations are smaller than that
    assert largest_allocation(sources["prefill_layer"], 1) < cache.slots * cache.width
    assert largest_allocation(sources["decode_layer"], cache.rows // 64) < cache.slots * cache.width


def test_no_table_is_copied_in_the_generated_code(biased, compiled):
    assert_no_table_is_copied(compiled.sources, biased)


@pytest.fixture(scope="module")
def on_cuda():
    """A model, and the host code of its programs."""
    shape = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 64}
    model = make_model(dtype=torch.bfloat16, device="cuda", **shape)
    return model, compile_programs(model).sources


def launches(source: str) -> Counter:
    """Return the Triton kernels that one run launches, by name."""
    return Counter(re.findall(r"^\s+(call_\w*(?:kernel|triton)\w*)\(", source, re.M))


@needs_cuda
def test_decode_on_cuda_is_six_kernels_a_layer_and_four_besides(on_cuda):
    _, sources = on_cuda
    assert 0 < launches(sources["decode_layer"]).total() <= 6
    assert 0 < launches(sources["head"]).total() <= 4


@needs_cuda
def test_decode_on_cuda_calls_no_library_and_copies_no_table(on_cuda):
    model, sources = on_cuda
    library = r"aoti_torch_(?:cuda_\w+|proxy_executor_call_function|copy_)\("
    assert not re.findall(library, sources["decode_layer"] + sources["head"])
    assert_no_table_is_copied(sources, model)


@needs_cuda
def test_prefill_on_cuda_attends_with_the_flash_kernel(on_cuda):
    _, sources = on_cuda
    called = re.findall(r"aoti_torch_cuda_(\w*attention\w*)\(", sources["prefill_layer"])
    assert called == ["_scaled_dot_product_flash_attention"]
