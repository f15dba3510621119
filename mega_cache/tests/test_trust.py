"""Whose artifact may run: each rule of origin, on real files; pins and signatures."""

import base64
import dataclasses
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from common.cli import parse_flags, to_argv
from common.errors import ArtifactUntrustedError, EnvironmentProblemError, UsageError
from common.manifest import SCHEMA, Manifest, dump_manifest, parse_manifest
from common.trust import (
    SignFlags,
    TrustFlags,
    check_links,
    check_origin,
    check_pin,
    check_sign_key,
    folder_problem,
    sign_manifest,
    verify_manifest,
)

STRANGER = 54321  # a user id that has no passwd entry
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
MANIFEST = Manifest(
    schema=SCHEMA,
    approach="torch_export",
    model={"id": "m", "revision": "r", "config_digest": "c", "dtype": "bfloat16"},
    environment={"torch": "2.9.1"},
    recipe={"max_seq_len": 2048},
    file={"bytes": 3, "sha256": "a" * 64, "blocks_sha256": "b" * 64},
    build_seconds=1.0,
    details={},
)


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
    with pytest.raises(ArtifactUntrustedError) as caught:
        check_origin(path)
    message = str(caught.value)
    assert "\n" not in message
    assert "expected" in message
    assert "--trust-artifact" in message
    return message


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
    check_origin(artifact)
    assert folder_problem(artifact) is None


def test_a_missing_file_is_missing_not_untrusted(artifact):
    with pytest.raises(FileNotFoundError):
        check_origin(artifact.parent / "none.bin")
    with pytest.raises(FileNotFoundError):
        check_origin(artifact / "below-a-file.bin")


def test_a_circle_of_links_ends(folder):
    (folder / "a").symlink_to(folder / "b")
    (folder / "b").symlink_to(folder / "a")
    with pytest.raises(FileNotFoundError):
        check_origin(folder / "a")


@as_root
def test_a_strangers_file_is_refused(artifact):
    os.chown(artifact, STRANGER, 0)
    assert f"{artifact} is a file of user {STRANGER}" in refusal(artifact)


@as_root
def test_roots_file_is_trusted_by_a_user(artifact):
    assert run_as(STRANGER, STRANGER, lambda: check_origin(artifact)) == "None"


@as_root
def test_a_strangers_folder_is_refused_at_any_height(artifact):
    os.chown(artifact.parent, STRANGER, 0)
    assert f"{artifact.parent} is a folder of user {STRANGER}" in refusal(artifact)
    os.chown(artifact.parent, 0, 0)
    os.chown(artifact.parent.parent, STRANGER, 0)
    assert f"{artifact.parent.parent} is a folder" in refusal(artifact)


def test_a_folder_that_everybody_can_write_to_is_refused(artifact):
    artifact.parent.chmod(0o777)
    assert "everybody can write to" in refusal(artifact)
    assert "everybody can write to" in folder_problem(artifact)


def test_a_file_that_everybody_can_write_to_is_refused(artifact):
    artifact.chmod(0o666)
    assert f"{artifact} is a file that everybody can write to" in refusal(artifact)


def test_a_sticky_folder_may_hold_the_folder_but_not_the_file(artifact):
    artifact.parent.parent.chmod(0o1777)
    check_origin(artifact)
    artifact.parent.chmod(0o1777)
    assert "everybody can write to" in refusal(artifact)


def test_an_open_folder_above_is_refused(artifact):
    artifact.parent.parent.chmod(0o777)
    assert f"{artifact.parent.parent} is a folder that everybody" in refusal(artifact)


@as_root
def test_another_group_that_can_write_is_refused(artifact):
    os.chown(artifact.parent, 0, STRANGER)
    artifact.parent.chmod(0o775)
    assert f"group {STRANGER} can write to" in refusal(artifact)


@as_root
def test_the_private_group_of_a_user_without_passwd_entry_is_not_others(artifact):
    for path in (artifact, artifact.parent):
        os.chown(path, STRANGER, STRANGER)
        path.chmod(0o775)
    assert run_as(STRANGER, STRANGER, lambda: check_origin(artifact)) == "None"
    # the same files, seen by the same user in another group
    told = run_as(STRANGER, STRANGER + 1, lambda: check_origin(artifact))
    assert told.startswith("ArtifactUntrustedError")
    assert f"expected {STRANGER} or root" in told or f"group {STRANGER}" in told


@as_root
def test_a_group_that_a_listed_user_has_as_primary_is_others(artifact):
    nobody = pwd.getpwnam("nobody")
    for path in (artifact, artifact.parent):
        os.chown(path, STRANGER, nobody.pw_gid)
        path.chmod(0o775)
    told = run_as(STRANGER, nobody.pw_gid, lambda: check_origin(artifact))
    assert told.startswith("ArtifactUntrustedError")


@as_root
def test_the_private_group_of_a_listed_user_is_not_others(artifact):
    primary = [entry.pw_gid for entry in pwd.getpwall()]
    if primary.count(0) != 1:
        pytest.skip("this machine's group 0 has other users")
    artifact.parent.chmod(0o775)
    check_origin(artifact)


@as_root
def test_an_access_control_list_that_lets_others_write_is_refused(artifact):
    # user::rwx user:54321:rwx group::r-x mask::rwx other::r-x, as setfacl writes it
    entries = [(1, 7, 2**32 - 1), (2, 7, STRANGER), (4, 5, 2**32 - 1), (16, 7, 2**32 - 1)]
    entries.append((32, 5, 2**32 - 1))
    blob = (2).to_bytes(4, "little")
    for tag, permission, who in entries:
        blob += tag.to_bytes(2, "little") + permission.to_bytes(2, "little")
        blob += who.to_bytes(4, "little")
    try:
        os.setxattr(artifact.parent, "system.posix_acl_access", blob)
    except OSError as error:
        pytest.skip(f"no access control lists here: {error}")
    assert "access control list" in refusal(artifact)


def test_our_own_link_is_followed_and_its_target_checked(artifact):
    link = artifact.parent.parent / "link.bin"
    link.symlink_to("inner/a.bin")
    check_origin(link)
    artifact.chmod(0o666)
    assert str(artifact) in refusal(link)


@as_root
def test_a_strangers_link_is_refused_for_reading_and_for_writing(artifact):
    link = artifact.parent.parent / "link"
    link.symlink_to(artifact.parent)
    os.chown(link, STRANGER, 0, follow_symlinks=False)
    assert f"{link} is a link of user {STRANGER}" in refusal(link / "a.bin")
    with pytest.raises(ArtifactUntrustedError, match="refusing to write"):
        check_links(link / "new" / "b.bin")
    check_links(artifact.parent / "new" / "b.bin")


def test_dots_after_a_link_are_followed_as_the_kernel_does(artifact):
    other = artifact.parent / "deep"
    other.mkdir(mode=0o755)
    link = artifact.parent.parent / "link"
    link.symlink_to(other)
    check_origin(link / ".." / "a.bin")


def test_a_pin_admits_only_its_sha256(artifact):
    check_pin(artifact, None, "a" * 64)
    check_pin(artifact, "a" * 64, "a" * 64)
    with pytest.raises(ArtifactUntrustedError, match="--expect-sha256 says"):
        check_pin(artifact, "a" * 64, "b" * 64)


def test_flags_survive_the_round_through_argv(artifact):
    argv = ["--expect-sha256", "AB" * 32, "--verify-key", str(artifact), "--trust-artifact"]
    groups = parse_flags("x", [TrustFlags, SignFlags], argv)
    assert groups[0] == TrustFlags(True, "ab" * 32, artifact)
    assert parse_flags("x", [TrustFlags, SignFlags], to_argv(*groups)) == groups
    for bad in (["--expect-sha256", "12"], ["--verify-key", "/none"], ["--sign-key", "/none"]):
        with pytest.raises(SystemExit) as caught:
            parse_flags("x", [TrustFlags, SignFlags], bad)
        assert caught.value.code == 2


def test_without_the_package_signatures_say_what_to_install(artifact, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("cryptography")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(EnvironmentProblemError, match="pip install cryptography"):
        check_sign_key(artifact)
    check_sign_key(None)


@pytest.fixture
def keys(tmp_path):
    """Return paths of (private, public) keys as openssl writes them."""
    pytest.importorskip("cryptography")
    if shutil.which("openssl") is None:
        pytest.skip("no openssl command")
    return make_keys(tmp_path, "ed25519")


def make_keys(folder: Path, algorithm: str) -> tuple[Path, Path]:
    private, public = folder / f"{algorithm}.key", folder / f"{algorithm}.pub"
    for command in (
        ["genpkey", "-algorithm", algorithm, "-out", private],
        ["pkey", "-in", private, "-pubout", "-out", public],
    ):
        subprocess.run(["openssl", *command], check=True, capture_output=True)
    return private, public


def test_a_signed_manifest_verifies_after_the_round_through_its_file(keys, tmp_path):
    check_sign_key(keys[0])
    signed = sign_manifest(MANIFEST, keys[0])
    reread = parse_manifest(dump_manifest(signed).encode())
    verify_manifest(reread, keys[1], tmp_path)


def test_a_changed_unsigned_or_foreign_manifest_is_refused(keys, tmp_path):
    signed = sign_manifest(MANIFEST, keys[0])
    (tmp_path / "other").mkdir()
    other = make_keys(tmp_path / "other", "ed25519")
    swapped = {**MANIFEST.file, "sha256": "c" * 64}
    zeros = base64.b64encode(bytes(64)).decode()
    for manifest, key, reason in [
        (MANIFEST, keys[1], "has no signature"),
        (dataclasses.replace(signed, file=swapped), keys[1], "was not made by"),
        (dataclasses.replace(signed, build_seconds=2.0), keys[1], "was not made by"),
        (dataclasses.replace(signed, signature=zeros), keys[1], "was not made by"),
        (dataclasses.replace(signed, signature="\xe9?"), keys[1], "was not made by"),
        (dataclasses.replace(signed, signature=""), keys[1], "was not made by"),
        (signed, other[1], "was not made by"),
    ]:
        with pytest.raises(ArtifactUntrustedError, match=reason):
            verify_manifest(manifest, key, tmp_path / "meta.json")


def test_keys_of_another_kind_are_usage_errors(keys, tmp_path):
    rsa_private, rsa_public = make_keys(tmp_path, "RSA")
    noise = tmp_path / "noise"
    noise.write_bytes(os.urandom(100))
    for key in (rsa_private, keys[1], noise):
        with pytest.raises(UsageError, match="no unencrypted Ed25519 private key"):
            check_sign_key(key)
    for key in (rsa_public, keys[0], noise):
        with pytest.raises(UsageError, match="no unencrypted Ed25519 public key"):
            verify_manifest(MANIFEST, key, tmp_path)
