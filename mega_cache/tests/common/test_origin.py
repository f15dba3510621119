"""Whose artifact may run: each rule of origin, on real files."""

import os
import pwd
import shutil
import tempfile
from pathlib import Path

import pytest

from common.artifact.disk import TrustFlags, origin_problem
from common.cli import parse_flags

STRANGER = 54321  # a user id that has no passwd entry
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture
def folder():
    """A private folder right under the sticky temporary folder, so that others can enter it."""
    path = Path(tempfile.mkdtemp(dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def artifact(folder):
    path = folder / "inner" / "a.bin"
    path.parent.mkdir(mode=0o755)
    path.write_bytes(b"code")
    path.chmod(0o644)
    return path


def refusal(path: Path) -> str:
    problem = origin_problem(path)
    assert "\n" not in problem
    assert "expected you or root" in problem or "expected you and root" in problem
    return problem


def run_as(uid: int, gid: int, work) -> str:
    """Return what `work()` returns, or the error it raises, in a process of another user."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(gid)
            os.setuid(uid)
            text = str(work())
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    os.waitpid(child, 0)
    return text


def test_our_own_file_in_our_own_folder_is_trusted(artifact):
    assert origin_problem(artifact) is None
    assert origin_problem(artifact.parent) is None


@as_root
def test_a_strangers_file_is_refused(artifact):
    os.chown(artifact, STRANGER, 0)
    assert f"file {artifact} belongs to user {STRANGER}" in refusal(artifact)


@as_root
def test_roots_file_is_trusted_by_a_user(artifact):
    assert run_as(STRANGER, STRANGER, lambda: origin_problem(artifact)) == "None"


@as_root
@pytest.mark.parametrize("height", [0, 1])
def test_a_strangers_folder_is_refused_at_any_height(artifact, height):
    folder = artifact.parents[height]
    os.chown(folder, STRANGER, 0)
    assert f"folder {folder} belongs to user {STRANGER}" in refusal(artifact)


@pytest.mark.parametrize("height", [0, 1])
def test_a_folder_that_everybody_can_write_to_is_refused_at_any_height(artifact, height):
    folder = artifact.parents[height]
    folder.chmod(0o777)
    assert f"folder {folder} can be written to by everybody" in refusal(artifact)
    assert origin_problem(artifact.parent) is not None


def test_a_file_that_everybody_can_write_to_is_refused(artifact):
    artifact.chmod(0o666)
    assert f"file {artifact} can be written to by everybody" in refusal(artifact)


def test_a_sticky_folder_may_hold_the_folder_but_not_the_file(artifact):
    artifact.parent.parent.chmod(0o1777)
    assert origin_problem(artifact) is None
    artifact.parent.chmod(0o1777)
    assert "by everybody" in refusal(artifact)


@as_root
def test_another_group_that_can_write_is_refused(artifact):
    os.chown(artifact.parent, 0, STRANGER)
    artifact.parent.chmod(0o775)
    assert f"by group {STRANGER}" in refusal(artifact)


@as_root
@pytest.mark.parametrize("uid", [0, STRANGER], ids=["listed", "unlisted"])
def test_what_a_user_made_with_umask_002_is_trusted_by_that_user_only(artifact, uid):
    if uid == 0 and pwd.getpwuid(0).pw_gid != 0:
        pytest.skip("this machine's root has no group of its own")
    for path in (artifact, artifact.parent):
        os.chown(path, uid, uid)
        path.chmod(0o775)
    assert run_as(uid, uid, lambda: origin_problem(artifact)) == "None"
    other = run_as(STRANGER + 1, uid, lambda: origin_problem(artifact))
    assert "belongs to user" in other or "can be written to by group" in other


@as_root
def test_a_group_with_another_name_is_others(artifact):
    nobody = pwd.getpwnam("nobody")
    for path in (artifact, artifact.parent):
        os.chown(path, nobody.pw_uid, nobody.pw_gid)
        path.chmod(0o775)
    told = run_as(nobody.pw_uid, nobody.pw_gid, lambda: origin_problem(artifact))
    assert f"by group {nobody.pw_gid}" in told


def test_a_links_target_counts(artifact):
    link = artifact.parent.parent / "link.bin"
    link.symlink_to("inner/a.bin")
    assert origin_problem(link) is None
    artifact.chmod(0o666)
    assert str(artifact) in refusal(link)


def test_only_a_sha256_can_be_pinned():
    (flags,) = parse_flags("x", [TrustFlags], ["--expect-sha256", "AB" * 32])
    assert flags == TrustFlags(False, "ab" * 32)
    with pytest.raises(SystemExit) as caught:
        parse_flags("x", [TrustFlags], ["--expect-sha256", "12"])
    assert caught.value.code == 2
