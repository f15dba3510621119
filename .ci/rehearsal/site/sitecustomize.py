"""Imported by every Python process of a rehearsal: writes down what it does that a start must not.

REHEARSAL_CALLS names a file that gets a JSON line for each subprocess, Triton kernel compiled,
kernel timed by an autotuner, CUDA graph captured and CUDA graph replayed, each with its name.
Where nothing is computed, `answers` takes the place of what has no meaning there.
"""

import functools
import importlib.machinery
import json
import os
import sys

AFTER_IMPORT = {}  # module -> what is done to it once it has been imported


class WatchedImports:
    """Finds a module as Python does, and has `AFTER_IMPORT` see it once it is there."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in AFTER_IMPORT:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                AFTER_IMPORT[name](module)

            spec.loader.exec_module = exec_module
        return spec


def record(what, name):
    with open(os.environ["REHEARSAL_CALLS"], "a") as file:
        file.write(json.dumps({"what": what, "name": name}) + "\n")


def recorded(owner, method, what, name_of):
    stock = getattr(owner, method)

    @functools.wraps(stock)
    def record_and_call(*args, **kwargs):
        record(what, name_of(*args))
        return stock(*args, **kwargs)

    setattr(owner, method, record_and_call)


def record_subprocess(event, arguments):
    if event == "subprocess.Popen":
        _, command, *_ = arguments
        record("subprocess", command if isinstance(command, str) else " ".join(map(str, command)))


def watch_compiler(module):
    # the last step of a real compilation: a kernel found in Triton's cache does not get here
    recorded(
        module.CUDABackend,
        "make_cubin",
        "compiled",
        lambda self, source, metadata, *rest: metadata.get("name", "a Triton kernel"),
    )


def watch_tuning(module):
    recorded(module.CachingAutotuner, "bench", "tuned", lambda self, *rest: self.fn.__name__)


def watch_cuda_graphs(module):
    recorded(module.CUDAGraph, "capture_begin", "captured", lambda *args: "CUDA graph")
    recorded(module.CUDAGraph, "replay", "replayed", lambda *args: "CUDA graph")


def watch_own_graphs(module):
    recorded(module.Graph, "replay", "replayed", lambda *args: "CUDA graph")


def keep_sources(module):
    """Have a package with a KV cache carry the source of each program, to be read."""
    strip, write, compiled = module.stripped, module.write_package, {}

    def stripped(library, folder):
        copy = strip(library, folder)
        compiled[copy] = library
        return copy

    def write_package(path, entries, *rest):
        sources = {
            name.removesuffix(".so") + ".cpp": compiled[file].with_suffix(".cpp")
            for name, file in entries.items()
            if file in compiled
        }
        write(path, entries | sources, *rest)

    module.stripped, module.write_package = stripped, write_package


if "REHEARSAL_CALLS" in os.environ:
    AFTER_IMPORT["common.cuda"] = watch_own_graphs
    AFTER_IMPORT["aotinductor.build.layer_package"] = keep_sources
    AFTER_IMPORT["triton.backends.nvidia.compiler"] = watch_compiler
    AFTER_IMPORT["torch._inductor.runtime.triton_heuristics"] = watch_tuning
    AFTER_IMPORT["torch.cuda.graphs"] = watch_cuda_graphs
    sys.addaudithook(record_subprocess)
if "LLAMA_REHEARSAL" in os.environ:
    import answers

    AFTER_IMPORT.update(answers.AFTER_IMPORT)
sys.meta_path.insert(0, WatchedImports)
