"""A store for a fleet: what fits is fetched whole or not at all, and only with consent."""

import hashlib
import importlib.util
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_artifacts import FOLDER, content_of, dies, killed_after, manifest_of

from common.artifact import store
from common.artifact.disk import (
    ArtifactPair,
    TrustFlags,
    building,
    open_verified,
    read_blob,
    write_pair,
)
from common.artifact.manifest import differences
from common.cli import Console
from common.errors import (
    ArtifactDamagedError,
    ArtifactMismatchError,
    ArtifactUntrustedError,
    EnvironmentProblemError,
    UsageError,
)

APPROACH = "torch_export"
QUIET = Console(quiet=True)
CONSENT = TrustFlags(trust_artifact=True)
HERE = {"torch": "2.9.1", "gpu": "NVIDIA H200", "cuda": "12.8"}
SMALL, LARGE = 50_000, 8_000_000  # bytes


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def url(tmp_path):
    return str(tmp_path / "store")


@pytest.fixture
def pair(tmp_path):
    tmp_path.chmod(0o755)
    return ArtifactPair(tmp_path / "built" / "a.pt2", tmp_path / "built" / "a_meta.json")


def build(pair, number, environment=HERE, recipe=None, verified=True, size=SMALL):
    """Write build `number`, which is for `environment`."""
    with building(pair, QUIET):
        write_pair(
            pair,
            lambda path: path.write_bytes(content_of(number).ljust(size, b"x")) and None,
            lambda record: manifest_of(record, number)._replace(
                environment=environment,
                recipe={"device": "cuda"} | (recipe or {}),
                details={"build": number, "verified": verified},
            ),
        )


def publish(pair, url, number, *about, **more):
    build(pair, number, *about, **more)
    store.publish(pair, url, APPROACH, QUIET)


def fits(manifest):
    return differences(manifest.environment, HERE, HERE)


def fetch(url, trust=CONSENT, console=QUIET):
    """Return the local pair and the number of the build that a start finds there, whole."""
    local = store.fetch(ArtifactPair(Path("a.pt2"), Path("a_meta.json")), url, APPROACH, fits,
                        trust, console)  # fmt: skip
    with open_verified(local, APPROACH, trust, console) as verified:
        content = read_blob(verified)
    number = verified.manifest.details["build"]
    assert content.rstrip(b"x") == content_of(number).rstrip(b"x")
    return local, number


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def start(code: str, *arguments: object, **environment: str) -> subprocess.Popen:
    """Start a process that has this file's helpers and runs `code`."""
    places = [str(FOLDER), str(FOLDER / "tests" / "common")]
    head = f"import sys; sys.path[:0] = {places!r}\nfrom test_store import *\n"
    head += "from common.errors import run_script\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + code, *map(str, arguments)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | environment,
        cwd=environment.get("HOME"),
    )


# --- there and back --------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_another_users_process_gets_what_was_published(scheme, pair, url, tmp_path):
    publish(pair, scheme + url, 1)
    home = tmp_path / "elsewhere"
    home.mkdir()
    pin = digest_of(pair.metadata_path)
    pair.path.unlink()
    process = start(
        "print(*fetch(sys.argv[1], TrustFlags(expect_sha256=sys.argv[2])))",
        scheme + url, pin, HOME=str(home), XDG_CACHE_HOME="",
    )  # fmt: skip
    told, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    path, number = told.rsplit(maxsplit=1)
    assert number == "1"
    assert str(home) in path
    assert next((home / ".cache").rglob(pin)).parent.stat().st_mode & 0o777 == 0o700


def test_any_url_of_fsspec_will_do(pair):
    publish(pair, "memory://fleet", 1)
    assert fetch("memory://fleet")[1] == 1


def test_places_in_the_store_can_be_read_by_people(pair, url):
    publish(pair, url, 1)
    (metadata,) = Path(url).rglob("meta.json")
    assert metadata.relative_to(url).parts[:3] == (
        "torch_export", "2.9.1-cuda-12.8-NVIDIA-H200", "c-float32",
    )  # fmt: skip
    assert metadata.read_bytes() == pair.metadata_path.read_bytes()
    (file,) = set(metadata.parent.iterdir()) - {metadata}
    assert file.name == f"{digest_of(pair.path)}.artifact"


def test_what_was_not_verified_is_not_published(pair, url):
    build(pair, 1, verified=False)
    with pytest.raises(UsageError, match="did not verify"):
        store.publish(pair, url, APPROACH, QUIET)
    assert not Path(url).exists()


def test_without_a_url_nothing_is_done(pair):
    store.publish(pair, None, APPROACH, QUIET)
    assert store.fetch(pair, None, APPROACH, fits, CONSENT, QUIET) == pair


# --- choosing --------------------------------------------------------------------------------


def test_the_newest_that_fits_is_taken_and_the_others_are_named(pair, url, capsys):
    publish(pair, url, 1, recipe={"max_cache_len": 512})
    publish(pair, url, 2, recipe={"max_cache_len": 2048})
    publish(pair, url, 3, HERE | {"torch": "2.13.0"})
    publish(pair, url, 4, {"torch": "2.9.1", "gpu": None, "cuda": None}, {"device": "cpu"})
    assert fetch(url, console=Console(quiet=False, verbose=True))[1] == 2
    told = capsys.readouterr().err
    assert "torch: built with 2.13.0, found 2.9.1" in told
    assert "gpu: built with none, found NVIDIA H200" in told


def test_with_none_that_fits_what_there_is_is_listed_with_its_difference(pair, url, capsys):
    publish(pair, url, 1, HERE | {"torch": "2.13.0"})
    publish(pair, url, 2, HERE | {"torch": "2.13.0", "gpu": "NVIDIA L4"})
    with pytest.raises(ArtifactMismatchError) as caught:
        fetch(url, console=Console(quiet=False))
    assert "none of the 2 artifacts" in str(caught.value)
    assert "of the nearest, torch: built with 2.13.0, found 2.9.1;" in str(caught.value)
    assert capsys.readouterr().err.count("torch: built with 2.13.0") == 2


def test_an_empty_store_says_how_to_publish(url):
    Path(url).mkdir()
    with pytest.raises(ArtifactDamagedError, match="--publish"):
        fetch(url)


def test_another_versions_metadata_is_passed_over(pair, url):
    publish(pair, url, 1)
    other = Path(url) / APPROACH / "a" / "b" / "c"
    other.mkdir(parents=True)
    (other / "meta.json").write_text(json.dumps({"schema": 99}))
    assert fetch(url)[1] == 1


# --- trust -----------------------------------------------------------------------------------


def test_nothing_is_fetched_without_consent_and_the_refusal_names_the_digest(pair, url, cache):
    publish(pair, url, 1)
    with pytest.raises(ArtifactUntrustedError, match=digest_of(pair.metadata_path)):
        fetch(url, TrustFlags())
    assert not list(cache.rglob("*.pt2"))
    fetch(url)
    with pytest.raises(ArtifactUntrustedError):  # a copy is still somebody else's
        fetch(url, TrustFlags())


def test_a_pin_takes_its_artifact_and_no_other(pair, url):
    publish(pair, url, 1, recipe={"max_cache_len": 512})
    pin = TrustFlags(expect_sha256=digest_of(pair.metadata_path))
    publish(pair, url, 2, recipe={"max_cache_len": 2048})
    assert fetch(url, pin)[1] == 1
    with pytest.raises(ArtifactUntrustedError, match="asks for"):
        fetch(url, TrustFlags(expect_sha256="0" * 64))


# --- local copies ----------------------------------------------------------------------------


def test_a_copy_is_used_again(pair, url):
    publish(pair, url, 1)
    local, _ = fetch(url)
    next(Path(url).rglob("*.artifact")).unlink()
    assert fetch(url) == (local, 1)


def test_a_pinned_copy_needs_no_network(pair, url, capsys):
    publish(pair, url, 1)
    pin = TrustFlags(expect_sha256=digest_of(pair.metadata_path))
    fetch(url, pin)
    Path(url).rename(f"{url}.gone")
    assert fetch(url, pin)[1] == 1
    assert capsys.readouterr().err == ""


def test_a_copy_adds_little_to_a_start(pair, url):
    publish(pair, url, 1)
    fetch(url)
    code = """
pair, console = ArtifactPair(Path("a.pt2"), Path("m.json")), Console(quiet=False)
began = time.monotonic()
store.fetch(pair, sys.argv[1], APPROACH, fits, CONSENT, console)
print(time.monotonic() - began)
"""
    seconds = [float(start(code, url).communicate(timeout=60)[0]) for _ in range(3)]
    assert min(seconds) < 0.2


# --- damage ----------------------------------------------------------------------------------


def test_a_file_damaged_in_the_store_is_refused_until_it_is_published_again(pair, url, cache):
    publish(pair, url, 1)
    file = next(Path(url).rglob("*.artifact"))
    content = file.read_bytes()
    for wrong in (content[:-1], content[:-1] + b"\0", b""):
        file.write_bytes(wrong)
        with pytest.raises(ArtifactDamagedError, match="publish it again|wrote nothing"):
            fetch(url)
        assert not list(cache.rglob("*meta.json"))
    store.publish(pair, url, APPROACH, QUIET)
    assert fetch(url)[1] == 1


def test_a_copy_with_damaged_metadata_is_fetched_again(pair, url):
    publish(pair, url, 1)
    local, _ = fetch(url)
    local.metadata_path.write_bytes(b"{")
    assert fetch(url) == (local, 1)


@pytest.mark.parametrize(
    ("address", "words"),
    [("s3://bucket/x", "Install s3fs"), ("nonsense://x", "Protocol not known")],
)
def test_a_missing_driver_is_named(address, words):
    if address.startswith("s3") and importlib.util.find_spec("s3fs"):
        pytest.skip("s3fs is installed")
    with pytest.raises(EnvironmentProblemError, match=words):
        fetch(address)


def test_a_hub_that_cannot_be_reached_is_one_line():
    code = "run_script(lambda argv: fetch('hf://org/name'))"
    process = start(code, HF_ENDPOINT="http://127.0.0.1:9")
    told = process.communicate(timeout=120)[1]
    assert process.returncode == 5, told
    assert told.startswith("error: cannot use the store hf://org/name: ")
    assert told.count("\n") == 1


# --- kills and rivals ------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False], ids=["first", "again"])
def test_a_publisher_killed_before_any_file_operation_leaves_the_old_or_the_new(
    first, pair, url, tmp_path
):
    store.publish(pair, None, APPROACH, QUIET)
    seen = []
    for step in range(1, 200):
        own = f"{url}{step}"
        if not first:
            publish(pair, own, 1)
        build(pair, 2)
        died = dies(step, lambda own=own: store.publish(pair, own, APPROACH, QUIET))
        try:
            seen.append(fetch(own)[1])
        except (ArtifactDamagedError, EnvironmentProblemError):
            seen.append(0)
        if not died:
            break
    assert seen[-1] == 2
    assert seen == sorted(seen)
    assert set(seen) == {0 if first else 1, 2}


def test_a_start_killed_during_a_fetch_leaves_none_or_a_whole_copy(pair, url, cache, monkeypatch):
    publish(pair, url, 1)
    pin = TrustFlags(expect_sha256=digest_of(pair.metadata_path))
    kept = []
    for step in range(1, 200):
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache / str(step)))
        died = dies(step, lambda: fetch(url))
        Path(url).rename(f"{url}.gone")
        try:
            kept.append(fetch(url, pin)[1])
        except EnvironmentProblemError:
            kept.append(0)
        Path(f"{url}.gone").rename(url)
        assert fetch(url)[1] == 1
        if not died:
            break
    assert kept == sorted(kept)
    assert set(kept) == {0, 1}


def test_twenty_five_random_kills_of_publishers_and_of_starts_each(
    pair, url, tmp_path, monkeypatch
):
    publish(pair, url, 0, size=LARGE)
    chance = random.Random(7)
    last, found = 0, 0
    for attempt in range(25):
        begun, ended = killed_after(
            chance.uniform(0, 0.1), lambda number: publish(pair, url, number, size=LARGE), last + 1,
            tmp_path / "log",
        )  # fmt: skip
        old, last = max(ended, default=found), max(begun)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache{attempt}"))
        killed_after(chance.uniform(0, 0.1), lambda _: fetch(url), 0, tmp_path / "log")
        _, found = fetch(url)
        assert found in (old, last)


def test_of_two_publishers_at_once_one_leaves_a_whole_pair(url, tmp_path, monkeypatch):
    code = """
pair = ArtifactPair(Path(sys.argv[2]) / "a.pt2", Path(sys.argv[2]) / "a_meta.json")
for number in range(10**6):
    publish(pair, sys.argv[1], number % 3, size=LARGE)
"""
    rivals = [start(code, url, tmp_path / name) for name in ("one", "other")]
    try:
        until, attempt = time.monotonic() + 60, 0
        while not list(Path(url).rglob("meta.json")):
            assert time.monotonic() < until
            time.sleep(0.05)
        while attempt < 20:
            attempt += 1
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache{attempt}"))
            assert fetch(url)[1] in range(3)
            assert [rival.poll() for rival in rivals] == [None, None]
    finally:
        for rival in rivals:
            rival.kill()
            rival.communicate()
