"""The metadata that stands beside an artifact: strict to read, and field by field to compare."""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from common.errors import ArtifactDamagedError

SCHEMA = 1
APPROACHES = ("mega_cache", "torch_export")
MODEL_FIELDS = ("id", "revision", "config_digest", "dtype")
FILE_FIELDS = ("bytes", "sha256", "blocks_sha256")
MAX_BYTES = 4 * 2**20  # of metadata; ours are some ten kilobytes
MAX_DEPTH = 50  # of nested JSON
# in the file only: of all the rest, so that a flipped digit is found even where any digit is valid
_OWN_DIGEST = "metadata_sha256"
_HEX_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHOWN_LENGTH = 100


@dataclass(frozen=True)
class Manifest:
    """What an artifact is: built from what, by what, how, and which bytes it has."""

    schema: int
    approach: str  # one of APPROACHES
    model: dict  # MODEL_FIELDS, strings; revision may be None
    environment: dict  # name -> string, number, boolean or None
    recipe: dict  # flag name -> its value at the build
    file: dict  # bytes: int, sha256: of the file, blocks_sha256: of its blocks' digests
    build_seconds: float
    details: dict  # what else the approach wants to remember, JSON
    signature: str | None = None


@dataclass(frozen=True)
class Difference:
    """One field that an artifact was built with and that is something else here."""

    field: str
    built: Any
    found: Any


def parse_manifest(text: bytes) -> Manifest:
    """Return the manifest in `text`; raise ArtifactDamagedError for anything but a valid one."""
    try:
        return _checked(_decoded(text))
    except (ValueError, RecursionError) as error:
        raise ArtifactDamagedError(
            f"metadata is damaged: {error}; build again with ./build.sh"
        ) from None


def dump_manifest(manifest: Manifest) -> str:
    """Return the text that parses back into `manifest` (tuples come back as lists).

    Raise ValueError for a manifest that no reader would accept.
    """
    fields = dataclasses.asdict(manifest)
    fields[_OWN_DIGEST] = _digest(manifest)
    text = json.dumps(fields, indent=2, allow_nan=False) + "\n"
    try:
        parse_manifest(text.encode())
    except ArtifactDamagedError as error:
        raise ValueError(f"not a valid manifest: {error}") from error
    return text


def canonical_bytes(manifest: Manifest) -> bytes:
    """Return what a signature covers: everything but the signature, in one fixed form."""
    return _canonical(dataclasses.asdict(dataclasses.replace(manifest, signature=None)))


def differences(built: dict, found: dict, fields: Iterable[str]) -> list[Difference]:
    """Return the fields that differ, in order; an absent field is None, a tuple equals a list."""
    pairs = [(field, _plain(built.get(field)), _plain(found.get(field))) for field in fields]
    return [Difference(*pair) for pair in pairs if not _same(pair[1], pair[2])]


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


def _decoded(text: bytes) -> dict:
    if len(text) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES} bytes")
    try:
        fields = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_float=_finite,
            parse_int=_bounded_int,
            parse_constant=_finite,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON at line {error.lineno}: {error.msg}") from None
    return fields


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    fields: dict = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"key {one_line(name)} appears twice")
        fields[name] = value
    return fields


def _bounded_int(text: str) -> int:
    if len(text) > 40:  # reading a number of a million digits takes minutes
        raise ValueError(f"{one_line(text)} is too large a number")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):  # NaN and Infinity, which JSON has not, and 1e999
        raise ValueError(f"{one_line(text)} is not a finite number")
    return number


def _checked(fields: Any) -> Manifest:
    _expect(isinstance(fields, dict), "top level", "an object", fields)
    _check_schema(fields.get("schema"))
    names = [field.name for field in dataclasses.fields(Manifest)]
    _check_names("top level", fields, [*names, _OWN_DIGEST])
    own_digest = fields.pop(_OWN_DIGEST)
    _expect(fields["approach"] in APPROACHES, "approach", " or ".join(APPROACHES),
            fields["approach"])  # fmt: skip
    for name in ("model", "environment", "recipe", "file", "details"):
        _expect(isinstance(fields[name], dict), name, "an object", fields[name])
        _expect(_depth(fields[name]) <= MAX_DEPTH, name, f"at most {MAX_DEPTH} levels", "more")
    _check_model(fields["model"])
    _check_file(fields["file"])
    for name, value in fields["environment"].items():
        scalar = value is None or isinstance(value, str | int | float)
        _expect(scalar, f"environment.{one_line(name)}", "text, a number or null", value)
    seconds = fields["build_seconds"]
    _expect(_is_number(seconds) and seconds >= 0, "build_seconds", "a number >= 0", seconds)
    signature = fields["signature"]
    _expect(signature is None or isinstance(signature, str), "signature", "text", signature)
    manifest = Manifest(**fields)
    _expect(own_digest == _digest(manifest), _OWN_DIGEST, "that of the other fields", own_digest)
    return manifest


def _digest(manifest: Manifest) -> str:
    return hashlib.sha256(_canonical(dataclasses.asdict(manifest))).hexdigest()


def _canonical(fields: dict) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _check_schema(schema: Any) -> None:
    known = isinstance(schema, int) and not isinstance(schema, bool) and schema >= 1
    _expect(known, "schema", f"a whole number such as {SCHEMA}", schema)
    if schema > SCHEMA:
        raise ValueError(
            f"written by a newer version: schema {_shown(schema)}, this one reads {SCHEMA}"
        )


def _check_model(model: dict) -> None:
    _check_names("model", model, MODEL_FIELDS)
    for name, value in model.items():
        optional = name == "revision" and value is None
        _expect(optional or isinstance(value, str), f"model.{name}", "text", value)


def _check_file(record: dict) -> None:
    _check_names("file", record, FILE_FIELDS)
    size = record["bytes"]
    positive = isinstance(size, int) and not isinstance(size, bool) and 0 < size < 2**63
    _expect(positive, "file.bytes", "a positive whole number", size)
    for name in ("sha256", "blocks_sha256"):
        digest = record[name]
        valid = isinstance(digest, str) and _HEX_SHA256.fullmatch(digest)
        _expect(valid, f"file.{name}", "64 lower-case hex digits", digest)


def _check_names(where: str, fields: dict, names: Iterable[str]) -> None:
    missing = [name for name in names if name not in fields]
    unknown = [name for name in fields if name not in names]
    if missing or unknown:
        parts = [f"missing {', '.join(missing)}"] if missing else []
        parts += [f"unknown {one_line(', '.join(unknown))}"] if unknown else []
        raise ValueError(f"{where}: {' and '.join(parts)}")


def _expect(holds: Any, where: str, expected: str, found: Any) -> None:
    if not holds:
        raise ValueError(f"{where} is {_shown(found)}, expected {expected}")


def _is_number(value: Any) -> bool:
    # a JSON integer may be too large for a float, and then it is no number of seconds
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e18


def _depth(value: Any) -> int:
    """Return how deep JSON nests, without recursion; more than MAX_DEPTH is not counted on."""
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH:
        depth += 1
        inner = [item.values() if isinstance(item, dict) else item
                 for item in level if isinstance(item, dict | list)]  # fmt: skip
        level = [child for children in inner for child in children]
    return depth


def _plain(value: Any) -> Any:
    """Return `value` as it looks after a round through JSON."""
    return json.loads(json.dumps(value, default=str))


def _same(one: Any, other: Any) -> bool:
    # as text: 1, 1.0 and true are equal to Python, and different flags to us
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return one_line(value if isinstance(value, str) else json.dumps(value))
