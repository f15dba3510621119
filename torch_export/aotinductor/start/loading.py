"""From a package on disk to what generates: checked, opened, and over its weights.

The weights travel while the package is opened, its programs are warmed up, and decode is captured:
all of it over tensors that have their places, and zeros in them, until the bytes arrive.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from aotinductor.cache import CacheShape
from aotinductor.flags import APPROACH
from aotinductor.lengths import Plan
from aotinductor.recipe import find_differences
from aotinductor.start import c_interface
from aotinductor.start.engine import Engine
from aotinductor.start.kv_engine import KvEngine, State
from aotinductor.start.memory import Memory, make_memory
from aotinductor.start.package import OPENMP, RUNTIME, STEPS, WEIGHTS, Package
from aotinductor.start.steps import DECODE, PackageSteps, names_of_weights
from common import machine
from common.artifact.disk import ArtifactPair, TrustFlags, open_verified
from common.artifact.manifest import describe, differences, raise_if_different
from common.cli import Console, SharedFlags
from common.errors import ArtifactDamagedError, ArtifactMismatchError, UsageError, first_line
from common.model import weights
from common.model.stored import read_header
from common.model.target import Target, as_built, choose_target
from common.model.tokenizer import TextCodec, load_codec

if TYPE_CHECKING:
    from aotinductor.start.base_engine import BaseEngine

RUNTIME_LIBRARY, LIBTORCH = "runtime", "libtorch"
EMBEDDING = "model.embed_tokens.weight"
WARM_UP_TOKENS = 8  # of the prompt that a GPU is warmed up with, where none is known
CloseStage = Callable[[str], None]  # called with the name of each stage when it has ended


class Opening(NamedTuple):
    """A start whose model, device and lengths are known: prompts can be made and checked."""

    pair: ArtifactPair
    trust: TrustFlags
    target: Target
    plan: Plan
    codec: TextCodec
    library: str = "auto"  # behind the programs' calls: runtime, libtorch; auto: as it was built
    capture: bool = True  # on a GPU, decode as one CUDA graph

    def load(
        self, console: Console, close_stage: CloseStage = lambda name: None,
        warm_up_tokens: int = WARM_UP_TOKENS,
    ) -> Engine:  # fmt: skip
        """Check the package against this start, load it, and bring the weights to the device.

        Any doubt is an error of its own kind. `warm_up_tokens`: of the first prompt, padded.
        """
        pair, target, plan = self.pair, self.target, self.plan
        with open_verified(pair, APPROACH, self.trust, console) as verified:
            built = verified.manifest
            library = choose_library(self.library, built.details)
            if library == LIBTORCH:
                c_interface.find_torch()
            raise_if_different(pair.path, find_differences(built, target, library))
            for difference in differences(
                built.environment, machine.gpu_environment(), ("driver",)
            ):
                console.warn(f"{describe([difference])}: usually harmless")
            if built != plan.manifest:
                problem = f"{pair.path} was replaced since this start: try again"
                raise ArtifactMismatchError(problem)
            try:
                package = Package(verified.file, Path(verified.path_for_loader), built.details)
                how = (self.capture, warm_up_tokens, close_stage)
                made = assemble(package, target, plan, library, *how)
            except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
                text = f"{type(error).__name__}: {first_line(error)}"
                raise ArtifactDamagedError(
                    f"{pair.path} cannot be loaded ({text}): build it with ./build.sh"
                ) from error
        weights_of = target.checkpoint.model_id
        if plan.built.get("embed_weights"):
            weights_of = f"{built.model['id']} (in the package)"
        artifact = {
            "name": pair.path.name,
            "sha256": built.file["sha256"],
            "bytes": built.file["bytes"],
            "verify_seconds": verified.verify_seconds,
            "kv_cache": built.recipe["kv_cache"],
            "library": library,
            "weights_of": weights_of,
        }
        return Engine(made, target, plan, self.codec, artifact)


def make_opening(
    pair: ArtifactPair, shared: SharedFlags, trust: TrustFlags, plan: Plan, console: Console
) -> Opening:
    """Return an opening by a plan, with a package or without."""
    target = choose_target(as_built(shared, plan.manifest), console, plan.checkpoint)
    if target.device == "cpu" and plan.checkpoint and not plan.built.get("embed_weights"):
        weights.map_pages(target.checkpoint.stored.values())  # while the tokenizer is made
    return Opening(pair, trust, target, plan, load_codec(target.checkpoint))


def make_state(details: dict[str, Any], cache: CacheShape, target: Target) -> tuple[State, Memory]:
    """Return the state of a KV cache for the model's depth, and the memory that it lies in."""
    widest = max(details["hidden_size"], 2 * cache.head_dim)
    memory = make_memory(target.device, 4 * max(details["vocab_size"], cache.slots * widest))
    return State.make(memory, cache, target.checkpoint.layers, details), memory


def choose_library(wanted: str, details: dict[str, Any]) -> str:
    """Return what stands behind the programs' calls: runtime or libtorch.

    Left the choice, the runtime library, where it has all that is called or no torch is installed.
    """
    lacks, problem = {}, "it holds the base graph"  # which is linked for torch's own loader
    if "runtime" in details:
        lacks = details["runtime"]["lacks"]
        called = sorted({name for program in DECODE for name in lacks.get(program, ())})
        problem = f"its programs call {', '.join(called)}" if called else ""
    if wanted == "auto":
        alone = not problem and (not lacks or machine.package_folder("torch") is None)
        return RUNTIME_LIBRARY if alone else LIBTORCH
    if wanted == RUNTIME_LIBRARY and problem:
        raise UsageError(f"--library runtime: this package starts over libtorch, for {problem}")
    return wanted


def assemble(
    package: Package, target: Target, plan: Plan, library: str, capture: bool = True,
    warm_up_tokens: int = WARM_UP_TOKENS, close_stage: CloseStage = lambda name: None,
) -> "KvEngine | BaseEngine":  # fmt: skip
    """Open the package, and return what generates with it over its weights."""
    code = _Code(package, library, target.device)
    engine, upload = (_assemble_kv if package.is_kv else _assemble_base)(target, plan, code)
    close_stage("artifact")
    if target.device == "cuda":
        engine.warm_up(warm_up_tokens, capture)
        close_stage("capture")
    upload.wait()
    close_stage("weights")
    code.close()
    return engine


class _Code:
    """A package's libraries and programs, opened one after the other."""

    def __init__(self, package: Package, library: str, device: str):
        self.package, self.library, self.device = package, library, device
        machine.spin_less()  # OpenMP reads it when it is loaded
        self.steps = c_interface.open_library(package.library(STEPS))
        self.steps.llama_step.restype = ctypes.c_int32
        self.convert = c_interface.converter(self.steps)
        self._kernels = package.unpack_kernels() if device == "cuda" else None

    def open(self, programs: list[str]) -> dict[str, c_interface.Program]:
        """Open what is behind the calls of the programs, and these."""
        package, opened = self.package, {}
        self.interface = self._open_interface()
        for name in programs:
            cubins = Path(self._kernels.name, name) if self._kernels else None
            path = package.library(package.libraries[name], self.library)
            opened[name] = c_interface.Program(path, self.interface, self.device, cubins)
        return opened

    def _open_interface(self) -> c_interface.Interface:
        package, on_cuda = self.package, self.device == "cuda"
        if self.library == LIBTORCH:
            whole = not package.has(RUNTIME)
            interface = c_interface.open_libtorch(on_cuda, whole)
            if not whole:  # the programs name it; libtorch comes before it
                c_interface.open_library(package.library(RUNTIME))
            return interface
        if on_cuda:
            machine.cuda.runtime()  # whose functions the library calls
        try:
            ctypes.CDLL(Path(OPENMP).name)
        except OSError:  # the system has none
            c_interface.open_library(package.library(OPENMP))
        runtime = c_interface.open_library(package.library(RUNTIME))
        return c_interface.Interface(RUNTIME_LIBRARY, runtime)

    def close(self) -> None:
        """Remove the kernels' files, all of which have been loaded."""
        if self._kernels:
            self._kernels.cleanup()


def _assemble_kv(target: Target, plan: Plan, code: _Code) -> tuple[KvEngine, weights.Upload]:
    package, details = code.package, code.package.details
    programs, cache = details["programs"], CacheShape(**details["cache"])
    if package.has(WEIGHTS):
        stored = read_header(package.path, package.offset_of(WEIGHTS))
    else:
        target.checkpoint.require_weights()
        stored = target.checkpoint.stored
    read = {name: stored[name] for name in names_of_weights(programs, target.checkpoint.layers)}
    upload = weights.start_upload(read, target.device, target.dtype, code.convert)
    state, memory = make_state(details, cache, target)
    lacks = details["runtime"]["lacks"] if code.library == RUNTIME_LIBRARY else {}
    # what is called in vain is not opened: without prefill a prompt goes through decode
    opened = code.open([name for name in programs if not lacks.get(name)])
    # rows of it are looked up on the host, also where the table itself is on a GPU
    on_cpu = target.device == "cpu"
    embedding = upload.tensors[EMBEDDING] if on_cpu else weights.map_tensor(stored[EMBEDDING])
    steps = PackageSteps(
        opened, details, upload.tensors, embedding, target.dtype, state, memory,
        (code.steps, code.interface),
    )  # fmt: skip
    return KvEngine(steps, state, cache, memory), upload


def _assemble_base(target: Target, plan: Plan, code: _Code) -> "tuple[BaseEngine, weights.Upload]":
    # imported here: it brings numpy, which a start of a KV cache goes without
    from aotinductor.start import base_engine as base

    device, package, details = target.device, code.package, code.package.details
    longest, vocab = plan.bounds.max_seq_len, details["vocab_size"]
    memory = make_memory(device, max(8 * longest, 4 * vocab))
    place = (package.path, target.checkpoint)
    stored, held = base.find_constants(details["constants"], *place, memory)
    upload = weights.start_upload(stored, device, target.dtype, code.convert)
    tensors = upload.tensors | held
    (program,) = code.open(details["graphs"]).values()
    base.bind(program, code.steps, code.interface, device, tensors)
    program.kept = tensors  # bound without a copy
    forward = base.BaseProgram(program, code.interface, memory, longest, vocab, target.dtype)
    return base.BaseEngine(forward, plan.padded), upload
