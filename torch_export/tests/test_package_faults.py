"""Faults that only a package can have: other zip files, other graphs, other lengths.

Every package here has the hash that its metadata names, so that only its content is at fault. The
native code inside is not judged: who made it is a matter of trust.
"""

import io
import random
import re
import subprocess
import sys
import zipfile

import pytest
from faults import FOLDER, edit_metadata, put
from helpers import run_script, succeeded
from test_faults import DAMAGED, pair, refusal, server

from common.artifact.manifest import SCHEMA

__all__ = ["pair", "refusal", "server"]  # fixtures


@pytest.fixture(scope="module", params=("kv", "base"))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def subject(kind, request):
    """A package with a KV cache, and one of the base graph."""
    return request.getfixturevalue(f"{kind}_subject")


def zipped(entries: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return content.getvalue()


def unzipped(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def library(entries: dict[str, bytes]) -> str:
    """Return the name of a library that a start opens as a program."""
    return next(name for name in entries if re.search(r"/(programs/\w+|base)/[^/]*\.so$", name))


def spoilt(entries: dict[str, bytes]) -> dict[str, bytes]:
    """Return packages by what is wrong with them."""
    so = library(entries)
    folder = so.split("/")[-2]
    rest = {name: data for name, data in entries.items() if name != so}
    moved = {name.replace(f"/{folder}/", "/other/"): data for name, data in entries.items()}
    steps = next(name for name in entries if name.endswith("/libllama_steps.so"))
    return {
        "no entry": zipped({}),
        "one entry": zipped({"hello.txt": b"hello"}),
        "one entry in a folder": zipped({"a/hello.txt": b"hello"}),
        "one entry with the library's name": zipped({so.rpartition("/")[2]: entries[so]}),
        "no library": zipped(rest),
        "no native step": zipped({name: data for name, data in entries.items() if name != steps}),
        "another program": zipped(moved),
        "no folder at all": zipped(
            {name.partition("/")[2]: data for name, data in entries.items()}
        ),
    }


def test_another_zip_with_a_right_hash_is_never_run(pair, refusal):
    for name, content in spoilt(unzipped(pair.path.read_bytes())).items():
        put(pair, content)
        line = refusal(DAMAGED)
        assert "cannot be loaded (" in line, name
        assert "./build.sh" in line, name


def test_sixty_random_selections_of_entries_are_refused(pair, refusal):
    entries = unzipped(pair.path.read_bytes())
    so = library(entries)
    chance = random.Random(6)
    for _ in range(60):
        names = chance.sample(sorted(entries), chance.randrange(len(entries)))
        chosen = {name: entries[name] for name in names}
        if data := chosen.pop(so, None):  # under another name or not at all
            parts = so.split("/")
            parts.pop(chance.randrange(len(parts)))
            chosen |= {"/".join(parts).removesuffix(".so"): data} if chance.random() < 0.5 else {}
        put(pair, zipped(chosen))
        refusal(DAMAGED)


ROWS = [{"name": "model.norm.weight", "shape": [256], "dtype": "float32"}]
OTHER_GRAPHS = {
    "base": [
        {"details__graphs": ...},
        {"details__graphs": 7},
        {"details__graphs": ["prefill", "decode"]},
        {"details__constants": []},
        {"details__constants": ROWS},
    ],
    "kv": [
        {"details__programs": ...},
        {"details__programs": 7},
        {"details__programs": {"prefill": [], "decode": []}},
        {"details__cache": ...},
        {"details__cache": {"slots": 2048}},
        {"details__dtypes": ...},
        {"details__rope": {}},
        {"details__hidden_size": "256"},
    ],
}
NEITHER = [{"details": {}}]


def test_metadata_that_describes_no_package_is_refused(kind, pair, refusal):
    before = pair.metadata_path.read_bytes()
    for changes in (*OTHER_GRAPHS[kind], *NEITHER):
        edit_metadata(pair, **changes)
        assert "./build.sh" in refusal(DAMAGED), changes
        pair.metadata_path.write_bytes(before)


def test_a_package_of_the_version_before_is_refused(pair, refusal):
    text = pair.metadata_path.read_text()
    assert f'"schema": {SCHEMA}' in text
    pair.metadata_path.write_text(text.replace(f'"schema": {SCHEMA}', f'"schema": {SCHEMA - 1}'))
    line = refusal(DAMAGED)
    assert f"schema {SCHEMA - 1}, this one reads {SCHEMA}" in line
    assert "./build.sh" in line


def test_a_prompt_beyond_the_exported_lengths_is_refused_before_loading(refusal):
    line = refusal(2, "--prompt-length=2050")
    assert re.search(r"\./build\.sh (--kv-cache )?--max-seq-len 2056", line)


def test_switched_off_caches_do_not_matter_to_a_package(subject, tmp_path):
    flags = subject.run_flags(subject.pair)
    off = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    done = succeeded(run_script(subject.run, *flags, result=tmp_path / "run.json", **off))
    assert not any(done.result["compile"].values())


def test_a_reader_that_stops_early_is_no_crash(subject):
    words = [sys.executable, str(FOLDER / subject.run), *subject.run_flags(subject.pair)]
    command = ["bash", "-o", "pipefail", "-c", '"$@" | true', "bash", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
