"""Options of a command, from words: a dataclass whose fields are the options, and whose
texts at the fields are their help.

``help.toml`` has the usage, the groups and the examples of every command. Nothing heavy
is imported: help and mistakes are instant.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import functools
import importlib
import inspect
import itertools
import math
import re
import sys
import textwrap
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    NoReturn,
    NotRequired,
    TypedDict,
    TypeVar,
)

from cloob.commands.removed import refuse_option
from cloob.errors import InputError, nearest
from cloob.machine import check_device_name

T = TypeVar("T")
HELP_FLAGS = {"-h", "--help"}
_NUMBERS = {int: "an integer", float: "a number"}
_NAMES = {int: "N", float: "X", Path: "PATH"}
_PATH = "it must be the path of a file or folder"
_ADDRESS = re.compile(r"(pipe|file|[A-Za-z][A-Za-z0-9+.-]+(?=:/)):")


class Range(NamedTuple):
    """What a number may be. It stands in the annotation of an option, as any function
    that refuses values; a text there is what the help calls the value.
    """

    low: int
    high: int

    def __call__(self, number: float) -> None:
        if not self.low <= number <= self.high:
            raise InputError(
                f"is {number}; it must be {self.low:,} or more, and at most"
                f" {self.high:,}"
            )


Device = Annotated[str, check_device_name]
Threads = Annotated[int | None, Range(0, 1024)]
Batch = Annotated[int, Range(1, 2**20)]


def run_command(name: str, words: Sequence[str]) -> int:
    """Runs a command; the exit code."""
    command = importlib.import_module(f"cloob.commands.{name}")
    if hasattr(command, "read"):
        options = command.read(words)
    else:
        options = parse(command.Options, words, name)
    code: int = command.run(options)
    return code


class Field(NamedTuple):
    """A field of a dataclass: an option, or a positional word."""

    kind: type  # of a value: bool, int, float, str or Path
    choices: tuple[str, ...]  # of text, all that it may be; of a number, words as well
    takes_many: bool  # values: a tuple of them
    marks: tuple[object, ...]  # of its annotation: checks, and what the help calls it
    default: object  # MISSING where it must be given


class Page(TypedDict):
    """The help of a command, as ``help.toml`` has it."""

    usage: str
    about: NotRequired[str]
    groups: dict[str, list[str]]  # names of options by title
    examples: list[str]


def fields_of(kind: type) -> dict[str, Field]:
    """The options of a dataclass by name."""
    types_ = typing.get_type_hints(kind)
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {}
    for field in dataclasses.fields(kind):
        marks = getattr(hints[field.name], "__metadata__", ())
        fields[field.name] = _field(types_[field.name], marks, field.default)
    return fields


def _field(hint: object, marks: tuple[object, ...], default: object) -> Field:
    """The field of an annotation, such as ``float | Literal["auto", "none"]``."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    members = typing.get_args(hint) if is_union else (hint,)
    kind, choices = members[0], ()
    for member in members:
        if typing.get_origin(member) is Literal:
            choices = typing.get_args(member)
    takes_many = typing.get_origin(kind) is tuple
    if takes_many:
        kind = typing.get_args(kind)[0]
    if not isinstance(kind, type):
        kind = str  # that of the choices
    return Field(kind, choices, takes_many, marks, default)


def parse(kind: type[T], words: Sequence[str], command: str) -> T:
    """An instance of a dataclass of options; InputError says what is wrong with the
    words.
    """
    fields = fields_of(kind)
    if HELP_FLAGS & set(words):
        show_help(command, fields, docs_of(kind), inspect.getdoc(kind) or "")
    return kind(**parse_values(command, fields, words))


def parse_values(
    command: str, fields: Mapping[str, Field], words: Sequence[str]
) -> dict[str, Any]:
    """The values that were typed, by name."""
    parser = parser_of(command, fields)
    namespace, untaken = parser.parse_known_intermixed_args(list(words))
    if untaken:
        typed = next((word for word in untaken if word.startswith("-")), untaken[0])
        advice = ""
        if typed.startswith("--"):
            option = typed.partition("=")[0]
            refuse_known_option(command, fields, option)
            advice = f"; {nearest(option, map(spelled, names_on(command)))}"
        elif typed.startswith("-"):
            advice = f"; what begins with - and is no option goes after: -- {typed}"
        parser.error(f"not taken: {typed}{advice}")
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(namespace).items()
    }


def refuse_known_option(command: str, fields: Mapping[str, Field], option: str) -> None:
    """Raises InputError for an option that left the command, is one of a page beside
    its own, or is a setting that has no option.
    """
    refuse_option(command, option)
    name = option.removeprefix("--").replace("-", "_")
    family = command.partition(" ")[0]
    pages_with_it = [
        f"`cloob {page}`"
        for page in pages()
        if name in names_on(page) and page.partition(" ")[0] == family
    ]
    if pages_with_it:
        raise InputError(f"{option} goes with {' and '.join(pages_with_it)}")
    if name in fields:
        raise InputError(
            f"{option} is set in a file: --config more.toml, with the line {name} = …"
        )


def spelled(name: str) -> str:
    """A setting as one types it."""
    return f"--{name.replace('_', '-')}"


def as_words(options: object, *names: str) -> list[str]:
    """Those of some options that were given, as words of a command line."""
    words = []
    for name in names:
        value = getattr(options, name)
        if value != getattr(type(options), name):
            words += [spelled(name)] if value is True else [spelled(name), str(value)]
    return words


# --- the parser ---


class _Parser(argparse.ArgumentParser):
    """A parser whose mistakes are ours."""

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ").replace(": is ", " is ", 1)
        message = message.replace(": expected one argument", " needs a value")
        raise InputError(f"{message} ({self.prog} --help)")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """One that breaks no option at its hyphens."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


def parser_of(
    command: str,
    fields: Mapping[str, Field],
    texts: Mapping[str, str] | None = None,
    about: str = "",
) -> _Parser:
    """A parser with the options of a command in groups, and their texts."""
    page = pages()[command]
    parser = _Parser(
        f"cloob {command}",
        usage=f"cloob {page['usage']}",
        description=about,
        epilog="\n  ".join(["examples:", *page["examples"]]),
        formatter_class=_Formatter,
        argument_default=argparse.SUPPRESS,
        add_help=False,
        allow_abbrev=False,
    )
    for title, names in page["groups"].items():
        group = parser.add_argument_group(title)
        for name in names:
            is_word = title == "arguments"
            text = "" if texts is None else texts[name]
            form = _form(fields[name], is_word=is_word)
            group.add_argument(name if is_word else spelled(name), help=text, **form)
    return parser


def _form(field: Field, *, is_word: bool) -> dict[str, Any]:
    """What argparse wants to know of a field."""
    if field.kind is bool:
        if field.default is False:
            return {"action": "store_true"}
        return {"nargs": "?", "const": "True", "choices": ("True", "False")}
    form: dict[str, Any] = {"type": functools.partial(_value, field)}
    if field.takes_many:
        form["nargs"] = "*"
    elif not is_word:
        form["required"] = field.default is MISSING
    elif field.default is not MISSING:
        form["nargs"] = "?"
    if field.kind is str and field.choices:
        form["choices"] = field.choices
        return form
    names = [mark for mark in field.marks if isinstance(mark, str)]
    form["metavar"] = names[0] if names else _NAMES.get(field.kind, "TEXT")
    return form


def _value(field: Field, word: str) -> Path | float | str:
    """The value of a word, converted and checked."""
    try:
        value = _convert(field, word)
        for mark in field.marks:
            if callable(mark):
                mark(value)
    except InputError as error:  # argparse would hide what it says
        raise argparse.ArgumentTypeError(str(error)) from None
    return value


def _convert(field: Field, word: str) -> Path | float | str:
    """A word as a value of the field's kind; InputError says what is wrong with it."""
    if field.kind is Path:
        return _path(word)
    if field.kind is str or word in field.choices:
        return word
    with contextlib.suppress(ValueError):
        number: float = field.kind(word)
        if math.isfinite(number):
            return number
    expected = ", ".join([_NUMBERS[field.kind], *field.choices])
    raise InputError(f"is {word!r}; it must be {expected}")


def _path(word: str) -> Path:
    if not word:
        raise InputError(f"is empty; {_PATH}")
    if _ADDRESS.match(word):  # it would make folders called `https:`
        raise InputError(f"is an address; {_PATH}")
    return Path(word)


# --- help ---


def show_help(
    command: str,
    fields: Mapping[str, Field],
    docs: Mapping[str, str],
    about: str,
    starts: Mapping[str, object] | None = None,
) -> NoReturn:
    """Prints what a command does, its options in groups with what they start from, and
    examples.
    """
    texts = {}
    for name, field in fields.items():
        text = docs.get(name, "") + _shown((starts or {}).get(name, field.default))
        texts[name] = text.replace("%", "%%")
    parser_of(command, fields, texts, about).print_help()
    sys.exit(0)


def _shown(default: object) -> str:
    """A default in brackets; nothing of one that the text says, or that is no value."""
    if default is None or default is MISSING or isinstance(default, bool):
        return ""
    values = default if isinstance(default, list | tuple) else [default]
    text = " ".join(map(str, values))
    return f" [{text}]" if text else ""


def docs_of(kind: type) -> dict[str, str]:
    """The texts at the fields of a dataclass."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        (body,) = ast.parse(inspect.getsource(base)).body
        assert isinstance(body, ast.ClassDef)
        for field, text in itertools.pairwise(body.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                words = str(ast.literal_eval(text.value)).split()
                docs[ast.unparse(field.target)] = " ".join(words)
    return docs


@functools.cache
def pages() -> dict[str, Page]:
    """The help of every command; ``train`` has three pages."""
    text = Path(__file__).with_name("help.toml").read_text(encoding="utf-8")
    tables: dict[str, Page] = tomllib.loads(text)
    return tables


def names_on(command: str) -> list[str]:
    """The options that the help of a command shows."""
    groups = pages()[command]["groups"].items()
    return [name for title, names in groups for name in names if title != "arguments"]
