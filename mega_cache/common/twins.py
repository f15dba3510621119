"""The check that both folders carry the same `common/` and helpers of tests, and what mends it.

python mega_cache/common/twins.py          names every file that differs; exit status 1
python mega_cache/common/twins.py --mend   copies what mega_cache has over torch_export's
"""

import filecmp
import shutil
import sys
from pathlib import Path

SHARED_TESTS = ("helpers.py", "faults.py", "test_faults.py")
_IGNORED = shutil.ignore_patterns("__pycache__")


def find_differences(original: Path, twin: Path) -> list[str]:
    """Return the files, relative to both folders, that are not the same in the two."""
    files = _files(original) | _files(twin)
    return sorted(
        str(name)
        for name in files
        if not (original / name).is_file()
        or not (twin / name).is_file()
        or not filecmp.cmp(original / name, twin / name, shallow=False)
    )


def find_test_differences(original: Path, twin: Path) -> list[str]:
    """Return the files of SHARED_TESTS that are not the same in two folders of tests."""
    _, differing, absent = filecmp.cmpfiles(original, twin, SHARED_TESTS, shallow=False)
    return sorted(differing + absent)


def mend(original: Path, twin: Path) -> None:
    shutil.rmtree(twin, ignore_errors=True)
    shutil.copytree(original, twin, ignore=_IGNORED)


def _files(folder: Path) -> set[Path]:
    return {
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def main() -> None:
    repository = Path(__file__).resolve().parents[2]
    folders = [repository / name for name in ("mega_cache", "torch_export")]
    original, twin = (folder / "common" for folder in folders)
    tests, twin_tests = (folder / "tests" for folder in folders)
    if "--mend" in sys.argv[1:]:
        mend(original, twin)
        for name in SHARED_TESTS:
            shutil.copy(tests / name, twin_tests / name)
    differing = find_differences(original, twin) + find_test_differences(tests, twin_tests)
    if differing:
        sys.exit(
            f"{folders[0]} and {folders[1]} differ in {', '.join(differing)}: "
            "mend it with `python mega_cache/common/twins.py --mend`"
        )


if __name__ == "__main__":
    main()
