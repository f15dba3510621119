"""From a package on disk to what generates: checked, opened, and over its weights.

The weights travel while the package is opened, its programs are warmed up, and decode is captured:
all of it over tensors that have their places, and zeros in them, until the bytes arrive.
"""

import ctypes
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from aotinductor.cache import CacheShape
from aotinductor.flags import APPROACH
from aotinductor.lengths import Plan
from aotinductor.recipe import find_differences
from aotinductor.start import c_interface
from aotinductor.start.kv_engine import KvEngine, State
from aotinductor.start.memory import Memory, make_memory
from aotinductor.start.package import OPENMP, RUNTIME, STEPS, WEIGHTS, Package
from aotinductor.start.steps import DECODE, PackageSteps, names_of_weights
from common import machine
from common.artifact.disk import ArtifactPair, TrustFlags, open_verified
from common.artifact.manifest import describe, differences, raise_if_different
from common.cli import Console
from common.errors import (
    ArtifactDamagedError,
    ArtifactMismatchError,
    UsageError,
)
from common.model import weights
from common.model.stored import Stored, read_header
from common.model.target import Target
from common.model.weights import Upload

if TYPE_CHECKING:
    from aotinductor.start.base_engine import BaseEngine

RUNTIME_LIBRARY, LIBTORCH = "runtime", "libtorch"
EMBEDDING = "model.embed_tokens.weight"


class Wish(NamedTuple):
    """How a package is to be loaded."""

    pair: ArtifactPair
    trust: TrustFlags
    library: str = "auto"  # behind the programs' calls: runtime, libtorch; auto: as it was built
    cuda_graph: bool | None = None  # None: on a GPU
    warm_up_tokens: int = 8  # padded length of the prompt that a GPU is warmed up with


def load_engine(
    wish: Wish, target: Target, plan: Plan, close_stage: Callable[[str], None], console: Console
) -> "tuple[KvEngine | BaseEngine, dict[str, Any]]":
    """Check the package against this start, then load it; any doubt is an error of its own kind.

    Returns what generates, and what a result tells of the package. `close_stage` is called with
    the name of each stage when it has ended.
    """
    pair = wish.pair
    with open_verified(pair, APPROACH, wish.trust, console) as verified:
        built = verified.manifest
        library = choose_library(wish.library, built.details)
        if library == LIBTORCH:
            c_interface.find_torch()
        raise_if_different(pair.path, find_differences(built, target, library))
        for difference in differences(built.environment, machine.gpu_environment(), ("driver",)):
            console.warn(f"{describe([difference])}: usually harmless")
        if built != plan.manifest:
            problem = f"{pair.path} was replaced since this start: try again"
            raise ArtifactMismatchError(problem)
        try:
            path, embedded = Path(verified.path_for_loader), built.recipe["embed_weights"]
            source = Source(verified.file, path, built.details, embedded)
            if built.recipe["kv_cache"] != source.is_kv:
                raise ValueError("its metadata's recipe and details are of different graphs")
            engine = assemble(wish, target, plan, library, source, close_stage)
        except (RuntimeError, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            text = next((line for line in str(error).splitlines() if line.strip()), "no message")
            if isinstance(error, KeyError | TypeError | AttributeError):
                text = f"its metadata does not describe it: {text}"
            raise ArtifactDamagedError(
                f"{pair.path} cannot be loaded ({text}): build it with ./build.sh"
            ) from error
    recipe, file = built.recipe, built.file
    built_from = f"{built.model['id']} (in the package)"
    return engine, {
        "name": pair.path.name,
        "sha256": file["sha256"],
        "bytes": file["bytes"],
        "verify_seconds": verified.verify_seconds,
        "kv_cache": recipe["kv_cache"],
        "library": library,
        "weights_of": built_from if recipe["embed_weights"] else target.checkpoint.model_id,
    }


def make_state(details: dict[str, Any], cache: CacheShape, target: Target) -> tuple[State, Memory]:
    """Return the state of a KV cache for the model's depth, and the memory that it lies in."""
    hidden, vocab = details["hidden_size"], details["vocab_size"]
    largest = 4 * max(vocab, cache.slots * max(hidden, 2 * cache.head_dim))
    memory = make_memory(target.device, largest)
    layers = target.checkpoint.layers
    return State.make(memory, cache, layers, details["dtypes"], hidden, vocab), memory


def choose_library(wanted: str, details: dict[str, Any]) -> str:
    """Return what stands behind the programs' calls: runtime or libtorch.

    Left the choice, the runtime library, where it has all that is called or no torch is installed.
    """
    if "runtime" not in details:  # the base graph, which is linked for torch's own loader
        possible, lacks = False, {}
    else:
        lacks = details["runtime"]["lacks"]
        possible = not any(lacks.get(program) for program in DECODE)
    if wanted == "auto":
        alone = possible and (not lacks or machine.torch_folder() is None)
        return RUNTIME_LIBRARY if alone else LIBTORCH
    if wanted == RUNTIME_LIBRARY and not possible:
        names = sorted({name for program in DECODE for name in lacks.get(program, ())})
        calls = f"its programs call {', '.join(names)}" if names else "it holds the base graph"
        raise UsageError(f"--library runtime: this package starts over libtorch, for {calls}")
    return wanted


class Source(NamedTuple):
    """A package that may be run: its open file, a path that opens it again, and what it holds."""

    file: BinaryIO
    path: Path
    details: dict[str, Any]
    embedded: bool  # the weights are in it

    @property
    def is_kv(self) -> bool:
        return "programs" in self.details


def assemble(
    wish: Wish, target: Target, plan: Plan, library: str, source: Source,
    close_stage: Callable[[str], None],
) -> "KvEngine | BaseEngine":  # fmt: skip
    """Open the package, and return what generates with it over its weights."""
    details = source.details
    package = Package(source.file, details["programs" if source.is_kv else "graphs"])
    assembly = _Assembly(wish, target, plan, library, source, package, close_stage)
    return assembly.kv_engine(details) if source.is_kv else assembly.base_engine(details)


class _Assembly:
    """What the steps of one load share."""

    def __init__(self, wish, target, plan, library, source, package, close_stage):
        self.wish: Wish = wish
        self.target: Target = target
        self.plan: Plan = plan
        self.library: str = library
        self.source: Source = source
        self.package: Package = package
        self.close_stage: Callable[[str], None] = close_stage

    def kv_engine(self, details: dict[str, Any]) -> KvEngine:
        checkpoint, device, dtype = self.target.checkpoint, self.target.device, self.target.dtype
        programs, cache = details["programs"], CacheShape(**details["cache"])
        stored = self._stored_tensors()
        names = names_of_weights(programs, checkpoint.layers)
        if missing := [name for name in (*names, EMBEDDING) if name not in stored]:
            raise ArtifactMismatchError(
                f"{checkpoint.folder} has no {', '.join(missing[:3])}: it does not fit the package"
            )
        upload = weights.start_upload({name: stored[name] for name in names}, device, dtype)
        state, memory = make_state(details, cache, self.target)
        lacks = details["runtime"]["lacks"] if self.library == RUNTIME_LIBRARY else {}
        # what is called in vain is not opened: without prefill a prompt goes through decode
        opened, kernels = self._open([name for name in programs if not lacks.get(name)])
        steps = PackageSteps(opened, programs, upload.tensors, state, memory, self._libraries)
        steps.rotate_with(**details["rope"])
        # rows of it are looked up on the host, also where the table itself is on a GPU
        on_host = upload.tensors if device == "cpu" else None
        table = on_host[EMBEDDING] if on_host else weights.map_tensor(stored[EMBEDDING])
        steps.embed_with(table, dtype)
        engine = KvEngine(steps, state, cache, memory)
        self.close_stage("artifact")
        if device == "cuda":
            # what a request will run, so that kernels are there; no trace of it is left
            tokens = self.wish.warm_up_tokens
            engine.prefill([0] * tokens, tokens)
            if self.wish.cuda_graph is not False:
                engine.capture()
            engine.reset()
            memory.stream.wait()
            self.close_stage("capture")
        return self._finish(engine, upload, kernels)

    def base_engine(self, details: dict[str, Any]) -> "BaseEngine":
        # imported here: they bring numpy, which a start of a KV cache goes without
        from aotinductor.start import constants
        from aotinductor.start.base_engine import BaseEngine, BaseProgram

        device, dtype = self.target.device, self.target.dtype
        longest, vocab = self.plan.bounds.max_seq_len, details["vocab_size"]
        memory = make_memory(device, max(8 * longest, 4 * vocab))
        rows, values = constants.read_constants(details, memory)
        if self.source.embedded:
            stored = constants.find_in_package(rows, self.source.path)
        else:
            try:
                stored = constants.find_in_checkpoint(rows, self._stored_tensors(), dtype)
            except ValueError as error:
                raise ArtifactMismatchError(f"{self.target.checkpoint.folder}: {error}") from error
        upload = weights.start_upload(stored, device, dtype)
        tensors = upload.tensors | values
        opened, kernels = self._open(details["graphs"])
        (program,) = opened.values()
        steps, interface = self._libraries
        constants.bind(program, steps, interface, device, tensors)
        program.kept = tensors  # bound without a copy
        forward = BaseProgram(program, interface, memory, longest, vocab, dtype)
        engine = BaseEngine(forward, self.plan.padded)
        self.close_stage("artifact")
        if device == "cuda":
            engine.logits([0] * self.wish.warm_up_tokens)
            self.close_stage("capture")
        return self._finish(engine, upload, kernels)

    def _stored_tensors(self) -> Mapping[str, Stored]:
        """Return where each tensor lies: in the package, or in the checkpoint."""
        if self.package.has(WEIGHTS):
            begin = self.package.offset_of(WEIGHTS)
            return read_header(self.source.path, begin)
        self.target.checkpoint.require_weights()
        return self.target.checkpoint.stored

    def _open(self, programs: list[str]):
        """Open the libraries and the programs; return those, and where their kernels lie."""
        machine.spin_less()  # libgomp reads it when it is loaded
        device = self.target.device
        if self.library == LIBTORCH:
            whole = not self.package.has(RUNTIME)
            interface = c_interface.open_libtorch(device == "cuda", whole)
            if self.package.has(RUNTIME):  # which the programs name; libtorch comes before it
                c_interface.open_library(self.package.library(RUNTIME))
        else:
            if device == "cuda":
                machine.cuda.runtime()  # whose functions the library calls
            self._open_openmp()
            interface = c_interface.open_runtime(self.package.library(RUNTIME))
        steps = c_interface.open_library(self.package.library(STEPS))
        steps.llama_step.restype = ctypes.c_int32
        self._libraries = (steps, interface)
        kernels = self.package.unpack_kernels() if device == "cuda" else None
        opened = {}
        for name in programs:
            cubins = Path(kernels.name, name) if kernels else None
            path = self.package.program(name, self.library)
            opened[name] = c_interface.Program(path, interface, device, cubins)
        return opened, kernels

    def _open_openmp(self) -> None:
        """Open libgomp by its name; the package's own where the system has none."""
        try:
            ctypes.CDLL(Path(OPENMP).name)
        except OSError:
            c_interface.open_library(self.package.library(OPENMP))

    def _finish(self, engine, upload: Upload, kernels):
        upload.wait()
        self.close_stage("weights")
        if kernels:
            kernels.cleanup()  # all of them have been loaded
        return engine


def require_gpu_for_graph(wanted: bool | None, device: str, slots: int | None) -> None:
    """Raise UsageError if a captured decode is asked for where there is none."""
    if wanted and (device != "cuda" or slots is None):
        raise UsageError(
            "--cuda-graph captures the decode step of a package with a KV cache on a CUDA GPU: "
            f"this is {'the base graph' if slots is None else 'a CPU'}"
        )
