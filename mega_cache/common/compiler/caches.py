"""Compiler caches of one process alone: empty at first, and gone with it."""

import getpass
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import EnvironmentProblemError


@contextmanager
def private_compiler_caches(temporary_files: bool = True) -> Iterator[None]:
    """Give this process empty compiler caches that nobody else can write to, removed at its end.

    Inductor's default is a guessable folder under /tmp, accepted even if another user made it. What
    caches the user names in the environment are kept.

    With `temporary_files` all others of this process lie there too, whatever TMPDIR is: Inductor's
    precompiled headers, and what an interrupted compiler leaves.
    """
    with folder_for_compilers("llama-compile-") as folder:
        places = cache_places(folder)
        if not temporary_files:
            del places["TMPDIR"]
        before = {name: os.environ.get(name) for name in places}
        kept = {name for name, place in before.items() if place and not _cut_in_two(place)}
        changed = places.keys() - (kept - {"TMPDIR"})
        os.environ.update({name: places[name] for name in changed})
        if temporary_files:
            tempfile.tempdir = None  # it remembers the first TMPDIR it saw
        try:
            yield
        finally:
            for name in changed:
                os.environ.pop(name, None)
                if (place := before[name]) is not None:
                    os.environ[name] = place
            if temporary_files:
                tempfile.tempdir = None


@contextmanager
def folder_for_compilers(prefix: str) -> Iterator[str]:
    """Make a folder that only this user reads, gone at the end whenever an interrupt comes.

    It is where temporary files are, or elsewhere if that has a space in its name.
    """
    folder = os.path.join(_place_for_compilers(), f"{prefix}{os.urandom(8).hex()}")
    try:  # begun before there is a folder: between the two, `tempfile` would leave it behind
        os.mkdir(folder, 0o700)
        yield folder
    finally:
        # a compiler that an interrupt has orphaned may write once more while it is removed
        shutil.rmtree(folder, ignore_errors=True)


def _place_for_compilers() -> str:
    usual = tempfile.gettempdir()
    for place in (usual, "/tmp", "/var/tmp"):
        if not _cut_in_two(place) and os.access(place, os.W_OK):
            return place
    raise EnvironmentProblemError(
        f"TMPDIR {usual!r} has a space in it, where compilers' command lines would be cut: set it "
        "to a folder without"
    )


def _cut_in_two(place: str) -> bool:
    return any(character.isspace() for character in place)


def cache_places(folder: str) -> dict[str, str]:
    """Return the variables that keep a process's temporary files and caches in `folder`."""
    places = {
        "TMPDIR": folder,
        "TORCHINDUCTOR_CACHE_DIR": os.path.join(folder, "inductor"),
        "TRITON_CACHE_DIR": os.path.join(folder, "triton"),
    }
    try:
        getpass.getuser()
    except (KeyError, OSError):  # Python to 3.12, from 3.13 on
        # Inductor asks for a user name even where the user id has none
        places["USER"] = f"uid-{os.getuid()}"
    return places
