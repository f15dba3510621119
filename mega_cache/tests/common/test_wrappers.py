"""The shell wrappers find their folder and an interpreter, wherever and however they are called."""

import os
import shutil
import subprocess
import sys
import tempfile

import pytest
from helpers import FOLDER

from common.compiler.caches import private_compiler_caches


def call(path, cwd, **environment):
    return subprocess.run(
        [str(path), "--help"], cwd=cwd, capture_output=True, text=True, timeout=60,
        env=os.environ | {"PYTHON": sys.executable} | environment,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["build.sh", "run.sh", "benchmark.sh", "compare.sh"])
def test_a_wrapper_is_found_through_a_link_and_beside_an_exported_cdpath(name, tmp_path):
    link = tmp_path / "elsewhere" / "link.sh"
    link.parent.mkdir()
    link.symlink_to(FOLDER / name)
    for path, cwd in ((link, tmp_path), (f"./{FOLDER.name}/{name}", FOLDER.parent)):
        done = call(path, cwd, CDPATH=f"{FOLDER.parent}:{tmp_path}", PYTHONSAFEPATH="1")
        assert done.returncode == 0, done.stderr
        assert "--model-id" in done.stdout
        assert done.stderr == ""


def test_without_a_stderr_the_answer_is_on_stdout_all_the_same(tmp_path):
    # the shell opens the wrapper itself where stderr was
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(FOLDER)!r})\n"
        "from common.cli import Console\nfrom common.errors import run_script\n"
        "run_script(lambda argv: (Console(False).say('aside'), print('answer')))\n"
    )
    wrapper = tmp_path / "wrapper.sh"
    wrapper.write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" "{script}"\n')
    wrapper.chmod(0o755)
    done = subprocess.run(f"{wrapper} 2>&-", shell=True, stdout=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (0, "answer\n")


def test_a_folder_with_a_space_in_its_name_is_one(tmp_path):
    folder = tmp_path / "two words" / "folder"
    ignored = shutil.ignore_patterns("artifacts", "tests", "results", "__pycache__")
    shutil.copytree(FOLDER, folder, ignore=ignored)
    assert call(folder / "run.sh", tmp_path).returncode == 0


def test_no_compiler_meets_a_folder_with_a_space(tmp_path, monkeypatch):
    place = tmp_path / "two words"
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr("tempfile.tempdir", None)
    names = ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    before = {name: os.environ.get(name) for name in names}
    with private_compiler_caches():
        assert not any(" " in os.environ[name] for name in names)
        assert os.path.isdir(os.environ["TMPDIR"])
    assert {name: os.environ.get(name) for name in names} == before
    assert list(place.iterdir()) == []


def test_a_programs_own_temporary_folder_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    variable = os.environ.get("TMPDIR")
    with private_compiler_caches(temporary_files=False):
        assert tempfile.gettempdir() == str(tmp_path)
        assert os.environ.get("TMPDIR") == variable
    assert list(tmp_path.iterdir()) == []
