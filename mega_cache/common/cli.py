"""Flags declared once, in classes that become argparse groups; and what a script says."""

import argparse
import re
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import SimpleNamespace, UnionType
from typing import Any, NamedTuple

_FOLDER = Path(__file__).resolve().parents[1]  # of the scripts
_METAVARS = {int: "N", float: "X", Path: "PATH"}


class Console:
    """Results on stdout, all else on stderr; `quiet` keeps warnings and results only."""

    def __init__(self, quiet: bool, verbose: bool = False):
        self.quiet, self.verbose = quiet, verbose

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        print(f"warning: {text}", file=sys.stderr, flush=True)

    def result(self, text: str) -> None:
        print(text, flush=True)

    def bar(self, items: Collection[Any], label: str, unit: str):
        """Return `items` behind a tqdm bar; in a `with` it leaves its line when interrupted."""
        # imported here: a lean start that shows no bar does not pay for tqdm
        from tqdm import tqdm

        off = self.quiet or len(items) < 2
        return tqdm(items, desc=label, unit=unit, file=sys.stderr, disable=off)


class Flag(NamedTuple):
    default: Any
    help: str
    parse: Callable[[str], Any] | None = None
    choices: Sequence[str] | None = None
    often: bool = False  # first in `--help`


flag: Any = Flag  # whose place in a group is that of its value


class Flags(SimpleNamespace):
    """A group of flags: an attribute `name: type = flag(...)` is one. Or a group of such groups.

    Not a dataclass: making one takes half a millisecond, and a start has ten of these.
    """

    def __init__(self, *values: Any, **named: Any):
        kinds = type(self).__annotations__
        given = dict(zip(kinds, values, strict=False)) | named
        if len(values) > len(kinds) or named.keys() - kinds.keys():
            raise TypeError(f"{type(self).__name__} has {', '.join(kinds)}, no other flag")
        for name, kind in kinds.items():
            if name not in given:
                given[name] = kind() if _is_group(kind) else getattr(type(self), name).default
        super().__init__(**given)
        self.check()

    def check(self) -> None:
        """Raise ValueError for flags that exclude each other."""

    def changed(self, **values: Any) -> Any:
        """Return the same group with other values of some flags."""
        return type(self)(**vars(self) | values)


def parse_flags(
    description: str, groups: Sequence[type], argv: Sequence[str] | None, **defaults: Any
) -> tuple:
    """Return one instance per group; `defaults` are the script's own. Bad flags exit with 2."""
    parser = _make_parser(description, groups, defaults)
    values = vars(parser.parse_args(argv))

    def instance(group: type) -> Any:
        kinds = group.__annotations__.items()
        return group(**{n: instance(kind) if _is_group(kind) else values[n] for n, kind in kinds})

    try:
        _check_result_file(values)
        return tuple(map(instance, groups))
    except ValueError as error:  # of a group's `check`
        parser.error(str(error))


def _check_result_file(values: dict[str, Any]) -> None:
    """Raise ValueError if `--json` would fail after the work, or overwrite what is worked on."""
    result = values.get("json")
    if result is None:
        return
    if result.is_dir():
        raise ValueError(f"--json {result} is a folder: name a file")
    for name, path in values.items():
        if isinstance(path, Path) and name != "json":
            taken = (path, path.with_name(f"{path.stem}_meta.json"))  # an artifact's metadata
            if result.resolve() in [one.resolve() for one in taken]:
                flag_name = name.replace("_", "-")
                raise ValueError(f"--json {result} would overwrite what --{flag_name} names")


def words_besides(groups: Sequence[type], argv: Sequence[str]) -> list[str]:
    """Return the words of a command line that are not flags of `groups`, as the user wrote them."""
    return _make_parser("", groups, {}).parse_known_args(argv)[1]


def config_of(*groups: Any) -> dict[str, Any]:
    """Return the flags of all groups by name, as values that JSON knows."""
    config = {}
    for name, value in (item for group in groups for item in vars(group).items()):
        if isinstance(value, Flags):
            config |= config_of(value)
        else:
            config[name] = str(value) if isinstance(value, Path) else value
    return config


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
        _add_group(parser, often, group, defaults)
    return parser


def _add_group(parser: argparse.ArgumentParser, often, group: type, defaults: dict) -> None:
    """Add the flags of the group itself, or, of a group made of groups, those of each."""
    rest = parser.add_argument_group(group.__doc__)
    for name, kind in group.__annotations__.items():
        if _is_group(kind):
            _add_group(parser, often, kind, defaults)
            continue
        told = getattr(group, name)
        if isinstance(kind, UnionType):  # X | None
            kind = kind.__args__[0]
        default = defaults.get(name, told.default)
        text = f"{told.help} (default: {_default_text(default)})".replace("%", "%%")
        settings: dict[str, Any] = {"dest": name, "default": default, "help": text}
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings |= {"type": told.parse or kind, "choices": told.choices}
            settings["metavar"] = None if told.choices else _METAVARS.get(kind, "TEXT")
        place = often if told.often else rest
        place.add_argument(f"--{name.replace('_', '-')}", **settings)


def _is_group(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Flags)


def _default_text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    if isinstance(value, Path) and value.is_relative_to(_FOLDER):
        value = value.relative_to(_FOLDER)
    return "none" if value in (None, "") else str(value)


# --- what a flag's text may be ---------------------------------------------------------------


def _at_least(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if not minimum <= value < 2**63:
            raise argparse.ArgumentTypeError(f"must be >= {minimum} and below 2**63, got {text}")
        return value

    return parse


positive_int = _at_least(1)
non_negative_int = _at_least(0)


def positive_ints(text: str) -> tuple[int, ...]:
    """Parse `128,256`: sorted, without repeats."""
    return tuple(sorted(set(map(positive_int, text.split(",")))))


def mode_names(text: str) -> tuple[str, ...]:
    """Parse names out of MODES, order kept."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in MODES:
            known = ", ".join(MODES)
            raise argparse.ArgumentTypeError(f"unknown name {name!r}: choose from {known}")
    return names


def sha256_text(text: str) -> str:
    """Parse 64 hex digits, as `sha256sum` prints them."""
    digest = text.strip().lower()
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise argparse.ArgumentTypeError(f"{text!r} is not a sha256: expected 64 hex digits")
    return digest


# --- flags that scripts of both folders share ------------------------------------------------

DTYPES = ("auto", "bfloat16", "float16", "float32")
FLOOR = "floor"
MODES = ("compile_preload", "compile_no_preload", "eager", FLOOR)


class SharedFlags(Flags):
    """every script"""

    model_id: str = flag(
        "meta-llama/Llama-3.2-3B-Instruct",
        "Hub id, checkpoint folder, or a preset that needs no download: "
        "random:tiny, random:1b, random:3b, random:8b",
        often=True,
    )
    device: str = flag("auto", "auto: CUDA when there is one", choices=("auto", "cuda", "cpu"))
    dtype: str = flag(
        "auto",
        "of weights; auto: the artifact's, else bfloat16 on CUDA, float32 on CPU",
        choices=DTYPES,
    )
    seed: int = flag(0, "of sampling and of synthetic prompts", parse=non_negative_int)
    json: Path | None = flag(None, "file to write the whole result to, as JSON", often=True)
    verbose: bool = flag(False, "print every measure", often=True)
    quiet: bool = flag(False, "no progress on stderr; results and warnings only")
    debug: bool = flag(False, "add the traceback to an error")


class PromptFlags(Flags):
    """prompt and generation"""

    prompt: str = flag(
        "Write a short explanation of portable torch.compile caches.",
        "text, or - to read it from stdin",
        often=True,
    )
    prompts_file: Path | None = flag(None, "one prompt a line, each a request of this process")
    chat: bool = flag(False, "put the prompt through the tokenizer's chat template")
    prompt_length: int = flag(
        0, "tokens of a synthetic prompt instead of the text; 0 is off", parse=non_negative_int
    )
    max_new_tokens: int = flag(128, "tokens to generate at most", parse=positive_int, often=True)
    ignore_eos: bool = flag(False, "go on to --max-new-tokens past an end-of-sequence token")
    num_requests: int = flag(1, "requests to serve one after another", parse=positive_int)
    show_completions: bool = flag(
        False, "print the text of every request (compare, benchmark: of every trial)"
    )

    def check(self) -> None:
        if not (self.prompt or self.prompt_length or self.prompts_file):
            raise ValueError("--prompt is empty: give some text, or --prompt-length N")


_LOWEST_TEMPERATURE = 1e-5


class SamplingFlags(Flags):
    """sampling"""

    temperature: float = flag(0.0, "of sampling; 0 is greedy decoding")
    top_k: int = flag(0, "sample from the K likeliest tokens; 0 is off", parse=non_negative_int)
    top_p: float = flag(1.0, "sample from the likeliest tokens that hold this share; 1 is off")

    def check(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature is a finite number >= 0, got {self.temperature}")
        if 0.0 < self.temperature < _LOWEST_TEMPERATURE:
            raise ValueError(
                f"--temperature {self.temperature} is below {_LOWEST_TEMPERATURE}, where logits "
                "leave float32's range: use 0, greedy decoding"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"--top-p is a share above 0 and at most 1, got {self.top_p}")
        if not self.temperature and (self.top_k or self.top_p < 1.0):
            raise ValueError("--top-k and --top-p choose among samples: give --temperature too")


class CompareFlags(Flags):
    """compare: load against skip, in isolated processes"""

    compare_load_vs_skip: bool = flag(
        False, "run this command with and without the artifact in fresh processes and compare"
    )
    compare_runs: int = flag(2, "processes per side", parse=positive_int)


class ComparisonFlags(Flags):
    """results of compare and benchmark"""

    plot: Path | None = flag(None, "PNG or SVG file to draw the result into (needs matplotlib)")
    tokens_may_differ: bool = flag(
        False,
        "report different token ids between modes without failing: in bfloat16 two kernels "
        "may break a near tie differently",
    )


class BenchmarkFlags(Flags):
    """benchmark"""

    modes: tuple[str, ...] = flag(MODES[:3], "to measure", parse=mode_names, often=True)
    repeats: int = flag(2, "processes per mode", parse=positive_int, often=True)
    sweep_prompt_lengths: tuple[int, ...] = flag(
        (), "also measure at these prompt lengths in tokens, like 8,128,512", parse=positive_ints
    )


class EquivalenceFlags(Flags):
    """equivalence"""

    logit_prompt_lengths: tuple[int, ...] = flag(
        (16, 128, 512), "prompt lengths in tokens to compare logits at", parse=positive_ints
    )
    logit_steps: int = flag(8, "next-token logits per prompt", parse=positive_int)


_STORES = "a folder, hf://org/name, s3://bucket/folder, or another that fsspec knows"


class PublishFlags(Flags):
    """store"""

    publish: str | None = flag(None, f"URL of a store to put the artifact into: {_STORES}")


class FetchFlags(Flags):
    """store"""

    fetch: str | None = flag(
        None,
        f"URL of a store to take the artifact from: {_STORES}; it is somebody else's code, so add "
        "--expect-sha256 or --trust-artifact",
    )
