"""Every documented command parses, and no length reaches a package that does not take it."""

import re
import shlex
import sys

import pytest
import torch
from helpers import FOLDER, run_command
from hypothesis import given
from hypothesis import strategies as st

from aotinductor.flags import (
    BuildSettings,
    ExpectedShapeFlags,
    PackageFileFlags,
    RunSettings,
    ShapeFlags,
)
from aotinductor.lengths import Plan, make_bounds, override, parse_bounds
from aotinductor.recipe import machine_of
from common import machine
from common.cli import (
    BenchmarkFlags,
    CompareFlags,
    ComparisonFlags,
    config_of,
    parse_flags,
)
from common.errors import UsageError

RUN_GROUPS = (RunSettings, CompareFlags, ComparisonFlags)
GROUPS = {
    "build.sh": (BuildSettings,),
    "run.sh": RUN_GROUPS,
    "compare.sh": RUN_GROUPS,
    "benchmark.sh": (RunSettings, BenchmarkFlags, ComparisonFlags),
}
SCRIPTS = {
    "build_llama_aotinductor.py": "build.sh",
    "run_llama_aotinductor.py": "run.sh",
    "benchmark_llama_modes.py": "benchmark.sh",
}
COMMANDS = """
build.sh --model-id meta-llama/Llama-3.2-3B-Instruct --example-seq-len 128 --dynamic-seq-len
build.sh --no-dynamic-seq-len --example-seq-len 128 --max-autotune
build.sh --min-seq-len 1 --max-seq-len 2048 --dynamic-seq-multiple 8 --no-max-autotune
build.sh --package-path a.pt2 --metadata-path a_meta.json --device cuda --dtype bfloat16 --seed 1
run.sh --no-bucket-pad --max-new-tokens 128
run.sh --bucket-pad --prompt Hello --load-artifacts --show-completions --json out.json --quiet
run.sh --no-load-artifacts --compile-dynamic-seq-len --package-path a.pt2 --metadata-path a.json
run.sh --compare-load-vs-skip --compare-runs 3 --model-id random:tiny
compare.sh --model-id random:3b
benchmark.sh --num-requests 100 --repeats 2
benchmark.sh --no-preload-method export --modes compile_preload,compile_no_preload,eager
benchmark.sh --compile-dynamic-seq-len --min-seq-len 1 --max-seq-len 2048 --dynamic-seq-multiple 8
benchmark.sh --no-preload-method torch-compile
"""
lengths = st.integers(1, 5000)


def documented_commands():
    yield from filter(None, COMMANDS.splitlines())
    readme = (FOLDER / "README.md").read_text().replace("<sha256>", "0" * 64)
    texts = [readme, *(FOLDER.joinpath(s).read_text() for s in SCRIPTS)]
    for line in "\n".join(texts).splitlines():
        if found := re.match(r"\s*(?:\./(\w+\.sh)|python (\w+\.py))((?: [^#]*)?)(?:#.*)?$", line):
            wrapper = found[1] or SCRIPTS[found[2]]
            if wrapper in GROUPS:
                yield wrapper + re.sub(r"\s{3,}.*", "", found[3])


@pytest.mark.parametrize("command", list(documented_commands()))
def test_every_documented_command_parses(command):
    wrapper, *flags = shlex.split(command)
    parse_flags("", GROUPS[wrapper], flags)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_without_torch(script, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    command = [sys.executable, FOLDER / script, "--help"]
    done = run_command(command, PYTHONPATH=str(tmp_path))
    assert done.status == 0
    assert "--package-path" in done.stdout


@pytest.mark.parametrize(
    ("wrapper", "mine"),
    [
        ("build.sh", {"max_seq_len": 64, "example_seq_len": 16}),
        ("run.sh", {"max_new_tokens": 3}),
        ("compare.sh", {"compare_runs": 7, "max_new_tokens": 3}),
        ("benchmark.sh", {"num_requests": 3, "repeats": 5}),
    ],
)
def test_a_users_flag_beats_the_wrappers(wrapper, mine, tmp_path):
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in mine.items()]
    done = run_command([FOLDER / wrapper, *words], PYTHON=str(tmp_path / "python"))
    script, *argv = done.stdout.splitlines()
    assert done.status == 0 and script.startswith(str(FOLDER))
    parsed = config_of(*parse_flags("", GROUPS[wrapper], argv))
    assert mine.items() <= parsed.items()


def test_a_wrapper_keeps_the_users_folder(tmp_path, monkeypatch):
    (tmp_path / "python").write_text("#!/bin/sh\npwd\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    done = run_command([FOLDER / "run.sh"], PYTHON=str(tmp_path / "python"))
    assert done.stdout.strip() == str(tmp_path)


def test_metadata_lies_beside_its_package():
    assert PackageFileFlags().pair().metadata_path.name == "llama3b_aotinductor_meta.json"
    assert PackageFileFlags().pair().path == FOLDER / "artifacts" / "llama3b_aotinductor.pt2"


def shape_flags():
    def make(multiple, blocks, low, dynamic):
        longest = multiple * blocks
        low = 1 + low % (longest - multiple)
        return ShapeFlags(128, dynamic, low, longest, multiple)

    return st.builds(make, st.integers(1, 64), st.integers(2, 64), lengths, st.booleans())


@given(shape_flags())
def test_bounds_survive_the_metadata(flags):
    bounds = make_bounds(flags)
    assert parse_bounds(bounds._asdict() | {"kv_cache": False}) == bounds


@given(shape_flags(), lengths, lengths, st.booleans())
def test_an_accepted_request_pads_to_lengths_the_graph_takes(flags, prompt, new, bucket_pad):
    bounds = make_bounds(flags)
    try:
        Plan(bounds, None, bucket_pad).check_request(prompt, new)
    except UsageError:
        return
    for length in {prompt, prompt + new - 1}:
        padded = bounds.padded(length, bucket_pad)
        assert length <= padded <= bounds.max_seq_len
        assert padded % bounds.dynamic_seq_multiple == 0
        assert padded >= bounds.buckets[0]


def test_the_published_bounds_pad_to_eights_and_to_powers_of_two():
    bounds = make_bounds(ShapeFlags())
    assert [bounds.padded(length) for length in (1, 8, 9, 2048)] == [8, 8, 16, 2048]
    assert bounds.buckets == [8, 16, 32, 64, 128, 256, 512, 1024, 2048]
    assert bounds.padded(129, bucket_pad=True) == 256


@pytest.mark.parametrize(
    ("prompt", "new", "words"),
    [
        (99, 1, "rebuild with ./build.sh --min-seq-len 99"),
        (2041, 8, "rebuild with ./build.sh --max-seq-len 2056"),
    ],
)
def test_a_request_out_of_bounds_names_the_limit_and_the_rebuild(prompt, new, words):
    plan = Plan(make_bounds(ShapeFlags(min_seq_len=100)))
    with pytest.raises(UsageError, match=re.escape(words)):
        plan.check_request(prompt, new)
    plan.check_request(2040, 8)


@pytest.mark.parametrize(
    "flags",
    [
        {"max_seq_len": 2047},
        {"min_seq_len": 4096},
        {"min_seq_len": 2041},
    ],
)
def test_bounds_that_cannot_be_exported_are_refused(flags):
    with pytest.raises(ValueError, match="--max-seq-len"):
        ShapeFlags(**flags)


def test_a_runtime_graph_takes_the_flags_given_and_builds_defaults():
    assert override(ExpectedShapeFlags()) == make_bounds(ShapeFlags())
    assert override(ExpectedShapeFlags(max_seq_len=64)).max_seq_len == 64
    with pytest.raises(UsageError, match="try 56"):
        override(ExpectedShapeFlags(max_seq_len=60))


def test_a_recipe_names_the_level_that_host_code_of_cuda_is_compiled_for():
    if not machine.host_code_is_portable("cuda"):
        pytest.skip("no x86-64-v3 here")
    assert machine_of("cuda") == {
        "device": "cuda", "cpu_capability": machine.COMMON_LEVEL, "cpu_features": None,
    }  # fmt: skip
    assert machine_of("cpu")["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert set(machine_of("cpu")["cpu_features"]) == machine.cpu_features() > {"avx2", "fma"}
