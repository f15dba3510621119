"""What a package is built for: a start in an environment that has no torch, and elsewhere."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from helpers import FOLDER, Finished, run_command, run_script, succeeded

RUN = "run_llama_aotinductor.py"
LENGTHS = (1, 7, 8, 9, 129, 1000)


@pytest.fixture(scope="module")
def serving(kv_package, presets_folder, tmp_path_factory):
    """A folder that has what travels, and an environment made from requirements-serve.txt alone."""
    place = tmp_path_factory.mktemp("serving")
    ignored = shutil.ignore_patterns("artifacts", "tests", "results", "__pycache__")
    shutil.copytree(FOLDER, place / "torch_export", ignore=ignored)
    for path in (kv_package, kv_package.with_name("kv_meta.json")):
        shutil.copy(path, place)
    shutil.copytree(next(presets_folder.glob("random-tiny-*")), place / "checkpoint")
    (place / "home").mkdir()
    subprocess.run([sys.executable, "-m", "venv", place / "venv"], check=True)
    packages = ("-r", FOLDER / "requirements-serve.txt")
    pip = [place / "venv" / "bin" / "python", "-m", "pip", "install", "-q"]
    subprocess.run([*pip, "--disable-pip-version-check", *packages], check=True)
    return place


@pytest.fixture
def serve(serving):
    """Return a function that runs a command there, with that environment's python3 on PATH."""

    def start(*command, **environment) -> Finished:
        clean = [f"HOME={serving}/home", f"PATH={serving}/venv/bin:/usr/bin:/bin", "LC_ALL=C.UTF-8"]
        clean += [f"{name}={value}" for name, value in environment.items()]
        return run_command(["env", "-i", "-C", serving, *clean, *command])

    return start


@pytest.fixture
def run(serve, serving):
    """Return a function that runs run.sh there, and returns what it wrote as JSON."""

    def start(*flags) -> dict:
        result = serving / "run.json"
        words = ("--model-id=checkpoint", "--package-path=kv.pt2", f"--json={result}", *flags)
        succeeded(serve("torch_export/run.sh", *words))
        return json.loads(result.read_text())

    return start


def over_libtorch(kv_package, tmp_path, *flags) -> dict:
    """Return the same run's result here, over the torch that is installed."""
    words = ("--device=cpu", f"--package-path={kv_package}", "--library=libtorch")
    done = run_script(RUN, *words, *flags, result=tmp_path / "over_libtorch.json")
    return succeeded(done).result


def test_the_environment_has_no_torch(serve):
    program = "import importlib.util as u; print(*map(u.find_spec, ('torch', 'transformers')))"
    assert succeeded(serve("python3", "-c", program)).stdout == "None None\n"


@pytest.mark.parametrize("length", LENGTHS)
def test_tokens_are_those_of_a_start_over_libtorch(length, run, kv_package, tmp_path):
    flags = (f"--prompt-length={length}", "--max-new-tokens=64", "--ignore-eos")
    found = run(*flags)
    assert found["artifact"]["library"] == "runtime"
    assert found["environment"]["torch"] is None
    assert len(found["output"]["token_ids"]) == 64
    assert found["output"] == over_libtorch(kv_package, tmp_path, *flags)["output"]


def test_prompts_chat_and_sampling_are_those_over_libtorch(run, serving, kv_package, tmp_path):
    (serving / "prompts.txt").write_text("one\ntwo two\n\nthree three three\n")
    prompts = (f"--prompts-file={serving / 'prompts.txt'}", "--chat", "--max-new-tokens=16")
    sampling = ("--temperature=0.9", "--top-k=50", "--top-p=0.95", "--seed=3", "--num-requests=2")
    found = run(*prompts, *sampling)
    assert len(set(found["completions"])) == 3
    expected = over_libtorch(kv_package, tmp_path, *prompts, *sampling)
    assert found["completions"] == expected["completions"]
    assert found["output"] == expected["output"]


def test_the_program_of_the_readme_generates(serve, run):
    readme = FOLDER.joinpath("README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    (program,) = [block for block in blocks if "from aotinductor import load" in block]
    program = program.replace('"llama.pt2"', '"kv.pt2"').replace('"random:tiny"', '"checkpoint"')
    program += "\nprint(chr(0), token_ids)\n"
    text, _, token_ids = succeeded(serve("python3", "-c", program)).stdout.partition("\0")
    assert text == run("--prompt=Hello", "--max-new-tokens=64")["output"]["text"]
    assert len(json.loads(token_ids)) == 8


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--library=libtorch"], "no torch is installed"),
        (["--eager"], "No module named 'torch'"),
        (["--no-load-artifacts"], "No module named 'torch'"),
    ],
)
def test_what_needs_torch_says_so_in_one_line(flags, words, serve):
    package = ("--model-id=checkpoint", "--package-path=kv.pt2")
    done = serve("torch_export/run.sh", *package, *flags)
    assert done.status == 5
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_python_without_the_packages_is_told_which(serve, tmp_path):
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python3").chmod(0o755)
    done = serve("torch_export/run.sh", "--help", PATH=f"{tmp_path}:/usr/bin:/bin")
    assert done.status == 5
    assert "install what requirements-serve.txt names" in done.stderr


def test_nothing_was_written_outside_what_was_asked_for(serving):
    assert [path.name for path in (serving / "home").rglob("*")] == []
