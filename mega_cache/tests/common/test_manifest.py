"""Metadata: what is written parses back, and nothing else parses."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.artifact.manifest import (
    MAX_BYTES,
    SCHEMA,
    Difference,
    Manifest,
    describe,
    differences,
    dump_manifest,
    parse_manifest,
    raise_if_different,
)
from common.cli import SharedFlags
from common.errors import ArtifactDamagedError, ArtifactMismatchError
from common.model.target import as_built

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
OBJECTS = st.dictionaries(st.text(max_size=8), JSON)
MANIFESTS = st.builds(
    Manifest,
    schema=st.just(SCHEMA),
    approach=st.sampled_from(("mega_cache", "torch_export")),
    model=OBJECTS,
    environment=OBJECTS,
    recipe=OBJECTS,
    file=st.fixed_dictionaries({"bytes": st.integers(1, 2**62), "sha256": st.text()}),
    build_seconds=st.floats(0, 1e9),
    details=OBJECTS,
)
EXAMPLE = Manifest(
    schema=SCHEMA,
    approach="mega_cache",
    model={"id": "random:tiny", "revision": None, "config_digest": "c0", "dtype": "float32"},
    environment={"torch": "2.9.1", "gpu": None},
    recipe={"prefill_lengths": [128, 256], "fullgraph": True},
    file={"bytes": 3, "sha256": "a" * 64},
    build_seconds=12.5,
    details={"graphs": 2},
)


def refusal(text: bytes | str) -> str:
    """Return the one line with which `text` is refused."""
    with pytest.raises(ArtifactDamagedError) as caught:
        parse_manifest(text if isinstance(text, bytes) else text.encode())
    message = str(caught.value)
    assert message.startswith("metadata is damaged: ")
    assert message.endswith("; build again with ./build.sh")
    assert message.isprintable()
    return message


@given(MANIFESTS)
def test_a_manifest_survives_the_round_through_its_file(manifest):
    text = dump_manifest(manifest)
    assert parse_manifest(text.encode()) == manifest
    assert dump_manifest(parse_manifest(text.encode())) == text


@settings(max_examples=400)
@given(st.data())
def test_mutated_metadata_says_the_same_or_is_refused(data):
    good = dump_manifest(data.draw(st.just(EXAMPLE) | MANIFESTS)).encode()
    text = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(len(text), start + 30)))
        text[start:end] = data.draw(st.binary(max_size=6) | st.sampled_from(
            [b"null", b"NaN", b"1e999", b'"', b"{}", b"[]", b"-1", b"true", b"\\ud800", b"\0"]
        ))  # fmt: skip
    try:
        assert parse_manifest(bytes(text)) == parse_manifest(good)
    except ArtifactDamagedError as error:
        assert str(error).isprintable()


@given(st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()))
def test_random_bytes_and_random_json_are_refused(text):
    refusal(text)


@pytest.mark.parametrize("schema", [SCHEMA + 1, SCHEMA - 1, "1", None, []])
def test_another_versions_metadata_is_named_as_that(schema):
    message = refusal(json.dumps({"schema": schema, "something_new": 1}))
    assert f"written by another version: schema {schema or 'none'}" in message.replace("[]", "none")


@pytest.mark.parametrize(
    ("name", "value"),
    [("build_seconds", float("nan")), ("details", {1: set()}), ("schema", SCHEMA + 1),
     ("details", {"x": "y" * MAX_BYTES})],
)  # fmt: skip
def test_what_no_reader_takes_is_not_written(name, value):
    with pytest.raises((ArtifactDamagedError, ValueError, TypeError)):
        dump_manifest(EXAMPLE._replace(**{name: value}))


def test_hostile_sizes_depths_and_numbers_are_refused_at_once():
    began = time.monotonic()
    refusal(b" " * (MAX_BYTES + 1))
    refusal(b"[" * MAX_BYTES)
    refusal(b'{"schema":' + b"9" * (MAX_BYTES - 100) + b"}")
    refusal(f'{{"schema":{SCHEMA},"details":{"[" * 900 + "]" * 900}}}')
    refusal(f'{{"schema":{SCHEMA},"build_seconds":1e999}}')
    assert time.monotonic() - began < 5


def test_control_characters_of_metadata_reach_no_terminal():
    refusal(json.dumps({"schema": "\x1b[2J\nerror: all is well"}))


def test_differences_are_named_with_both_values():
    built = {"torch": "2.9.1", "gpu": "H200", "lengths": [128, 256], "fullgraph": True}
    found = {"torch": "2.13.0", "gpu": None, "lengths": (128, 256), "fullgraph": 1}
    result = differences(built, found, ("torch", "gpu", "lengths", "fullgraph", "absent"))
    assert result == [
        Difference("torch", "2.9.1", "2.13.0"),
        Difference("gpu", "H200", None),
        Difference("fullgraph", True, 1),
    ]
    told = (
        "torch: built with 2.9.1, found 2.13.0; gpu: built with H200, found none; "
        "fullgraph: built with true, found 1"
    )
    assert describe(result) == told
    raise_if_different(Path("a.pt2"), [])
    with pytest.raises(ArtifactMismatchError) as caught:
        raise_if_different(Path("a.pt2"), result)
    assert str(caught.value).startswith(f"a.pt2 was built for something else: {told}; rebuild it")


@given(
    st.dictionaries(st.sampled_from("abcd"), JSON), st.dictionaries(st.sampled_from("abcd"), JSON)
)
def test_a_description_is_one_printable_line(built, found):
    assert describe(differences(built, found, "abcd")).isprintable()
    assert differences(built, built, "abcd") == []


def test_a_run_takes_device_and_dtype_from_the_artifact_unless_it_is_told():
    def built(recipe, dtype=None):
        return EXAMPLE._replace(model={"dtype": dtype}, recipe=recipe)

    found = as_built(SharedFlags(), built({"device": "cpu"}, "float16"))
    assert (found.device, found.dtype) == ("cpu", "float16")
    told = SharedFlags(device="cuda", dtype="bfloat16")
    assert as_built(told, built({"device": "cpu"}, "float16")) == told
    others = built({}), built({"device": "cuda"}, "complex64"), built({"device": 7}), None
    assert all(as_built(SharedFlags(), other) == SharedFlags() for other in others)
