"""Errors with an exit status, and the one place where a failure becomes a line on stderr."""

import errno
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

INTERRUPTED = 130
INTERRUPT_AGAIN_SECONDS = 5.0
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_PERMITTED = (errno.EACCES, errno.EPERM, errno.EROFS)


class ScriptError(Exception):
    """A failure that a user can act on; `status` is the exit status of the process."""

    status = 1


class UsageError(ScriptError):
    """The flags or the prompt ask for something that cannot be done."""

    status = 2


class ArtifactDamagedError(ScriptError):
    """The artifact or its metadata is missing, half-written or damaged."""

    status = 3


class ArtifactMismatchError(ScriptError):
    """The artifact is whole, but was built for something else."""

    status = 4


class EnvironmentProblemError(ScriptError):
    """The machine lacks something: a GPU, disk, memory, access to a gated model."""

    status = 5


class ArtifactUntrustedError(ScriptError):
    """The artifact is code from somebody that this user has not agreed to run."""

    status = 6


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the file system refuses while `path` is written into one line with its name."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise _as_script_error(error, path) from error
        raise EnvironmentProblemError(
            f"cannot write {path} ({error.strerror or error}): choose a place that you can write to"
        ) from error


def run_script(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Run `main(argv)` and exit: 0 when it returns, else its failure's status and one line."""
    argv = sys.argv[1:] if argv is None else argv
    _open_closed_streams()
    # SIGTERM unwinds like Ctrl-C, so that temporary folders and half-written files are removed
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _raise_interrupt)
    try:
        main(argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, 0)
        _fail(INTERRUPTED, "interrupted", argv)
    except BrokenPipeError as error:
        if not (_reader_has_gone(sys.stdout) or _reader_has_gone(sys.stderr)):
            _fail(1, f"a process that this one works with has ended: {error}", argv)
        _drop_unwritten_output()  # `| head` is no failure
    except Exception as error:  # the boundary of the process
        known = _as_script_error(error)
        _fail(known.status, str(known), argv)


def _open_closed_streams() -> None:
    """Give a process started with `>&-` somewhere to write to."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (as long as the process)


def _reader_has_gone(stream: TextIO) -> bool:
    poll = select.poll()
    poll.register(stream.fileno(), 0)  # errors are told without being asked for
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _drop_unwritten_output() -> None:
    """What cannot be written must not be tried again at exit: the status would be 120."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _raise_interrupt(signum: int, frame: object) -> None:
    # An import or a destructor that it hits may swallow it, and the build would go on for minutes:
    # seen on torch 2.13. So it comes again, later than any clean-up takes.
    signal.setitimer(signal.ITIMER_REAL, INTERRUPT_AGAIN_SECONDS)
    raise KeyboardInterrupt


def _as_script_error(error: Exception, place: object = None) -> ScriptError:
    """Return the error as one line with a status; `place` is what was being written."""
    if isinstance(error, ScriptError):
        return error
    number = error.errno if isinstance(error, OSError) else None
    place = place or getattr(error, "filename", None) or "a file"
    text = next((line for line in str(error).splitlines() if line.strip()), "no message")
    # compilers and extensions wrap what the system told them in errors of their own, and torch,
    # which is not imported here, names its out-of-memory error like this
    if number in _NO_SPACE or any(os.strerror(one) in str(error) for one in _NO_SPACE):
        return EnvironmentProblemError(
            f"no space left to write {place}: {text}: make room or choose another path"
        )
    if number in _NOT_PERMITTED:
        return EnvironmentProblemError(f"not permitted: {place}: {os.strerror(number)}")
    if type(error).__name__ == "OutOfMemoryError":
        return EnvironmentProblemError(f"out of device memory: {text}")
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return EnvironmentProblemError(
            f"out of host memory, {_free_memory()} are free ({text}): "
            "use a smaller model or --dtype bfloat16"
        )
    return ScriptError(f"{type(error).__name__}: {text} (--debug shows where)")


def _free_memory() -> str:
    return f"{os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.1f} GB"


def _fail(status: int, message: str, argv: Sequence[str]) -> None:
    if "--debug" in argv:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    _drop_unwritten_output()
    sys.exit(status)
