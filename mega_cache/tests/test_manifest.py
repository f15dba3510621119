"""Metadata: what is written parses back, and nothing else parses."""

import dataclasses
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ArtifactDamagedError
from common.manifest import (
    APPROACHES,
    MAX_BYTES,
    SCHEMA,
    Difference,
    Manifest,
    canonical_bytes,
    describe,
    differences,
    dump_manifest,
    parse_manifest,
)

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
HEX = st.text("0123456789abcdef", min_size=64, max_size=64)
MANIFESTS = st.builds(
    Manifest,
    schema=st.just(SCHEMA),
    approach=st.sampled_from(APPROACHES),
    model=st.fixed_dictionaries(
        {
            "id": st.text(),
            "revision": st.none() | st.text(),
            "config_digest": st.text(),
            "dtype": st.text(),
        }
    ),
    environment=st.dictionaries(st.text(max_size=8), SCALARS),
    recipe=st.dictionaries(st.text(max_size=8), JSON),
    file=st.fixed_dictionaries(
        {"bytes": st.integers(1, 2**62), "sha256": HEX, "blocks_sha256": HEX}
    ),
    build_seconds=st.floats(0, 1e9),
    details=st.dictionaries(st.text(max_size=8), JSON),
    signature=st.none() | st.text(max_size=100),
)
EXAMPLE = Manifest(
    schema=SCHEMA,
    approach="mega_cache",
    model={"id": "random:tiny", "revision": None, "config_digest": "c0", "dtype": "float32"},
    environment={"torch": "2.9.1", "gpu": None},
    recipe={"prefill_lengths": [128, 256], "fullgraph": True},
    file={"bytes": 3, "sha256": "a" * 64, "blocks_sha256": "b" * 64},
    build_seconds=12.5,
    details={"graphs": 2},
)


def fields() -> dict:
    return json.loads(dump_manifest(EXAMPLE))


def refusal(text: bytes | str | dict) -> str:
    """Return the one line with which `text` is refused."""
    text = json.dumps(text) if isinstance(text, dict) else text
    with pytest.raises(ArtifactDamagedError) as caught:
        parse_manifest(text if isinstance(text, bytes) else text.encode())
    message = str(caught.value)
    assert message.startswith("metadata is damaged: ")
    assert message.endswith("; build again with ./build.sh")
    assert "\n" not in message
    assert len(message) < 400
    return message


@given(MANIFESTS)
def test_a_manifest_survives_the_round_through_its_file(manifest):
    text = dump_manifest(manifest)
    assert parse_manifest(text.encode()) == manifest
    assert dump_manifest(parse_manifest(text.encode())) == text


@given(MANIFESTS, st.text(max_size=20))
def test_the_signed_bytes_are_everything_but_the_signature(manifest, signature):
    signed = dataclasses.replace(manifest, signature=signature)
    assert canonical_bytes(signed) == canonical_bytes(manifest)
    reread = parse_manifest(dump_manifest(signed).encode())
    assert canonical_bytes(reread) == canonical_bytes(manifest)
    other = dataclasses.replace(manifest, build_seconds=manifest.build_seconds + 1.0)
    if other != manifest:
        assert canonical_bytes(other) != canonical_bytes(manifest)


@settings(max_examples=400)
@given(st.data())
def test_mutated_metadata_is_valid_or_refused_and_nothing_else(data):
    text = bytearray(dump_manifest(data.draw(st.just(EXAMPLE) | MANIFESTS)).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(len(text), start + 30)))
        text[start:end] = data.draw(st.binary(max_size=6) | st.sampled_from(
            [b"null", b"NaN", b"1e999", b'"', b"{}", b"[]", b"-1", b"true", b"\\ud800", b"\0"]
        ))  # fmt: skip
    parsed_or_refused(bytes(text))


@given(st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()))
def test_random_bytes_and_random_json_are_refused(text):
    refusal(text)


@settings(max_examples=300)
@given(st.data())
def test_any_value_in_any_place_is_valid_or_refused(data):
    tree = fields()
    name = data.draw(st.sampled_from(sorted(tree)))
    inner = tree[name] if isinstance(tree[name], dict) and data.draw(st.booleans()) else tree
    key = data.draw(st.sampled_from(sorted(inner)))
    inner[key] = data.draw(JSON)
    parsed_or_refused(json.dumps(tree).encode())


def parsed_or_refused(text: bytes) -> None:
    try:
        manifest = parse_manifest(text)
    except ArtifactDamagedError as error:
        assert str(error).isprintable()
    else:
        assert parse_manifest(dump_manifest(manifest).encode()) == manifest


def test_newer_schema_is_named():
    tree = fields() | {"schema": SCHEMA + 1, "something_new": 1}
    message = refusal(tree)
    assert f"written by a newer version: schema {SCHEMA + 1}, this one reads {SCHEMA}" in message


@pytest.mark.parametrize("schema", [True, 0, -1, 1.0, "1", None, []])
def test_schema_must_be_a_positive_whole_number(schema):
    assert "schema is" in refusal(fields() | {"schema": schema})


def test_unknown_missing_and_repeated_keys_are_named():
    assert "unknown extra" in refusal(fields() | {"extra": 1})
    tree = fields()
    del tree["recipe"]
    assert "missing recipe" in refusal(tree)
    tree = fields()
    tree["file"]["path"] = "x"
    assert "file: unknown path" in refusal(tree)
    tree = fields()
    del tree["model"]["dtype"]
    assert "model: missing dtype" in refusal(tree)
    assert "key a appears twice" in refusal('{"a": 1, "a": 2}')


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 50])
def test_numbers_that_are_none_are_refused(number):
    text = dump_manifest(EXAMPLE).replace("12.5", number)
    refusal(text)
    refusal(text.replace('"graphs": 2', f'"graphs": {number}'))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("approach", "onnx"),
        ("approach", []),
        ("model", None),
        ("environment", {"torch": ["2.9.1"]}),
        ("recipe", [1]),
        ("file", {"bytes": 3, "sha256": "A" * 64, "blocks_sha256": "b" * 64}),
        ("file", {"bytes": 0, "sha256": "a" * 64, "blocks_sha256": "b" * 64}),
        ("file", {"bytes": True, "sha256": "a" * 64, "blocks_sha256": "b" * 64}),
        ("build_seconds", -1),
        ("build_seconds", "12"),
        ("build_seconds", False),
        ("signature", 5),
    ],
)
def test_wrong_types_are_named(name, value):
    assert name in refusal(fields() | {name: value})


def test_hostile_sizes_and_depths_are_refused_at_once():
    began = time.monotonic()
    refusal(b" " * (MAX_BYTES + 1))
    refusal(b"[" * MAX_BYTES)
    refusal(b'{"schema":' + b"9" * (MAX_BYTES - 100) + b"}")
    names = ",".join(f'"{number}":0' for number in range(300_000))
    refusal("{" + names + "}")
    deep: dict = {}
    for _ in range(200):
        deep = {"a": deep}
    refusal(fields() | {"details": deep})
    assert time.monotonic() - began < 5


def test_control_characters_of_metadata_reach_no_terminal():
    message = refusal(fields() | {"approach": "\x1b[2J\nerror: all is well"})
    assert "\x1b" not in message


def test_a_manifest_that_no_reader_takes_is_not_written():
    with pytest.raises(ValueError, match="approach"):
        dump_manifest(dataclasses.replace(EXAMPLE, approach="onnx"))
    with pytest.raises(ValueError):
        dump_manifest(dataclasses.replace(EXAMPLE, build_seconds=float("nan")))


def test_differences_are_named_with_both_values():
    built = {"torch": "2.9.1", "gpu": "H200", "lengths": [128, 256], "fullgraph": True}
    found = {"torch": "2.13.0", "gpu": None, "lengths": (128, 256), "fullgraph": 1}
    result = differences(built, found, ("torch", "gpu", "lengths", "fullgraph", "absent"))
    assert result == [
        Difference("torch", "2.9.1", "2.13.0"),
        Difference("gpu", "H200", None),
        Difference("fullgraph", True, 1),
    ]
    assert describe(result) == (
        "torch: built with 2.9.1, found 2.13.0; gpu: built with H200, found none; "
        "fullgraph: built with true, found 1"
    )


@given(
    st.dictionaries(st.sampled_from("abcd"), JSON), st.dictionaries(st.sampled_from("abcd"), JSON)
)
def test_a_description_is_one_printable_line(built, found):
    result = differences(built, found, "abcd")
    assert describe(result).isprintable()
    assert differences(built, built, "abcd") == []
