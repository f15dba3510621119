"""Artifacts on disk: replaced whole, under kills too, and verified before a byte is used."""

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.artifact import disk
from common.artifact.disk import (
    BLOCK_BYTES,
    ArtifactPair,
    TrustFlags,
    VerifiedArtifact,
    building,
    check_target,
    content_digest,
    open_verified,
    read_blob,
    write_pair,
)
from common.artifact.manifest import SCHEMA, Manifest
from common.cli import Console
from common.errors import (
    ArtifactDamagedError,
    ArtifactMismatchError,
    ArtifactUntrustedError,
    EnvironmentProblemError,
    ScriptError,
    UsageError,
)

FOLDER = Path(__file__).resolve().parents[2]
QUIET = Console(quiet=True)


@pytest.fixture
def pair(tmp_path):
    tmp_path.chmod(0o755)
    return ArtifactPair(tmp_path / "a.pt2", tmp_path / "a_meta.json")


def manifest_of(record: dict, build: int = 0) -> Manifest:
    return Manifest(
        schema=SCHEMA,
        approach="torch_export",
        model={"id": "m", "revision": None, "config_digest": "c", "dtype": "float32"},
        environment={"torch": "2.9.1"},
        recipe={"lengths": [128]},
        file=record,
        build_seconds=1.0,
        details={"build": build},
    )


def content_of(build: int) -> bytes:
    """Return what build number `build` writes: its size says nothing, its bytes do."""
    return random.Random(build).randbytes(50_000)


def write_build(pair: ArtifactPair, build: int) -> None:
    with building(pair, QUIET):
        write_pair(
            pair,
            lambda path: path.write_bytes(content_of(build)) and None,
            lambda record: manifest_of(record, build),
        )


def opened(
    pair: ArtifactPair, flags: TrustFlags | None = None
) -> AbstractContextManager[VerifiedArtifact]:
    return open_verified(pair, "torch_export", flags or TrustFlags(), QUIET)


def read_build(pair: ArtifactPair) -> int:
    """Return the number of the build that is found, whole, by a reader."""
    with opened(pair) as verified:
        content = read_blob(verified)
        assert Path(verified.path_for_loader).read_bytes() == content
    build = verified.manifest.details["build"]
    assert content == content_of(build)
    return build


def refusal(kind: type[ScriptError], pair: ArtifactPair, flags: TrustFlags | None = None) -> str:
    """Return the one line with which a reader refuses the pair."""
    with pytest.raises(kind) as caught, opened(pair, flags):
        pass
    message = str(caught.value)
    assert "\n" not in message
    return message


def damage(pair: ArtifactPair, flags: TrustFlags | None = None) -> str:
    message = refusal(ArtifactDamagedError, pair, flags)
    assert "./build.sh" in message
    return message


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


def python(code: str, *arguments: object, **options) -> subprocess.Popen:
    """Start a process that has this file's helpers and runs `code`."""
    head = f"import sys; sys.path[:0] = [{str(FOLDER)!r}, {str(FOLDER / 'tests' / 'common')!r}]\n"
    head += "from test_artifacts import *\n"
    head += "pair = ArtifactPair(Path(sys.argv[1]), Path(sys.argv[2]))\n"
    command = [sys.executable, "-c", head + code, *map(str, arguments)]
    return subprocess.Popen(command, text=True, **options)


# --- writing ---------------------------------------------------------------------------------


def test_a_written_pair_is_what_a_reader_finds(pair):
    write_build(pair, 1)
    assert read_build(pair) == 1
    assert pair.path.read_bytes() == content_of(1)  # a plain open works too
    assert names(pair.path.parent) == {"a.pt2", "a_meta.json"}
    record = json.loads(pair.metadata_path.read_text())["file"]
    assert record["sha256"] == hashlib.sha256(content_of(1)).hexdigest()
    for path in (pair.path, pair.metadata_path):
        assert path.stat().st_mode & 0o022 == 0


def test_folders_are_made_and_not_for_others_to_write(tmp_path):
    pair = ArtifactPair(tmp_path / "x" / "y" / "a.bin", tmp_path / "z" / "m.json")
    before = os.umask(0)
    try:
        write_build(pair, 1)
    finally:
        os.umask(before)
    assert read_build(pair) == 1
    for folder in ("x", "x/y", "z"):
        assert (tmp_path / folder).stat().st_mode & 0o777 == 0o755


def test_the_producer_sees_the_artifacts_own_name(pair):
    seen = []

    def produce(path):
        seen.append(path.name)
        path.write_bytes(b"x")

    write_pair(pair, produce, manifest_of)
    assert seen == ["a.pt2"]


def test_our_own_link_stays_a_link(pair, tmp_path):
    (tmp_path / "disk").mkdir(mode=0o755)
    pair.path.symlink_to("disk/real.pt2")
    write_build(pair, 1)
    write_build(pair, 2)
    assert pair.path.is_symlink()
    assert (tmp_path / "disk" / "real.pt2").read_bytes() == content_of(2)
    assert read_build(pair) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, BrokenPipeError])
def test_a_failing_build_leaves_the_old_pair_and_nothing_else(pair, error):
    write_build(pair, 1)

    def produce(path):
        path.write_bytes(b"half")
        (path.parent / "scratch").mkdir()
        raise error("no")

    with pytest.raises(error), building(pair, QUIET):
        write_pair(pair, produce, manifest_of)
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_pair(pair, lambda path: path.write_bytes(b"new") and None, lambda _: manifest_of(set))
    assert read_build(pair) == 1
    assert names(pair.path.parent) == {"a.pt2", "a_meta.json"}


def test_targets_that_cannot_be_written_are_refused_before_the_build(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    meta = tmp_path / "m.json"
    for bad in ("/proc/no/a.bin", tmp_path / "file" / "a.bin", tmp_path / "folder"):
        target = ArtifactPair(Path(bad), meta)
        with pytest.raises(EnvironmentProblemError) as caught, building(target, QUIET):
            pass
        assert "\n" not in str(caught.value)
    same = ArtifactPair(meta, meta)
    with pytest.raises(UsageError, match="different paths"), building(same, QUIET):
        pass
    with building(ArtifactPair(tmp_path / "a.bin", meta), QUIET):
        check_target(ArtifactPair(tmp_path / "a.bin", meta), "mega_cache", 1)
    assert names(tmp_path) == {"file", "folder"}


def test_too_little_room_is_named_before_the_build(pair):
    with pytest.raises(EnvironmentProblemError, match=r"has room for .*, the artifact needs about"):
        check_target(pair, "torch_export", 10**18)


def test_the_other_folders_artifact_of_the_same_stem_is_not_overwritten(pair):
    write_build(pair, 1)
    check_target(pair, "torch_export", 1)
    with pytest.raises(UsageError, match="belongs to a torch_export artifact"):
        check_target(
            ArtifactPair(pair.path.with_suffix(".bin"), pair.metadata_path), "mega_cache", 1
        )


def test_a_full_disk_leaves_the_old_pair_whole(pair):
    write_build(pair, 1)
    code = """
import resource
from common.errors import run_script
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))  # a full disk, as far as write() sees
def main(argv):
    with building(pair, QUIET):
        write_pair(pair, lambda path: path.write_bytes(bytes(2**20)) and None, manifest_of)
run_script(main)
"""
    process = python(code, pair.path, pair.metadata_path, stderr=subprocess.PIPE)
    told = process.communicate()[1]
    assert process.returncode == 5, told
    assert "no space left" in told
    assert told.count("\n") == 1
    assert read_build(pair) == 1
    assert names(pair.path.parent) == {"a.pt2", "a_meta.json"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_build_cleans_up(pair, number):
    write_build(pair, 1)
    code = """
from common.errors import run_script
def produce(path):
    path.write_bytes(b"half")
    print("producing", flush=True)
    time.sleep(60)
def main(argv):
    with building(pair, QUIET):
        write_pair(pair, produce, manifest_of)
run_script(main)
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = python(code, pair.path, pair.metadata_path, **pipes)
    assert process.stdout.readline() == "producing\n"
    process.send_signal(number)
    told = process.communicate(timeout=20)[1]
    assert (process.returncode, told) == (130, "error: interrupted\n")
    assert read_build(pair) == 1
    assert names(pair.path.parent) == {"a.pt2", "a_meta.json"}


# --- kills -----------------------------------------------------------------------------------

STEPS = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.scandir")


def dies(step: int, work: Callable[[], object]) -> bool:
    """Do the work in a child that kills itself before file operation `step`; return if it did."""
    child = os.fork()
    if child == 0:
        seen = 0

        def hook(event, arguments):
            nonlocal seen
            if event in STEPS:
                seen += 1
                if seen == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("first", [True, False], ids=["first build", "rebuild"])
def test_killed_before_any_file_operation_the_pair_is_old_or_new(pair, first):
    folder = pair.path.parent
    found = []
    for step in range(1, 200):
        for path in folder.iterdir():
            path.unlink()
        if not first:
            write_build(pair, 1)
        died = dies(step, lambda: write_build(pair, 2))
        left = names(folder)
        if first and not pair.metadata_path.exists():
            assert "no artifact" in damage(pair)
            found.append("none")
        else:
            found.append((read_build(pair), pair.path.exists() and pair.path.read_bytes()[:9]))
        assert names(folder) == left  # reading writes nothing
        with building(pair, QUIET):  # the next builder completes or clears up
            assert all(not name.startswith(".") for name in names(folder))
        if found[-1] == "none":
            assert names(folder) == set()
        else:
            assert pair.path.read_bytes() == content_of(found[-1][0])
            assert read_build(pair) == found[-1][0]
        if not died:
            break
    assert not died
    assert step > 10
    old = b"" if first else content_of(1)[:9]
    # every stage was met: old, new in metadata only, new
    between = (2, old or False)
    assert found.count(between) >= 1
    assert found[-1] == (2, content_of(2)[:9])
    assert [entry for entry in found if entry not in (between, found[-1])] == [found[0]] * (
        found.index(between)
    )


def killed_after(seconds: float, work: Callable[[int], object], first: int, log: Path):
    """Do the work with `first`, `first + 1`, ... in a child; kill it; return what began and ended.

    The time runs from the first beginning on.
    """
    log.write_text("")
    child = os.fork()
    if child == 0:
        try:
            with open(log, "a", buffering=1) as lines:
                for number in itertools.count(first):
                    lines.write(f"begin {number}\n")
                    work(number)
                    lines.write(f"end {number}\n")
        finally:
            os._exit(1)
    while log.stat().st_size == 0:
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    lines = [line.split() for line in log.read_text().splitlines()]
    return [[int(number) for word, number in lines if word == kind] for kind in ("begin", "end")]


def test_fifty_random_kills_lose_nothing(pair, tmp_path):
    write_build(pair, 0)
    chance = random.Random(6)
    last, found, seen = 0, 0, []
    for _ in range(50):
        begun, ended = killed_after(
            chance.uniform(0, 0.02), lambda build: write_build(pair, build), last + 1,
            tmp_path / "log",
        )  # fmt: skip
        old, last = max(ended, default=found), max(begun)
        found = read_build(pair)
        assert found in (old, last)
        seen.append(found == last)
    assert seen.count(False) > 5
    write_build(pair, 7)
    assert pair.path.read_bytes() == content_of(7)
    assert names(tmp_path) == {"a.pt2", "a_meta.json", "log"}


def test_clearing_up_leaves_files_of_other_artifacts_alone(pair):
    folder = pair.path.parent
    other = ArtifactPair(folder / "a.pt2.copy", folder / "a_meta.json.copy")
    write_build(other, 1)
    assert dies(12, lambda: write_build(other, 2))
    strange = folder / ".a.pt2.notes"
    strange.write_bytes(b"")
    before = names(folder)
    write_build(pair, 3)
    assert names(folder) == before | {"a.pt2", "a_meta.json"}


# --- at once ---------------------------------------------------------------------------------


def test_the_second_of_two_builders_waits_and_says_so(pair):
    code = """
with building(pair, Console(quiet=False)):
    began = time.monotonic()
    print("building", flush=True)
    sys.stdin.readline()
    write_pair(pair, lambda path: path.write_bytes(content_of(5)), lambda one: manifest_of(one, 5))
    print(began, time.monotonic())
"""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    one = python(code, pair.path, pair.metadata_path, **pipes)
    assert one.stdout.readline() == "building\n"
    two = python(code, pair.path, pair.metadata_path, **pipes)
    assert two.stderr.readline().startswith("another process is writing")
    ended = [process.communicate("\n", timeout=30) for process in (one, two)]
    assert [told for _, told in ended] == ["", ""]  # nothing more than that
    (out, _), (later_out, _) = ended
    ended_at, began_at = out.split()[1], later_out.splitlines()[-1].split()[0]
    assert float(began_at) >= float(ended_at)  # began after the other had ended
    assert read_build(pair) == 5


def test_a_builder_that_was_killed_blocks_nobody(pair):
    code = """
with building(pair, QUIET):
    print("building", flush=True)
    time.sleep(60)
"""
    process = python(code, pair.path, pair.metadata_path, stdout=subprocess.PIPE)
    process.stdout.readline()
    process.kill()
    process.communicate()
    write_build(pair, 1)
    assert read_build(pair) == 1


def test_a_reader_during_replacements_finds_one_of_them(pair):
    write_build(pair, 0)
    process = python(
        "for build in range(1, 10**9): write_build(pair, build)", pair.path, pair.metadata_path
    )
    try:
        found = set()
        until = time.monotonic() + 3
        while time.monotonic() < until or len(found) < 5:
            assert process.poll() is None
            found.add(read_build(pair))
    finally:
        process.kill()
        process.wait()


def test_a_reader_keeps_what_it_checked_when_the_pair_is_replaced(pair):
    write_build(pair, 1)
    with opened(pair) as verified:
        write_build(pair, 2)
        assert Path(verified.path_for_loader).read_bytes() == content_of(1)
        assert read_blob(verified) == content_of(1)
    assert read_build(pair) == 2


# --- reading ---------------------------------------------------------------------------------


def test_missing_files_say_how_to_build(pair):
    assert f"no artifact and no metadata at {pair.metadata_path}" in damage(pair)
    write_build(pair, 1)
    pair.path.rename(pair.path.with_name("kept"))
    assert f"no artifact at {pair.path}" in damage(pair)
    pair.path.with_name("kept").rename(pair.path)
    pair.metadata_path.unlink()
    assert f"no metadata at {pair.metadata_path}" in damage(pair)
    below_a_file = ArtifactPair(pair.path / "a.bin", pair.path / "a_meta.json")
    assert "no artifact and no metadata at" in damage(below_a_file)


def test_truncated_grown_and_empty_artifacts_are_refused(pair):
    write_build(pair, 1)
    content = pair.path.read_bytes()
    for wrong in (b"", content[:-1], content + b"\0", content[: len(content) // 2]):
        pair.path.write_bytes(wrong)
        assert f"has {len(wrong)} bytes, its metadata says {len(content)}" in damage(pair)


@pytest.mark.parametrize("block_bytes", [BLOCK_BYTES, 1000], ids=["one block", "many blocks"])
@pytest.mark.parametrize("place", [0, 999, 1000, 25_500, 49_999])
def test_a_flipped_bit_anywhere_is_refused(pair, monkeypatch, block_bytes, place):
    monkeypatch.setattr(disk, "BLOCK_BYTES", block_bytes)
    write_build(pair, 1)
    assert read_build(pair) == 1
    content = bytearray(pair.path.read_bytes())
    content[place] ^= 16
    pair.path.write_bytes(content)
    assert "is not that of its metadata" in damage(pair)


def test_the_other_approachs_artifact_is_a_mismatch(pair):
    write_build(pair, 1)
    message = "is a torch_export artifact, expected one of"
    with (
        pytest.raises(ArtifactMismatchError, match=message),
        open_verified(pair, "mega_cache", TrustFlags(), QUIET),
    ):
        pass


def test_files_of_two_builds_are_refused(pair):
    write_build(pair, 1)
    old = pair.path.read_bytes()
    write_build(pair, 2)
    pair.path.write_bytes(old)
    assert "from another build" in damage(pair)


def test_what_is_no_regular_file_is_refused_without_a_hang(pair):
    write_build(pair, 1)
    for path in (pair.path, pair.metadata_path):
        kept = path.with_name("kept")
        path.rename(kept)
        for make, remove in ((os.mkfifo, os.unlink), (os.mkdir, os.rmdir)):
            make(path)
            assert "no regular file" in damage(pair)
            remove(path)
        kept.rename(path)
    assert read_build(pair) == 1


@pytest.mark.parametrize("name", ["path", "metadata_path"])
def test_a_file_that_others_can_write_needs_consent_which_is_none_to_damage(pair, name):
    write_build(pair, 1)
    getattr(pair, name).chmod(0o666)
    assert "or --trust-artifact" in refusal(ArtifactUntrustedError, pair)
    consent = TrustFlags(trust_artifact=True)
    with opened(pair, consent):
        pass
    pair.path.write_bytes(b"x")
    damage(pair, consent)


def test_an_untrusted_target_folder_is_warned_of_at_the_build(pair, capsys):
    pair.path.parent.chmod(0o777)
    with building(pair, QUIET):
        pass
    assert "will need --trust-artifact" in capsys.readouterr().err


def test_a_pinned_metadata_file_admits_its_artifact_wherever_it_lies_and_no_other(pair):
    write_build(pair, 1)
    right = TrustFlags(expect_sha256=hashlib.sha256(pair.metadata_path.read_bytes()).hexdigest())
    pair.path.parent.chmod(0o777)
    with opened(pair, right):
        pass
    pair.path.write_bytes(content_of(2))
    damage(pair, right)
    write_build(pair, 2)
    assert "--expect-sha256 says" in refusal(ArtifactUntrustedError, pair, right)


def test_bytes_changed_after_the_check_are_not_handed_out(pair):
    write_build(pair, 1)
    with opened(pair) as verified:
        with open(pair.path, "r+b") as file:
            file.write(b"changed in place")
        with pytest.raises(ArtifactDamagedError, match="changed while it was read"):
            read_blob(verified)


def test_the_cost_of_verification_is_told_and_small(pair, capsys):
    write_build(pair, 1)
    seconds = []
    for _ in range(5):
        with open_verified(pair, "torch_export", TrustFlags(), Console(False)) as verified:
            seconds.append(verified.verify_seconds)
    assert min(seconds) < 0.05
    assert f"verified {pair.path}: 0.1 MB in " in capsys.readouterr().err


# --- digest ----------------------------------------------------------------------------------


@given(st.binary(min_size=1, max_size=400))
def test_the_digest_is_the_contents_or_that_of_its_blocks_digests(content):
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryFile() as file:
        patch.setattr(disk, "BLOCK_BYTES", 64)
        patch.setattr(disk, "_READ_BYTES", 24)
        file.write(content)
        file.flush()
        found = content_digest(len(content), partial(os.pread, file.fileno()))
    blocks = [hashlib.sha256(content[at : at + 64]) for at in range(0, len(content), 64)]
    whole = hashlib.sha256(b"".join(block.digest() for block in blocks))
    assert found == (blocks[0] if len(blocks) == 1 else whole).hexdigest()


def test_a_large_files_digest_is_what_the_documented_shell_command_prints(tmp_path):
    if not shutil.which("xxd"):
        pytest.skip("no xxd here")
    path = tmp_path / "large"
    with open(path, "wb") as file:
        for _ in range(3):  # mostly holes
            file.seek(BLOCK_BYTES - 50, os.SEEK_CUR)
            file.write(os.urandom(100))
    documented = next(line for line in content_digest.__doc__.splitlines() if "split" in line)
    printed = subprocess.check_output(
        ["sh", "-c", documented.replace("FILE", str(path))], text=True
    )
    with open(path, "rb") as file:
        found = content_digest(path.stat().st_size, partial(os.pread, file.fileno()))
    assert found == printed.split()[0]
