"""The check that both folders carry the same `common/` and test tools, and what mends it.

python .ci/twins.py          names every file that differs; exit status 1
python .ci/twins.py --mend   copies what mega_cache has over torch_export's
"""

import filecmp
import shutil
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
ORIGINAL, TWIN = (REPOSITORY / name for name in ("mega_cache", "torch_export"))
_TOOLS = ("tools.sh", "requirements.txt", "helpers.py", "faults.py")
_TESTS = (
    "test_faults.py",
    "test_fleet.py",
    "test_readme.py",
    "test_refusals.py",
    "test_what_a_user_sees.py",
)
TEST_TOOLS = tuple(f"tests/{name}" for name in (*_TOOLS, *_TESTS))


def find_differences(original: Path, twin: Path) -> list[str]:
    """Return the files, relative to both folders, that are not the same in the two."""
    names = {*_files(original), *_files(twin), *TEST_TOOLS}
    _, differing, absent = filecmp.cmpfiles(original, twin, names, shallow=False)
    return sorted(differing + absent)


def mend(original: Path, twin: Path) -> None:
    shutil.rmtree(twin / "common", ignore_errors=True)
    for name in (*_files(original), *TEST_TOOLS):
        (twin / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(original / name, twin / name)


def _files(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in (folder / "common").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def main() -> None:
    if "--mend" in sys.argv[1:]:
        mend(ORIGINAL, TWIN)
    if differing := find_differences(ORIGINAL, TWIN):
        sys.exit(
            f"{ORIGINAL} and {TWIN} differ in {', '.join(differing)}: "
            "mend it with `python .ci/twins.py --mend`"
        )


if __name__ == "__main__":
    main()
