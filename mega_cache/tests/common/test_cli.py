"""Flags: declared once, refused in one line, and handed on as the user wrote them."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import cli as flags
from common.cli import Flags, config_of, flag, parse_flags, positive_ints, words_besides


class Mine(Flags):
    """flags of a parent"""

    runs: int = flag(2, "processes")
    strict: bool = flag(False, "fail early")


class Theirs(Flags):
    """flags of its trials"""

    text: str = flag("hello", "any text")
    lengths: tuple[int, ...] = flag((1, 2), "tokens", parse=positive_ints)
    place: Path | None = flag(None, "a file")


GROUPS = [one for one in vars(flags).values() if flags._is_group(one) and one is not Flags]


def test_every_flag_has_a_help_text_and_no_flag_is_declared_twice():
    assert GROUPS
    names = [name for group in GROUPS for name in group.__annotations__]
    assert all(getattr(group, name).help for group in GROUPS for name in group.__annotations__)
    assert len(names) == len(set(names)) > 20


@given(
    runs=st.integers(0, 99),
    strict=st.booleans(),
    text=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1),
)
def test_a_trial_gets_the_users_words_without_the_parents_own(runs, strict, text):
    mine = [f"--runs={runs}", "--strict" if strict else "--no-strict"]
    theirs = [f"--text={text}", "--lengths", "5,3"]
    argv = [*mine, *theirs]
    parent, trial = parse_flags("", (Mine, Theirs), argv)
    assert parent == Mine(runs, strict)
    assert words_besides((Mine,), argv) == theirs
    assert parse_flags("", (Theirs,), words_besides((Mine,), argv)) == (trial,)


def test_the_last_of_two_flags_wins():
    (theirs,) = parse_flags("", (Theirs,), ["--text=a", "--lengths=1", "--text", "b"])
    assert theirs == Theirs("b", (1,))


def test_a_script_can_have_a_default_of_its_own(capsys):
    assert parse_flags("", (Mine,), [], runs=50) == (Mine(runs=50),)
    with pytest.raises(SystemExit):
        parse_flags("", (Mine,), ["--help"], runs=50)
    assert "(default: 50)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--max-new-tokens=0"], ">= 1"),
        (["--sweep-prompt-lengths=128,x"], "'x' is not a whole number"),
        (["--prompt="], "--prompt is empty"),
        (["--modes=compile_preload,warp"], "unknown name 'warp'"),
        (["--temperature=nan"], "finite"),
        (["--temperature=1", "--top-p=1.5"], "at most 1"),
        (["--top-k=5"], "give --temperature too"),
        (["--warp"], "unrecognized arguments"),
    ],
)
def test_a_bad_flag_is_one_clear_line_and_status_2(argv, words, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_flags("", GROUPS, argv)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_the_configuration_is_json_values():
    config = config_of(Theirs(place=Path("/a")), Mine())
    assert config == {
        "text": "hello", "lengths": (1, 2), "place": "/a", "runs": 2, "strict": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--temperature=1e-38"], "use 0, greedy decoding"),
        (["--temperature=nan"], "finite number"),
        (["--seed=99999999999999999999"], "below 2**63"),
        (["--seed=-1"], ">= 0"),
        (["--json=/tmp"], "is a folder"),
        (["--json=a/../b.bin", "--place=b.bin"], "would overwrite what --place names"),
        (["--json=./b_meta.json", "--place=b.bin"], "would overwrite what --place names"),
    ],
)
def test_what_would_fail_after_the_work_is_refused_before_it(words, told, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_flags("", (flags.SharedFlags, flags.SamplingFlags, Theirs), words)
    assert caught.value.code == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_the_largest_seed_and_a_low_temperature_are_taken():
    import torch

    words = [f"--seed={2**63 - 1}", "--temperature=1e-5", "--json=result.json"]
    shared, sampling = parse_flags("", (flags.SharedFlags, flags.SamplingFlags), words)
    torch.Generator().manual_seed(shared.seed)
    logits = torch.tensor([[3e4, -3e4]]) / sampling.temperature
    assert torch.multinomial(logits.softmax(-1), 1).item() == 0
