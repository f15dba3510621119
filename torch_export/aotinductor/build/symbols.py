"""What a compiled program calls, and what of it a runtime library lacks."""

import re
import subprocess
from pathlib import Path

# The driver and CUDA's runtime, which are opened beside the runtime library.
_OF_CUDA = re.compile(r"cu(da)?[A-Z]")


def called_symbols(program_path: Path) -> list[str]:
    """Return the functions of torch's C interface that a program calls, sorted.

    For a program that isn't linked with libtorch: what it takes from the C and C++ libraries and
    from libgomp carries a version, and torch's functions have none.
    """
    symbols = _dynamic_symbols(program_path)
    names = {name for name, defined in symbols if not defined and "@" not in name}
    return sorted(name for name in names if not _OF_CUDA.match(name))


def missing_symbols(program_path: Path, runtime_path: Path) -> list[str]:
    """Return what a program calls and the runtime library hasn't: with any it needs libtorch."""
    offered = {name for name, defined in _dynamic_symbols(runtime_path) if defined}
    return [name for name in called_symbols(program_path) if name not in offered]


def _dynamic_symbols(library: Path) -> list[tuple[str, bool]]:
    """Return name and "defined here" of each symbol that has to be there (weak ones don't)."""
    # of binutils, which a C++ compiler cannot do without
    command = ["readelf", "--dyn-syms", "--wide", str(library)]
    table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    symbols = []
    for line in table.splitlines():
        # number: value size type binding visibility section name [(version's number)]
        fields = line.split()
        if len(fields) >= 8 and fields[4] == "GLOBAL":
            symbols.append((fields[7], fields[6] != "UND"))
    return symbols


def stripped(library: Path, folder: Path) -> Path:
    """Return a copy in a new folder, without what only a debugger reads.

    The newest torch compiles that in, three quarters of a library. `strip` belongs to binutils, as
    the linker does.
    """
    folder.mkdir()
    copy = folder / library.name
    subprocess.run(["strip", "--strip-unneeded", "-o", str(copy), str(library)], check=True)
    return copy
