"""A store of artifacts for a fleet: build once and publish, fetch and start everywhere.

A store is a folder at any URL that fsspec knows. An artifact's place in it says what it is for:

    <approach>/<torch>-<device>/<model's configuration>-<dtype>/<recipe>/<sha256>.artifact
                                                                        /meta.json

The file goes there first and carries its own digest in its name, the metadata goes last and is
replaced whole. So at any moment `meta.json` names a file that is there, whoever is killed and
however many publish at once. Files of former builds stay, for somebody may be fetching them.

A local copy lies under the sha256 of its metadata, which `--expect-sha256` asks for: a start that
pins an artifact it has fetched before needs no network.
"""

import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.artifacts import (
    ArtifactPair,
    TrustFlags,
    building,
    check_target,
    open_verified,
    size_text,
    write_pair,
)
from common.cli import Console, flag
from common.errors import (
    ArtifactDamagedError,
    ArtifactMismatchError,
    ArtifactUntrustedError,
    EnvironmentProblemError,
    ScriptError,
    UsageError,
    writing,
)
from common.manifest import (
    Difference,
    Manifest,
    describe,
    dump_manifest,
    one_line,
    parse_manifest,
    rehearsal_differences,
)

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

    Fits = Callable[[Manifest], list[Difference]]

_METADATA = "meta.json"
_KINDS = "a folder, hf://org/name, s3://bucket/folder, or another that fsspec knows"


@dataclass(frozen=True)
class PublishFlags:
    """store"""

    publish: str | None = flag(None, f"URL of a store to put the artifact into: {_KINDS}")


@dataclass(frozen=True)
class FetchFlags:
    """store"""

    fetch: str | None = flag(
        None,
        f"URL of a store to take the artifact from: {_KINDS}; it is somebody else's code, so add "
        "--expect-sha256 or --trust-artifact",
    )


@dataclass(frozen=True)
class _Entry:
    """An artifact in a store, or the local copy of one."""

    place: str  # its folder
    manifest: Manifest
    digest: str  # sha256 of its metadata file


# --- publishing ------------------------------------------------------------------------------


def publish(pair: ArtifactPair, url: str | None, approach: str, console: Console) -> None:
    """Put a verified artifact into the store at `url`; without a URL do nothing."""
    if url is None:
        return
    with open_verified(pair, approach, TrustFlags(), console) as verified:
        manifest = verified.manifest
        if not manifest.details.get("verified"):
            raise UsageError(
                f"{pair.path} is not published: its build did not verify that it gives the "
                "model's own tokens"
            )
        metadata = dump_manifest(manifest).encode()
        with _driver_errors(url):
            fs, root = _open_store(url)
            place = f"{root}/{_place_of(manifest)}"
            fs.makedirs(place, exist_ok=True)
            target = f"{place}/{_file_name(manifest)}"
            with _progress(f"publish {pair.path.name}", console) as bar:
                _put(fs, target, lambda path: fs.put_file(
                    verified.path_for_loader, path, callback=bar
                ))  # fmt: skip
            _put(fs, f"{place}/{_METADATA}", lambda path: fs.pipe_file(path, metadata))
    console.say(
        f"published {place}: others start from it with\n"
        f"  ./run.sh --fetch {url} --expect-sha256 {hashlib.sha256(metadata).hexdigest()}"
    )


def _put(fs: "AbstractFileSystem", path: str, upload: Callable[[str], None]) -> None:
    """Make or replace a file whole or not at all.

    Object stores do that by themselves; a driver with a rename of its own has folders, where it
    takes one. A killed publisher leaves its draft there.
    """
    from fsspec import AbstractFileSystem

    if type(fs).mv is AbstractFileSystem.mv:
        upload(path)
    else:
        draft = f"{path}.{os.urandom(8).hex()}.part"
        upload(draft)
        fs.mv(draft, path)


def _place_of(manifest: Manifest) -> str:
    """Return where in a store the artifact belongs: parts that people can read and sort."""
    environment, recipe, model = manifest.environment, manifest.recipe, manifest.model
    if recipe.get("device") == "cuda":
        device = ("cuda", environment.get("cuda"), environment.get("gpu"))
    else:
        device = ("cpu", recipe.get("cpu_capability") or platform.machine())
    rehearsal = ("rehearsal",) if environment.get("rehearsal") else ()
    # their own code is part of what was compiled
    recipe = recipe | {name: environment.get(name) for name in ("transformers", "triton")}
    recipe_digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    return "/".join(
        (
            _slug(manifest.approach),
            _slug(environment.get("torch"), *device, *rehearsal),
            _slug(str(model.get("config_digest"))[:16], model.get("dtype")),
            recipe_digest[:16],
        )
    )


def _slug(*parts: Any) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", "-".join(map(str, parts)))


def _file_name(manifest: Manifest) -> str:
    return f"{manifest.file['sha256']}.artifact"  # whatever its builder called it


# --- fetching --------------------------------------------------------------------------------


def fetch(
    pair: ArtifactPair, url: str | None, approach: str, fits: "Fits", trust: TrustFlags,
    console: Console,
) -> ArtifactPair:  # fmt: skip
    """Return the local copy of the store's newest artifact that fits; without a URL, `pair`.

    `fits` returns in which fields an artifact differs from what this process is and asks for. The
    copy is opened and verified like any other artifact, under the same `trust`. Without network a
    copy from this store does, and a pinned one needs none.
    """
    if url is None:
        return pair
    copies, fs = _copies_folder(url), None
    entries = _pinned(_local_entries(copies, approach), trust)
    if not (entries and trust.expect_sha256):
        try:
            with _driver_errors(url):
                fs, root = _open_store(url)
                entries = _store_entries(fs, root, approach)
        except EnvironmentProblemError as error:
            if not entries:
                raise
            console.warn(f"{error}; choosing from the copies in {copies}")
    entry = _choose(entries, fits, url, trust, console)
    folder = copies / entry.digest
    local = ArtifactPair(folder / f"artifact{pair.path.suffix}", folder / _METADATA)
    if fs and not _is_copy(local, entry):
        _download(fs, url, entry, local, console)
    return local


def _choose(
    entries: list[_Entry], fits: "Fits", url: str, trust: TrustFlags, console: Console
) -> _Entry:
    """Return the newest that fits and may run; with none, list what there is and raise."""
    if not entries:
        raise ArtifactDamagedError(f"no such artifact in {url}: ./build.sh --publish {url}")
    allowed = _pinned(entries, trust)
    if not allowed:
        raise ArtifactUntrustedError(
            f"none of the {len(entries)} artifacts in {url} has the metadata that --expect-sha256 "
            f"{trust.expect_sha256} asks for: pin one that is there"
        )
    found = [(entry, rehearsal_differences(entry.manifest) + fits(entry.manifest))
             for entry in allowed]  # fmt: skip
    fitting = [entry for entry, unlike in found if not unlike]
    for entry, unlike in found:
        if unlike and (console.verbose or not fitting):
            console.say(f"  {one_line(entry.place)}: {describe(unlike)}")
    if not fitting:
        nearest = min((unlike for _, unlike in found), key=len)
        raise ArtifactMismatchError(
            f"none of the {len(found)} artifacts in {url} was built for this; of the nearest, "
            f"{describe(nearest)}; publish one with ./build.sh --publish {url}"
        )
    chosen = max(fitting, key=lambda entry: str(entry.manifest.file.get("written")))
    if not (trust.expect_sha256 or trust.trust_artifact):
        raise ArtifactUntrustedError(
            f"{one_line(chosen.place)} fits, and is somebody else's code that would run as you: "
            f"ask them for its sha256 and add --expect-sha256 (this one has {chosen.digest}), or "
            "consent with --trust-artifact"
        )
    return chosen


def _pinned(entries: list[_Entry], trust: TrustFlags) -> list[_Entry]:
    return [entry for entry in entries if trust.expect_sha256 in (None, entry.digest)]


def _store_entries(fs: "AbstractFileSystem", root: str, approach: str) -> list[_Entry]:
    names = map(str, fs.find(f"{root}/{approach}"))
    found = [name for name in names if name.endswith(f"/{_METADATA}")]
    if not found and not fs.exists(root):
        raise FileNotFoundError(root)  # a share that is not mounted, say
    contents = fs.cat(found) if found else {}
    return _parsed((path.rpartition("/")[0], content) for path, content in contents.items())


def _local_entries(copies: Path, approach: str) -> list[_Entry]:
    found = copies.glob(f"*/{_METADATA}")
    entries = _parsed((str(path.parent), path.read_bytes()) for path in found)
    return [entry for entry in entries if entry.manifest.approach == approach]


def _parsed(contents: Iterable[tuple[str, bytes]]) -> list[_Entry]:
    """Return the artifacts whose metadata can be read here; another version's cannot."""
    entries = []
    for place, content in contents:
        with suppress(ArtifactDamagedError):
            entries.append(
                _Entry(place, parse_manifest(content), hashlib.sha256(content).hexdigest())
            )
    return entries


def _copies_folder(url: str) -> Path:
    """Return where copies from this store are kept, apart from those of others."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = cache / "llama_artifacts" / hashlib.sha256(url.encode()).hexdigest()[:16]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def _is_copy(local: ArtifactPair, entry: _Entry) -> bool:
    with suppress(FileNotFoundError):
        return hashlib.sha256(local.metadata_path.read_bytes()).hexdigest() == entry.digest
    return False


def _download(
    fs: "AbstractFileSystem", url: str, entry: _Entry, local: ArtifactPair, console: Console
) -> None:
    """Write the copy as a build is written: whoever is killed, no start finds half of it."""
    expected = entry.manifest.file

    def get(path: Path) -> None:
        label = f"fetch {size_text(expected['bytes'])}"
        remote = f"{entry.place}/{_file_name(entry.manifest)}"
        with _driver_errors(url), _progress(label, console) as bar:
            fs.get_file(remote, str(path), callback=bar)

    def check(record: dict) -> Manifest:
        if any(record[name] != expected[name] for name in ("bytes", "sha256")):
            raise ArtifactDamagedError(
                f"what came from {one_line(entry.place)} is not what its metadata says: damaged "
                "there or on the way; try again, or publish it again"
            )
        return entry.manifest

    check_target(local, expected["bytes"])
    with building(local, console):
        if not _is_copy(local, entry):  # else another process was faster
            write_pair(local, get, check)


# --- drivers ---------------------------------------------------------------------------------


def _open_store(url: str) -> tuple["AbstractFileSystem", str]:
    # imported here: a start that pins a copy at hand does not pay for it
    import fsspec

    fs, root = fsspec.url_to_fs(url)
    return fs, root.rstrip("/")


@contextmanager
def _driver_errors(url: str) -> Iterator[None]:
    """Turn what a driver raises into one line."""
    try:
        yield
    except ScriptError:
        raise
    except ImportError as error:  # in fsspec's words: Install s3fs to access S3
        raise EnvironmentProblemError(f"{url} needs a driver: {error}") from error
    except Exception as error:  # their libraries' own, which have no base in common
        text = " ".join(str(error).split())
        raise EnvironmentProblemError(
            f"cannot use the store {url}: {type(error).__name__}: {text}"
        ) from error


@contextmanager
def _progress(label: str, console: Console) -> Iterator[Any]:
    """Show a bar on stderr while a file is transferred."""
    from fsspec.callbacks import TqdmCallback

    bar = {"desc": label, "unit": "B", "unit_scale": True, "file": sys.stderr}
    with TqdmCallback(tqdm_kwargs=bar | {"disable": console.quiet}) as callback:
        yield callback
