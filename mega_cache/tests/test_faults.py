"""Nothing damaged, mismatched or foreign is loaded: a listed exit status, one line, no hang.

On a real artifact of random:tiny, through the run script's own main(). Both folders carry this
file; what only one kind of artifact can suffer is beside it.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest
from faults import FOLDER, ScriptServer, copy_pair, edit_metadata, mutations, put
from helpers import run_command, user_environment

from common.artifact.disk import TrustFlags, open_verified
from common.artifact.manifest import SCHEMA, parse_manifest
from common.cli import Console
from common.errors import ArtifactDamagedError, ArtifactMismatchError

QUIET = Console(quiet=True)
DAMAGED, MISMATCH, ENVIRONMENT, UNTRUSTED = 3, 4, 5, 6
AT_ONCE_SECONDS = 20.0  # a refusal takes a tenth of one; the machine may be busy


@pytest.fixture(scope="module")
def server(subject, presets_folder, tmp_path_factory):
    work = tmp_path_factory.mktemp("served")
    server = ScriptServer(FOLDER / subject.run, work)
    yield server
    server.close()


@pytest.fixture
def pair(subject, tmp_path):
    return copy_pair(subject.pair, tmp_path / "artifact")


@pytest.fixture
def refusal(server, subject, pair, presets_folder):
    """Return a function that runs with the artifact, and returns the one line of its refusal."""

    def refuse(status, *more_flags):
        answer = server.run(*subject.run_flags(pair), *more_flags)
        assert answer.status == status, answer.text
        assert answer.seconds < AT_ONCE_SECONDS
        # what transformers says of a checkpoint is kept, once
        assert server.outside(answer, presets_folder, presets_folder.with_name("cache")) == []
        return answer.error()

    return refuse


# --- missing and damaged ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        (("path",), "no artifact at"),
        (("metadata_path",), "no metadata at"),
        (("path", "metadata_path"), "no artifact and no metadata at"),
    ],
)
def test_what_is_missing_is_named(missing, words, pair, refusal):
    for name in missing:
        getattr(pair, name).unlink()
    line = refusal(DAMAGED)
    assert words in line
    assert "./build.sh" in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "line 1 column 1"),
        (b"{", "line 1 column 2"),
        (b"\xff\xfe", "utf-8"),
        (b"[]", "expected an object"),
        (b'{"schema": 99}', "written by another version: schema 99, this one reads"),
        (b'{"schema": %d}' % SCHEMA, "metadata_sha256 is not that of the other fields"),
        (b'{"schema": %d' % SCHEMA + b" " * 2**23 + b"}", "larger than"),
        (b"[" * 10**5, "metadata is damaged"),
    ],
)
def test_metadata_that_is_none_is_refused(text, words, pair, refusal):
    pair.metadata_path.write_bytes(text)
    line = refusal(DAMAGED)
    assert words in line
    assert "./build.sh" in line


@pytest.mark.parametrize("digits", [("2", "3"), ("8", "9"), ("float32", "float64")])
def test_a_digit_changed_in_the_metadata_is_found(digits, pair, refusal):
    text = pair.metadata_path.read_text()
    assert digits[0] in text
    at = text.rindex(digits[0], 0, text.index('"metadata_sha256"'))
    pair.metadata_path.write_text(text[:at] + digits[1] + text[at + len(digits[0]) :])
    refusal(DAMAGED)


def test_a_pipe_or_a_folder_in_place_of_a_file_is_no_hang(pair, refusal):
    for path in (pair.metadata_path, pair.path):
        kept = path.with_name("kept")
        path.rename(kept)
        os.mkfifo(path)
        assert "no regular file" in refusal(DAMAGED)
        path.unlink()
        path.mkdir()
        assert "no regular file" in refusal(DAMAGED)
        path.rmdir()
        kept.rename(path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99, 1.0])
def test_cut_and_flipped_artifacts_are_refused(share, pair, refusal):
    content = pair.path.read_bytes()
    at = min(int(share * len(content)), len(content) - 1)
    pair.path.write_bytes(content[:at])
    assert f"has {at} bytes, its metadata says {len(content)}" in refusal(DAMAGED)
    pair.path.write_bytes(content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :])
    assert "is not that of its metadata" in refusal(DAMAGED)


# --- whole, and for something else -----------------------------------------------------------


def test_the_other_folders_artifact_is_named_as_that(pair, refusal):
    mine = parse_manifest(pair.metadata_path.read_bytes()).approach
    other = {"mega_cache": "torch_export", "torch_export": "mega_cache"}[mine]
    edit_metadata(pair, approach=other, recipe={}, details={})
    assert f"is a {other} artifact, expected one of {mine}" in refusal(MISMATCH)


def test_every_field_that_must_be_the_same_is_compared(subject, pair, refusal):
    before = pair.metadata_path.read_bytes()
    for name in subject.checked:
        edit_metadata(pair, **{name.replace(".", "__"): "of elsewhere"})
        line = refusal(MISMATCH)
        assert f"{name.partition('.')[2]}: built with of elsewhere, found " in line
        assert "./build.sh" in line
        pair.metadata_path.write_bytes(before)


def test_another_dtype_and_another_checkpoint_are_mismatches(refusal, presets_folder, tmp_path):
    assert "dtype: built with float32, found bfloat16" in refusal(MISMATCH, "--dtype=bfloat16")
    other = tmp_path / "other"
    shutil.copytree(next(presets_folder.glob("random-tiny-*")), other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))
    line = refusal(MISMATCH, f"--model-id={other}")
    assert "norm_eps: built with 1e-05, found 1e-06" in line
    assert "digest: built with" not in line  # which would say the same, and tell nobody what


# --- from somebody else ----------------------------------------------------------------------


def test_an_artifact_that_others_can_write_is_not_trusted(pair, refusal):
    pair.path.chmod(0o666)
    line = refusal(UNTRUSTED)
    assert "can be written to by everybody" in line
    assert "--trust-artifact" in line
    pair.path.chmod(0o644)
    pair.path.parent.chmod(0o777)
    assert f"folder {pair.path.parent} can be written to by everybody" in refusal(UNTRUSTED)


def test_consent_to_an_origin_is_none_to_damage(pair, refusal):
    pair.path.chmod(0o666)
    pair.path.write_bytes(b"x")
    refusal(DAMAGED, "--trust-artifact")


def test_only_the_artifact_of_the_pinned_metadata_is_loaded(pair, refusal, server, subject):
    assert "--expect-sha256 says" in refusal(UNTRUSTED, f"--expect-sha256={'0' * 64}")
    pair.path.parent.chmod(0o777)
    digest = sha256(pair.metadata_path.read_bytes()).hexdigest()
    assert server.run(*subject.run_flags(pair), f"--expect-sha256={digest}").status == 0


# --- flags and machine -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        ("--no-such-flag",),
        ("--max-new-tokens=0",),
        ("--max-new-tokens=many",),
        ("--dtype=int4",),
        ("--device=tpu",),
        ("--seed=-1",),
        ("--expect-sha256=abc",),
        ("--prompt=", "--prompt-length=0"),
        ("--model-id=random:huge",),
        ("--model-id=/",),
        ("extra",),
        ("--eager", "--load-artifacts", "--num-requests=0"),
    ],
)
def test_bad_flags_are_usage_errors(flags, server, subject):
    answer = server.run(*subject.flags, *flags)
    assert answer.status == 2, answer.text
    assert "Traceback" not in answer.text
    assert "error: " in answer.text.splitlines()[-1]
    assert server.outside(answer) == []


def test_no_gpu_is_named(refusal):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "no CUDA GPU is to be seen" in refusal(ENVIRONMENT, "--device=cuda")


def test_a_user_without_passwd_entry_can_run(subject, tmp_path):
    stranger = ["unshare", "--user", "--map-user=54321", "--map-group=54321"]
    if shutil.which("unshare") is None or subprocess.run([*stranger, "true"]).returncode:
        pytest.skip("this machine lets nobody have a user namespace")
    home = [f"-u{name}" for name in ("HOME", "USER", "LOGNAME", "USERNAME")]
    script = [sys.executable, FOLDER / subject.run, *subject.run_flags(subject.pair)]
    result = tmp_path / "run.json"
    done = run_command(
        [*stranger, "env", *home, "-C", tmp_path, *script, f"--json={result}"], result
    )
    assert done.status == 0, done.stderr
    assert done.result["artifact"]["sha256"]
    assert "Traceback" not in done.stderr


# --- builds that end early -------------------------------------------------------------------


@pytest.fixture
def build(subject, pair, tmp_path):
    """Return a function that starts a real build over the pair, with a temporary folder of its own.

    `prefix` is a command that starts it.
    """

    def start(*flags, prefix=()):
        (tmp_path / "tmp").mkdir()
        script = [sys.executable, FOLDER / subject.build, *subject.build_flags]
        command = [*prefix, *script, f"{subject.path_flag}={pair.path}", *flags]
        return subprocess.Popen(
            list(map(str, command)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=user_environment() | {"TMPDIR": str(tmp_path / "tmp")},
        )

    return start


def wait_for(find, process):
    """Return what `find` finds, once it finds something."""
    until = time.monotonic() + 120
    while not (found := list(find())):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.02)
    return found


@pytest.mark.parametrize(
    ("number", "stage"), [(signal.SIGINT, "start"), (signal.SIGTERM, "compilation")]
)
def test_an_interrupted_build_leaves_the_old_pair_and_nothing_else(
    number, stage, build, pair, tmp_path
):
    before = {path.name: path.read_bytes() for path in pair.path.parent.iterdir()}
    process = build()
    temporary = tmp_path / "tmp"
    (caches,) = wait_for(lambda: temporary.glob("llama-compile-*"), process)
    assert caches.stat().st_mode & 0o777 == 0o700
    if stage == "compilation":
        wait_for(lambda: temporary.rglob("cc*.s"), process)  # between two of g++'s programs
    process.send_signal(number)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 130, told
    assert told.splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in told
    after = {path.name: path.read_bytes() for path in pair.path.parent.iterdir()}
    after.pop(f".{pair.path.name}.lock", None)
    assert after == before
    assert list(temporary.iterdir()) == []


def test_a_disk_that_fills_up_during_compilation_is_named(build, pair, tmp_path, server, subject):
    small = f'mount -t tmpfs -o size=300k none "{tmp_path}/tmp" && exec "$0" "$@"'
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*namespace, "true"]).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    process = build(prefix=[*namespace, "sh", "-c", small])
    told = process.communicate(timeout=300)[1]
    assert process.returncode == ENVIRONMENT, told
    assert "no space left" in told.splitlines()[-1].lower()
    assert "Traceback" not in told
    assert answers_as_before(server, subject, pair)


def test_a_file_size_limit_is_named_before_anything_is_compiled(build, pair):
    process = build(prefix=["bash", "-c", 'ulimit -f 1000; exec "$0" "$@"'])
    told = process.communicate(timeout=120)[1]
    assert process.returncode == ENVIRONMENT, told
    assert "has room for 1.0 MB, the artifact needs about" in told.splitlines()[-1]


def test_a_target_that_cannot_be_written_is_named_before_anything_is_compiled(build, subject):
    process = build(f"{subject.path_flag}=/proc/none/artifact")
    told = process.communicate(timeout=120)[1]
    assert process.returncode == ENVIRONMENT, told
    assert "cannot write /proc/none" in told.splitlines()[-1]
    assert "choose a place that you can write to" in told.splitlines()[-1]


# --- at random -------------------------------------------------------------------------------


def answers_as_before(server, subject, pair):
    """Say whether the artifact at `pair` still loads, in a process that refused others."""
    answer = server.run(*subject.run_flags(pair))
    assert answer.status == 0, answer.text
    return f"loaded {pair.path.name}" in answer.text


def test_a_hundred_and_fifty_damaged_artifacts_are_refused_and_the_good_one_still_loads(
    pair, refusal, server, subject
):
    good = pair.path.read_bytes()
    damaged = mutations(good, random.Random(1))
    for _ in range(150):
        pair.path.write_bytes(next(damaged))
        refusal(DAMAGED)
    pair.path.write_bytes(good)
    assert answers_as_before(server, subject, pair)


def test_fifty_damaged_metadata_are_refused(pair, refusal):
    good = pair.metadata_path.read_bytes()
    damaged, seen = mutations(good, random.Random(2)), 0
    while seen < 50:
        text = next(damaged)
        if not says_the_same(text, good):
            pair.metadata_path.write_bytes(text)
            refusal(DAMAGED)
            seen += 1


def says_the_same(text: bytes, good: bytes) -> bool:
    """Say whether only spaces between the fields changed."""
    try:
        return json.loads(text) == json.loads(good)
    except (ValueError, RecursionError):
        return False


def test_five_hundred_damaged_pairs_give_a_listed_error_or_the_checked_bytes(pair):
    good = [path.read_bytes() for path in (pair.path, pair.metadata_path)]
    approach = parse_manifest(good[1]).approach
    chance = random.Random(3)
    small = good[0][: 2**16]  # hashing megabytes again and again shows no more
    put(pair, small)
    metadata = pair.metadata_path.read_bytes()
    damaged = mutations(small, chance), mutations(metadata, chance)
    for _ in range(500):
        both = chance.choice(((True, False), (False, True), (True, True)))
        pair.path.write_bytes(next(damaged[0]) if both[0] else small)
        pair.metadata_path.write_bytes(next(damaged[1]) if both[1] else metadata)
        try:
            with open_verified(pair, approach, TrustFlags(), QUIET) as verified:
                assert Path(verified.path_for_loader).read_bytes() == small
        except (ArtifactDamagedError, ArtifactMismatchError) as error:
            assert str(error).isprintable()
