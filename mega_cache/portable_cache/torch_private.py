"""Every private name of torch and transformers that this package touches, and no other module does.

torch_private.CacheArtifactManager            what a name of NAMES stands for on this stack
torch_private.replace("run_kernel", function) put a function in the place of one
with torch_private.losing("what then"): ...   go on without, and tell it in `lost`

A name that is gone, or whose parameters are others, is a MissingNameError. torch._inductor,
torch._dynamo and torch.compiler._cache are private modules by their names.
"""

import functools
import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch

from common.errors import EnvironmentProblemError

# short name: path, with the parameters that this package relies on; every one was seen on torch
# 2.9.1 and 2.14.1, transformers 4.57.5 and 5.24.0
NAMES = {
    # what a mega-cache holds, until torch has a public registry for further kinds of entries
    "CacheArtifact": "torch.compiler._cache.CacheArtifact",
    "register_artifact": "torch.compiler._cache.CacheArtifactFactory.register",
    "CacheArtifactManager": "torch.compiler._cache.CacheArtifactManager",
    "new_artifacts": "torch.compiler._cache.CacheArtifactManager._new_cache_artifacts",
    "fresh_entries": "torch.compiler._cache.CacheArtifactManager.with_fresh_cache",
    "PlainFile": "torch._inductor.runtime.autotune_cache.AutotuneCacheArtifact",
    # settings and folders of the compiler, which have no public home
    "config": "torch._inductor.config",
    "dynamo_config": "torch._dynamo.config",
    "compile_fx": "torch._inductor.compile_fx",
    "cache_dir": "torch._inductor.runtime.cache_dir_utils.cache_dir",
    "triton_cache_dir": "torch._inductor.runtime.cache_dir_utils.triton_cache_dir",
    "write_atomic": "torch._inductor.codecache.write_atomic",
    # until Inductor decomposes products of one row on a CPU, as it does on CUDA
    "CustomGraphPass": "torch._inductor.custom_graph_pass.CustomGraphPass",
    # documented, in a module with a private name
    "list_mode_options": "torch._inductor.list_mode_options",
    "compile_package": "torch._inductor.aoti_compile_and_package(package_path, inductor_configs)",
    # aoti_load_package() runs g++ on 2.14, and on 2.9 parses the tree of inputs at each call
    "PackageLoader": "torch._C._aoti.AOTIModelPackageLoader",
    # until save_cache_artifacts() keeps compiled C++
    "load_cpp_kernel":
        "torch._inductor.codecache.CppPythonBindingsCodeCache.load_pybinding_async(submit_fn)",
    "load_cpp_library":
        "torch._inductor.codecache.CppPythonBindingsCodeCache._load_library(path, key)",
    # until it keeps what tuning chose (pytorch #172819), and Triton's wheel brings its C helper
    "run_kernel": "torch._inductor.runtime.triton_heuristics.CachingAutotuner.run(benchmark_run)",
    "compile_config":
        "torch._inductor.runtime.triton_heuristics.CachingAutotuner._precompile_config(cfg)",
    "config_key": "torch._inductor.runtime.triton_heuristics.triton_config_to_hashable",
    "triton_folder": "torch._inductor.runtime.triton_heuristics.triton_hash_to_path_key",
    "TritonBundle": "torch._inductor.triton_bundler.TritonBundle",
    "put_autotuner":
        "torch._inductor.triton_bundler.TritonBundler.put_static_autotuner(key, kernel)",
    "load_autotuners":
        "torch._inductor.triton_bundler.TritonBundler.load_autotuners(static_autotuners)",
    "KernelFiles": "torch._inductor.triton_bundler.TritonKernelArtifacts",
    "KernelFile": "torch._inductor.triton_bundler.TritonKernelArtifact",
    "triton_driver": "triton.runtime.driver",
    # generate compiles on accelerators only, until that is a public setting
    "compiles_everywhere": "transformers.CompileConfig._compile_all_devices",
}  # fmt: skip
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
def owner_of(name: str) -> tuple[Any, str]:
    """Return what the name belongs to and its last part; both are there and as we know them."""
    path, _, parameters = name.rstrip(")").partition("(")
    first, *parts = path.split(".")
    try:
        owner = found = importlib.import_module(first)
        for index, part in enumerate(parts):
            owner = found
            if not hasattr(owner, part):
                importlib.import_module(".".join((first, *parts[: index + 1])))
            found = getattr(owner, part)
        if parameters:
            known = inspect.signature(found).parameters
            if missing := set(parameters.split(", ")) - set(known):
                raise TypeError(f"it takes no {', '.join(sorted(missing))}")
    except (ImportError, AttributeError, TypeError) as error:
        stack = " with ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
        raise MissingNameError(f"{stack} has no {path} as known here: {error}") from None
    return owner, parts[-1]


@contextmanager
def losing(consequence: str) -> Iterator[None]:
    """Go on without what is done in here where a name is missing; `lost` gets the line."""
    try:
        yield
    except MissingNameError as error:
        lost.append(f"{error}; {consequence}")


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
    """Make the next cache length look for its graph, or compile it, as a fresh process would."""
    torch._dynamo.reset()
    # the compiled call that generate keeps on the model
    for name in ("get_compiled_call", "_compiled_call", "_last_compile_config"):
        model.__dict__.pop(name, None)
