"""The metadata that stands beside an artifact: checked when read, and compared field by field."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import ArtifactDamagedError, ArtifactMismatchError

SCHEMA = 5
MAX_BYTES = 4 * 2**20  # of metadata; ours are some ten kilobytes
# in the file only: of all the rest, so that a flipped digit is found even where any digit is valid
_OWN_DIGEST = "metadata_sha256"


class Manifest(NamedTuple):
    """What an artifact is: built from what, by what, how, and which bytes it has."""

    schema: int
    approach: str  # mega_cache or torch_export
    model: dict  # id, revision (or None), config_digest, dtype
    environment: dict  # of the build: name -> text, number or None
    recipe: dict  # flag name -> its value at the build
    file: dict  # bytes: int; sha256: as disk.content_digest says; written: UTC, ISO 8601
    build_seconds: float
    details: dict  # what else the approach wants to remember, JSON


class Difference(NamedTuple):
    """One field that an artifact was built with and that is something else here."""

    field: str
    built: Any
    found: Any


def parse_manifest(text: bytes, path: Path | None = None) -> Manifest:
    """Return the manifest in `text`; raise ArtifactDamagedError for anything but a valid one."""
    try:
        if len(text) > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES} bytes")
        fields = json.loads(text.decode())
        if not isinstance(fields, dict):
            raise ValueError(f"it holds {_shown(fields)}, expected an object")
        if (schema := fields.get("schema")) != SCHEMA:
            raise ValueError(
                f"written by another version: schema {_shown(schema)}, this one reads {SCHEMA}"
            )
        if fields.pop(_OWN_DIGEST, None) != _digest(fields):
            raise ValueError(f"{_OWN_DIGEST} is not that of the other fields")
        return Manifest(**fields)
    except (ValueError, RecursionError, TypeError) as error:
        place = f"{path}: " if path else ""
        raise ArtifactDamagedError(
            f"{place}metadata is damaged: {error}; build again with ./build.sh"
        ) from None


def dump_manifest(manifest: Manifest) -> str:
    """Return the text that parses back into `manifest` (tuples come back as lists).

    What no reader would accept is not written: it raises what json or `parse_manifest` raises.
    """
    fields = manifest._asdict()
    text = json.dumps(fields | {_OWN_DIGEST: _digest(fields)}, indent=2, allow_nan=False) + "\n"
    parse_manifest(text.encode())
    return text


def differences(built: dict, found: dict, fields: Iterable[str]) -> list[Difference]:
    """Return the fields that differ, in order; an absent field is None, a tuple equals a list."""
    pairs = [Difference(field, built.get(field), found.get(field)) for field in fields]
    return [pair for pair in pairs if _digest(pair.built) != _digest(pair.found)]


def model_differences(manifest: Manifest, found: dict) -> list[Difference]:
    """Return the architecture's words that differ: a digest alone tells nobody what does."""
    known = manifest.details.get("checkpoint")
    words = known["architecture"] if known else {}
    return differences(words, found, [name for name in found if name in words])


def raise_if_different(path: Path, found_differences: list[Difference]) -> None:
    """Raise ArtifactMismatchError, naming every field, if there are differences."""
    if found_differences:
        raise ArtifactMismatchError(
            f"{path} was built for something else: {describe(found_differences)}; "
            "rebuild it with ./build.sh and the same flags, or run with the build's"
        )


def describe(found_differences: Iterable[Difference]) -> str:
    """Return `torch: built with 2.9.1, found 2.13.0; ...` on one line."""
    return "; ".join(
        f"{field}: built with {_shown(built)}, found {_shown(found)}"
        for field, built, found in found_differences
    )


def one_line(text: str) -> str:
    """Return text from a file made safe to print: short, one line, no control characters."""
    safe = text if text.isprintable() else text.encode("unicode_escape").decode()
    return safe if len(safe) <= 100 else f"{safe[:100]}..."


def _digest(value: Any) -> str:
    # of its text: 1, 1.0 and true are equal to Python, and different flags to us
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return one_line(value if isinstance(value, str) else json.dumps(value))
