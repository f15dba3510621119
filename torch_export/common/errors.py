"""Errors with an exit status, and the one place where a failure becomes a line on stderr."""

import errno
import fcntl
import io
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

INTERRUPTED = 130
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ScriptError(Exception):
    """A failure that a user can act on; `status` is the exit status of the process."""

    status = 1


class UsageError(ScriptError):  # the flags or the prompt ask for something that cannot be done
    status = 2


class ArtifactDamagedError(ScriptError):  # it or its metadata is missing, half-written or damaged
    status = 3


class ArtifactMismatchError(ScriptError):  # it is whole, but was built for something else
    status = 4


class EnvironmentProblemError(ScriptError):  # no GPU, disk, memory, access to a gated model
    status = 5


class ArtifactUntrustedError(ScriptError):  # code that this user has not agreed to run
    status = 6


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the file system refuses while `path` is written into one line with its name."""
    try:
        yield
    except OSError as error:
        full = error.errno in _NO_SPACE
        advice = "make room" if full else "choose a place that you can write to"
        text = f"cannot write {path} ({error.strerror or error}): {advice}"
        raise EnvironmentProblemError(text) from error


def run_script(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Run `main(argv)` and exit: 0 when it returns, else its failure's status and one line."""
    argv = sys.argv[1:] if argv is None else argv
    for name in ("stdout", "stderr"):
        if not _can_be_written(getattr(sys, name)):  # started with `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (as long as the process)
        # a character that the terminal's encoding lacks is escaped, and ends no answer
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # SIGTERM unwinds like Ctrl-C, so that temporary folders and half-written files are removed; so
    # does SIGHUP, when the terminal is closed
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _raise_interrupt)
    sys.unraisablehook = _repeat_interrupt
    try:
        main(argv)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:  # the boundary of the process
        signal.setitimer(signal.ITIMER_REAL, 0)
        status, line = _status_and_line(error)
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            status = 0  # `| head` has seen enough, which is no failure
        else:
            if "--debug" in argv:
                import traceback

                traceback.print_exc()
            print(f"error: {line}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # else it is tried again at exit, whose status would be 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(status)


def first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "no message")


def _raise_interrupt(signum: int, frame: object) -> None:
    # An import that it hits may swallow it, and the build would go on for minutes: seen on torch
    # 2.13. So it comes again, in 5 s: later than any clean-up takes.
    signal.setitimer(signal.ITIMER_REAL, 5.0)
    raise KeyboardInterrupt


def _repeat_interrupt(unraisable: "sys.UnraisableHookArgs") -> None:
    """Let an interrupt that a destructor or a weak reference's callback swallowed come again."""
    if unraisable.exc_type is KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, 0.01)  # by then that code has returned
    else:
        sys.__unraisablehook__(unraisable)


def _can_be_written(stream: TextIO | None) -> bool:
    """Say whether a standard stream is one: a shell that lacks it opens a script in its place."""
    try:
        return stream is not None and fcntl.fcntl(stream, fcntl.F_GETFL) & os.O_ACCMODE > 0
    except io.UnsupportedOperation:  # not of the system: a test's
        return True


def _reader_has_gone() -> bool:
    """Say whether whoever read our stdout or our stderr reads no more."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        poll.register(stream.fileno(), 0)  # errors are told without being asked for
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _status_and_line(error: BaseException) -> tuple[int, str]:
    lacking = EnvironmentProblemError.status
    text = first_line(error)
    if isinstance(error, ScriptError):
        return error.status, str(error)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    if isinstance(error, ModuleNotFoundError):
        advice = f"install the packages of requirements.txt for {sys.executable}"
        return lacking, f"{text}, which this needs: {advice}, or set PYTHON to another"
    if isinstance(error, BrokenPipeError):
        return 1, f"a process that this one works with has ended: {text}"
    # compilers and extensions wrap what the system told them in errors of their own, and torch,
    # which is not imported here, names its out-of-memory error like this
    if any(os.strerror(number) in str(error) for number in _NO_SPACE):
        return lacking, f"no space left: {text}: make room or choose another path"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return lacking, f"not permitted: {text}"
    if type(error).__name__ == "OutOfMemoryError":
        return lacking, f"out of device memory: {text}"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
        advice = "use a smaller model or --dtype bfloat16"
        return lacking, f"out of host memory, {free:.1f} GB are free ({text}): {advice}"
    return 1, f"{type(error).__name__}: {text} (--debug shows where)"
