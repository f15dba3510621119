"""An artifact on disk: its file and its metadata, replaced together, verified before use.

How two files change as one. The metadata names the content of the file by its sha256, and its
rename is the commit. A builder, alone under a lock, (1) writes the new file whole, flushes it and
gives it a hidden name made of its sha256 beside the old one; (2) renames the new metadata into
place; (3) renames the hidden file into place. Killed before 2, the old pair is as it was and the
hidden file is rubbish; after 2, the new pair is complete under the hidden name, and after 3 under
its own. So a reader takes what the metadata names, under the hidden name or else under its own: no
moment exists at which it finds neither, and it never needs to write. The next builder does step 3
for a dead one, or removes its rubbish.
"""

import errno
import hashlib
import os
import re
import resource
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from common import trust
from common.cli import Console
from common.errors import (
    ArtifactDamagedError,
    ArtifactMismatchError,
    EnvironmentProblemError,
    UsageError,
)
from common.manifest import MAX_BYTES, Manifest, dump_manifest, parse_manifest
from common.trust import TrustFlags

BLOCK_BYTES = 64 * 2**20  # part of the metadata's format: blocks_sha256 is over these
_READ_BYTES = 2**20  # stays in a core's cache between read and digest
_MAX_THREADS = 32
_ATTEMPTS = 100  # of a reader whose pair is replaced between two opens, microseconds apart
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REBUILD = "build it again with ./build.sh"


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


@contextmanager
def building(pair: ArtifactPair, console: Console) -> Iterator[bool]:
    """Hold the only right to build this pair; yield whether another builder had to finish first.

    Clears up after builders that died.
    """
    from filelock import Timeout

    pair = _writable_pair(pair)
    with _os_errors_named(pair.path.parent):
        lock = _lock(pair)
        try:
            lock.acquire(timeout=0)
            waited = False
        except Timeout:
            waited = True
            console.say(f"another process is building {pair.path}: waiting until it has finished")
            lock.acquire()
    try:
        _recover(pair)
        if problem := trust.folder_problem(pair.path):
            console.warn(f"{problem}: loading from there will need --trust-artifact")
        yield waited
    finally:
        lock.release()


def check_target(pair: ArtifactPair, needed_bytes: int) -> None:
    """Raise EnvironmentProblemError if a pair of this size cannot be written; makes the folders."""
    if os.path.realpath(pair.path) == os.path.realpath(pair.metadata_path):
        raise UsageError(f"artifact and metadata are both {pair.path}: give them different paths")
    pair = _writable_pair(pair)
    for path in (pair.path, pair.metadata_path):
        with _os_errors_named(path.parent):
            probe = _temporary(path)
            probe.touch(exist_ok=False)
            probe.unlink(missing_ok=True)  # a builder that clears up may have been faster
    available = _available_bytes(pair.path.parent)
    if available < needed_bytes:
        raise EnvironmentProblemError(
            f"{pair.path.parent} has room for {_size(available)}, the artifact needs about "
            f"{_size(needed_bytes)}: make room, raise the file size limit, or choose another path"
        )


def write_pair(
    pair: ArtifactPair,
    produce: Callable[[Path], None],
    make_manifest: Callable[[dict], Manifest],
    sign_key: Path | None = None,
) -> Manifest:
    """Replace the pair by what `produce` writes to the path it is given; return its manifest.

    That path has the artifact's own name, in a private folder beside it. Whatever happens, readers
    find the old pair or the new one.
    """
    pair = _writable_pair(pair)
    with _lock(pair):  # no wait inside `building`, whose lock it shares
        workshop = _temporary(pair.path)
        produced = workshop / pair.path.name
        try:
            with _os_errors_named(pair.path):
                workshop.mkdir(mode=0o700)
            with _os_errors_named(pair.path, only=_NO_SPACE):
                produce(produced)
            with _os_errors_named(pair.path):
                record = _finish(produced)
            manifest = make_manifest(record)
            if sign_key is not None:
                manifest = trust.sign_manifest(manifest, sign_key)
            with _os_errors_named(pair.path):
                _publish(pair, produced, manifest)
        finally:
            _recover(pair)
    return manifest


def describe_file(path: Path) -> dict:
    """Return the manifest's `file` record of the file at `path`."""
    with open(path, "rb") as file:
        return _describe(file.fileno())


def open_verified(
    pair: ArtifactPair, approach: str, flags: TrustFlags, console: Console
) -> VerifiedArtifact:
    """Return the artifact, open, after origin, metadata, kind, size and digest were checked.

    The caller compares environment and recipe. Raises ArtifactUntrustedError (before any content
    is read), ArtifactDamagedError (missing ones too) and ArtifactMismatchError (another approach).
    """
    began = time.monotonic()
    manifest, file = _open_consistent(pair, approach, flags)
    try:
        _check_pin(pair, manifest, file, flags)
    except BaseException:
        file.close()
        raise
    seconds = time.monotonic() - began
    size = _size(manifest.file["bytes"])
    console.say(f"verified {pair.path}: {size} in {seconds * 1000:.1f} ms")
    return VerifiedArtifact(manifest, pair.path, file, _loader_path(pair, file), seconds)


def peek_manifest(pair: ArtifactPair) -> Manifest | None:
    """Return the metadata at hand, or None without a valid one; nothing of it is to be trusted."""
    try:
        with _regular_file(pair.metadata_path) as file:
            return parse_manifest(file.read(MAX_BYTES + 1))
    except (OSError, ArtifactDamagedError):
        return None


def read_blob(verified: VerifiedArtifact) -> bytes:
    """Return the content of a verified artifact, its digest checked on these very bytes."""
    verified.file.seek(0)
    content = verified.file.read()
    view = memoryview(content)
    blocks = range(0, len(content), BLOCK_BYTES)
    digests = [hashlib.sha256(view[at : at + BLOCK_BYTES]).digest() for at in blocks]
    if not _matches(verified.manifest.file, len(content), digests):
        raise ArtifactDamagedError(f"{verified.path} was changed while it was read: {_REBUILD}")
    return content


def block_digests(descriptor: int, size: int, threads: int) -> list[bytes]:
    """Return the sha256 of each block of the first `size` bytes, in order."""
    starts = range(0, size, BLOCK_BYTES)
    threads = min(threads, len(starts))
    if threads <= 1:
        return [_block_digest(descriptor, start, size) for start in starts]
    # imported here: a start from a small artifact does not pay for it
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(threads) as pool:  # hashlib and preadv work outside the GIL
        return list(pool.map(lambda start: _block_digest(descriptor, start, size), starts))


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


def _describe(descriptor: int) -> dict:
    size = os.fstat(descriptor).st_size
    blocks = block_digests(descriptor, size, _cores())
    return {
        "bytes": size,
        "sha256": _plain_sha256(descriptor, size, blocks),
        "blocks_sha256": hashlib.sha256(b"".join(blocks)).hexdigest(),
    }


def _plain_sha256(descriptor: int, size: int, blocks: list[bytes]) -> str:
    """Return the sha256 of the whole file, which for a single block is that block's."""
    if len(blocks) == 1:
        return blocks[0].hex()
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_READ_BYTES))
    start = 0
    while start < size and (count := os.preadv(descriptor, [buffer], start)):
        digest.update(buffer[:count])
        start += count
    return digest.hexdigest()


def _matches(record: dict, size: int, blocks: list[bytes]) -> bool:
    if size != record["bytes"]:
        return False
    if len(blocks) == 1 and blocks[0].hex() != record["sha256"]:
        return False
    return hashlib.sha256(b"".join(blocks)).hexdigest() == record["blocks_sha256"]


def _cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, _MAX_THREADS)


def _finish(produced: Path) -> dict:
    """Flush what was produced to disk, take write access from others, return its record."""
    if not produced.is_file() or produced.stat().st_size == 0:
        raise ArtifactDamagedError(f"the build wrote nothing to {produced}: nothing was replaced")
    with open(produced, "rb") as file:
        os.fchmod(file.fileno(), stat.S_IMODE(os.fstat(file.fileno()).st_mode) & ~0o022)
        os.fsync(file.fileno())
        return _describe(file.fileno())


def _publish(pair: ArtifactPair, produced: Path, manifest: Manifest) -> None:
    """Do steps 1, 2 and 3 of the module's docstring."""
    text = dump_manifest(manifest)
    hidden = _hidden(pair.path, manifest)
    os.replace(produced, hidden)
    _flush_folder(hidden.parent)
    draft = _temporary(pair.metadata_path)
    with open(draft, "x", encoding="utf-8") as file:
        os.fchmod(file.fileno(), stat.S_IMODE(os.fstat(file.fileno()).st_mode) & ~0o022)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, pair.metadata_path)
    _flush_folder(pair.metadata_path.parent)
    os.replace(hidden, pair.path)
    _flush_folder(pair.path.parent)


def _recover(pair: ArtifactPair) -> None:
    """Complete or undo what a dead or failed builder left; the lock is held."""
    keep_hidden = False
    with suppress(FileNotFoundError):
        try:
            with _regular_file(pair.metadata_path) as file:
                manifest = parse_manifest(file.read(MAX_BYTES + 1))
        except ArtifactDamagedError:  # a newer version's, say: what it names may be hidden
            keep_hidden = True
        else:
            _complete(pair, manifest)
    for path in (pair.path, pair.metadata_path):
        for name in os.listdir(path.parent):
            if _is_temporary(name, path) or (_is_hidden(name, path) and not keep_hidden):
                _remove(path.parent / name)


def _complete(pair: ArtifactPair, manifest: Manifest) -> None:
    hidden = _hidden(pair.path, manifest)
    with suppress(FileNotFoundError, ArtifactDamagedError), _regular_file(hidden) as file:
        if _holds(file, manifest):
            os.replace(hidden, pair.path)
            _flush_folder(pair.path.parent)


def _remove(path: Path) -> None:
    with suppress(OSError):  # rubbish that cannot be removed stops nobody
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _hidden(path: Path, manifest: Manifest) -> Path:
    return path.with_name(f".{path.name}.{manifest.file['sha256'][:32]}{path.suffix}")


def _is_hidden(name: str, path: Path) -> bool:
    pattern = rf"\.{re.escape(path.name)}\.[0-9a-f]{{32}}{re.escape(path.suffix)}"
    return re.fullmatch(pattern, name) is not None


def _temporary(path: Path) -> Path:
    # at least as long as a hidden name, so that check_target's probe meets the limit first
    return path.with_name(f".{path.name}.{os.urandom(16).hex()}.building")


def _is_temporary(name: str, path: Path) -> bool:
    return re.fullmatch(rf"\.{re.escape(path.name)}\.[0-9a-f]{{32}}\.building", name) is not None


def _lock(pair: ArtifactPair):
    from filelock import FileLock

    lock_path = pair.path.with_name(f".{pair.path.name}.lock")
    return FileLock(lock_path, is_singleton=True)  # one per path: `write_pair` in `building`


def _writable_pair(pair: ArtifactPair) -> ArtifactPair:
    """Return the pair with the user's own links followed and its folders made."""
    for path in (pair.path, pair.metadata_path):
        trust.check_links(path)
    real = ArtifactPair(*(Path(os.path.realpath(path)) for path in (pair.path, pair.metadata_path)))
    for path in (real.path, real.metadata_path):
        with _os_errors_named(path.parent):
            _make_folder(path.parent)
            is_folder = path.is_dir()
        if is_folder:
            raise EnvironmentProblemError(f"{path} is a folder, expected a file: name the file")
    return real


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    with suppress(FileExistsError):  # made meanwhile, by another builder
        folder.mkdir(mode=0o755)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(folder))


@contextmanager
def _os_errors_named(path: Path, only: tuple[int, ...] = ()) -> Iterator[None]:
    """Turn what the file system refuses into one line with its place and its room."""
    try:
        yield
    except OSError as error:
        if only and error.errno not in only:
            raise
        if error.errno in _NO_SPACE:
            raise EnvironmentProblemError(
                f"no space to write {path} ({error.strerror}, room for "
                f"{_size(_available_bytes(path.parent))}): make room or choose another path; "
                "an artifact that was there is untouched"
            ) from error
        raise EnvironmentProblemError(
            f"cannot write {path} ({error.strerror or error}): choose a place that you can write to"
        ) from error


def _available_bytes(folder: Path) -> int:
    room = shutil.disk_usage(folder).free
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return room if limit == resource.RLIM_INFINITY else min(room, limit)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot flush a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _regular_file(path: Path) -> BinaryIO:
    """Return a regular file opened; a missing one is FileNotFoundError, another kind damage."""
    try:
        file = open(path, "rb", opener=_open_at_once)  # noqa: SIM115 (handed out open)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            raise FileNotFoundError(errno.ENOENT, error.strerror, str(path)) from None
        if error.errno in (errno.EISDIR, errno.ENXIO):  # a folder, a socket
            raise _not_regular(path) from None
        raise
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise _not_regular(path)
    return file


def _open_at_once(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NONBLOCK)  # a named pipe would wait for its writer


def _not_regular(path: Path) -> ArtifactDamagedError:
    return ArtifactDamagedError(f"{path} is no regular file, expected one: {_REBUILD}")


def _open_consistent(
    pair: ArtifactPair, approach: str, flags: TrustFlags
) -> tuple[Manifest, BinaryIO]:
    """Return the metadata and the open file that it names, of one build."""
    for _ in range(_ATTEMPTS):
        _check_origins(flags, pair.metadata_path, pair.path)
        with _open_metadata(pair) as metadata:
            manifest = _read_manifest(pair, metadata, approach, flags)
            file = _open_content(pair, manifest, flags)
            if file is not None:
                return manifest, file
            if not _was_replaced(pair.metadata_path, metadata):
                _raise_damage(pair, manifest)
    raise ArtifactDamagedError(f"{pair.path} is being replaced all the time: try again later")


def _check_origins(flags: TrustFlags, *paths: Path) -> None:
    if not flags.trust_artifact:
        for path in paths:
            with suppress(FileNotFoundError):  # reported where it is opened
                trust.check_origin(path)


def _open_metadata(pair: ArtifactPair) -> BinaryIO:
    try:
        return _regular_file(pair.metadata_path)
    except FileNotFoundError:
        what = "metadata" if pair.path.exists() else "artifact and no metadata"
        raise _missing(what, pair.metadata_path) from None


def _missing(what: str, path: Path) -> ArtifactDamagedError:
    return ArtifactDamagedError(f"no {what} at {path}: build it with ./build.sh")


def _read_manifest(
    pair: ArtifactPair, file: BinaryIO, approach: str, flags: TrustFlags
) -> Manifest:
    try:
        manifest = parse_manifest(file.read(MAX_BYTES + 1))
    except ArtifactDamagedError as error:
        raise ArtifactDamagedError(f"{pair.metadata_path}: {error}") from None
    if flags.verify_key is not None:
        trust.verify_manifest(manifest, flags.verify_key, pair.metadata_path)
    if manifest.approach != approach:
        raise ArtifactMismatchError(
            f"{pair.path} is a {manifest.approach} artifact, expected one of {approach}: "
            "give the one that this folder's ./build.sh made"
        )
    return manifest


def _open_content(pair: ArtifactPair, manifest: Manifest, flags: TrustFlags) -> BinaryIO | None:
    """Return the file with the content that the manifest names, or None."""
    real = Path(os.path.realpath(pair.path))
    for path in (_hidden(real, manifest), pair.path):
        _check_origins(flags, path)
        try:
            file = _regular_file(path)
        except (FileNotFoundError, ArtifactDamagedError):
            continue
        try:
            if _holds(file, manifest):
                return file
        except BaseException:
            file.close()
            raise
        file.close()
    return None


def _holds(file: BinaryIO, manifest: Manifest) -> bool:
    """Say whether size and digest are the manifest's; a file that cannot be read holds nothing."""
    size = os.fstat(file.fileno()).st_size
    if size != manifest.file["bytes"]:
        return False
    try:
        return _matches(manifest.file, size, block_digests(file.fileno(), size, _cores()))
    except OSError as error:
        raise ArtifactDamagedError(f"{file.name}: {error.strerror}: {_REBUILD}") from error


def _was_replaced(path: Path, opened: BinaryIO) -> bool:
    """Say whether `path` is another file now; the open one keeps its inode from being reused."""
    try:
        return not os.path.samestat(os.stat(path), os.fstat(opened.fileno()))
    except FileNotFoundError:
        return True


def _raise_damage(pair: ArtifactPair, manifest: Manifest) -> NoReturn:
    """Raise what is wrong with the file that should hold the manifest's content."""
    try:
        with _regular_file(pair.path) as file:
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise _missing("artifact", pair.path) from None
    expected = manifest.file["bytes"]
    if size != expected:
        raise ArtifactDamagedError(
            f"{pair.path} has {size} bytes, its metadata says {expected}: truncated, or from "
            f"another build; {_REBUILD}"
        )
    raise ArtifactDamagedError(
        f"the content of {pair.path} is not that of its metadata (sha256 "
        f"{manifest.file['sha256'][:16]}...): damaged, or from another build; {_REBUILD}"
    )


def _check_pin(pair: ArtifactPair, manifest: Manifest, file: BinaryIO, flags: TrustFlags) -> None:
    if flags.expect_sha256 is None:
        return
    # taken from the file: the metadata's own word for it is nothing to pin
    size = manifest.file["bytes"]
    blocks = [bytes.fromhex(manifest.file["sha256"])] if size <= BLOCK_BYTES else []
    found = _plain_sha256(file.fileno(), size, blocks)
    trust.check_pin(pair.path, flags.expect_sha256, found)


def _loader_path(pair: ArtifactPair, file: BinaryIO) -> str:
    path = f"/proc/self/fd/{file.fileno()}"
    return path if os.path.exists(path) else str(pair.path)


def _size(count: int) -> str:
    """Return a number of bytes as people read it, in decimal units."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"
