"""Every command that the READMEs show is one that the scripts understand."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from helpers import FOLDER, run_command

UNKNOWN = "--a-flag-that-no-script-has"
BLOCKS = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def commands_in(readme: Path, prefix: str) -> list[str]:
    """Return the commands of this folder's wrappers in a README's blocks, without comments."""
    if not readme.exists():  # the folder was copied alone
        return []
    blocks = [text for language, text in BLOCKS.findall(readme.read_text()) if not language]
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in line.partition(" #")[0].split("&&")]
    wrapper = re.compile(rf"{re.escape(prefix)}(\w+\.sh\b.*)")
    return [found[1] for part in parts if (found := wrapper.fullmatch(part))]


COMMANDS = commands_in(FOLDER / "README.md", "./")
COMMANDS += commands_in(FOLDER.parent / "README.md", f"{FOLDER.name}/")


def test_the_readme_shows_every_wrapper():
    shown = {command.partition(" ")[0] for command in COMMANDS}
    assert shown == {path.name for path in FOLDER.glob("*.sh")}


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_a_command_of_a_readme_parses(command):
    wrapper, *flags = shlex.split(command.replace("<sha256>", "0" * 64))
    assert (FOLDER / wrapper).stat().st_mode & 0o111, "not executable"
    if wrapper in ("demo.sh", "test.sh"):
        return
    # everything else is understood, and bad values would be told first
    done = run_command([str(FOLDER / wrapper), *flags, UNKNOWN], PYTHON=sys.executable)
    assert done.status == 2
    assert done.stderr.splitlines()[-1].endswith(f"unrecognized arguments: {UNKNOWN}")
