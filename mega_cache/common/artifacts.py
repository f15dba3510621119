"""An artifact on disk: its file and its metadata, replaced together, verified before use.

How two files change as one. The metadata names the content of the file by its digest, and its
rename is the commit. A builder, alone under a lock, (1) puts the new file, whole and flushed, at
NAME.new; (2) renames the new metadata into place; (3) renames NAME.new to NAME. A reader takes
whichever of NAME.new and NAME holds what the metadata names, and looks again if the metadata was
replaced meanwhile. So whoever is killed wherever, it finds the old pair or the new one, and it
never needs to write. The next builder does step 3 for a dead one, or removes its rubbish.
"""

import errno
import grp
import hashlib
import os
import pwd
import resource
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import BinaryIO

from common.cli import Console, flag, sha256_text
from common.errors import (
    ArtifactDamagedError,
    ArtifactMismatchError,
    ArtifactUntrustedError,
    EnvironmentProblemError,
    UsageError,
    writing,
)
from common.manifest import (
    MAX_BYTES,
    Manifest,
    dump_manifest,
    parse_manifest,
    raise_if_different,
    rehearsal_differences,
)

BLOCK_BYTES = 64 * 2**20  # part of the metadata's format: see content_digest
_READ_BYTES = 2**20  # stays in a core's cache between read and digest
_MAX_THREADS = 32
_REBUILD = "build it again with ./build.sh"


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


@dataclass(frozen=True)
class ArtifactPair:
    """Where an artifact's file and its metadata are."""

    path: Path
    metadata_path: Path


@dataclass(frozen=True)
class VerifiedArtifact:
    """An artifact whose bytes are those of its metadata; the open file is what was checked.

    `path_for_loader` opens that very file again, in this process, as long as `file` is open.
    """

    manifest: Manifest
    path: Path  # for messages
    file: BinaryIO
    path_for_loader: str
    verify_seconds: float

    def __enter__(self) -> "VerifiedArtifact":
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()


# --- building --------------------------------------------------------------------------------


@contextmanager
def building(pair: ArtifactPair, console: Console) -> Iterator[None]:
    """Hold the only right to build this pair, and clear up after builders that died."""
    from filelock import Timeout

    pair = _prepared(pair)
    with writing(pair.path):
        lock = _lock(pair)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            console.say(f"another process is writing {pair.path}: waiting until it has finished")
            lock.acquire()
    try:
        _recover(pair)
        if problem := origin_problem(pair.path.parent):
            console.warn(f"{problem}: loading from there will need --trust-artifact")
        yield
    finally:
        lock.release()


def check_target(pair: ArtifactPair, needed_bytes: int) -> None:
    """Raise, before a long build, what would keep a pair of this size from being written."""
    pair = _prepared(pair)
    for path in (pair.path, pair.metadata_path):
        with writing(path), tempfile.TemporaryFile(dir=path.parent):
            pass
    available = _available_bytes(pair.path.parent)
    if available < needed_bytes:
        raise EnvironmentProblemError(
            f"{pair.path.parent} has room for {size_text(available)}, the artifact needs about "
            f"{size_text(needed_bytes)}: make room, raise the file size limit, or choose another "
            "path"
        )


def write_pair(
    pair: ArtifactPair,
    produce: Callable[[Path], None],
    make_manifest: Callable[[dict], Manifest],
) -> Manifest:
    """Replace the pair by what `produce` writes to the path it is given; return its manifest.

    `make_manifest` is given the `file` record. Whatever happens, readers find the old pair or the
    new one.
    """
    pair = _prepared(pair)
    # the artifact's own name: a compiler writes it into the package, and insists on its suffix
    produced = _workshop(pair.path) / pair.path.name
    with _lock(pair), _umask_for_artifacts():  # no wait inside `building`, whose lock it shares
        _recover(pair)
        try:
            with writing(pair.path):
                produced.parent.mkdir(mode=0o700)
            produce(produced)
            with writing(pair.path):
                record = _flush(produced)
            manifest = make_manifest(record)
            metadata = dump_manifest(manifest)
            with writing(pair.path):
                _replace_pair(pair, produced, metadata)
        finally:
            _recover(pair)
    return manifest


def _prepared(pair: ArtifactPair) -> ArtifactPair:
    """Return the pair with the user's own links followed and its folders made."""
    pair = _real(pair)
    if pair.path == pair.metadata_path:
        raise UsageError(f"artifact and metadata are both {pair.path}: give them different paths")
    for path in (pair.path, pair.metadata_path):
        with writing(path), _umask_for_artifacts():
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "is a folder, expected a file")
    return pair


def _real(pair: ArtifactPair) -> ArtifactPair:
    return ArtifactPair(*(Path(os.path.realpath(p)) for p in (pair.path, pair.metadata_path)))


def _new(path: Path) -> Path:
    return path.with_name(f"{path.name}.new")


def _workshop(path: Path) -> Path:
    return path.with_name(f"{path.name}.building")


def _lock(pair: ArtifactPair):
    from filelock import FileLock

    return FileLock(pair.path.with_name(f".{pair.path.name}.lock"), is_singleton=True)


@contextmanager
def _umask_for_artifacts() -> Iterator[None]:
    """Let nobody else write to what is made: it would not be loaded."""
    before = os.umask(0o022)
    os.umask(before | 0o022)
    try:
        yield
    finally:
        os.umask(before)


def _flush(produced: Path) -> dict:
    """Bring what was produced to disk and return its record."""
    if not produced.is_file() or produced.stat().st_size == 0:
        raise ArtifactDamagedError(f"the build wrote nothing to {produced}: nothing was replaced")
    with open(produced, "rb") as file:
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
        return {
            "bytes": size,
            "sha256": content_digest(file.fileno(), size),
            "written": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        }


def _replace_pair(pair: ArtifactPair, produced: Path, metadata: str) -> None:
    """Do steps 1, 2 and 3 of the module's docstring."""
    _rename(produced, _new(pair.path))
    with open(_new(pair.metadata_path), "w", encoding="utf-8") as file:
        file.write(metadata)
        file.flush()
        os.fsync(file.fileno())
    _rename(_new(pair.metadata_path), pair.metadata_path)
    _rename(_new(pair.path), pair.path)


def _rename(old: Path, new: Path) -> None:
    """Rename, and bring the folder to disk, so that a power cut keeps the order of the steps."""
    os.replace(old, new)
    descriptor = os.open(new.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot flush a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _recover(pair: ArtifactPair) -> None:
    """Finish or remove what a dead or failed builder left; the lock is held."""
    new = _new(pair.path)
    with suppress(FileNotFoundError, ArtifactDamagedError), _open_regular(new) as file:
        manifest = parse_manifest(_read_metadata(pair))
        if _content_problem(file, manifest) is None:
            _rename(new, pair.path)
    shutil.rmtree(_workshop(pair.path), ignore_errors=True)
    for rubbish in (new, _new(pair.metadata_path)):
        with suppress(OSError):  # what cannot be removed stops the next step, which names it
            rubbish.unlink()


def _available_bytes(folder: Path) -> int:
    room = shutil.disk_usage(folder).free
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return room if limit == resource.RLIM_INFINITY else min(room, limit)


# --- loading ---------------------------------------------------------------------------------


def open_verified(
    pair: ArtifactPair, approach: str, flags: TrustFlags, console: Console
) -> VerifiedArtifact:
    """Return the artifact, open, after origin, metadata, kind, size and digest were checked.

    The caller compares environment and recipe. Raises ArtifactUntrustedError, ArtifactDamagedError
    (missing ones too) and ArtifactMismatchError (another approach, a rehearsal's).
    """
    began = time.monotonic()
    # checked and opened where they really are: a link could lead elsewhere in between
    real = _real(pair)
    manifest, file = _open_consistent(real, approach, flags)
    seconds = time.monotonic() - began
    size = size_text(manifest.file["bytes"])
    console.say(f"verified {pair.path}: {size} in {seconds * 1000:.1f} ms")
    return VerifiedArtifact(manifest, pair.path, file, _loader_path(real, file), seconds)


def peek_manifest(pair: ArtifactPair) -> Manifest | None:
    """Return the metadata at hand, or None without a valid one; nothing of it is to be trusted."""
    try:
        return parse_manifest(_read_metadata(pair))
    except (OSError, ArtifactDamagedError):
        return None


def read_blob(verified: VerifiedArtifact) -> bytes:
    """Return the content of a verified artifact, its digest checked on these very bytes."""
    verified.file.seek(0)
    content = verified.file.read()
    view = memoryview(content)
    blocks = (view[at : at + BLOCK_BYTES] for at in range(0, len(content), BLOCK_BYTES))
    found = _joined([hashlib.sha256(block).digest() for block in blocks])
    if found != verified.manifest.file["sha256"]:
        raise ArtifactDamagedError(f"{verified.path} was changed while it was read: {_REBUILD}")
    return content


def size_text(count: int) -> str:
    """Return a number of bytes as people read it, in decimal units."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


def _open_consistent(
    pair: ArtifactPair, approach: str, flags: TrustFlags
) -> tuple[Manifest, BinaryIO]:
    """Return the metadata and the open file that it names, of one build."""
    while True:
        text = _read_metadata(pair, flags)
        manifest = _acceptable(pair, text, approach)
        try:
            return manifest, _open_content(pair, manifest, flags)
        except ArtifactDamagedError:
            if _read_metadata(pair) == text:  # else the pair was replaced between the two opens
                raise


def _read_metadata(pair: ArtifactPair, flags: TrustFlags | None = None) -> bytes:
    """Return the metadata file's content, with `flags` only of a trusted one."""
    try:
        with _open_regular(pair.metadata_path) as file:
            if flags:
                check_trust(pair.metadata_path, flags)
            text = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        what = "metadata" if pair.path.exists() else "artifact and no metadata"
        raise ArtifactDamagedError(_missing(what, pair.metadata_path)) from None
    if flags:
        check_pin(pair.metadata_path, text, flags)
    return text


def _acceptable(pair: ArtifactPair, text: bytes, approach: str) -> Manifest:
    try:
        manifest = parse_manifest(text)
    except ArtifactDamagedError as error:
        raise ArtifactDamagedError(f"{pair.metadata_path}: {error}") from None
    if manifest.approach != approach:
        raise ArtifactMismatchError(
            f"{pair.path} is a {manifest.approach} artifact, expected one of {approach}: "
            "give the one that this folder's ./build.sh made"
        )
    raise_if_different(pair.path, rehearsal_differences(manifest))
    return manifest


def _open_content(pair: ArtifactPair, manifest: Manifest, flags: TrustFlags) -> BinaryIO:
    """Return the file, open, with the content that the metadata names."""
    problem = _missing("artifact", pair.path)
    for path in (_new(pair.path), pair.path):
        with ExitStack() as closing, suppress(FileNotFoundError):
            file = closing.enter_context(_open_regular(path))
            check_trust(path, flags)
            problem = _content_problem(file, manifest)
            if problem is None:
                closing.pop_all()
                return file
    raise ArtifactDamagedError(problem)


def _content_problem(file: BinaryIO, manifest: Manifest) -> str | None:
    """Return in what way the file is not the one that the manifest names, or None."""
    size, expected = os.fstat(file.fileno()).st_size, manifest.file["bytes"]
    if size != expected:
        return (
            f"{file.name} has {size} bytes, its metadata says {expected}: truncated, or from "
            f"another build; {_REBUILD}"
        )
    if content_digest(file.fileno(), size) != manifest.file["sha256"]:
        return (
            f"the content of {file.name} is not that of its metadata: damaged, or from another "
            f"build; {_REBUILD}"
        )
    return None


def _missing(what: str, path: Path) -> str:
    return f"no {what} at {path}: build it with ./build.sh"


def _open_regular(path: Path) -> BinaryIO:
    """Return a regular file opened; a missing one is FileNotFoundError, another kind damage."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a named pipe would wait for its writer
            raise ArtifactDamagedError(f"{path} is no regular file, expected one: {_REBUILD}")
        return open(path, "rb")
    except NotADirectoryError as error:
        raise FileNotFoundError(*error.args) from None


def _loader_path(pair: ArtifactPair, file: BinaryIO) -> str:
    path = f"/proc/self/fd/{file.fileno()}"
    return path if os.path.exists(path) else str(pair.path)


# --- digest ----------------------------------------------------------------------------------


def content_digest(descriptor: int, size: int) -> str:
    """Return the digest by which metadata names the first `size` bytes of a file, in hex.

    Up to 64 MiB it is what `sha256sum` prints. Of a larger file it is the sha256 of the sha256s of
    its blocks of 64 MiB, so that all cores work on it; in a shell:

        split -b 64M --filter 'sha256sum | head -c 64 | xxd -r -p' FILE | sha256sum
    """
    starts = range(0, size, BLOCK_BYTES)
    if len(starts) <= 1:
        return _joined([_block_digest(descriptor, start, size) for start in starts])
    # imported here: a start from a small artifact does not pay for it
    from concurrent.futures import ThreadPoolExecutor

    threads = min(len(starts), len(os.sched_getaffinity(0)), _MAX_THREADS)
    with ThreadPoolExecutor(threads) as pool:  # hashlib and preadv work outside the GIL
        return _joined(list(pool.map(lambda start: _block_digest(descriptor, start, size), starts)))


def _joined(digests: list[bytes]) -> str:
    return (digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(digests)).digest()).hex()


def _block_digest(descriptor: int, start: int, size: int) -> bytes:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_READ_BYTES))
    end = min(start + BLOCK_BYTES, size)
    while start < end:
        count = os.preadv(descriptor, [buffer[: min(_READ_BYTES, end - start)]], start)
        if count == 0:  # shorter than it was: the digest will not match
            break
        digest.update(buffer[:count])
        start += count
    return digest.digest()


# --- origin ----------------------------------------------------------------------------------


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
