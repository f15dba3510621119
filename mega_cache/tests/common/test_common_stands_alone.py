"""`common/` is the same in both folders and knows neither."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2]
TWINS = FOLDER.parent / ".ci" / "twins.py"
IN_REPOSITORY = pytest.mark.skipif(not TWINS.exists(), reason="the folder was copied alone")


@IN_REPOSITORY
def test_the_twins_are_equal():
    done = subprocess.run([sys.executable, TWINS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@IN_REPOSITORY
def test_a_drifted_twin_is_found_and_mended(tmp_path):
    spec = importlib.util.spec_from_file_location("twins", TWINS)
    twins = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(twins)
    original, twin = tmp_path / "a", tmp_path / "b"
    for name in ("common/one.py", *twins.TEST_TOOLS):
        (original / name).parent.mkdir(parents=True, exist_ok=True)
        (original / name).write_text("1")
    twins.mend(original, twin)
    assert twins.find_differences(original, twin) == []
    for name in ("common/one.py", "common/two.py", twins.TEST_TOOLS[0]):
        (twin / name).write_text("2")
    assert twins.find_differences(original, twin) == [
        "common/one.py", "common/two.py", twins.TEST_TOOLS[0],
    ]  # fmt: skip
    twins.mend(original, twin)
    assert twins.find_differences(original, twin) == []


def test_nothing_in_common_names_its_folder():
    names = ("portable_cache", "aotinductor", "llama3b_")
    for path in (FOLDER / "common").rglob("*.py"):
        text = path.read_text()
        assert not any(name in text for name in names), path
