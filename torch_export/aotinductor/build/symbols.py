"""What a compiled program calls and a runtime library lacks, and what nobody calls."""

import re
import subprocess
from pathlib import Path

# The driver and CUDA's runtime, which are opened beside the runtime library.
_OF_CUDA = re.compile(r"cu(da)?[A-Z]")


def missing_symbols(program: Path, runtime: Path) -> list[str]:
    """Return what a program calls and the runtime library hasn't: with any it needs libtorch.

    For a program that isn't linked with libtorch: what it takes from the C and C++ libraries and
    from libgomp carries a version, and functions of torch's C interface have none.
    """
    offered = {name for kind, name in _dynamic_symbols(runtime) if kind not in "Uw"}
    # U: undefined, and not weak
    called = {name for kind, name in _dynamic_symbols(program) if kind == "U" and "@" not in name}
    return sorted(name for name in called - offered if not _OF_CUDA.match(name))


def _dynamic_symbols(library: Path) -> list[tuple[str, str]]:
    """Return kind and name of each symbol, as `nm` writes them."""
    # of binutils, which a C++ compiler cannot do without
    command = ["nm", "--dynamic", str(library)]
    table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [(fields[-2], fields[-1]) for fields in map(str.split, table.splitlines())]


def stripped(library: Path, folder: Path) -> Path:
    """Return a copy in a new folder, without what only a debugger reads.

    The newest torch compiles that in, three quarters of a library.
    """
    folder.mkdir()
    copy = folder / library.name
    subprocess.run(["strip", "--strip-unneeded", "-o", str(copy), str(library)], check=True)
    return copy
