"""Every private name of torch and transformers that this package touches, and no other module does.

torch_private.CacheArtifactManager            what a name of NAMES stands for on this stack
torch_private.replace("run_kernel", function) put a function in the place of one
with torch_private.losing("what then"): ...   go on without, and tell it in `lost`

A name that is gone, or whose parameters are others, is a MissingNameError: one line with the name,
what it is for and the tested versions. torch._inductor, torch._dynamo and torch.compiler._cache are
private modules by their names; where torch documents one of their functions the table says so.
"""

import functools
import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from common.errors import EnvironmentProblemError

# oldest and newest stack that the tests run on; every name below was seen on both
TESTED = {"torch": ("2.9.1", "2.14.1"), "transformers": ("4.57.5", "5.24.0")}


class Name(NamedTuple):
    path: str
    use: str
    until: str  # what will make it unnecessary
    parameters: tuple[str, ...] = ()  # those that this package relies on


_CACHE = "a public registry for further kinds of entries in save_cache_artifacts()"
_WHOLE = "save_cache_artifacts() that keeps what tuning chose, pytorch #172819, and compiled C++"
_ASKED = "a public question for the folder of the compiler's caches"
_DOCUMENTED = "documented; only the module's name is private"
_SETTING = "a public home of the setting"
_EVENTS = "a public event for each look-up in the compiler's caches"

NAMES = {
    # --- the mega-cache's entries -------------------------------------------------------------
    "CacheArtifact": Name("torch.compiler._cache.CacheArtifact", "kinds of entries", _CACHE),
    "register_artifact": Name(
        "torch.compiler._cache.CacheArtifactFactory.register", "a kind for C++ kernels", _CACHE
    ),
    "CacheArtifactManager": Name(
        "torch.compiler._cache.CacheArtifactManager", "reading and writing a blob", _CACHE
    ),
    "new_artifacts": Name(
        "torch.compiler._cache.CacheArtifactManager._new_cache_artifacts",
        "entries that are saved next",
        _CACHE,
    ),
    "fresh_entries": Name(
        "torch.compiler._cache.CacheArtifactManager.with_fresh_cache",
        "a blob without what only the decode step's own compilation looks up",
        _CACHE,
    ),
    "PlainFile": Name(
        "torch._inductor.runtime.autotune_cache.AutotuneCacheArtifact",
        "an entry that is a plain file",
        _CACHE,
    ),
    "BytesReader": Name(
        "torch.utils._appending_byte_serializer.BytesReader",
        "ending where a damaged blob ends, not reading on for ever",
        "a load_cache_artifacts() that checks its bounds",
    ),
    # --- settings and folders -----------------------------------------------------------------
    "config": Name("torch._inductor.config", "settings of the compiler", _SETTING),
    "dynamo_config": Name("torch._dynamo.config", "specialize_float", _SETTING),
    "compile_fx": Name(
        "torch._inductor.compile_fx", "imported before the first request that traces", _SETTING
    ),
    "cache_dir": Name("torch._inductor.runtime.cache_dir_utils.cache_dir", "C++ kernels", _ASKED),
    "triton_cache_dir": Name(
        "torch._inductor.runtime.cache_dir_utils.triton_cache_dir", "Triton's files", _ASKED
    ),
    "write_atomic": Name(
        "torch._inductor.codecache.write_atomic", "files into those folders", _ASKED
    ),
    "CustomGraphPass": Name(
        "torch._inductor.custom_graph_pass.CustomGraphPass",
        "products of one row as sums on a CPU",
        "a decomposition of such products on a CPU, as on CUDA",
    ),
    # --- the decode step ----------------------------------------------------------------------
    "list_mode_options": Name(
        "torch._inductor.list_mode_options", "what --compile-mode means", _DOCUMENTED
    ),
    "compile_package": Name(
        "torch._inductor.aoti_compile_and_package",
        "the decode step as a library",
        _DOCUMENTED,
        ("package_path", "inductor_configs"),
    ),
    "PackageLoader": Name(
        "torch._C._aoti.AOTIModelPackageLoader",
        "loading that library, and running it on a list",
        "an aoti_load_package() that runs no g++ (2.14 does, to ask for the processor) and doesn't "
        "parse the tree of inputs at each call (2.9 does)",
    ),
    # --- what happened ------------------------------------------------------------------------
    "look_up_autograd": Name(
        "torch._functorch._aot_autograd.autograd_cache.AOTAutogradCache._lookup",
        "which graphs hit",
        _EVENTS,
        ("key",),
    ),
    "look_up_graph": Name(
        "torch._inductor.codecache.FxGraphCache.load_with_key",
        "which graphs hit, and in what the key of a miss differs",
        _EVENTS,
        ("key", "debug_lines"),
    ),
    # --- kernels ------------------------------------------------------------------------------
    "load_cpp_kernel": Name(
        "torch._inductor.codecache.CppPythonBindingsCodeCache.load_pybinding_async",
        "C++ kernels out of the artifact, without g++",
        _WHOLE,
        ("submit_fn",),
    ),
    "load_cpp_library": Name(
        "torch._inductor.codecache.CppPythonBindingsCodeCache._load_library",
        "the same",
        _WHOLE,
        ("path", "key"),
    ),
    "run_kernel": Name(
        "torch._inductor.runtime.triton_heuristics.CachingAutotuner.run",
        "which kernels ran",
        _WHOLE,
        ("benchmark_run",),
    ),
    "compile_config": Name(
        "torch._inductor.runtime.triton_heuristics.CachingAutotuner._precompile_config",
        "the kernel that coordinate descent chose",
        _WHOLE,
        ("cfg",),
    ),
    "config_key": Name(
        "torch._inductor.runtime.triton_heuristics.triton_config_to_hashable",
        "telling one configuration from another",
        _WHOLE,
    ),
    "triton_folder": Name(
        "torch._inductor.runtime.triton_heuristics.triton_hash_to_path_key", "its cubin", _WHOLE
    ),
    "TritonBundle": Name(
        "torch._inductor.triton_bundler.TritonBundle", "a graph's kernels, as pickled", _WHOLE
    ),
    "put_autotuner": Name(
        "torch._inductor.triton_bundler.TritonBundler.put_static_autotuner",
        "kernels that are compiled",
        _WHOLE,
        ("key", "kernel"),
    ),
    "load_autotuners": Name(
        "torch._inductor.triton_bundler.TritonBundler.load_autotuners",
        "kernels that come out of a cache",
        _WHOLE,
        ("static_autotuners",),
    ),
    "KernelFiles": Name(
        "torch._inductor.triton_bundler.TritonKernelArtifacts", "its cubin, saved", _WHOLE
    ),
    "KernelFile": Name(
        "torch._inductor.triton_bundler.TritonKernelArtifact", "its cubin, saved", _WHOLE
    ),
    "triton_driver": Name(
        "triton.runtime.driver", "Triton's C helper, saved", "a helper that Triton's wheel brings"
    ),
    # --- transformers -------------------------------------------------------------------------
    "compiles_everywhere": Name(
        "transformers.CompileConfig._compile_all_devices",
        "generate that compiles on a CPU",
        "the same as a public setting",
    ),
}

_COUNTED = "public counters of what was compiled and tuned"
# what common/compiler reads and replaces itself: counts.py, and the last three toolchain.py
IN_COMMON = (
    Name("torch._dynamo.utils.counters", "graphs, hits and misses", _COUNTED),
    Name("torch._dynamo.utils.get_compilation_metrics", "recompiles", _COUNTED),
    Name("torch._dynamo.utils.compilation_time_metrics", "kernels tuned", _COUNTED),
    Name("torch._inductor.async_compile.AsyncCompile.process_pool", "pools of workers", _COUNTED),
    Name("torch._inductor.triton_bundler.TritonBundler.read_and_emit", "cubins restored", _COUNTED),
    Name("torch._inductor.runtime.cache_dir_utils.cache_dir", "C++ kernels compiled", _ASKED),
    Name("torch._inductor.runtime.cache_dir_utils.triton_cache_dir", "cubins compiled", _ASKED),
    Name("torch._inductor.config.cpp_cache_precompile_headers", "whether openssl is run", _SETTING),
    Name(
        "torch._inductor.select_algorithm.AlgorithmSelectorCache.log_results",
        "a line in place of tables of tuning",
        "a setting for them that is in no cache's key",
    ),
    Name(
        "torch._inductor.select_algorithm._log_autotune_choices_stats",
        "the same",
        "a setting for them that is in no cache's key",
    ),
)

lost: list[str] = []  # a line for each thing that this process goes without


class MissingNameError(EnvironmentProblemError, AttributeError):
    """This torch or transformers lacks a name, or has it with other parameters."""


def __getattr__(short: str) -> Any:
    if short not in NAMES:  # Python itself asks for some
        raise AttributeError(f"{short} is none of NAMES")
    owner, attribute = owner_of(NAMES[short])
    return getattr(owner, attribute)


def replace(short: str, value: Any) -> None:
    """Put `value` in the place of a function or class of the stack, for this process."""
    setattr(*owner_of(NAMES[short]), value)


@functools.cache
def owner_of(name: Name) -> tuple[Any, str]:
    """Return what the name belongs to and its last part; both are there and as we know them."""
    path, use, _, parameters = name
    first, *parts = path.split(".")
    try:
        owner = found = importlib.import_module(first)
        for index, part in enumerate(parts):
            owner = found
            if not hasattr(owner, part):
                importlib.import_module(".".join((first, *parts[: index + 1])))
            found = getattr(owner, part)
        known = inspect.signature(found).parameters if parameters else {}
        if missing := set(parameters) - set(known):
            raise TypeError(f"it takes no {', '.join(sorted(missing))}")
    except (ImportError, AttributeError, TypeError) as error:
        raise MissingNameError(f"{_stack()} has no {path} as known here ({use}): {error}") from None
    return owner, parts[-1]


@contextmanager
def losing(consequence: str) -> Iterator[None]:
    """Go on without what is done in here where a name is missing; `lost` gets the line."""
    try:
        yield
    except MissingNameError as error:
        lost.append(f"{error}; {consequence}")


def beyond_tested() -> str | None:
    """Return one line when torch or transformers is older or newer than any tested; else None."""
    versions = _versions()
    tested = " and ".join(f"{name} {' to '.join(TESTED[name])}" for name in versions)
    inside = all(
        _numbers(TESTED[name][0]) <= _numbers(version) <= _numbers(TESTED[name][1])
        for name, version in versions.items()
    )
    return None if inside else f"{_stack()} is none of those tested here: {tested}"


def _numbers(version: str) -> list[int]:
    digits = (part for part in version.partition("+")[0].split("."))
    return [int(part) for part in digits if part.isdigit()]


def _stack() -> str:
    return " with ".join(f"{name} {version}" for name, version in _versions().items())


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in TESTED}


# --- settings, and what is set on objects of the stack ----------------------------------------


def configure(graph_pass: Any | None) -> None:
    """Make every kernel one that can be saved as it ran; part of the keys of build and run."""
    config = __getattr__("config")
    # Triton cuts the name of a kernel's file at 150 characters, and then torch doesn't find the
    # file. A descriptive name lists all operators of the kernel and gets that long.
    config.triton.descriptive_names = False
    # kernels that a model brings, through torch.library.triton_op
    config.static_launch_user_defined_triton_kernels = True
    config.post_grad_custom_pre_pass = graph_pass


def compile_everywhere(compile_config: Any) -> None:
    """Have generate compile on a CPU too; left alone it does so on accelerators only."""
    with losing("on a CPU nothing is compiled"):
        __getattr__("compiles_everywhere")
    compile_config._compile_all_devices = True


def use_decode_step(model: Any, step: Any) -> None:
    """Make `generate` decode by `step`; prefill and all else stay as they are."""
    # public, but nowhere documented: an instance attribute hides the class's method
    model.get_compiled_call = lambda compile_config: step


def forget_compiled_state(model: Any) -> None:
    """Make the next cache length compile as a fresh process would.

    Otherwise the second length makes Dynamo switch to dynamic shapes, and what is saved is a graph
    that no process starting at that length ever looks for.
    """
    torch._dynamo.reset()
    # the compiled call that generate keeps on the model
    for name in ("get_compiled_call", "_compiled_call", "_last_compile_config"):
        model.__dict__.pop(name, None)
