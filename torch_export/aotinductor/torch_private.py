"""Every private name of torch that this folder touches, what for, and what would end the need.

Read in torch 2.9.1 and 2.14.1. A name that a stack doesn't have ends in one line that says so
(EnvironmentProblemError). What `common/compiler` touches, it says itself.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from common.errors import EnvironmentProblemError

_TORCH_LIBRARIES = ("torch", "torch_cpu", "torch_cuda", "c10", "c10_cuda")


def find(module: str, name: str) -> Any:
    """Return a private name of torch, or raise EnvironmentProblemError naming what is gone."""
    try:
        found = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        raise EnvironmentProblemError(
            f"{module}.{name} is not in torch {torch.__version__}: this needs a stack that the "
            "README names"
        ) from None
    return found


def aot_compile(program: torch.export.ExportedProgram, options: Mapping[str, object]) -> list[str]:
    """Return the files of one program, compiled ahead of time: its library is the one `.so`.

    `aoti_compile_and_package`, the public name, takes one program a file and writes torch's own
    layout, weights and metadata of its own.
    """
    compiled = find("torch._inductor", "aot_compile")
    args, kwargs = program.example_inputs
    # the module's own guards are Python checks, which a compiled program does not run anyway
    module = program.module(check_guards=False)
    files = compiled(module, args, kwargs, options={"aot_inductor.package": True, **options})
    return [str(file) for file in files]


def package_aoti(path: Path, files: Mapping[str, list[str]]) -> None:
    """Write a `.pt2` that torch's plain loader opens, of several compiled programs.

    What `aoti_compile_and_package` calls for one program; it takes only one.
    """
    find("torch._inductor.package", "package_aoti")(str(path), dict(files))


def flash_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> torch.Tensor:
    """Return causal attention by the flash kernel, whatever else a stack would prefer.

    `torch.nn.attention.sdpa_kernel` is the public way to choose, and has no effect on a graph: the
    choice is made while it is lowered.
    """
    # by its name: this is traced, and a look-up as `find` makes it cannot be
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    return flash(q, k, v, is_causal=True, scale=scale)[0]


@contextmanager
def linked_with(library: Path) -> Iterator[None]:
    """While inside, programs are linked with this library, libNAME.so, and with none of torch's.

    A setting says which further libraries, none on both stacks where they are: the compiler's own
    variable does. `link_libtorch` is a setting of 2.14; before, the list of torch's libraries is a
    literal, which the options of the linker's command repeat.
    """
    # asked first, and the answer is kept: Inductor tries the processor's vectors with a library
    # that needs torch's, and takes one that cannot be opened for a processor without vectors
    find("torch._inductor.cpu_vec_isa", "valid_vec_isa_list")()
    settings = {"aot_inductor.custom_op_libs": [library.stem.removeprefix("lib")]}
    places = [str(library.parent), *filter(None, [os.environ.get("LIBRARY_PATH")])]
    with ExitStack() as patches:
        if hasattr(find("torch._inductor.config", "aot_inductor"), "link_libtorch"):
            settings["aot_inductor.link_libtorch"] = False
        else:
            options = find("torch._inductor.cpp_builder", "BuildOptionsBase")
            stock = find("torch._inductor.cpp_builder", "BuildOptionsBase.get_libraries")

            def without_torch(self) -> list[str]:
                return [name for name in stock(self) if name not in _TORCH_LIBRARIES]

            patches.enter_context(patch.object(options, "get_libraries", without_torch))
        patches.enter_context(patch.dict(os.environ, LIBRARY_PATH=os.pathsep.join(places)))
        patches.enter_context(inductor_settings(settings))
        yield


@contextmanager
def inductor_settings(options: Mapping[str, object]) -> Iterator[None]:
    """While inside, Inductor's settings are these, in their documented place.

    For what applies to every graph, autotuning's own included; `options` of a call do not.
    """
    with find("torch._inductor.config", "patch")(dict(options)):
        yield
