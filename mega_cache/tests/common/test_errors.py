"""However a script ends: a status of the list, one line, and no traceback."""

import signal
import subprocess
import sys

import pytest
from helpers import FOLDER

from common.errors import run_script

SCRIPT = f"""
import os, sys
sys.path.insert(0, {str(FOLDER)!r})
from common.errors import run_script
def main(argv):
    exec(argv[0])
run_script(main)
"""


@pytest.fixture(autouse=True)
def own_handlers(monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def shell(tail: str, program: str) -> subprocess.CompletedProcess:
    """Run a script that does `program`, its output redirected by the shell's `tail`."""
    line = f'"$0" -c "$1" "$2" {tail}'
    command = ["bash", "-o", "pipefail", "-c", line, sys.executable, SCRIPT, program]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def end_of(error: BaseException, capsys, *flags: str) -> tuple[int, str]:
    """Return the status and the stderr of a script that fails with `error`."""

    def main(argv):
        raise error

    with pytest.raises(SystemExit) as caught:
        run_script(main, flags)
    return caught.value.code, capsys.readouterr().err


LONG = "print('line\\n' * 10**6)"


@pytest.mark.parametrize("tail", ["| head -1", "| true", ">&-", ">&- 2>&-", "2>&-"])
def test_a_reader_that_stops_early_and_closed_streams_are_no_crash(tail):
    done = shell(tail, LONG)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_a_message_to_a_reader_that_has_gone_is_no_crash():
    done = shell("2>&1 | true", "print('x', file=sys.stderr, flush=True)\n" * 100 + LONG)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_full_disk_under_stdout_is_status_5_and_not_pythons_120():
    for program in (LONG, "print('short')"):
        done = shell("> /dev/full", program)
        assert done.returncode == 5, done.stderr
        assert done.stderr.startswith("error: no space left")
        assert done.stderr.count("\n") == 1


def test_a_process_that_dies_under_us_is_not_taken_for_a_reader_of_our_output():
    program = "ends = os.pipe(); os.close(ends[0]); os.write(ends[1], b'x')"
    done = shell("", program)
    assert done.returncode == 1
    assert done.stderr.startswith("error: a process that this one works with has ended")


def test_out_of_device_memory_says_what_was_needed_and_what_there_was(capsys):
    import torch

    text = (
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.80 GiB "
        "of which 1.25 GiB is free."
    )
    status, told = end_of(torch.OutOfMemoryError(text), capsys)
    assert status == 5
    assert told == f"error: out of device memory: {text}\n"


def test_out_of_host_memory_says_what_was_needed_and_what_there_was(capsys):
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    status, told = end_of(caught.value, capsys)
    assert status == 5
    assert "GB are free" in told
    assert f"you tried to allocate {2**60} bytes" in told
    status, told = end_of(MemoryError(), capsys)
    assert status == 5
    assert "GB are free" in told


def test_an_errors_traceback_is_for_debugging_only(capsys):
    assert end_of(ValueError("odd\nmore"), capsys) == (
        1,
        "error: ValueError: odd (--debug shows where)\n",
    )
    assert "Traceback" in end_of(ValueError("odd"), capsys, "--debug")[1]
    assert end_of(KeyboardInterrupt(), capsys) == (130, "error: interrupted\n")


def test_a_signal_in_a_destructor_which_swallows_it_ends_the_script_all_the_same():
    program = """
import time
class Swallows:
    def __del__(self):
        os.kill(os.getpid(), 15)
Swallows()
began = time.monotonic()
try:
    time.sleep(60)
finally:
    print(time.monotonic() - began < 2)
"""
    done = shell("", program)
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")
    assert done.stdout == "True\n"


def test_what_else_a_destructor_fails_with_is_told_as_python_tells_it():
    done = shell("", "class Bad:\n    def __del__(self):\n        1 / 0\nBad()")
    assert done.returncode == 0
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_unwinds_so_that_temporary_folders_are_removed(number, tmp_path):
    program = (
        "import tempfile, time\n"
        f"with tempfile.TemporaryDirectory(dir={str(tmp_path)!r}):\n"
        "    print('there', flush=True)\n"
        "    time.sleep(60)"
    )
    command = [sys.executable, "-c", SCRIPT, program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"there\n"
        assert list(tmp_path.iterdir())
        process.send_signal(number)
        assert process.wait(30) == 130
    assert not list(tmp_path.iterdir())


def test_a_character_that_the_terminal_lacks_is_escaped():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, r"print('Gr\xfc\xdfe \U0001f999 \udcff')"],
        env={"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Gr\\xfc\\xdfe \\U0001f999 \\udcff\n"
