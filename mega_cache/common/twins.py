"""The check that both folders carry the same `common/`, and the command that mends it.

python mega_cache/common/twins.py          names every file that differs; exit status 1
python mega_cache/common/twins.py --mend   copies mega_cache/common over torch_export/common
"""

import filecmp
import shutil
import sys
from pathlib import Path

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
    original, twin = (repository / name / "common" for name in ("mega_cache", "torch_export"))
    if "--mend" in sys.argv[1:]:
        mend(original, twin)
    differing = find_differences(original, twin)
    if differing:
        sys.exit(
            f"{original} and {twin} differ in {', '.join(differing)}: "
            "mend it with `python mega_cache/common/twins.py --mend`"
        )


if __name__ == "__main__":
    main()
