"""Whose artifact may run: origin, a pinned hash, a signature. An artifact is code that runs as us.

A hash proves that the bytes are the ones meant; only their origin or a signature says who meant
them. No inspection of the content can make an artifact safe.
"""

import argparse
import base64
import binascii
import dataclasses
import errno
import grp
import os
import pwd
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.cli import existing_file, flag
from common.errors import ArtifactUntrustedError, EnvironmentProblemError, UsageError
from common.manifest import Manifest, canonical_bytes

_MAX_LINKS = 40  # as the kernel: more is a circle
_MAX_KEY_BYTES = 2**16
_CONSENT = "check where it comes from, then copy it to a folder of your own or add --trust-artifact"


def sha256_text(text: str) -> str:
    """Parse 64 hex digits, as `sha256sum` prints them."""
    digest = text.strip().lower()
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a sha256: expected 64 hex digits")
    return digest


@dataclass(frozen=True)
class TrustFlags:
    """whose artifact may run"""

    trust_artifact: bool = flag(
        False, "load an artifact whatever its owner, its folder and the links to it"
    )
    expect_sha256: str | None = flag(
        None, "the only sha256 the artifact may have, as sha256sum prints it", parse=sha256_text
    )
    verify_key: Path | None = flag(
        None, "PEM file of the Ed25519 public key that must have signed it", parse=existing_file
    )


@dataclass(frozen=True)
class SignFlags:
    """signing"""

    sign_key: Path | None = flag(
        None, "PEM file of the Ed25519 private key to sign the artifact with", parse=existing_file
    )


def check_origin(path: Path) -> None:
    """Raise ArtifactUntrustedError if anyone but this user and root could have put `path` there.

    That is so if the file, a link on the way or a folder above belongs to somebody else, or others
    can write to the file or to its folder, or to a folder above that has no sticky bit. A missing
    path raises FileNotFoundError.
    """
    problem = next(_origin_problems(path), None)
    if problem:
        raise ArtifactUntrustedError(f"{problem}; {path} is code that would run as you: {_CONSENT}")


def folder_problem(path: Path) -> str | None:
    """Return why `check_origin` would refuse a file of ours at `path`, or None."""
    return next(_origin_problems(Path(os.path.realpath(path)).parent), None)


def check_links(path: Path) -> None:
    """Raise ArtifactUntrustedError if a link on the way to `path` is somebody else's.

    Checked before writing: replacing what such a link points to would write where they want.
    """
    for place, info in _walk(path, missing_ok=True):
        if stat.S_ISLNK(info.st_mode) and (problem := _owner_problem(place, info)):
            raise ArtifactUntrustedError(f"{problem}; refusing to write to {path} through it")


def check_pin(path: Path, expected: str | None, found: str) -> None:
    """Raise ArtifactUntrustedError if a sha256 is pinned and `found` is another."""
    if expected is not None and expected != found:
        raise ArtifactUntrustedError(
            f"{path} has sha256 {found}, --expect-sha256 says {expected}: "
            "fetch the right artifact, or pin this one if you know where it comes from"
        )


def check_sign_key(path: Path | None) -> None:
    """Raise now, before a long build, what signing with this key would raise at its end."""
    if path is not None:
        _load_key(path, private=True)


def sign_manifest(manifest: Manifest, key_path: Path) -> Manifest:
    """Return the manifest with its Ed25519 signature, which covers the artifact by its sha256."""
    signature = _load_key(key_path, private=True).sign(canonical_bytes(manifest))
    return dataclasses.replace(manifest, signature=base64.b64encode(signature).decode())


def verify_manifest(manifest: Manifest, key_path: Path, metadata_path: Path) -> None:
    """Raise ArtifactUntrustedError unless the key's owner signed this manifest."""
    key = _load_key(key_path, private=False)
    if manifest.signature is None:
        raise ArtifactUntrustedError(
            f"{metadata_path} has no signature, --verify-key {key_path} asks for one: "
            "build it with --sign-key, or run without --verify-key"
        )
    from cryptography.exceptions import InvalidSignature

    try:
        signature = base64.b64decode(manifest.signature, validate=True)
        key.verify(signature, canonical_bytes(manifest))
    except (InvalidSignature, binascii.Error, ValueError):
        raise ArtifactUntrustedError(
            f"the signature in {metadata_path} was not made by the key of {key_path}, or the "
            "metadata was changed since: get the artifact again from whoever signs it"
        ) from None


def _load_key(path: Path, private: bool) -> Any:
    """Return the Ed25519 key that `openssl genpkey -algorithm ed25519` (`pkey -pubout`) wrote."""
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric import ed25519
        from cryptography.hazmat.primitives.serialization import (
            load_pem_private_key,
            load_pem_public_key,
        )
    except ImportError:
        raise EnvironmentProblemError(
            "signatures need the Python package cryptography, which is not installed: "
            "pip install cryptography"
        ) from None
    with open(path, "rb") as file:
        text = file.read(_MAX_KEY_BYTES)
    try:
        key = load_pem_private_key(text, password=None) if private else load_pem_public_key(text)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _key_error(path, private, type(error).__name__) from None
    wanted = ed25519.Ed25519PrivateKey if private else ed25519.Ed25519PublicKey
    if not isinstance(key, wanted):
        raise _key_error(path, private, type(key).__name__.strip("_"))
    return key


def _key_error(path: Path, private: bool, found: str) -> UsageError:
    kind = "private" if private else "public"
    command = "openssl genpkey -algorithm ed25519" if private else "openssl pkey -pubout"
    return UsageError(
        f"{path} is no unencrypted Ed25519 {kind} key in PEM ({found}): make one with `{command}`"
    )


def _origin_problems(path: Path) -> Iterator[str]:
    """Yield what is wrong with each step from the root to `path`, links followed."""
    steps = list(_walk(path))
    last = steps[-1][0]
    holder = last if stat.S_ISDIR(steps[-1][1].st_mode) else last.parent
    for place, info in steps:
        problem = _owner_problem(place, info)
        if problem:
            yield problem
        if stat.S_ISLNK(info.st_mode):
            continue
        # in a sticky folder such as /tmp nobody can replace our folder, but anyone can add a file
        sticky = place not in (last, holder) and info.st_mode & stat.S_ISVTX
        writers = None if sticky else _other_writers(place, info)
        if writers:
            noun = "folder" if stat.S_ISDIR(info.st_mode) else "file"
            yield f"{place} is a {noun} that {writers} can write to, expected only you and root"


def _walk(path: Path, missing_ok: bool = False) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield every folder, link and file that the kernel passes on its way to `path`."""
    current = Path("/")
    yield current, os.lstat(current)
    parts = list(reversed(path.absolute().parts[1:]))
    links = 0
    while parts:
        part = parts.pop()
        if part == "..":
            current = current.parent
            continue
        place = current / part
        try:
            info = os.lstat(place)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
                raise
            if missing_ok:
                return
            raise FileNotFoundError(errno.ENOENT, error.strerror, str(path)) from None
        yield place, info
        if not stat.S_ISLNK(info.st_mode):
            current = place
            continue
        links += 1
        if links > _MAX_LINKS:
            raise FileNotFoundError(f"{path}: links in a circle")
        target = Path(os.readlink(place))
        parts.extend(reversed(target.parts[1:] if target.is_absolute() else target.parts))
        current = Path("/") if target.is_absolute() else current


def _owner_problem(place: Path, info: os.stat_result) -> str | None:
    trusted = {os.geteuid(), 0}
    if stat.S_ISDIR(info.st_mode):
        # in a user namespace the machine's root appears as the overflow user, who then owns /
        trusted.add(os.lstat("/").st_uid)
    if info.st_uid in trusted:
        return None
    kinds = {stat.S_IFDIR: "folder", stat.S_IFLNK: "link"}
    noun = kinds.get(stat.S_IFMT(info.st_mode), "file")
    return (
        f"{place} is a {noun} of user {_user_name(info.st_uid)}, "
        f"expected {_user_name(os.geteuid())} or root"
    )


def _other_writers(place: Path, info: os.stat_result) -> str | None:
    """Return who else can write, in words, or None."""
    if info.st_mode & stat.S_IWOTH:
        return "everybody"
    if not info.st_mode & stat.S_IWGRP:
        return None
    if _has_acl(place):  # the group bits are then the mask of everyone in the list
        return "others by an access control list"
    return None if _is_private_group(info.st_gid) else f"group {_group_name(info.st_gid)}"


def _is_private_group(gid: int) -> bool:
    """Say whether `gid` is this user's primary group and nobody else's group."""
    user = _or_none(pwd.getpwuid, os.geteuid())
    group = _or_none(grp.getgrgid, gid)
    if gid != (user.pw_gid if user else os.getegid()):
        return False
    name = user.pw_name if user else None
    if group and (set(group.gr_mem) - {name}):
        return False
    # the members of a directory service may not be listed: a shared group has another name
    if group and user and group.gr_name != name:
        return False
    others = (entry for entry in pwd.getpwall() if entry.pw_uid != os.geteuid())
    return not any(entry.pw_gid == gid for entry in others)


def _has_acl(place: Path) -> bool:
    try:
        return bool(os.getxattr(place, "system.posix_acl_access"))
    except (OSError, AttributeError):  # none set, a file system without, not Linux
        return False


def _user_name(uid: int) -> str:
    entry = _or_none(pwd.getpwuid, uid)
    return f"{entry.pw_name} ({uid})" if entry else str(uid)


def _group_name(gid: int) -> str:
    entry = _or_none(grp.getgrgid, gid)
    return f"{entry.gr_name} ({gid})" if entry else str(gid)


def _or_none(lookup: Any, number: int) -> Any:
    try:
        return lookup(number)
    except KeyError:  # containers and clusters run users that have no entry
        return None
