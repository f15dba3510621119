"""A run as a user sees it: text that streams, a summary of a few lines, and a clean end."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import FOLDER, run_command, user_environment

ANY = "--prompt-length=0"  # the text counts, not the length that the other tests ask for


@pytest.fixture
def command(subject):
    return [sys.executable, str(FOLDER / subject.run), *subject.run_flags(subject.pair), ANY]


def test_only_the_completion_is_on_stdout_and_the_summary_is_short(command, tmp_path):
    result = tmp_path / "run.json"
    done = run_command([*command, "--prompt=Hello", f"--json={result}"], result)
    assert done.status == 0, done.stderr
    assert done.stdout == done.result["output"]["text"] + "\n"
    said = done.stderr.splitlines()
    assert any(line.startswith("ready after ") for line in said)
    assert len(said) <= 8, done.stderr  # the progress of loading, and at most four of summary
    assert len(run_command([*command, "--quiet"]).stderr.splitlines()) == 0
    verbose = run_command([*command, "--verbose"])
    assert "| tail_tokens/s" not in verbose.stderr  # one request has no tail
    assert "| ttft_cold" in verbose.stderr
    assert "| kernels_compiled" in verbose.stderr


def test_a_prompt_from_stdin_is_the_same_prompt(command):
    given = run_command([*command, "--prompt=Hello"])
    piped = subprocess.run(
        [*command, "--prompt", "-"], input="Hello", capture_output=True, text=True,
        env=user_environment(),
    )  # fmt: skip
    assert piped.returncode == 0, piped.stderr
    assert piped.stdout == given.stdout


def test_each_line_of_a_file_is_served_and_shown(command, tmp_path):
    file, result = tmp_path / "prompts.txt", tmp_path / "run.json"
    file.write_text("one\ntwo two\nthree three three\n")
    done = run_command([*command, f"--prompts-file={file}", f"--json={result}"], result)
    assert done.status == 0, done.stderr
    texts = json.loads(result.read_text())["completions"]
    assert len(texts) == 3
    assert done.stdout == "".join(text + "\n" for text in texts)


@pytest.fixture
def streaming(command):
    """A run that goes on for a long time, with the first of its text on stdout already."""
    long = ["--prompt=Hello", "--max-new-tokens=900", "--ignore-eos", "--num-requests=50"]
    process = subprocess.Popen(
        [*command, *long, "--show-completions"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=user_environment(),
    )  # fmt: skip
    assert process.stdout.read(1)
    yield process
    process.kill()
    process.wait()


def test_the_first_text_comes_before_the_last_is_computed(streaming):
    assert streaming.poll() is None
    began = time.monotonic()
    os.read(streaming.stdout.fileno(), 1 << 16)  # more of it, while it still runs
    assert streaming.poll() is None
    assert time.monotonic() - began < 60


def test_an_interrupt_in_a_stream_ends_it_cleanly(streaming):
    streaming.send_signal(signal.SIGINT)
    _, stderr = streaming.communicate(timeout=60)
    assert streaming.returncode == 130
    assert b"Traceback" not in stderr
    assert stderr.splitlines()[-1] == b"error: interrupted"


def test_a_reader_that_stops_early_is_no_failure(streaming):
    streaming.stdout.close()
    _, status = os.waitpid(streaming.pid, 0)
    streaming.returncode = os.waitstatus_to_exitcode(status)
    assert streaming.returncode == 0
    assert b"Traceback" not in streaming.stderr.read()
