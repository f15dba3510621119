"""Prefill and decode over the KV cache: eager's tokens for any Llama, and the code made of them.

A cache that is copied is as right as one that is not, only slow: so the generated code is read.
"""

import re
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from aotinductor.build import layer_graphs
from aotinductor.build.compile_package import compile_package
from aotinductor.flags import ShapeFlags
from aotinductor.kv_generation import CacheShape, Generator
from aotinductor.lengths import make_bounds
from aotinductor.loading import make_engine
from aotinductor.package import open_model
from common.errors import UsageError

SLOTS = 190  # no multiple of a block: the last one is filled up
LENGTHS = (100, 1, 7, 63, 64, 65, 129)  # a long one first: what it leaves must not leak
BOUNDS = make_bounds(ShapeFlags(64, max_seq_len=176, dynamic_seq_multiple=8))
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def make_model(layers=2, dtype=torch.float32, device="cpu", **changes) -> LlamaForCausalLM:
    """Return a small Llama whose biases and norms are noise too."""
    shape = {"hidden_size": 96, "intermediate_size": 136, "vocab_size": 300, "head_dim": 32}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
    config = LlamaConfig(**shape | heads | {"num_hidden_layers": layers} | changes)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.25)
    return model.to(device=device, dtype=dtype)


@dataclass(frozen=True)
class Uncompiled:
    """A graph called as a package's model is."""

    graph: torch.nn.Module

    @torch.no_grad()
    def __call__(self, inputs):
        return [self.graph(*inputs)]


def make_generator(model, prefill, decode) -> Generator:
    details = layer_graphs.describe_state(model, CacheShape.of(model.config, SLOTS))
    return make_engine([prefill, decode], details, model.dtype, model.device)


def uncompiled_generator(model) -> Generator:
    graphs = (layer_graphs.PrefillGraph(model), layer_graphs.DecodeGraph(model))
    return make_generator(model, *map(Uncompiled, graphs))


def make_prompt(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(300, (length,), generator=generator).tolist()


def eager_tokens(model, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
    return out[0, len(prompt) :].tolist()


def assert_tokens_equal_eager(generator: Generator, model) -> None:
    for length in LENGTHS:
        prompt = make_prompt(length)
        assert generator.generate(prompt, BOUNDS.padded(length), 24) == eager_tokens(
            model, prompt, 24
        )


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
        {"num_attention_heads": 2, "num_key_value_heads": 2},
        {"num_attention_heads": 8, "num_key_value_heads": 1, "tie_word_embeddings": True},
        {"head_dim": 40},  # half of it is no power of two
        {"head_dim": 64, "hidden_act": "gelu"},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_any_llama_gives_eagers_tokens(changes):
    model = make_model(**changes)
    assert_tokens_equal_eager(uncompiled_generator(model), model)


@pytest.mark.parametrize("rope_type", layer_graphs.LENGTH_DEPENDENT_ROPE)
def test_rope_that_depends_on_the_length_is_refused(rope_type):
    model = make_model()
    model.model.rotary_emb.rope_type = rope_type
    with pytest.raises(UsageError, match="build without --kv-cache"):
        layer_graphs.PrefillGraph(model)


def test_reset_forgets_what_absent_weights_left_behind():
    model = make_model()
    generator = uncompiled_generator(model)
    for table in generator.tables:
        table.fill_(float("nan"))
    generator.reset()
    assert_tokens_equal_eager(generator, model)


class Untouchable:
    def __call__(self, inputs):
        raise AssertionError("a graph was called beyond what it checks")


@pytest.mark.parametrize(("length", "padded"), [(0, 8), (9, 8), (8, SLOTS + 1)])
def test_a_prompt_that_does_not_fit_never_reaches_the_graph(length, padded):
    generator = make_generator(make_model(), Untouchable(), Untouchable())
    with pytest.raises(ValueError, match="does not fit"):
        generator.prefill([1] * length, padded)


def test_a_full_cache_ends_generation_before_the_graph_is_called():
    generator = uncompiled_generator(make_model())
    prompt = make_prompt(BOUNDS.max_seq_len)
    fitting = SLOTS - len(prompt) + 1  # the last token needs no slot
    assert len(generator.generate(prompt, len(prompt), fitting)) == fitting
    generator.decode_model = Untouchable()
    with pytest.raises(ValueError, match=f"no slot {SLOTS}"):
        generator.decode()


def test_decode_is_given_the_blocks_in_use_alone():
    generator = uncompiled_generator(make_model())
    for length, rows in ((1, 64), (63, 64), (64, 128), (127, 128), (128, 192)):
        generator.prefill(make_prompt(length), BOUNDS.padded(length))
        generator.decode()
        assert {len(table) for table in generator.tables_in_use} == {rows}


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


def compile_graphs(model, package: Path) -> dict[str, str]:
    """Write a package of both graphs; return the host code that Inductor generated for each."""
    compile_package(model, BOUNDS, SLOTS, package, embed_weights=False, max_autotune=False)
    with zipfile.ZipFile(package) as archive:
        return {
            name.split("/")[-2]: archive.read(name).decode()
            for name in archive.namelist()
            if name.endswith("wrapper.cpp")
        }


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
def package(tmp_path_factory):
    return tmp_path_factory.mktemp("graphs") / "graphs.pt2"


@pytest.fixture(scope="module")
def sources(biased, package):
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as on a machine of one core
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_graphs, "ONE_THREAD_BYTES", 0)  # as a large model is compiled
        generated = compile_graphs(biased, package)
    torch.set_num_threads(before)
    return generated


@pytest.mark.parametrize("count", (1, 2, 5))
def test_compiled_graphs_with_biases_give_eagers_tokens(biased, package, sources, threads, count):
    weights = dict(biased.named_parameters())
    graphs = [open_model(package, name, biased.device, weights) for name in ("prefill", "decode")]
    threads(count)  # more than at build: each piece of work is still done once
    assert_tokens_equal_eager(make_generator(biased, *graphs), biased)


def test_decode_of_a_small_model_on_a_cpu_is_one_threads_work(monkeypatch):
    model = make_model()
    assert layer_graphs.decode_options(model) == {"cpp.dynamic_threads": False, "cpp.threads": 1}
    monkeypatch.setattr(layer_graphs, "ONE_THREAD_BYTES", 0)
    assert layer_graphs.decode_options(model) == {}


def largest_allocation(source: str, symbol_value: int) -> int:
    """Return the elements of the largest tensor that the host code allocates.

    It names the sizes `int_array_N`; a dynamic one is a multiple of a symbol, given a value here.
    """
    sizes, largest = {}, 0
    for line in source.splitlines():
        if found := re.search(r"int64_t (int_array_\d+)\[\] = \{(.*?),? *\};", line):
            text = re.sub(r"\b[su]\d+\b", str(symbol_value), found[2].replace("L", ""))
            sizes[found[1]] = [eval(size) for size in text.split(",") if size.strip()]
        elif found := re.search(r"aoti_torch_empty_strided\w*\(\d+, (int_array_\d+)", line):
            largest = max(largest, torch.Size(sizes[found[1]]).numel())
    assert largest, "no allocation found: the generated code has changed its looks"
    return largest


def assert_no_table_is_copied(sources: dict[str, str], model) -> None:
    """A copy of a table needs a place: no tensor as large as the smallest table is allocated."""
    cache = CacheShape.of(model.config, SLOTS)
    width = cache.kv_heads * cache.head_dim
    # of the shortest prompt, of 1 * 8 tokens, and of one token activations are smaller than that
    assert largest_allocation(sources["prefill"], 1) < cache.slots * width
    assert largest_allocation(sources["decode"], cache.rows // 64) < cache.slots * width


def test_no_table_is_copied_in_the_generated_code(biased, sources):
    assert_no_table_is_copied(sources, biased)


@pytest.fixture(scope="module")
def on_cuda(tmp_path_factory):
    """Host code of both graphs, by number of layers."""
    shape = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 64}
    models = {layers: make_model(layers, torch.bfloat16, "cuda", **shape) for layers in (3, 6)}
    return {
        layers: (model, compile_graphs(model, tmp_path_factory.mktemp("cuda") / "graphs.pt2"))
        for layers, model in models.items()
    }


def launches(source: str) -> Counter:
    """Return the Triton kernels that one run launches, by name."""
    return Counter(re.findall(r"^\s+(call_\w*(?:kernel|triton)\w*)\(", source, re.M))


@needs_cuda
def test_decode_on_cuda_is_six_kernels_a_layer_and_the_same_ones_in_every_layer(on_cuda):
    kernels = {layers: launches(sources["decode"]) for layers, (_, sources) in on_cuda.items()}
    for layers, found in kernels.items():
        assert 0 < found.total() <= 6 * layers + 6
    assert len(kernels[6]) == len(kernels[3]) <= 20


@needs_cuda
def test_decode_on_cuda_calls_no_library_and_copies_no_table(on_cuda):
    for model, sources in on_cuda.values():
        library = r"aoti_torch_(?:cuda_\w+|proxy_executor_call_function|copy_)\("
        assert not re.findall(library, sources["decode"])
        assert_no_table_is_copied(sources, model)


@needs_cuda
def test_prefill_on_cuda_attends_with_the_flash_kernel(on_cuda):
    for layers, (_, sources) in on_cuda.items():
        called = re.findall(r"aoti_torch_cuda_(\w*attention\w*)\(", sources["prefill"])
        assert called == ["_scaled_dot_product_flash_attention"] * layers
