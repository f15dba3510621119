"""An artifact on disk: its file and its metadata, replaced together, verified before use.

How two files change as one. The metadata names the content of the file by its digest, and its
rename is the commit. A builder, alone under a lock, (1) puts the new file, whole and flushed, at
NAME.new; (2) renames the new metadata into place; (3) renames NAME.new to NAME. A reader takes
whichever of NAME.new and NAME holds what the metadata names, and looks again if the metadata was
replaced meanwhile. So whoever is killed wherever, it finds the old pair or the new one, and it
never needs to write. The next builder does step 3 for a dead one, or removes its rubbish.
"""

import grp
import hashlib
import os
import pwd
import resource
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from common import errors
from common.artifact import manifest
from common.artifact.manifest import Manifest
from common.cli import Console, Flags, flag, sha256_text

BLOCK_BYTES = 64 * 2**20  # part of the metadata's format: see content_digest
_READ_BYTES = 2**20  # stays in a core's cache between read and digest
_REBUILD = "build it again with ./build.sh"


class TrustFlags(Flags):
    """whose artifact may run"""

    trust_artifact: bool = flag(False, "load an artifact whoever could have written it")
    expect_sha256: str | None = flag(
        None,
        "the only sha256 the metadata file may have, as `sha256sum NAME_meta.json` prints it; "
        "it names the artifact's own digest, so no other origin is asked for",
        parse=sha256_text,
    )


_NOT_TO_RUN = TrustFlags(trust_artifact=True)  # whoever wrote what is only looked at


class ArtifactPair(NamedTuple):
    """Where an artifact's file and its metadata are."""

    path: Path
    metadata_path: Path

    def real(self) -> "ArtifactPair":
        """Return where they really are: a link could lead elsewhere between check and use."""
        return ArtifactPair(*(Path(os.path.realpath(path)) for path in self))

    def new(self) -> "ArtifactPair":
        return ArtifactPair(*(path.with_name(f"{path.name}.new") for path in self))


class VerifiedArtifact(NamedTuple):
    """An artifact whose bytes are those of its metadata; the open file is what was checked."""

    manifest: Manifest
    file: BinaryIO
    path_for_loader: str  # opens that very file again, in this process, as long as it is open
    verify_seconds: float


# --- building --------------------------------------------------------------------------------


@contextmanager
def building(pair: ArtifactPair, console: Console) -> Iterator[None]:
    """Hold the only right to write this pair, with its folders made and dead builders cleared up.

    Meanwhile nobody else may write to what this process makes: it would not be loaded.
    """
    import tempfile  # imported here, as below: a start does without

    from filelock import FileLock, Timeout

    pair = pair.real()
    if pair.path == pair.metadata_path:
        raise errors.UsageError(f"artifact and metadata are both {pair.path}: give different paths")
    lock = FileLock(pair.path.with_name(f".{pair.path.name}.lock"))
    before = os.umask(0o022)
    os.umask(before | 0o022)
    try:
        for path in pair:
            with errors.writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.is_dir():
                    raise OSError("a folder is there")
                tempfile.TemporaryFile(dir=path.parent).close()
        with errors.writing(pair.path):
            try:
                lock.acquire(timeout=0)
            except Timeout:
                console.say(f"another process is writing {pair.path}: waiting until it is done")
                lock.acquire()
        _recover(pair)
        if problem := origin_problem(pair.path.parent):
            console.warn(f"{problem}: loading from there will need --trust-artifact")
        yield
    finally:
        lock.release()
        os.umask(before)


def check_target(pair: ArtifactPair, approach: str, needed_bytes: int) -> None:
    """Raise, before a long build, if a file of this size cannot or should not be written there."""
    there = peek_manifest(pair)
    if there and there.approach != approach:  # NAME.pt2 and NAME.bin have one name for it
        raise errors.UsageError(
            f"{pair.metadata_path} belongs to a {there.approach} artifact, which would be lost: "
            "choose another path"
        )
    folder = pair.real().path.parent
    room, limit = shutil.disk_usage(folder).free, resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY:
        room = min(room, limit)
    if room < needed_bytes:
        raise errors.EnvironmentProblemError(
            f"{folder} has room for {room / 1e6:.1f} MB, the artifact needs about "
            f"{needed_bytes / 1e6:.1f} MB: make room, raise the file size limit, or choose another "
            "path"
        )


def write_pair(
    pair: ArtifactPair, produce: Callable[[Path], None], make_manifest: Callable[[dict], Manifest]
) -> Manifest:
    """Replace the pair by what `produce` writes to the path it is given; return its manifest.

    For use in `building`, or where no other process looks. `make_manifest` takes the `file` record.
    """
    from datetime import datetime, timezone

    pair = pair.real()
    new = pair.new()
    # the artifact's own name: a compiler writes it into the package, and insists on its suffix
    produced = pair.path.with_name(f"{pair.path.name}.building") / pair.path.name
    try:
        with errors.writing(pair.path):
            produced.parent.mkdir(mode=0o700)
        produce(produced)
        with errors.writing(pair.path), open(produced, "rb") as file:
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
            record = {
                "bytes": size,
                "sha256": content_digest(size, partial(os.pread, file.fileno())),
                "written": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            }
            built = make_manifest(record)
            text = manifest.dump_manifest(built)
            os.replace(produced, new.path)
            with open(new.metadata_path, "w") as metadata:
                metadata.write(text)
                metadata.flush()
                os.fsync(metadata.fileno())
            os.replace(new.metadata_path, pair.metadata_path)
            os.replace(new.path, pair.path)
    finally:
        _recover(pair)
    return built


def _recover(pair: ArtifactPair) -> None:
    """Finish or remove what a dead or failed builder left; the lock is held."""
    new = pair.new()
    if os.path.exists(new.path):
        with suppress(errors.ArtifactDamagedError):
            _open_content(new.path, read_manifest(pair, _NOT_TO_RUN), _NOT_TO_RUN).close()
            os.replace(new.path, pair.path)
    shutil.rmtree(pair.path.with_name(f"{pair.path.name}.building"), ignore_errors=True)
    for rubbish in new:
        with suppress(OSError):  # what cannot be removed stops the next step, which names it
            rubbish.unlink()


# --- loading ---------------------------------------------------------------------------------


@contextmanager
def open_verified(
    pair: ArtifactPair, approach: str, flags: TrustFlags, console: Console
) -> Iterator[VerifiedArtifact]:
    """Yield the artifact, open, after origin, metadata, kind, size and digest were checked.

    The caller compares environment and recipe. Raises ArtifactUntrustedError, ArtifactDamagedError
    (missing ones too) and ArtifactMismatchError (another approach).
    """
    began = time.monotonic()
    real = pair.real()
    while True:
        built = read_manifest(real, flags)
        if built.approach != approach:
            raise errors.ArtifactMismatchError(
                f"{pair.path} is a {built.approach} artifact, expected one of {approach}: "
                "give the one that this folder's ./build.sh made"
            )
        with suppress(errors.ArtifactDamagedError):
            file = _open_content(real.new().path, built, flags)
            break
        try:
            file = _open_content(real.path, built, flags)
            break
        except errors.ArtifactDamagedError:
            if read_manifest(real, flags) == built:  # else the pair was replaced meanwhile
                raise
    with file:
        megabytes, seconds = built.file["bytes"] / 1e6, time.monotonic() - began
        console.say(f"verified {pair.path}: {megabytes:.1f} MB in {seconds * 1000:.1f} ms")
        yield VerifiedArtifact(built, file, f"/proc/self/fd/{file.fileno()}", seconds)


def peek_manifest(pair: ArtifactPair) -> Manifest | None:
    """Return the metadata at hand, or None without a valid one; nothing of it is to be trusted."""
    with suppress(OSError, errors.ArtifactDamagedError):
        return read_manifest(pair, _NOT_TO_RUN)
    return None


def read_blob(verified: VerifiedArtifact) -> bytes:
    """Return the content of a verified artifact, its digest checked on these very bytes."""
    content = verified.file.read()
    found = content_digest(len(content), lambda count, start: content[start : start + count])
    if found != verified.manifest.file["sha256"]:
        raise errors.ArtifactDamagedError(f"the artifact changed while it was read: {_REBUILD}")
    return content


def read_manifest(pair: ArtifactPair, flags: TrustFlags) -> Manifest:
    """Return the metadata, of an origin that the flags admit; the artifact is another matter."""
    what = "metadata" if os.path.exists(pair.path) else "artifact and no metadata"
    with _open(pair.metadata_path, what, flags) as file:
        text = file.read(manifest.MAX_BYTES + 1)
    found = hashlib.sha256(text).hexdigest()
    if flags.expect_sha256 not in (None, found):
        raise errors.ArtifactUntrustedError(
            f"{pair.metadata_path} has sha256 {found}, --expect-sha256 says {flags.expect_sha256}: "
            "fetch the right artifact, or pin this one if you know where it comes from"
        )
    return manifest.parse_manifest(text, pair.metadata_path)


def _open_content(path: Path, built: Manifest, flags: TrustFlags) -> BinaryIO:
    """Return the file, open, if its content is what the metadata names."""
    file, expected = _open(path, "artifact", flags), built.file["bytes"]
    size = os.fstat(file.fileno()).st_size
    if size != expected:
        problem = f"{path} has {size} bytes, its metadata says {expected}: truncated"
    elif content_digest(size, partial(os.pread, file.fileno())) != built.file["sha256"]:
        problem = f"the content of {path} is not that of its metadata: damaged"
    else:
        return file
    file.close()
    raise errors.ArtifactDamagedError(f"{problem}, or from another build; {_REBUILD}")


def _open(path: Path, what: str, flags: TrustFlags) -> BinaryIO:
    """Return a regular file, opened, whose origin or the user's consent admits it."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a named pipe would wait for its writer
            raise errors.ArtifactDamagedError(f"{path} is no regular file: {_REBUILD}")
        consent = flags.trust_artifact or flags.expect_sha256  # a pin names what it admits
        if not consent and (problem := origin_problem(path)):
            raise errors.ArtifactUntrustedError(
                f"{problem}; {path} is code that would run as you: check where it comes from, then "
                "copy it to a folder of your own, or add --expect-sha256 or --trust-artifact"
            )
        return open(path, "rb")
    except (FileNotFoundError, NotADirectoryError):
        raise errors.ArtifactDamagedError(f"no {what} at {path}: ./build.sh makes it") from None


# --- digest and origin -----------------------------------------------------------------------


def content_digest(size: int, read: Callable[[int, int], bytes]) -> str:
    """Return the digest by which metadata names `size` bytes, in hex; `read` is like os.pread.

    Up to 64 MiB it is what `sha256sum` prints. Of a larger file it is the sha256 of the sha256s of
    its blocks of 64 MiB, so that all cores work on it; in a shell:

        split -b 64M --filter 'sha256sum | head -c 64 | xxd -r -p' FILE | sha256sum
    """

    def block_digest(start: int) -> bytes:
        digest, end = hashlib.sha256(), min(start + BLOCK_BYTES, size)
        # a file shorter than it was ends early, and its digest will not match
        while start < end and (part := read(min(_READ_BYTES, end - start), start)):
            digest.update(part)
            start += len(part)
        return digest.digest()

    if size <= BLOCK_BYTES:
        return block_digest(0).hex()
    # imported here: a start of a package that is code alone does not pay for it
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor() as pool:  # hashlib and pread work outside the GIL
        digests = list(pool.map(block_digest, range(0, size, BLOCK_BYTES)))
    return hashlib.sha256(b"".join(digests)).hexdigest()


def origin_problem(path: Path) -> str | None:
    """Return why others than this user and root can change `path`, or what is put there, or None.

    Every folder above counts; a link counts as what it leads to.
    """
    path = Path(os.path.realpath(path))
    holder = path if path.is_dir() else path.parent
    for place in (path, *path.parents):
        info = os.stat(place)
        is_folder = stat.S_ISDIR(info.st_mode)
        what = f"{'folder' if is_folder else 'file'} {place}"
        # in a user namespace the machine's root appears as the overflow user, who then owns /
        root = os.stat("/").st_uid if is_folder else 0
        if info.st_uid not in (os.geteuid(), 0, root):
            return f"{what} belongs to user {info.st_uid}, expected you or root"
        # in a sticky folder such as /tmp nobody can replace our folder, but anyone can add a file
        if info.st_mode & stat.S_ISVTX and place not in (path, holder):
            continue
        if info.st_mode & stat.S_IWOTH:
            return f"{what} can be written to by everybody, expected you and root"
        if info.st_mode & stat.S_IWGRP and not _is_private_group(info.st_gid):
            return f"{what} can be written to by group {info.st_gid}, expected you and root"
    return None


def _is_private_group(gid: int) -> bool:
    """Say whether `gid` is the group that most systems make for one user, whose umask is 002."""
    try:
        group, name = grp.getgrgid(gid), pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # containers run users and groups that no list names
        return gid == os.geteuid()
    return group.gr_name == name and set(group.gr_mem) <= {name}
