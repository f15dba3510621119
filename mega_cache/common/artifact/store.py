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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from common import errors
from common.artifact import disk, manifest
from common.artifact.disk import ArtifactPair, TrustFlags
from common.artifact.manifest import Difference, Manifest, describe, one_line
from common.cli import Console

Fits = Callable[[Manifest], list[Difference]]

_METADATA = "meta.json"


class _Entry(NamedTuple):
    """An artifact in a store, or the local copy of one."""

    place: str  # its folder
    manifest: Manifest
    digest: str  # sha256 of its metadata file


def publish(pair: ArtifactPair, url: str | None, approach: str, console: Console) -> None:
    """Put a verified artifact into the store at `url`; without a URL do nothing."""
    if url is None:
        return
    with disk.open_verified(pair, approach, TrustFlags(), console) as verified:
        built = verified.manifest
        if not built.details.get("verified"):
            raise errors.UsageError(
                f"{pair.path} is not published: its build did not verify that it gives the "
                "model's own tokens"
            )
        metadata = manifest.dump_manifest(built).encode()
        with _store(url) as (fs, root), _progress(f"publish {pair.path.name}", console) as bar:
            place = f"{root}/{_place_of(built)}"
            fs.makedirs(place, exist_ok=True)
            with _whole(fs, f"{place}/{built.file['sha256']}.artifact") as path:
                fs.put_file(verified.path_for_loader, path, callback=bar)
            with _whole(fs, f"{place}/{_METADATA}") as path:
                fs.pipe_file(path, metadata)
    console.say(
        f"published {place}: others start from it with\n"
        f"  ./run.sh --fetch {url} --expect-sha256 {_sha256(metadata)}"
    )


@contextmanager
def _whole(fs: Any, path: str) -> Iterator[str]:
    """Yield where to write a file so that it is made or replaced whole or not at all.

    Object stores do that by themselves; a driver with a rename of its own has folders, where it
    takes one. A killed publisher leaves its draft there.
    """
    from fsspec import AbstractFileSystem

    renames = type(fs).mv is not AbstractFileSystem.mv
    draft = f"{path}.{os.urandom(8).hex()}.part" if renames else path
    yield draft
    if renames:
        fs.mv(draft, path)


def _place_of(built: Manifest) -> str:
    """Return where in a store the artifact belongs: parts that people can read and sort."""
    environment, recipe, model = built.environment, built.recipe, built.model
    if recipe.get("device") == "cuda":
        device = ["cuda", environment.get("cuda"), environment.get("gpu")]
    else:
        device = ["cpu", recipe.get("cpu_capability") or platform.machine()]
    # their own code is part of what was compiled
    recipe = recipe | {name: environment.get(name) for name in ("transformers", "triton")}
    parts = (
        (built.approach,),
        (environment.get("torch"), *device),
        (str(model.get("config_digest"))[:16], model.get("dtype")),
        (_sha256(json.dumps(recipe, sort_keys=True).encode())[:16],),
    )
    return "/".join(re.sub(r"[^A-Za-z0-9._]+", "-", "-".join(map(str, part))) for part in parts)


def fetch(
    pair: ArtifactPair, url: str | None, approach: str, fits: Fits, trust: TrustFlags,
    console: Console,
) -> ArtifactPair:  # fmt: skip
    """Return the local copy of the store's newest artifact that fits; without a URL, `pair`.

    `fits` returns in which fields an artifact differs from what this process is and asks for. The
    copy is opened and verified like any other artifact, under the same `trust`. A pinned one that
    is here needs no network.
    """
    if url is None:
        return pair
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    copies = Path(cache, "llama_artifacts", approach)
    with errors.writing(copies):
        copies.mkdir(parents=True, exist_ok=True, mode=0o700)
    entries = _copy(copies, trust.expect_sha256) or _list_store(url, approach)
    entry = _choose(entries, fits, url, trust, console)
    folder = copies / entry.digest
    local = ArtifactPair(folder / f"artifact{pair.path.suffix}", folder / _METADATA)
    if not _copy(copies, entry.digest):
        _download(url, entry, local, console)
    return local


def _copy(copies: Path, digest: str | None) -> list[_Entry]:
    """Return the local copy whose metadata has this digest, if it is here."""
    path = copies / str(digest) / _METADATA
    found = _parsed({str(path): path.read_bytes()} if path.exists() else {})
    return [entry for entry in found if entry.digest == digest]


def _list_store(url: str, approach: str) -> list[_Entry]:
    with _store(url) as (fs, root):
        names = map(str, fs.find(f"{root}/{approach}"))
        found = [name for name in names if name.endswith(f"/{_METADATA}")]
        if not found and not fs.exists(root):
            raise FileNotFoundError(root)  # a share that is not mounted, say
        return _parsed(fs.cat(found) if found else {})


def _parsed(contents: dict[str, bytes]) -> list[_Entry]:
    """Return the artifacts whose metadata, by its path, can be read: another version's cannot."""
    entries = []
    for path, content in contents.items():
        with suppress(errors.ArtifactDamagedError):
            place, built = path.rpartition("/")[0], manifest.parse_manifest(content)
            entries.append(_Entry(place, built, _sha256(content)))
    return entries


def _choose(
    entries: list[_Entry], fits: Fits, url: str, trust: TrustFlags, console: Console
) -> _Entry:
    """Return the newest that fits and may run; with none, list what there is and raise."""
    if not entries:
        raise errors.ArtifactDamagedError(f"no such artifact in {url}: ./build.sh --publish {url}")
    allowed = [entry for entry in entries if trust.expect_sha256 in (None, entry.digest)]
    if not allowed:
        raise errors.ArtifactUntrustedError(
            f"none of the {len(entries)} artifacts in {url} has the metadata that --expect-sha256 "
            f"{trust.expect_sha256} asks for: pin one that is there"
        )
    compared = [(entry, fits(entry.manifest)) for entry in allowed]
    fitting = [entry for entry, unlike in compared if not unlike]
    for entry, unlike in compared:
        if unlike and (console.verbose or not fitting):
            console.say(f"  {one_line(entry.place)}: {describe(unlike)}")
    if not fitting:
        nearest = min((unlike for _, unlike in compared), key=len)
        raise errors.ArtifactMismatchError(
            f"none of the {len(allowed)} artifacts in {url} was built for this; of the nearest, "
            f"{describe(nearest)}; publish one with ./build.sh --publish {url}"
        )
    chosen = max(fitting, key=lambda entry: str(entry.manifest.file.get("written")))
    if not (trust.expect_sha256 or trust.trust_artifact):
        raise errors.ArtifactUntrustedError(
            f"{one_line(chosen.place)} fits, and is somebody else's code that would run as you: "
            f"ask them for its sha256 and add --expect-sha256 (this one has {chosen.digest}), or "
            "consent with --trust-artifact"
        )
    return chosen


def _download(url: str, entry: _Entry, local: ArtifactPair, console: Console) -> None:
    """Write the copy as a build is written: whoever is killed, no start finds half of it."""
    digest = entry.manifest.file["sha256"]

    def get(path: Path) -> None:
        with _store(url) as (fs, _), _progress("fetch", console) as bar:
            fs.get_file(f"{entry.place}/{digest}.artifact", str(path), callback=bar)

    def check(record: dict) -> Manifest:
        if record["sha256"] != digest:
            raise errors.ArtifactDamagedError(
                f"what came from {one_line(entry.place)} is not what its metadata says: damaged "
                "there or on the way; try again, or publish it again"
            )
        return entry.manifest

    with disk.building(local, console):
        if not _copy(local.path.parents[1], entry.digest):  # else another process was faster
            disk.check_target(local, entry.manifest.approach, entry.manifest.file["bytes"])
            disk.write_pair(local, get, check)


@contextmanager
def _store(url: str) -> Iterator[tuple[Any, str]]:
    """Yield fsspec's driver and the folder for it; what a driver raises becomes one line."""
    try:
        # imported here: a start that pins a copy at hand does not pay for it
        import fsspec

        fs, root = fsspec.url_to_fs(url)
        yield fs, root.rstrip("/")
    except ImportError as error:  # in fsspec's words: Install s3fs to access S3
        raise errors.EnvironmentProblemError(f"{url} needs a driver: {error}") from error
    except Exception as error:  # their libraries' own, which have no base in common
        text = " ".join(str(error).split())
        raise errors.EnvironmentProblemError(
            f"cannot use the store {url}: {type(error).__name__}: {text}"
        ) from error


def _progress(label: str, console: Console) -> Any:
    from fsspec.callbacks import TqdmCallback

    bar = {"desc": label, "unit": "B", "unit_scale": True, "disable": console.quiet}
    return TqdmCallback(tqdm_kwargs=bar)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
