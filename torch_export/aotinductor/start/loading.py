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
from common.model.stored import Stored, read_header
from common.model.target import Target, choose_target
from common.model.tokenizer import TextCodec, load_codec

if TYPE_CHECKING:
    from aotinductor.start.base_engine import BaseEngine

RUNTIME_LIBRARY, LIBTORCH = "runtime", "libtorch"
EMBEDDING = "model.embed_tokens.weight"
CloseStage = Callable[[str], None]  # called with the name of each stage when it has ended


class Wish(NamedTuple):
    """How a package is to be loaded."""

    pair: ArtifactPair
    trust: TrustFlags
    library: str = "auto"  # behind the programs' calls: runtime, libtorch; auto: as it was built
    cuda_graph: bool | None = None  # None: on a GPU
    warm_up_tokens: int = 8  # padded length of the prompt that a GPU is warmed up with


class Opening(NamedTuple):
    """A start whose model, device and lengths are known: prompts can be made and checked."""

    wish: Wish
    target: Target
    plan: Plan
    codec: TextCodec

    def warmed_up_with(self, padded_tokens: int) -> "Opening":
        """Return the same for a first prompt of this length."""
        return self._replace(wish=self.wish._replace(warm_up_tokens=padded_tokens))

    def load(self, console: Console, close_stage: CloseStage = lambda name: None) -> Engine:
        """Check the package against this start, load it, and bring the weights to the device.

        Any doubt is an error of its own kind.
        """
        pair, target, plan = self.wish.pair, self.target, self.plan
        with open_verified(pair, APPROACH, self.wish.trust, console) as verified:
            built = verified.manifest
            library = choose_library(self.wish.library, built.details)
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
                path, embedded = Path(verified.path_for_loader), built.recipe["embed_weights"]
                source = Source(verified.file, path, built.details, embedded)
                if built.recipe["kv_cache"] != source.is_kv:
                    raise ValueError("its metadata's recipe and details are of different graphs")
                made = assemble(self.wish, target, plan, library, source, close_stage)
            except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
                text = first_line(error)
                if isinstance(error, KeyError | TypeError | AttributeError):
                    text = f"its metadata does not describe it: {text}"
                raise ArtifactDamagedError(
                    f"{pair.path} cannot be loaded ({text}): build it with ./build.sh"
                ) from error
        built_from = f"{built.model['id']} (in the package)"
        artifact = {
            "name": pair.path.name,
            "sha256": built.file["sha256"],
            "bytes": built.file["bytes"],
            "verify_seconds": verified.verify_seconds,
            "kv_cache": built.recipe["kv_cache"],
            "library": library,
            "weights_of": built_from if embedded else target.checkpoint.model_id,
        }
        return Engine(made, target, plan, self.codec, artifact)


def make_opening(
    pair: ArtifactPair, shared: SharedFlags, trust: TrustFlags, plan: Plan, console: Console
) -> Opening:
    """Return an opening by a plan, with a package or without; without a model, of its own."""
    if not shared.model_id and plan.manifest:
        shared = shared.changed(model_id=plan.manifest.model["id"])
    target = choose_target(plan.fill_in(shared), console, plan.checkpoint)
    if target.device == "cpu" and plan.checkpoint and not plan.built.get("embed_weights"):
        weights.map_pages(target.checkpoint.stored.values())  # while the tokenizer is made
    return Opening(Wish(pair, trust), target, plan, load_codec(target.checkpoint))


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
        alone = possible and (not lacks or machine.package_folder("torch") is None)
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
    wish: Wish, target: Target, plan: Plan, library: str, source: Source, close_stage: CloseStage
) -> "KvEngine | BaseEngine":
    """Open the package, and return what generates with it over its weights."""
    kind = "programs" if source.is_kv else "graphs"
    code = _Code(Package(source.file, source.details[kind]), library, target.device)
    assemble_kind = _assemble_kv if source.is_kv else _assemble_base
    engine, upload = assemble_kind(target, plan, source, code)
    close_stage("artifact")
    if target.device == "cuda":
        engine.warm_up(wish.warm_up_tokens, wish.cuda_graph is not False)
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
            path = package.program(name, self.library)
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
        return c_interface.open_runtime(package.library(RUNTIME))

    def close(self) -> None:
        """Remove the kernels' files, all of which have been loaded."""
        if self._kernels:
            self._kernels.cleanup()


def _assemble_kv(
    target: Target, plan: Plan, source: Source, code: _Code
) -> tuple[KvEngine, weights.Upload]:
    checkpoint, details = target.checkpoint, source.details
    programs, cache = details["programs"], CacheShape(**details["cache"])
    stored = _stored_tensors(target, source, code.package)
    names = names_of_weights(programs, checkpoint.layers)
    if missing := [name for name in (*names, EMBEDDING) if name not in stored]:
        raise ArtifactMismatchError(
            f"{checkpoint.folder} has no {', '.join(missing[:3])}: it does not fit the package"
        )
    read = {name: stored[name] for name in names}
    upload = weights.start_upload(read, target.device, target.dtype, code.convert)
    state, memory = make_state(details, cache, target)
    lacks = details["runtime"]["lacks"] if code.library == RUNTIME_LIBRARY else {}
    # what is called in vain is not opened: without prefill a prompt goes through decode
    opened = code.open([name for name in programs if not lacks.get(name)])
    libraries = (code.steps, code.interface)
    steps = PackageSteps(opened, programs, upload.tensors, state, memory, libraries)
    steps.rotate_with(**details["rope"])
    # rows of it are looked up on the host, also where the table itself is on a GPU
    on_cpu = target.device == "cpu"
    table = upload.tensors[EMBEDDING] if on_cpu else weights.map_tensor(stored[EMBEDDING])
    steps.embed_with(table, target.dtype)
    return KvEngine(steps, state, cache, memory), upload


def _assemble_base(
    target: Target, plan: Plan, source: Source, code: _Code
) -> "tuple[BaseEngine, weights.Upload]":
    # imported here: it brings numpy, which a start of a KV cache goes without
    from aotinductor.start import base_engine as base

    device, details = target.device, source.details
    longest, vocab = plan.bounds.max_seq_len, details["vocab_size"]
    memory = make_memory(device, max(8 * longest, 4 * vocab))
    rows, values = base.read_constants(details, memory, code.convert)
    if source.embedded:
        stored = base.find_in_package(rows, source.path)
    else:
        try:
            found = _stored_tensors(target, source, code.package)
            stored = base.find_in_checkpoint(rows, found, target.dtype)
        except ValueError as error:
            raise ArtifactMismatchError(f"{target.checkpoint.folder}: {error}") from error
    upload = weights.start_upload(stored, device, target.dtype, code.convert)
    tensors = upload.tensors | values
    (program,) = code.open(details["graphs"]).values()
    base.bind(program, code.steps, code.interface, device, tensors)
    program.kept = tensors  # bound without a copy
    forward = base.BaseProgram(program, code.interface, memory, longest, vocab, target.dtype)
    return base.BaseEngine(forward, plan.padded), upload


def _stored_tensors(target: Target, source: Source, package: Package) -> Mapping[str, Stored]:
    """Return where each tensor lies: in the package, or in the checkpoint."""
    if package.has(WEIGHTS):
        return read_header(source.path, package.offset_of(WEIGHTS))
    target.checkpoint.require_weights()
    return target.checkpoint.stored
