"""Clocks: since when this process lives, and how long its stages took."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# set by a parent that measures: seconds of the monotonic clock, which all processes of one
# machine share, read just before the spawn
START_VARIABLE = "LLAMA_START_MONOTONIC"


def process_start() -> float:
    """Return when this process began, in seconds of `time.monotonic()`, interpreter included.

    Taken from the measuring parent if there is one. Otherwise from the kernel, whose clock ticks
    are 10 ms; a shell wrapper that `exec`s us counts too, since it is the same process.
    """
    stamp = os.environ.get(START_VARIABLE)
    if stamp is not None:
        return float(stamp)
    stat = Path("/proc/self/stat")
    if not stat.exists():  # not Linux: the best left is the moment of this import
        return _IMPORTED
    # field 22 counts from the boot; the name in field 2 may hold spaces, so cut after its bracket
    ticks = int(stat.read_text().rpartition(")")[2].split()[19])
    since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
    age = since_boot - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age


class Stages:
    """Seconds per named stage of a process, in order; the rest of the wall time has no name.

    `hidden` is work of other threads that went on behind the stages: not part of their sum.
    """

    def __init__(self, start: float):
        self.start = start
        self.seconds: dict[str, float] = {}
        self.hidden: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        with _timed(self.seconds, name):
            yield

    @contextmanager
    def behind(self, name: str) -> Iterator[None]:
        with _timed(self.hidden, name):
            yield

    def close(self, name: str) -> None:
        """Book everything since the start that no stage has claimed yet under `name`."""
        claimed = sum(self.seconds.values())
        self.seconds[name] = self.seconds.get(name, 0.0) + self.elapsed() - claimed

    def split(self, name: str, part: str, seconds: float) -> None:
        """Book `seconds` of the stage `name` as a stage `part` of its own, right before it."""
        rest = self.seconds.pop(name) - seconds
        self.seconds |= {part: seconds, name: rest}

    def elapsed(self) -> float:
        return time.monotonic() - self.start


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.monotonic()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.monotonic() - began


_IMPORTED = time.monotonic()
