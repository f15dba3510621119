"""A CUDA GPU without torch: what it is, its memory, its streams, and captured graphs.

Two libraries of NVIDIA's through ctypes: the driver, which says what GPU there is, and the CUDA
runtime, on whose context torch works too. Everything here is about the first visible GPU. Calls let
go of the GIL, and each failure is an EnvironmentProblemError with CUDA's own words.
"""

import ctypes
import functools
import importlib.util
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from common.errors import EnvironmentProblemError

# of cuDeviceGetAttribute
_CLOCK_KILOHERTZ, _BUS_BITS, _MAJOR, _MINOR = 36, 37, 75, 76
_BY_ADDRESS = 4  # of cudaMemcpyKind
_THREAD_LOCAL = 1  # of cudaStreamCaptureMode: another thread may allocate meanwhile
_NON_BLOCKING = 1  # of a stream: it does not wait for the default one
_NO_TIMING = 2  # of an event


class Gpu(NamedTuple):
    """What the driver says of the GPU; None is unknown."""

    name: str
    capability: str  # like 9.0
    bytes_per_second: float | None  # of its memory


def count() -> int:
    """Return how many GPUs this process may use: 0 without a driver."""
    found = ctypes.c_int(0)
    library = _driver()
    if library is None or library.cuDeviceGetCount(ctypes.byref(found)) != 0:
        return 0
    return found.value


@functools.cache
def describe() -> Gpu:
    """Return what the first GPU is; there is one."""
    library, device, name = _driver(), ctypes.c_int(), ctypes.create_string_buffer(256)
    assert library is not None
    library.cuDeviceGet(ctypes.byref(device), 0)
    library.cuDeviceGetName(name, len(name), device)

    def attribute(number: int) -> int:
        value = ctypes.c_int(0)
        library.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        return value.value

    # two transfers a clock; a driver that no longer tells the clock says 0
    rate = 2 * attribute(_CLOCK_KILOHERTZ) * 1e3 * attribute(_BUS_BITS) / 8
    capability = f"{attribute(_MAJOR)}.{attribute(_MINOR)}"
    return Gpu(name.value.decode(errors="replace"), capability, rate or None)


def open_early(wanted: bool) -> None:
    """Start to make the context that all will use, in a thread: tenths of a second without the GIL.

    Without a driver or a GPU nothing happens; a failure is left for its first user to meet.
    """

    def make_context() -> None:
        context = ctypes.c_void_p()
        if count():  # kept until the end, as torch keeps it
            _driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)

    if wanted:
        threading.Thread(target=make_context, daemon=True).start()


@functools.cache
def _driver() -> ctypes.CDLL | None:
    with suppress(OSError):  # no such library
        library = ctypes.CDLL("libcuda.so.1")
        if library.cuInit(0) == 0:
            return library
    return None


# --- the runtime -----------------------------------------------------------------------------


class Runtime:
    """The CUDA runtime's functions, which raise when they fail: `runtime.cudaMalloc(...)`."""

    def __init__(self, library: ctypes.CDLL):
        self._library = library
        library.cudaGetErrorString.restype = ctypes.c_char_p

    def __getattr__(self, name: str) -> Callable[..., None]:
        function = getattr(self._library, name)

        def call(*arguments) -> None:
            if status := function(*arguments):
                words = self._library.cudaGetErrorString(status)
                # out of memory is torch's wording, which `run_script` knows
                raise EnvironmentProblemError(f"CUDA: {name} failed: {words.decode()}")

        setattr(self, name, call)  # looked up once
        return call


@functools.cache
def runtime() -> Runtime:
    """Return the CUDA runtime, with the first GPU set; the one that is in this process, if any."""
    everything = ctypes.CDLL(None)
    if not hasattr(everything, "cudaGetErrorString"):
        ctypes.CDLL(str(_find_runtime()), ctypes.RTLD_GLOBAL)
    found = Runtime(everything)
    found.cudaSetDevice(0)
    return found


def loaded_library(name: str) -> str | None:
    """Return the file in this process whose name begins like this, or None."""
    words = Path("/proc/self/maps").read_text().split()
    return next((word for word in words if f"/{name}" in word), None)


def _find_runtime() -> Path | str:
    """Return the library: one already loaded, a wheel's (nvidia-cuda-runtime), or the system's."""
    if loaded := loaded_library("libcudart.so."):
        return loaded
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        # cuda_runtime for CUDA 12, cu13 from then on
        if wheels := sorted(Path(folder).glob("*/lib/libcudart.so.*")):
            return wheels[-1]
    for name in ("libcudart.so.13", "libcudart.so.12"):
        with suppress(OSError):
            ctypes.CDLL(name)
            return name
    raise EnvironmentProblemError(
        "no CUDA runtime library (libcudart): install the wheel of the package's CUDA version, "
        "nvidia-cuda-runtime-cu12 or nvidia-cuda-runtime"
    )


def runtime_version() -> str:
    """Return the CUDA runtime's version, like 12.8."""
    version = ctypes.c_int()
    runtime().cudaRuntimeGetVersion(ctypes.byref(version))
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def used_bytes() -> int:
    """Return how much of the GPU's memory is in use, by all processes."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    runtime().cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
    return total.value - free.value


class DeviceMemory:
    """Bytes on the GPU, zeros at first, freed with this object."""

    def __init__(self, nbytes: int):
        pointer = ctypes.c_void_p()
        runtime().cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(max(nbytes, 1)))
        self.address, self.nbytes = int(pointer.value or 0), nbytes
        self.fill_with_zeros()

    def fill_with_zeros(self, stream: "Stream | None" = None) -> None:
        handle = stream.handle if stream else None
        arguments = (ctypes.c_void_p(self.address), 0, ctypes.c_size_t(self.nbytes), handle)
        runtime().cudaMemsetAsync(*arguments)

    def __del__(self):
        if getattr(self, "address", 0):
            with suppress(EnvironmentProblemError):  # at exit the context may be gone already
                runtime().cudaFree(ctypes.c_void_p(self.address))


class HostMemory:
    """Page-locked bytes of the host, which the GPU reads and writes without a copy between."""

    def __init__(self, nbytes: int):
        pointer = ctypes.c_void_p()
        runtime().cudaHostAlloc(ctypes.byref(pointer), ctypes.c_size_t(nbytes), 0)
        self.address, self.nbytes = int(pointer.value or 0), nbytes
        self.view = memoryview((ctypes.c_char * nbytes).from_address(self.address)).cast("B")

    def __del__(self):
        if getattr(self, "address", 0):
            with suppress(EnvironmentProblemError):
                runtime().cudaFreeHost(ctypes.c_void_p(self.address))


class Stream:
    """A queue of work on the GPU; its methods return before the work is done."""

    def __init__(self):
        self.handle = ctypes.c_void_p()
        runtime().cudaStreamCreateWithPriority(ctypes.byref(self.handle), _NON_BLOCKING, 0)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy between any two addresses, of the GPU or the host: CUDA knows which is whose."""
        places = (ctypes.c_void_p(target), ctypes.c_void_p(source))
        runtime().cudaMemcpyAsync(*places, ctypes.c_size_t(nbytes), _BY_ADDRESS, self.handle)

    def wait(self) -> None:
        """Return when all that is queued has been done."""
        runtime().cudaStreamSynchronize(self.handle)

    @contextmanager
    def capture(self, graph: "Graph") -> Iterator[None]:
        """Record what is queued inside, instead of doing it."""
        runtime().cudaStreamBeginCapture(self.handle, _THREAD_LOCAL)
        recorded = ctypes.c_void_p()
        try:
            yield
        finally:  # or the stream could never be used again
            runtime().cudaStreamEndCapture(self.handle, ctypes.byref(recorded))
        runtime().cudaGraphInstantiate(ctypes.byref(graph.handle), recorded, ctypes.c_ulonglong(0))


class Event:
    """A mark in a stream that one can wait for."""

    def __init__(self):
        self.handle = ctypes.c_void_p()
        runtime().cudaEventCreateWithFlags(ctypes.byref(self.handle), _NO_TIMING)

    def record(self, stream: Stream) -> None:
        runtime().cudaEventRecord(self.handle, stream.handle)

    def wait(self) -> None:
        """Return when the stream has come here; at once, if it was never recorded."""
        runtime().cudaEventSynchronize(self.handle)

    def __del__(self):
        if getattr(self, "handle", None):
            with suppress(EnvironmentProblemError):
                runtime().cudaEventDestroy(self.handle)


class Graph:
    """Work that was captured, to be replayed as often as one likes."""

    def __init__(self):
        self.handle = ctypes.c_void_p()

    def replay(self, stream: Stream) -> None:
        runtime().cudaGraphLaunch(self.handle, stream.handle)
