"""A `.pt2` as a start sees it: a zip of stored entries, whose code never lies in a folder.

STEM/programs/<program>/*.so, *.cubin      a KV cache's: prefill_layer, decode_layer,
                                           head
STEM/data/aotinductor/base/*.so, *.cubin   the base graph's
STEM/native/*.so                           what makes a step's calls, and the runtime library
STEM/weights/model.safetensors             weights, where a KV package holds them
"""

import hashlib
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from common.errors import EnvironmentProblemError

if TYPE_CHECKING:
    import tempfile

STEPS, RUNTIME = "native/libllama_steps.so", "native/libllama_runtime.so"
OPENMP = "native/libgomp.so.1"
WEIGHTS = "weights/model.safetensors"
_unpacked: dict[tuple[bytes, str], str] = {}  # digest, and what it calls -> a path that opens it
_FOLDERS = ("programs", "data/aotinductor")  # where programs lie: ours, and those of torch's loader


class Package:
    """An open package, checked; entries are named without the top folder."""

    def __init__(self, file: BinaryIO, path: Path, details: Mapping[str, Any]):
        """`path` opens the file again; `details` are its metadata's.

        Raises ValueError unless it has a library for each program that they name.
        """
        self.path, self.details = path, details
        self.is_kv = "programs" in details
        # reads the directory at the file's end
        self._file, self._archive = file, zipfile.ZipFile(file)
        entries = self._archive.infolist()
        self._entries = {entry.filename.partition("/")[2]: entry for entry in entries}
        programs = details["programs" if self.is_kv else "graphs"]
        self.libraries = {program: self._library_of(program) for program in programs}

    def _library_of(self, program: str) -> str:
        for name in self._entries:
            folder, _, file = name.rpartition("/")
            if file.endswith(".so") and folder in [f"{one}/{program}" for one in _FOLDERS]:
                return name
        raise ValueError(f"a zip without a library for {program}")

    def has(self, name: str) -> bool:
        return name in self._entries

    def offset_of(self, name: str) -> int:
        """Return where the bytes of a stored entry begin in the file. KeyError: no such entry."""
        entry = self._entries[name]
        # a local header: 30 bytes, with the lengths of the name and of the padding at its end
        header = os.pread(self._file.fileno(), 30, entry.header_offset)
        lengths = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        return entry.header_offset + 30 + sum(lengths)

    def library(self, name: str, over: str = "") -> str:
        """Return a path that opens an entry's library, as long as this process lives.

        The code never lies in a folder: there is none to be writable, or to forbid execution, and
        none is left behind. The same code has the same path, unless it is to be bound to something
        else (`over`). KeyError: no such entry.
        """
        content = self._archive.read(self._entries[name])
        key = (hashlib.sha256(content).digest(), over)
        if key not in _unpacked:
            # never closed: the loader takes a path that it knows for the library that it knows
            descriptor = os.memfd_create(Path(name).name)
            with open(descriptor, "wb", closefd=False) as file:
                file.write(content)
            _unpacked[key] = f"/proc/self/fd/{descriptor}"
        return _unpacked[key]

    def unpack_kernels(self) -> "tempfile.TemporaryDirectory[str]":
        """Return a folder with one per program of its CUDA kernels: data, which only CUDA reads."""
        import tempfile

        try:
            folder = tempfile.TemporaryDirectory(prefix="llama-kernels-")
            for program, library in self.libraries.items():
                own = Path(folder.name, program)
                own.mkdir()
                for name, entry in self._entries.items():
                    beside = name.rpartition("/")[0] == library.rpartition("/")[0]
                    if beside and not name.endswith(".so"):
                        (own / Path(name).name).write_bytes(self._archive.read(entry))
        except OSError as error:
            raise EnvironmentProblemError(
                f"cannot unpack CUDA kernels below {tempfile.gettempdir()} "
                f"({error.strerror or error}): set TMPDIR to a folder that you can write to"
            ) from error
        return folder
