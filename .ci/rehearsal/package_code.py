"""What the code inside a `.pt2` launches, allocates and needs; read without torch or a GPU."""

import math
import re
import subprocess
import tempfile
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

KERNEL_CALL = re.compile(r"^\s+call_(\w+)\(", re.MULTILINE)
# programs of a KV cache, or the graphs that torch's own loader finds
PROGRAM = re.compile(r"/(?:programs|data/aotinductor)/([^/]+)/")
LIBRARY_CALL = re.compile(r"\b(aoti_torch_(?:cuda_\w+|cpu_\w+|copy_|clone))\(")
CUSTOM_CALL = re.compile(r"aoti_torch_proxy_executor_call_function\(")
SHAPE = re.compile(r"int64_t (int_array_\d+)\[\] = \{([^}]*)\}")
ALLOCATION = re.compile(r"aoti_torch_empty_strided\(\d+, (int_array_\d+),.*&(\w+)_handle\)")
ATTENTION = re.compile(r"_scaled_dot_product_(\w+?)(?:_attention\w*)?$")


@dataclass(frozen=True)
class GraphCode:
    """One graph of a package, or one program."""

    kernels: Counter[str]  # Triton kernel -> launches of one run
    library_calls: Counter[str]
    allocations: dict[str, tuple[str, ...]]  # buffer -> its sizes as the code has them
    cubin_targets: Counter[str]
    host_library: bytes
    source: str  # host code

    @property
    def launches(self) -> int:
        return self.kernels.total() + self.library_calls.total()

    @property
    def attention_backends(self) -> Counter[str]:
        found = ((ATTENTION.search(name), count) for name, count in self.library_calls.items())
        return Counter({match[1]: count for match, count in found if match})

    def buffers_of_at_least(self, elements: int) -> list[str]:
        """Return the buffers of a constant size that hold so many elements."""
        constant = {
            name: tuple(map(int, sizes))
            for name, sizes in self.allocations.items()
            if all(size.isdigit() for size in sizes)
        }
        return [
            f"{name} of {'x'.join(map(str, sizes))}"
            for name, sizes in constant.items()
            if math.prod(sizes) >= elements
        ]


def wide_instructions(library: bytes) -> list[str]:
    """Return the AVX-512 instructions of a shared library, as objdump writes them."""
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        Path(file.name).write_bytes(library)
        listing = subprocess.run(
            ["objdump", "-d", "--no-show-raw-insn", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    wide = re.compile(r"%(?:zmm|[xy]mm(?:1[6-9]|2\d|3[01])|k[1-7]\b)")
    return [line.split("\t")[-1].strip() for line in listing.splitlines() if wide.search(line)]


def host_libraries(blob: bytes) -> list[bytes]:
    """Return what begins with each x86-64 shared library that is stored in a file as it is."""
    starts = [found.start() for found in re.finditer(b"\x7fELF", blob)]
    # e_machine; cubins are ELF too
    return [blob[at:] for at in starts if blob[at + 18 : at + 20] == b"\x3e\x00"]


def read_package(path: Path) -> dict[str, GraphCode]:
    """Return the code of every graph in the package."""
    with zipfile.ZipFile(path) as archive:
        members: dict[str, list[str]] = {}
        for name in archive.namelist():
            if found := PROGRAM.search(name):
                members.setdefault(found[1], []).append(name)
        return {graph: read_graph(archive, names) for graph, names in members.items()}


def read_graph(archive: zipfile.ZipFile, members: list[str]) -> GraphCode:
    source = "".join(
        archive.read(name).decode() for name in members if name.endswith(".wrapper.cpp")
    )
    if not source:  # site/sitecustomize.py puts it beside a program's library
        raise ValueError(f"no generated source beside {', '.join(members)}")
    # from here on the code is one run; shapes are named anew in each function before it
    run = source[source.index("::run_impl(") :]
    shapes = {name: tuple(sizes(text)) for name, text in SHAPE.findall(run)}
    cubins = [archive.read(name) for name in members if name.endswith(".cubin")]
    targets = (set(re.findall(rb"sm_\d+a?", cubin)) for cubin in cubins)
    return GraphCode(
        kernels=Counter(KERNEL_CALL.findall(run)),
        library_calls=Counter(LIBRARY_CALL.findall(run) + CUSTOM_CALL.findall(run)),
        allocations={buffer: shapes[shape] for shape, buffer in ALLOCATION.findall(run)},
        cubin_targets=Counter(target.decode() for found in targets for target in found),
        host_library=b"".join(archive.read(name) for name in members if name.endswith(".so")),
        source=source,
    )


def sizes(text: str) -> list[str]:
    return [part.strip().removesuffix("L") for part in text.split(",")]
