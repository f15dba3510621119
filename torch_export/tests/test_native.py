"""The native side of a start: torch's C interface without torch, and a step as one call."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aotinductor.native import compile as native
from common.errors import EnvironmentProblemError

TESTS = Path(__file__).parent
SOURCES = TESTS.parent / "aotinductor/native"
CXX = os.environ.get("CXX", "g++")
CODES = {torch.float32: 6, torch.bfloat16: 15, torch.float16: 5}  # c10/core/ScalarType.h
ATTENTION = "aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu"
dtypes = st.sampled_from(list(CODES))
few = settings(max_examples=40, deadline=None, derandomize=True)

# A program as torch makes them, as far as linking goes: it calls what only a runtime library or
# libtorch has, and says whose function that is.
PROGRAM = r"""
#include <dlfcn.h>
#include <cstdint>
extern "C" int32_t aoti_torch_dtype_float32();
extern "C" const char* owner() {
  Dl_info info;
  dladdr(reinterpret_cast<void*>(&aoti_torch_dtype_float32), &info);
  return aoti_torch_dtype_float32() == 6 ? info.dli_fname : "another function";
}
"""
OWNER = """
import ctypes, sys
from pathlib import Path
runtime, program, *libtorch = sys.argv[1:]
for library in libtorch:
    ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
ctypes.CDLL(runtime)
owner = ctypes.CDLL(program).owner
owner.restype = ctypes.c_char_p
print(Path(owner().decode()).name)
assert "torch" not in sys.modules
if not libtorch:
    import torch
    assert torch.ones(3, 4).mm(torch.ones(4, 5)).sum().item() == 60
    print(Path(owner().decode()).name)
"""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    return native.compile_native(tmp_path_factory.mktemp("native"), "cpu")


@pytest.fixture(scope="module")
def runtime(libraries):
    return Runtime(ctypes.CDLL(str(libraries[native.RUNTIME])))


class Runtime:
    """Calls functions of the runtime library with tensors of torch."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library

    def handle(self, tensor: torch.Tensor) -> ctypes.c_void_p:
        shape = ctypes.c_int64 * max(tensor.dim(), 1)
        handle = ctypes.c_void_p()
        code = self.library.aoti_torch_create_tensor_from_blob(
            ctypes.c_void_p(tensor.data_ptr()), ctypes.c_int64(tensor.dim()),
            shape(*tensor.shape), shape(*tensor.stride()), ctypes.c_int64(0),
            CODES[tensor.dtype], 0, 0, ctypes.byref(handle),
        )  # fmt: skip
        assert code == 0
        return handle

    def call(self, name: str, *arguments) -> int:
        """Return the error code; tensors become handles for the time of the call."""
        made = [self.handle(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        try:
            return getattr(self.library, name)(*made)
        finally:
            for argument, handle in zip(arguments, made, strict=True):
                if isinstance(argument, torch.Tensor):
                    self.library.aoti_torch_delete_tensor_object(handle)

    def attend(self, query, key, value, scale: float):
        """Return what the queries see, and the logarithms of their sums."""
        seen, sums = ctypes.c_void_p(), ctypes.c_void_p()
        code = self.call(
            ATTENTION, query, key, value, ctypes.c_double(0), 1, None,
            ctypes.byref(ctypes.c_double(scale)), ctypes.byref(seen), ctypes.byref(sums),
        )  # fmt: skip
        assert code == 0
        return self.take(seen, query.dtype, 4), self.take(sums, torch.float32, 3)

    def take(self, handle: ctypes.c_void_p, dtype: torch.dtype, dims: int) -> torch.Tensor:
        """Return a copy of the tensor behind a handle, which is deleted."""
        shapes = []
        for question in ("sizes", "strides"):
            answer = ctypes.POINTER(ctypes.c_int64)()
            getattr(self.library, f"aoti_torch_get_{question}")(handle, ctypes.byref(answer))
            shapes.append(answer[:dims])
        data, size = ctypes.c_void_p(), ctypes.c_int64()
        self.library.aoti_torch_get_data_ptr(handle, ctypes.byref(data))
        self.library.aoti_torch_get_storage_size(handle, ctypes.byref(size))
        assert data.value is not None
        memory = torch.frombuffer(bytearray(ctypes.string_at(data.value, size.value)), dtype=dtype)
        self.library.aoti_torch_delete_tensor_object(handle)
        return memory.as_strided(*shapes).clone()


def spread(shape, dtype: torch.dtype, gap: int) -> torch.Tensor:
    """Return random numbers of a shape, in rows that lie `gap` elements apart from each other."""
    wide = torch.randn(*shape[:-1], shape[-1] + gap, dtype=torch.float32).to(dtype)
    return wide[..., : shape[-1]]


def assert_close(got: torch.Tensor, exact: torch.Tensor, scale: torch.Tensor) -> None:
    """Differences from float64's result are roundings: of float32 sums, and of what is stored."""
    stored = torch.finfo(got.dtype).eps * exact.abs()
    assert ((got.double() - exact).abs() <= 2e-6 * scale + stored).all()


@few
@given(dtypes, st.integers(1, 60), st.integers(1, 1100), st.integers(1, 60), st.integers(0, 3),
       st.sampled_from([None, "row", "one", "each"]))  # fmt: skip
def test_products_are_torchs(runtime, dtype, n, k, r, gap, added):
    torch.manual_seed(n * k + r)
    left, right = spread((n, k), dtype, gap), spread((r, k), dtype, 2 * gap).t()
    out = spread((n, r), dtype, gap)
    exact = left.double() @ right.double()
    scale = left.double().abs() @ right.double().abs()
    if added is None:
        assert runtime.call("aoti_torch_cpu_mm_out", out, left, right) == 0
    else:
        shape = {"row": (r,), "one": (1, r), "each": (n, r)}[added]
        bias = spread(shape, dtype, 1)
        factors = (ctypes.c_double(1), ctypes.c_double(1))
        assert runtime.call("aoti_torch_cpu_addmm_out", out, bias, left, right, *factors) == 0
        exact, scale = bias.double() + exact, bias.double().abs() + scale
    assert_close(out, exact, scale)


@few
@given(dtypes, st.integers(1, 150), st.integers(1, 70), st.sampled_from([1, 2, 3]),
       st.sampled_from([1, 3, 8]), st.integers(0, 3))  # fmt: skip
def test_attention_is_torchs(runtime, dtype, n, width, kv_heads, group, gap):
    torch.manual_seed(n * width + group)
    heads = kv_heads * group
    query = spread((1, n, heads, width), dtype, gap).transpose(1, 2)
    key, value = (spread((1, n, kv_heads, width), dtype, gap).transpose(1, 2) for _ in range(2))
    seen, sums = runtime.attend(query, key, value, 0.3)
    wide = [t.repeat_interleave(group, 1).double() for t in (key, value)]
    scores = query.double() @ wide[0].transpose(2, 3) * 0.3
    scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))
    assert_close(seen, scores.softmax(-1) @ wide[1], wide[1].abs().amax((2, 3), keepdim=True))
    assert torch.allclose(sums.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
    # the layout is part of what generated code relies on
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    theirs = operator(query, *(t.to(dtype) for t in wide), 0.0, True, scale=0.3)
    for ours, torchs in zip((seen, sums), theirs, strict=True):
        strides = zip(ours.shape, ours.stride(), torchs.stride(), strict=True)
        assert all(mine == other for size, mine, other in strides if size > 1)


def test_what_is_not_made_for_is_an_error_of_one_line(runtime, capfd):
    a, b, out = torch.zeros(3, 4), torch.zeros(5, 4).t(), torch.zeros(3, 5)
    product, nothing = "aoti_torch_cpu_mm_out", ctypes.c_void_p()
    assert runtime.call(product, out.half(), a, b) == 1
    assert runtime.call(product, out, a, b.contiguous()) == 1
    assert runtime.call(product, nothing, a, b) == 1
    factors = (ctypes.c_double(1), ctypes.c_double(1))
    assert runtime.call("aoti_torch_cpu_addmm_out", out, a, a, b, *factors) == 1
    heads = torch.zeros(1, 3, 5, 4)
    results = [ctypes.byref(ctypes.c_void_p()) for _ in range(2)]
    rest = (None, ctypes.byref(ctypes.c_double(1)), *results)
    dropout = ctypes.c_double(0)
    assert runtime.call(ATTENTION, heads, heads, heads.half(), dropout, 1, *rest) == 1
    assert runtime.call(ATTENTION, heads, heads, heads.transpose(2, 3), dropout, 1, *rest) == 1
    assert runtime.call(ATTENTION, heads, heads, heads, dropout, 0, *rest) == 1
    assert len(capfd.readouterr().err.splitlines()) == 7


class StepTensor(ctypes.Structure):
    """`Tensor` of steps.cpp."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dims", ctypes.c_int64),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("dtype", ctypes.c_int32),
    ]


@pytest.mark.parametrize("failing", ["nothing", "a handle", "a program"])
def test_a_step_runs_its_calls_in_order_and_leaks_no_handle(libraries, failing):
    pointer, code = ctypes.c_void_p, ctypes.c_int32
    live, ran, made = set(), [], []

    def create(data, dims, sizes, strides, offset, dtype, device, index, result, *layout):
        assert (dims, sizes[0], offset, dtype, device, index) == (1, data, 0, 6, 0, 0)
        if failing == "a handle" and len(made) == 4:
            return 7
        made.append(len(made) + 100)
        live.add(made[-1])
        result[0] = made[-1]
        return 0

    def run(container, inputs, count, outputs, output_count, stream, proxy):
        ran.append((container, inputs[:count]))
        assert (output_count, stream) == (1, 5)
        live.difference_update(inputs[:count])
        outputs[0] = 99
        live.add(99)
        return 3 if failing == "a program" and len(ran) == 2 else 0

    int64, int64s, handles = ctypes.c_int64, ctypes.POINTER(ctypes.c_int64), ctypes.POINTER(pointer)
    create_type = ctypes.CFUNCTYPE(
        code, pointer, int64, int64s, int64s, int64, code, code, code, handles, code, pointer, int64
    )
    run_type = ctypes.CFUNCTYPE(
        code, pointer, handles, ctypes.c_size_t, handles, ctypes.c_size_t, pointer, pointer
    )
    sizes = [(int64 * 1)(n + 1) for n in range(6)]
    tensors = [StepTensor(n + 1, 1, sizes[n], sizes[n], 6) for n in range(6)]
    inputs = (ctypes.POINTER(StepTensor) * 6)(*map(ctypes.pointer, tensors))
    callbacks = (
        create_type(create),
        ctypes.CFUNCTYPE(code, pointer)(lambda h: live.remove(h) or 0),
    )
    runs = (run_type * 2)(*[run_type(run)] * 2)
    step = ctypes.CDLL(str(libraries[native.STEPS])).llama_step
    ended = step(
        *callbacks, 0, 0, int64(2), (pointer * 2)(11, 12), runs, (int64 * 2)(2, 4), inputs,
        pointer(5),
    )  # fmt: skip
    assert ended == {"nothing": 0, "a handle": 2007, "a program": 2003}[failing]
    assert ran[0] == (11, [100, 101])
    assert ran[1:] == ([] if failing == "a handle" else [(12, [102, 103, 104, 105])])
    assert not live


def test_under_sanitizers_nothing_is_read_or_written_beside_a_tensor(tmp_path):
    driver = tmp_path / "driver"
    flags = ["-std=c++17", "-O1", "-march=x86-64-v3", "-fopenmp", "-Wno-psabi", f"-I{SOURCES}"]
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    # the other sources are included
    sources = [TESTS / "native_driver.cpp", *(SOURCES / n for n in ("runtime.cpp", "handles.cpp"))]
    subprocess.run([CXX, *flags, *checks, "-o", driver, *sources], check=True)
    environment = {"OMP_NUM_THREADS": "2", "PATH": os.environ["PATH"]}
    ended = subprocess.run([driver], capture_output=True, text=True, env=environment)
    assert (ended.returncode, ended.stdout) == (0, "checked\n"), ended.stderr


def link_program(folder: Path, source: str) -> Path:
    (folder / "program.cpp").write_text(source)
    command = [CXX, "-shared", "-fPIC", "-o", "program.so", "program.cpp", "-L.", "-lllama_runtime"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "program.so"


@pytest.mark.parametrize("over_libtorch", [False, True])
def test_a_program_takes_libtorchs_functions_where_it_is_open(libraries, over_libtorch):
    library = libraries[native.RUNTIME]
    program = link_program(library.parent, PROGRAM)
    folder = Path(torch.__file__).parent / "lib"
    names = ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so", "libtorch.so")
    libtorch = [str(folder / name) for name in names] if over_libtorch else []
    command = [sys.executable, "-c", OWNER, str(library), str(program), *libtorch]
    ended = subprocess.run(command, capture_output=True, text=True)
    # the second time after `import torch`, which computes as ever
    owners = ["libtorch_cpu.so"] if over_libtorch else [library.name] * 2
    assert (ended.stdout.split(), ended.returncode) == (owners, 0), ended.stderr


def test_what_the_runtime_library_lacks_is_named(libraries):
    lacking = (
        'extern "C" int aoti_torch_cpu_convolution();\nint lacking = aoti_torch_cpu_convolution();'
    )
    library = libraries[native.RUNTIME]
    program = link_program(library.parent, PROGRAM + lacking)
    assert native.missing_symbols(program, library) == ["aoti_torch_cpu_convolution"]


def test_a_compiler_that_fails_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(EnvironmentProblemError, match="cannot compile libllama_runtime.so"):
        native.compile_native(tmp_path, "cpu")
