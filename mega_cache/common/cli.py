"""Flags declared once, as frozen dataclasses that become argparse groups; and what a script says.

A field made by `flag` is one flag: name and type come from the field. A script names the groups it
takes, or one dataclass made of groups.
"""

import argparse
import dataclasses
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).resolve().parents[1]  # of the scripts


class Console:
    """Results on stdout, all else on stderr; `quiet` keeps warnings and results only."""

    def __init__(self, quiet: bool, verbose: bool = False):
        self.quiet = quiet
        self.verbose = verbose

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        print(f"warning: {text}", file=sys.stderr, flush=True)

    def result(self, text: str) -> None:
        print(text, flush=True)

    def bar(self, items: Collection[Any], label: str, unit: str):
        """Return `items` behind a tqdm progress bar on stderr; a single item needs none.

        Used in a `with`, it leaves its line when the work is interrupted.
        """
        # imported here: a lean start that shows no bar does not pay for tqdm
        from tqdm import tqdm

        return tqdm(
            items, desc=label, unit=unit, file=sys.stderr, disable=self.quiet or len(items) < 2
        )


def flag(
    default: Any, help: str, *, parse: Callable[[str], Any] | None = None, choices=None,
    often: bool = False,
):  # fmt: skip
    """Declare one flag as a dataclass field; `often` puts it first in `--help`."""
    metadata = {"help": help, "parse": parse, "choices": choices, "often": often}
    return dataclasses.field(default=default, metadata=metadata)


def parse_flags(
    description: str, groups: Sequence[type], argv: Sequence[str] | None, **defaults: Any
) -> tuple:
    """Return one instance per group; bad flags end the process with exit status 2.

    `defaults` are those that this script has of its own.
    """
    parser = _make_parser(description, groups, defaults)
    namespace = vars(parser.parse_args(argv))
    try:
        return tuple(_instance(group, namespace) for group in groups)
    except ValueError as error:  # raised by a group's __post_init__: flags that exclude each other
        parser.error(str(error))


def words_besides(groups: Sequence[type], argv: Sequence[str]) -> list[str]:
    """Return the words of a command line that are not flags of `groups`, as the user wrote them."""
    _, words = _make_parser("", groups, {}).parse_known_args(argv)
    return words


def config_of(*groups: Any) -> dict[str, Any]:
    """Return the flags of all groups by name, as JSON values."""
    return {name: _as_json(value) for name, value in _flag_values(*groups)}


def positive_int(text: str) -> int:
    return _bounded(int, text, minimum=1)


def non_negative_int(text: str) -> int:
    return _bounded(int, text, minimum=0)


def non_negative_float(text: str) -> float:
    return _bounded(float, text, minimum=0.0)


def probability(text: str) -> float:
    value = _bounded(float, text, minimum=0.0)
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return value


def sha256_text(text: str) -> str:
    """Parse 64 hex digits, as `sha256sum` prints them."""
    digest = text.strip().lower()
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a sha256: expected 64 hex digits")
    return digest


def positive_ints(text: str) -> tuple[int, ...]:
    """Parse `128,256`: sorted, without repeats."""
    return tuple(sorted({positive_int(part) for part in _parts(text)}))


def names_from(*choices: str) -> Callable[[str], tuple[str, ...]]:
    """Return a parser of comma-separated names out of `choices`, order kept."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(_parts(text)))
        for name in names:
            if name not in choices:
                known = ", ".join(choices)
                raise argparse.ArgumentTypeError(f"unknown name {name!r}: choose from {known}")
        return names

    return parse


def _parts(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty entry: write it like 128,256")
    return parts


def _bounded(kind: type, text: str, minimum: float):
    try:
        value = kind(text)
    except ValueError:
        noun = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"{text!r} is not a {noun}") from None
    if not minimum <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a finite number >= {minimum}, got {text}")
    return value


def _make_parser(
    description: str, groups: Sequence[type], defaults: dict[str, Any]
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description,
        allow_abbrev=False,
        usage="%(prog)s [flags]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    often = parser.add_argument_group("used most")
    for group in groups:
        for plain in _plain_groups(group):
            title = (plain.__doc__ or plain.__name__).strip().splitlines()[0]
            rest = parser.add_argument_group(title)
            hints = typing.get_type_hints(plain)
            for field in dataclasses.fields(plain):
                place = often if field.metadata["often"] else rest
                default = defaults.get(field.name, field.default)
                _add_flag(place, field, _without_none(hints[field.name]), default)
    return parser


def _add_flag(place, field: dataclasses.Field, kind: Any, default: Any) -> None:
    name = f"--{field.name.replace('_', '-')}"
    text = f"{field.metadata['help']} (default: {_default_text(default)})"
    common = {"dest": field.name, "default": default, "help": text.replace("%", "%%")}
    if kind is bool:
        place.add_argument(name, action=argparse.BooleanOptionalAction, **common)
        return
    parse, choices = field.metadata["parse"] or kind, field.metadata["choices"]
    metavar = None if choices else _METAVARS.get(kind, "TEXT")
    place.add_argument(name, type=parse, choices=choices, metavar=metavar, **common)


_METAVARS = {int: "N", float: "X", Path: "PATH"}


def _plain_groups(group: type) -> Iterator[type]:
    """Yield the group itself, or, of a dataclass made of groups, each of them."""
    kinds = typing.get_type_hints(group).values()
    if all(dataclasses.is_dataclass(kind) for kind in kinds):
        yield from kinds
    else:
        yield group


def _instance(group: type, namespace: dict[str, Any]) -> Any:
    hints = typing.get_type_hints(group)
    return group(
        **{
            name: _instance(kind, namespace) if dataclasses.is_dataclass(kind) else namespace[name]
            for name, kind in hints.items()
        }
    )


def _flag_values(*groups: Any) -> Iterator[tuple[str, Any]]:
    for group in groups:
        for field in dataclasses.fields(group):
            value = getattr(group, field.name)
            if dataclasses.is_dataclass(value):
                yield from _flag_values(value)
            else:
                yield field.name, value


def _without_none(hint: Any) -> Any:
    if isinstance(hint, types.UnionType):
        return next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return hint


def _default_text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(str(part) for part in value) or "none"
    if isinstance(value, Path) and value.is_relative_to(_FOLDER):
        return str(value.relative_to(_FOLDER))
    return "none" if value is None else str(value)


def _as_json(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


# --- flags that scripts of both folders share ------------------------------------------------


DEVICES = ("auto", "cuda", "cpu")
DTYPES = ("auto", "bfloat16", "float16", "float32")
FLOOR = "floor"
MODES = ("compile_preload", "compile_no_preload", "eager", FLOOR)


@dataclass(frozen=True)
class SharedFlags:
    """every script"""

    model_id: str = flag(
        "meta-llama/Llama-3.2-3B-Instruct",
        "Hub id, checkpoint folder, or a preset that needs no download: "
        "random:tiny, random:1b, random:3b, random:8b",
        often=True,
    )
    device: str = flag("auto", "where to run; auto is CUDA when there is one", choices=DEVICES)
    dtype: str = flag(
        "auto", "of weights; auto is bfloat16 on CUDA and float32 on CPU", choices=DTYPES
    )
    seed: int = flag(0, "of sampling and of synthetic prompts", parse=non_negative_int)
    json: Path | None = flag(None, "file to write the whole result to, as JSON", often=True)
    verbose: bool = flag(False, "print every measure", often=True)
    quiet: bool = flag(False, "no progress on stderr; results and warnings only")
    debug: bool = flag(False, "add the traceback to an error")


@dataclass(frozen=True)
class PromptFlags:
    """prompt and generation"""

    prompt: str = flag(
        "Write a short explanation of portable torch.compile caches.",
        "text, or - to read it from stdin",
        often=True,
    )
    prompts_file: Path | None = flag(
        None, "file with one prompt a line, each a request of this process"
    )
    chat: bool = flag(False, "put the prompt through the tokenizer's chat template")
    prompt_length: int = flag(
        0,
        "tokens of a synthetic prompt to use instead of the text; 0 is off",
        parse=non_negative_int,
    )
    max_new_tokens: int = flag(128, "tokens to generate at most", parse=positive_int, often=True)
    ignore_eos: bool = flag(False, "go on to --max-new-tokens past an end-of-sequence token")
    num_requests: int = flag(1, "requests to serve one after another", parse=positive_int)
    show_completions: bool = flag(
        False, "print the text of every request (compare, benchmark: of every trial)"
    )

    def __post_init__(self):
        if not (self.prompt or self.prompt_length or self.prompts_file):
            raise ValueError("--prompt is empty: give some text, or --prompt-length N")


@dataclass(frozen=True)
class SamplingFlags:
    """sampling"""

    temperature: float = flag(0.0, "of sampling; 0 is greedy decoding", parse=non_negative_float)
    top_k: int = flag(0, "sample from the K likeliest tokens; 0 is off", parse=non_negative_int)
    top_p: float = flag(
        1.0, "sample from the likeliest tokens that hold this share; 1 is off", parse=probability
    )

    def __post_init__(self):
        if not self.temperature and (self.top_k or self.top_p < 1.0):
            raise ValueError("--top-k and --top-p choose among samples: give --temperature too")


@dataclass(frozen=True)
class CompareFlags:
    """compare: load against skip, in isolated processes"""

    compare_load_vs_skip: bool = flag(
        False, "run this command with and without the artifact in fresh processes and compare"
    )
    compare_runs: int = flag(2, "processes per side", parse=positive_int)


@dataclass(frozen=True)
class ComparisonFlags:
    """results of compare and benchmark"""

    plot: Path | None = flag(None, "PNG or SVG file to draw the result into (needs matplotlib)")
    tokens_may_differ: bool = flag(
        False,
        "report different token ids between modes without failing: in bfloat16 two kernels "
        "may break a near tie differently",
    )


@dataclass(frozen=True)
class BenchmarkFlags:
    """benchmark"""

    modes: tuple[str, ...] = flag(MODES[:3], "to measure", parse=names_from(*MODES), often=True)
    repeats: int = flag(2, "processes per mode", parse=positive_int, often=True)
    sweep_prompt_lengths: tuple[int, ...] = flag(
        (),
        "also measure each mode at these prompt lengths in tokens, like 8,128,512",
        parse=positive_ints,
    )


@dataclass(frozen=True)
class EquivalenceFlags:
    """equivalence"""

    logit_prompt_lengths: tuple[int, ...] = flag(
        (16, 128, 512), "prompt lengths in tokens to compare logits at", parse=positive_ints
    )
    logit_steps: int = flag(8, "next-token logits per prompt", parse=positive_int)
