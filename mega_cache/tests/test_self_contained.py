"""The folder stands alone, and its common/ is the twin's."""

from pathlib import Path

import pytest
from helpers import FOLDER

from common import twins

TWIN = FOLDER.parent / "torch_export"


@pytest.mark.skipif(not TWIN.is_dir(), reason="this folder was copied alone: it has no twin")
def test_the_twins_are_equal():
    differing = twins.find_differences(FOLDER / "common", TWIN / "common")
    differing += twins.find_test_differences(FOLDER / "tests", TWIN / "tests")
    assert not differing, "mend it with `python mega_cache/common/twins.py --mend`"


def test_a_drifted_twin_is_found_and_mended(tmp_path):
    original, twin = tmp_path / "a", tmp_path / "b"
    original.mkdir()
    (original / "one.py").write_text("1")
    twins.mend(original, twin)
    assert twins.find_differences(original, twin) == []
    (twin / "one.py").write_text("2")
    (twin / "two.py").write_text("2")
    assert twins.find_differences(original, twin) == ["one.py", "two.py"]
    twins.mend(original, twin)
    assert twins.find_differences(original, twin) == []


def test_nothing_in_common_names_its_folder():
    names = ("portable_cache", "aotinductor", "llama3b_")
    for path in Path(FOLDER, "common").glob("*.py"):
        text = path.read_text()
        assert not any(name in text for name in names), path
