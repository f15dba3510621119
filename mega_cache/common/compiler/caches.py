"""Compiler caches of one process alone: empty at first, and gone with it."""

import getpass
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import EnvironmentProblemError


@contextmanager
def private_compiler_caches() -> Iterator[None]:
    """Give this process empty compiler caches that nobody else can write to, removed at its end.

    Inductor's default is a guessable folder under /tmp, accepted even if another user made it, and
    its precompiled headers go to one in TMPDIR whatever the caches are called. What the user names
    in the environment is kept.
    """
    # mode 0700; a compiler that an interrupt has orphaned may write once more while it is removed
    with tempfile.TemporaryDirectory(
        prefix="llama-compile-", ignore_cleanup_errors=True, dir=place_for_compilers()
    ) as folder:
        places = cache_places(folder)
        before = {name: os.environ.get(name) for name in places}
        unfit = {name for name, place in before.items() if place is None or _cut_in_two(place)}
        os.environ.update({name: places[name] for name in unfit})
        tempfile.tempdir = None  # it remembers the first TMPDIR it saw
        try:
            yield
        finally:
            for name in unfit:
                os.environ.pop(name, None)
                if (place := before[name]) is not None:
                    os.environ[name] = place
            tempfile.tempdir = None


def place_for_compilers() -> str:
    """Return the folder for temporary files, or another one if that has a space in its name."""
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
