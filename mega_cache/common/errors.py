"""Errors with an exit status, and the one place where a failure becomes a line on stderr."""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

DONE, UNEXPECTED, USAGE, DAMAGED, MISMATCH, ENVIRONMENT, UNTRUSTED, INTERRUPTED = (
    *range(7),
    130,
)


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
    # SIGTERM unwinds like Ctrl-C, so that temporary folders and half-written files are removed
    signal.signal(signal.SIGTERM, _raise_interrupt)
    try:
        main(argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        _fail(INTERRUPTED, "interrupted", argv)
    except BrokenPipeError:
        # the reader has gone (`| head`); /dev/null keeps the interpreter's last flush quiet
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ScriptError as error:
        _fail(error.status, str(error), argv)
    except MemoryError:
        _fail(ENVIRONMENT, "out of host memory: use a smaller model or --dtype bfloat16", argv)
    except OSError as error:
        _fail(*_describe_os_error(error), argv)
    except Exception as error:  # the boundary of the process: everything else is status 1
        _fail(*_describe_unexpected(error), argv)


def _raise_interrupt(signum: int, frame: object) -> None:
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
    return UNEXPECTED, f"{type(error).__name__}: {_first_line(error)} (--debug shows where)"


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "no message")


def _fail(status: int, message: str, argv: Sequence[str]) -> None:
    if "--debug" in argv:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)
