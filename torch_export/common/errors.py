"""Errors with an exit status, and the one place where a failure becomes a line on stderr."""

import errno
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TextIO

DONE, UNEXPECTED, USAGE, DAMAGED, MISMATCH, ENVIRONMENT, UNTRUSTED, INTERRUPTED = (
    *range(7),
    130,
)

INTERRUPT_AGAIN_SECONDS = 5.0


class ScriptError(Exception):
    """A failure that a user can act on; `status` is the exit status of the process."""

    status = UNEXPECTED


class UsageError(ScriptError):
    """The flags or the prompt ask for something that cannot be done."""

    status = USAGE


class ArtifactDamagedError(ScriptError):
    """The artifact or its metadata is missing, half-written or damaged."""

    status = DAMAGED


class ArtifactMismatchError(ScriptError):
    """The artifact is whole, but was built for something else."""

    status = MISMATCH


class EnvironmentProblemError(ScriptError):
    """The machine lacks something: a GPU, disk, memory, access to a gated model."""

    status = ENVIRONMENT


class ArtifactUntrustedError(ScriptError):
    """The artifact is code from somebody that this user has not agreed to run."""

    status = UNTRUSTED


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
            _fail(UNEXPECTED, f"a process that this one works with has ended: {error}", argv)
        _drop_unwritten_output()  # `| head` is no failure
    except ScriptError as error:
        _fail(error.status, str(error), argv)
    except MemoryError:
        advice = "use a smaller model or --dtype bfloat16"
        _fail(ENVIRONMENT, f"out of host memory, {_free_memory()} are free: {advice}", argv)
    except OSError as error:
        _fail(*_describe_os_error(error), argv)
    except Exception as error:  # the boundary of the process: everything else is status 1
        _fail(*_describe_unexpected(error), argv)


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


def _describe_os_error(error: OSError) -> tuple[int, str]:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ENVIRONMENT, f"no space left to write {error.filename or 'a file'}: {error.strerror}"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ENVIRONMENT, f"not permitted: {error.filename}: {error.strerror}"
    return UNEXPECTED, f"{type(error).__name__}: {error}"


def _describe_unexpected(error: Exception) -> tuple[int, str]:
    # torch is not imported here: its out-of-memory error is known by its name
    if type(error).__name__ == "OutOfMemoryError":
        return ENVIRONMENT, f"out of device memory: {_first_line(error)}"
    # compilers and extensions wrap what the system told them in errors of their own
    if "can't allocate memory" in str(error):
        return ENVIRONMENT, f"out of host memory, {_free_memory()} are free: {_first_line(error)}"
    if os.strerror(errno.ENOSPC) in str(error) or os.strerror(errno.EFBIG) in str(error):
        return ENVIRONMENT, f"no space left to write a file: {_first_line(error)}"
    return UNEXPECTED, f"{type(error).__name__}: {_first_line(error)} (--debug shows where)"


def _free_memory() -> str:
    return f"{os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.1f} GB"


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "no message")


def _fail(status: int, message: str, argv: Sequence[str]) -> None:
    if "--debug" in argv:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    _drop_unwritten_output()
    sys.exit(status)
