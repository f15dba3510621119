"""The metadata that stands beside an artifact: checked when read, and field by field to compare."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ArtifactDamagedError, ArtifactMismatchError

SCHEMA = 2
MAX_BYTES = 4 * 2**20  # of metadata; ours are some ten kilobytes
# set in processes whose GPU computes nothing: what they make must never meet a real one
REHEARSAL_VARIABLE = "LLAMA_REHEARSAL"
# in the file only: of all the rest, so that a flipped digit is found even where any digit is valid
_OWN_DIGEST = "metadata_sha256"
_SHOWN_LENGTH = 100


@dataclass(frozen=True)
class Manifest:
    """What an artifact is: built from what, by what, how, and which bytes it has."""

    schema: int
    approach: str  # mega_cache or torch_export
    model: dict  # id, revision (or None), config_digest, dtype
    environment: dict  # of the build: name -> text, number or None
    recipe: dict  # flag name -> its value at the build
    file: dict  # bytes: int; sha256: as artifacts.content_digest says; written: UTC, ISO 8601
    build_seconds: float
    details: dict  # what else the approach wants to remember, JSON


@dataclass(frozen=True)
class Difference:
    """One field that an artifact was built with and that is something else here."""

    field: str
    built: Any
    found: Any


def parse_manifest(text: bytes) -> Manifest:
    """Return the manifest in `text`; raise ArtifactDamagedError for anything but a valid one."""
    try:
        return _checked(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactDamagedError(
            f"metadata is damaged: {error}; build again with ./build.sh"
        ) from None


def dump_manifest(manifest: Manifest) -> str:
    """Return the text that parses back into `manifest` (tuples come back as lists).

    What no reader would accept is not written: it raises what json or `parse_manifest` raises.
    """
    fields = dataclasses.asdict(manifest)
    text = json.dumps(fields | {_OWN_DIGEST: _digest(fields)}, indent=2, allow_nan=False) + "\n"
    parse_manifest(text.encode())
    return text


def differences(built: dict, found: dict, fields: Iterable[str]) -> list[Difference]:
    """Return the fields that differ, in order; an absent field is None, a tuple equals a list."""
    pairs = [(field, _plain(built.get(field)), _plain(found.get(field))) for field in fields]
    return [Difference(*pair) for pair in pairs if _canonical(pair[1]) != _canonical(pair[2])]


def rehearsal_differences(manifest: Manifest) -> list[Difference]:
    """Return that the artifact comes from a rehearsal if this process is none."""
    rehearsed = manifest.environment.get("rehearsal")
    if rehearsed and not in_rehearsal():
        return [Difference("rehearsal", rehearsed, None)]
    return []


def in_rehearsal() -> bool:
    return bool(os.environ.get(REHEARSAL_VARIABLE))


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
        f"{one_line(item.field)}: built with {_shown(item.built)}, found {_shown(item.found)}"
        for item in found_differences
    )


def one_line(text: str) -> str:
    """Return text from a file or a flag made safe to print: one line, no control characters."""
    safe = text if text.isprintable() else text.encode("unicode_escape").decode()
    return safe if len(safe) <= _SHOWN_LENGTH else f"{safe[:_SHOWN_LENGTH]}..."


def _checked(text: bytes) -> Manifest:
    if len(text) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES} bytes")
    fields = json.loads(text.decode())
    if not isinstance(fields, dict):
        raise ValueError(f"it holds {_shown(fields)}, expected an object")
    if fields.get("schema") != SCHEMA:
        schema = _shown(fields.get("schema"))
        raise ValueError(f"written by another version: schema {schema}, this one reads {SCHEMA}")
    if fields.pop(_OWN_DIGEST, None) != _digest(fields):
        raise ValueError(f"{_OWN_DIGEST} is not that of the other fields")
    # from here on only a faulty builder can be at fault
    names = {field.name: field.type for field in dataclasses.fields(Manifest)}
    if set(fields) != set(names):
        raise ValueError(f"fields are {one_line(', '.join(fields))}, expected {', '.join(names)}")
    for name, kind in names.items():
        if kind is dict and not isinstance(fields[name], dict):
            raise ValueError(f"{name} is {_shown(fields[name])}, expected an object")
    if not all(map(isinstance, map(fields["file"].get, ("bytes", "sha256")), (int, str))):
        raise ValueError(f"file is {_shown(fields['file'])}, expected bytes and sha256")
    return Manifest(**fields)


def _digest(fields: dict) -> str:
    return hashlib.sha256(_canonical(fields).encode()).hexdigest()


def _canonical(value: Any) -> str:
    # as text: 1, 1.0 and true are equal to Python, and different flags to us
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _plain(value: Any) -> Any:
    """Return `value` as it looks after a round through JSON."""
    return json.loads(json.dumps(value, default=str))


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return one_line(value if isinstance(value, str) else json.dumps(value))
