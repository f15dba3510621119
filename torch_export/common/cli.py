"""Flags declared once: frozen dataclasses become argparse groups, and turn back into argv.

A script names the groups it takes, or one dataclass made of groups; `compare` and `benchmark` hand
a trial its flags by turning the same parsed groups back into a command line, so no default is
written twice.
"""

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any


def flag(default: Any, help: str, *, parse: Callable[[str], Any] | None = None, choices=None):
    """Declare one flag as a dataclass field; its name and its type come from the field."""
    metadata = {"help": help, "parse": parse, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


def parse_flags(description: str, groups: Sequence[type], argv: Sequence[str] | None) -> tuple:
    """Return one instance per group; bad flags end the process with exit status 2."""
    parser = argparse.ArgumentParser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for group in groups:
        for plain in _plain_groups(group):
            _add_group(parser, plain)
    namespace = vars(parser.parse_args(argv))
    try:
        return tuple(_instance(group, namespace) for group in groups)
    except ValueError as error:  # raised by a group's __post_init__: flags that exclude each other
        parser.error(str(error))


def to_argv(*groups: Any) -> list[str]:
    """Return the command line that parses back into these groups."""
    argv = []
    for name, value in flag_values(*groups):
        word = name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(f"--{word}" if value else f"--no-{word}")
        elif value not in (None, ()):
            # one word, so that a value that starts with a dash stays a value
            argv.append(f"--{word}={_as_text(value)}")
    return argv


def flag_values(*groups: Any) -> Iterator[tuple[str, Any]]:
    """Yield name and value of every flag in these groups."""
    for group in groups:
        for field in dataclasses.fields(group):
            value = getattr(group, field.name)
            if dataclasses.is_dataclass(value):
                yield from flag_values(value)
            else:
                yield field.name, value


def positive_int(text: str) -> int:
    return _bounded(int, text, minimum=1)


def non_negative_int(text: str) -> int:
    return _bounded(int, text, minimum=0)


def non_negative_float(text: str) -> float:
    return _bounded(float, text, minimum=0.0)


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


def _add_group(parser: argparse.ArgumentParser, group: type) -> None:
    title = (group.__doc__ or group.__name__).strip().splitlines()[0]
    arguments = parser.add_argument_group(title)
    hints = typing.get_type_hints(group)
    for field in dataclasses.fields(group):
        name = f"--{field.name.replace('_', '-')}"
        kind = _without_none(hints[field.name])
        text = f"{field.metadata['help']} (default: {_default_text(field.default)})"
        common = {"dest": field.name, "default": field.default, "help": text.replace("%", "%%")}
        if kind is bool:
            arguments.add_argument(name, action=argparse.BooleanOptionalAction, **common)
        else:
            arguments.add_argument(
                name,
                type=field.metadata["parse"] or kind,
                choices=field.metadata["choices"],
                **common,
            )


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


def _without_none(hint: Any) -> Any:
    if isinstance(hint, types.UnionType):
        return next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return hint


def _default_text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else _as_text(value) or "none"


def _as_text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(str(part) for part in value)
    return str(value)


def existing_file(text: str) -> Path:
    """Parse a path to a file that must be there."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"no file at {text}")
    return path
