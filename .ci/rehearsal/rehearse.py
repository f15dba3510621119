"""Run both folders' scripts on CUDA and check what they built, launched, compiled and spawned.

    .ci/rehearsal/run                        on this machine's GPU; without one, rehearsed
    .ci/rehearsal/run --only "KV cache" --keep /tmp/rehearsal

Prints a line for each check; the exit status is 1 when one failed, and its line names the kernels
or calls. No time is taken: where nothing is computed none would mean anything.
"""

import argparse
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import of_mega_cache
import of_torch_export
from checkpoints import write_3b, write_tiny_qwen3
from of_mega_cache import Artifact
from rehearsal import Rehearsal, UnexpectedEndError


def main() -> None:
    flags = parse_flags()
    with tempfile.TemporaryDirectory(prefix="llama-rehearsal-") as temporary:
        folder = (flags.keep or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        rehearsal = Rehearsal(folder, real="LLAMA_REHEARSAL" not in os.environ)
        print("on this machine's GPU" if rehearsal.real else "on a GPU that computes nothing")
        with ThreadPoolExecutor(flags.workers) as pool:
            for name, step in steps(rehearsal).items():
                if flags.only in name:
                    pool.submit(attempt, rehearsal, name, step)
    print(f"{len(rehearsal.failed)} checks failed" if rehearsal.failed else "all checks hold")
    sys.exit(bool(rehearsal.failed))


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="steps whose name holds this text")
    parser.add_argument("--keep", type=Path, help="folder that the artifacts stay in")
    parser.add_argument("--workers", type=int, default=2, help="steps at a time")
    return parser.parse_args()


def steps(rehearsal: Rehearsal) -> dict[str, Callable[[], None]]:
    """Return what can be done side by side, longest first."""
    long_3b = short_3b = "random:3b"
    layers = 28
    if not rehearsal.real:  # where nothing is computed weights may be zeros, and layers are alike
        layers = 6
        long_3b = write_3b(rehearsal.folder / "3b_6_layers", layers)
        short_3b = write_3b(rehearsal.folder / "3b_2_layers", 2)
    artifacts = [
        Artifact("max-autotune", True, short_3b, longest=0, prompt_lengths=(1, 60)),
        Artifact("max-autotune", True),
        Artifact("max-autotune", False),
        Artifact("default", True),
        Artifact("default", False),
    ]
    packages = [
        of_torch_export.of_3b(long_3b, layers),
        of_torch_export.KV,
        of_torch_export.of_qwen3(write_tiny_qwen3(rehearsal.folder / "qwen3")),
        of_torch_export.BASE,
        of_torch_export.STATIC,
    ]
    found = {}
    for artifact in artifacts:
        step = partial(of_mega_cache.rehearse_artifact, rehearsal, artifact)
        found[f"mega_cache, {artifact.name}"] = step
    for package in packages:
        step = partial(of_torch_export.rehearse_package, rehearsal, package)
        found[f"torch_export, {package.name}"] = step
    for module in (of_mega_cache, of_torch_export):
        name = module.BUILD.replace("/", ", ")
        found[name] = partial(rehearsal.check_toolchain, name, module.BUILD)
    return found


def attempt(rehearsal: Rehearsal, name: str, step: Callable[[], None]) -> None:
    """Do one step; one that cannot be finished is a failed check, and the others go on."""
    try:
        step()
    except UnexpectedEndError as error:
        rehearsal.check(name, "runs through", [error])
    except Exception as error:  # one step's fault must not hide the others' checks
        traceback.print_exc()
        rehearsal.check(name, "runs through", [repr(error)])


if __name__ == "__main__":
    main()
