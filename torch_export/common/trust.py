"""Whose artifact may run: its origin, or a pinned digest. An artifact is code that runs as us.

A digest proves that the bytes are the ones meant; only their origin, or whoever names the digest,
says who meant them. No inspection of the content can make an artifact safe.
"""

import argparse
import grp
import hashlib
import os
import pwd
import stat
from dataclasses import dataclass
from pathlib import Path

from common.cli import flag
from common.errors import ArtifactUntrustedError


def sha256_text(text: str) -> str:
    """Parse 64 hex digits, as `sha256sum` prints them."""
    digest = text.strip().lower()
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a sha256: expected 64 hex digits")
    return digest


@dataclass(frozen=True)
class TrustFlags:
    """whose artifact may run"""

    trust_artifact: bool = flag(False, "load an artifact whoever could have written it")
    expect_sha256: str | None = flag(
        None,
        "the only sha256 the metadata file may have, as `sha256sum NAME_meta.json` prints it; "
        "it names the artifact's own digest, so no other origin is asked for",
        parse=sha256_text,
    )


def check_trust(path: Path, flags: TrustFlags) -> None:
    """Raise ArtifactUntrustedError if anyone but this user and root could have put `path` there.

    Not asked with consent, nor with a pinned digest: `check_pin` sees to that one.
    """
    if flags.trust_artifact or flags.expect_sha256:
        return
    if problem := origin_problem(path):
        raise ArtifactUntrustedError(
            f"{problem}; {path} is code that would run as you: check where it comes from, then "
            "copy it to a folder of your own, or add --expect-sha256 or --trust-artifact"
        )


def check_pin(path: Path, content: bytes, flags: TrustFlags) -> None:
    """Raise ArtifactUntrustedError if the metadata at `path` is not the one that is pinned."""
    found = hashlib.sha256(content).hexdigest()
    if flags.expect_sha256 not in (None, found):
        raise ArtifactUntrustedError(
            f"{path} has sha256 {found}, --expect-sha256 says {flags.expect_sha256}: "
            "fetch the right artifact, or pin this one if you know where it comes from"
        )


def origin_problem(path: Path) -> str | None:
    """Return why others than this user and root can change `path`, or what is put there, or None.

    Every folder above counts; a link counts as what it leads to.
    """
    path = Path(os.path.realpath(path))
    holder = path if path.is_dir() else path.parent
    for place in (path, *path.parents):
        info = os.stat(place)
        if problem := _owner_problem(place, info):
            return problem
        # in a sticky folder such as /tmp nobody can replace our folder, but anyone can add a file
        sticky = info.st_mode & stat.S_ISVTX and place not in (path, holder)
        if not sticky and (writers := _other_writers(info)):
            return f"{_kind(info)} {place} can be written to by {writers}, expected you and root"
    return None


def _owner_problem(place: Path, info: os.stat_result) -> str | None:
    trusted = {os.geteuid(), 0}
    if stat.S_ISDIR(info.st_mode):
        # in a user namespace the machine's root appears as the overflow user, who then owns /
        trusted.add(os.stat("/").st_uid)
    if info.st_uid in trusted:
        return None
    return f"{_kind(info)} {place} belongs to user {_user_name(info.st_uid)}, expected you or root"


def _other_writers(info: os.stat_result) -> str | None:
    if info.st_mode & stat.S_IWOTH:
        return "everybody"
    if info.st_mode & stat.S_IWGRP and not _is_private_group(info.st_gid):
        return f"group {info.st_gid}"
    return None


def _is_private_group(gid: int) -> bool:
    """Say whether `gid` is the group that most systems make for one user, whose umask is 002."""
    try:
        group = grp.getgrgid(gid)
    except KeyError:  # containers run users and groups that no list names
        return gid == os.geteuid()
    name = _user_name(os.geteuid())
    return group.gr_name == name and set(group.gr_mem) <= {name}


def _kind(info: os.stat_result) -> str:
    return "folder" if stat.S_ISDIR(info.st_mode) else "file"


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
