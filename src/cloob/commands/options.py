"""Options of a command, from words: a dataclass whose fields are the options, and whose
texts at the fields are their help.

``help.toml`` has the groups and the examples of every command. Nothing heavy is
imported: help and mistakes are instant.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import itertools
import re
import sys
import textwrap
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, TypeVar

from cloob.commands.removed import refuse_option
from cloob.errors import InputError, nearest

T = TypeVar("T")
NUMBERS = {int: "an integer", float: "a number"}
_PATH = "it must be the path of a file or folder"
_ADDRESS = re.compile(r"(pipe|file|[A-Za-z][A-Za-z0-9+.-]+(?=:/)):")
HELP_FLAGS = {"-h", "--help"}


class Metavar(NamedTuple):
    """What the help calls the value of an option."""

    name: str


def arg(metavar: str) -> Metavar:
    """What the help calls the value of an option."""
    return Metavar(metavar)


Positional = Annotated[T, "positional"]


@dataclass(frozen=True)
class Option:
    """An option, or a positional word."""

    name: str
    kinds: tuple[Any, ...]  # the types that it may have
    default: Any = None  # MISSING where it must be given
    metavar: str = ""
    is_positional: bool = False
    may_be_none: bool = False

    @property
    def spelled(self) -> str:
        """As one types it, or as the help calls a positional word."""
        if self.is_positional:
            return self.metavar.removesuffix(" …")
        return f"--{self.name.replace('_', '-')}"

    @property
    def is_flag(self) -> bool:
        """Whether it stands alone; one that may be None takes False, too."""
        return self.kinds == (bool,) and not self.may_be_none

    @property
    def is_list(self) -> bool:
        return typing.get_origin(self.kinds[0]) is tuple

    @property
    def element(self) -> Any:
        """The type of a value, or of one value of a list."""
        return typing.get_args(self.kinds[0])[0] if self.is_list else self.kinds[0]

    @property
    def choices(self) -> tuple[str, ...] | None:
        """The words that it may be, where it may be nothing else."""
        is_literal = typing.get_origin(self.element) is Literal
        return typing.get_args(self.element) if is_literal else None

    @property
    def n_words(self) -> str | None:
        """How many words are its value, as argparse has it."""
        if self.is_list:
            return "*"
        is_optional = self.is_positional and self.default is not MISSING
        return "?" if is_optional or self.element is bool else None

    @property
    def shown(self) -> str | None:
        """What the help calls its value; None for its choices."""
        if self.is_positional:
            return self.spelled
        if self.metavar or self.choices:
            return self.metavar or None
        names = {int: "N", float: "X", Path: "PATH", bool: "True|False"}
        return names.get(self.element, "TEXT")

    def convert(self, text: str) -> Any:
        """The value of a word; its error says what is wrong."""
        kind = self.element
        words = [word for other in self.kinds[1:] for word in typing.get_args(other)]
        if kind is bool:
            words = ["True", "False"]
        if text in words:
            return text == "True" if kind is bool else text
        if kind is Path:
            return _path(text)
        if kind not in NUMBERS:
            return text
        try:
            return kind(text)
        except ValueError:
            expected = ", ".join([NUMBERS[kind], *words])
            message = f"is {text!r}; it must be {expected}"
        raise argparse.ArgumentTypeError(message)


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError(f"is empty; {_PATH}")
    if _ADDRESS.match(text):  # it would make folders called `https:`
        raise argparse.ArgumentTypeError(f"is an address; {_PATH}")
    return Path(text)


def options_of(kind: Any) -> list[Option]:
    """The options of a dataclass, and of the dataclasses that it is made of."""
    hints = typing.get_type_hints(kind, include_extras=True)
    options: list[Option] = []
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            options += options_of(hint)
            continue
        marks = getattr(hint, "__metadata__", ())
        names = [mark.name for mark in marks if isinstance(mark, Metavar)]
        kinds = _kinds_of(hint)
        has_default = field.default_factory is MISSING
        options.append(
            Option(
                field.name,
                tuple(kind for kind in kinds if kind is not type(None)),
                field.default if has_default else None,
                names[0] if names else "",
                is_positional="positional" in marks,
                may_be_none=type(None) in kinds,
            )
        )
    return options


def _kinds_of(hint: Any) -> list[Any]:
    """The types of a union, or the one type, without what is annotated."""
    if hasattr(hint, "__metadata__"):
        return _kinds_of(hint.__origin__)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return [kind for x in typing.get_args(hint) for kind in _kinds_of(x)]
    return [hint]


def parse(kind: type[T], words: Sequence[str], command: str) -> T:
    """An instance of a dataclass of options; InputError says what is wrong with the
    words.
    """
    options = options_of(kind)
    if HELP_FLAGS & set(words):
        show_help(command, options, docs_of(kind), {}, inspect.getdoc(kind) or "")
    made: T = _made(kind, parse_values(options, words, command))
    return made


def _made(kind: Any, values: Mapping[str, Any]) -> Any:
    """An instance of nested dataclasses from values by name."""
    hints = typing.get_type_hints(kind)
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            arguments[field.name] = _made(hints[field.name], values)
        elif field.name in values:
            arguments[field.name] = values[field.name]
    return kind(**arguments)


class _Parser(argparse.ArgumentParser):
    """A parser whose mistakes are ours."""

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ").replace(": is ", " is ", 1)
        message = message.replace(": expected one argument", " needs a value")
        raise InputError(f"{message} ({self.prog} --help)")


def parse_values(
    options: Sequence[Option], words: Sequence[str], command: str
) -> dict[str, Any]:
    """The values that were typed, by name."""
    parser = _Parser(f"cloob {command}", add_help=False, allow_abbrev=False)
    for option in options:
        _add(parser, option, "")
    namespace, rest = parser.parse_known_intermixed_args(list(words))
    if rest:
        typed = next((word for word in rest if word.startswith("-")), rest[0])
        message = f"not taken: {typed}"
        if typed.startswith("--"):
            refuse_option(command, typed.partition("=")[0])
            flags = [x.spelled for x in options if not x.is_positional]
            message += f"; {nearest(typed.partition('=')[0], flags)}"
        elif typed.startswith("-"):
            message += f"; what begins with - and is no option goes after: -- {typed}"
        parser.error(message)
    values = vars(namespace)
    for option in options:
        if option.is_list and option.name in values:
            values[option.name] = tuple(values[option.name])
    return values


def _add(parser: Any, option: Option, text: str) -> None:
    """Adds an option to a parser, or to a group of one."""
    name = option.name if option.is_positional else option.spelled
    if option.is_flag:
        action = parser.add_argument(name, action="store_true", help=text)
    else:
        action = parser.add_argument(
            name,
            nargs=option.n_words,
            type=option.convert,
            choices=option.choices,
            metavar=option.shown,
            help=text,
        )
        action.required = option.default is MISSING
    if option.element is bool:
        action.const = True
    action.default = argparse.SUPPRESS


def as_words(options: object, *names: str) -> list[str]:
    """Those of some options that were given, as words of a command line."""
    values = _values_of(options)
    words = []
    for option in options_of(type(options)):
        value = values[option.name]
        if option.name in names and value != option.default:
            words += [option.spelled] if value is True else [option.spelled, str(value)]
    return words


def _values_of(options: Any) -> dict[str, Any]:
    """The values of nested dataclasses by name."""
    values: dict[str, Any] = {}
    for name, value in vars(options).items():
        values |= (
            _values_of(value) if dataclasses.is_dataclass(value) else {name: value}
        )
    return values


# --- help ---


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """One that breaks no option at its hyphens."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


def show_help(
    command: str,
    options: Sequence[Option],
    docs: Mapping[str, str],
    defaults: Mapping[str, Any],
    about: str,
) -> NoReturn:
    """Prints what a command does, its options in groups, and examples."""
    page = page_of(command)
    words = [f"cloob {command}"]
    for option in options:
        if option.is_positional:
            name = option.metavar
            is_needed = option.default is MISSING
            words.append(name if is_needed else f"[{name}]")
        elif option.default is MISSING:
            words.append(f"{option.spelled} {option.shown or option.name.upper()}")
    parser = _Parser(
        usage=" ".join([*words, "[options]"]),
        description=about,
        epilog="\n  ".join(["examples:", *page["examples"]]),
        add_help=False,
        formatter_class=_Formatter,
    )
    positional = [option.name for option in options if option.is_positional]
    by_name = {option.name: option for option in options}
    for title, names in {"arguments": positional, **page["groups"]}.items():
        group = parser.add_argument_group(title)
        for name in names:
            option = by_name[name]
            text = docs[name] + _shown_default(defaults.get(name, option.default))
            _add(group, option, text.replace("%", "%%"))
    parser.print_help()
    sys.exit(0)


def _shown_default(default: Any) -> str:
    if default is None or default is MISSING or isinstance(default, bool):
        return ""
    values = default if isinstance(default, list | tuple) else [default]
    text = " ".join(map(str, values))
    return f" [{text}]" if text else ""


def page_of(command: str) -> dict[str, Any]:
    """The groups of options and the examples of a command."""
    page: dict[str, Any] = _pages()[command]
    return page


@functools.cache
def _pages() -> dict[str, Any]:
    text = Path(__file__).with_name("help.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def docs_of(kind: Any) -> dict[str, str]:
    """The texts at the fields of a dataclass, and of those that it is made of."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        body = _classes_of(sys.modules[base.__module__])[base.__name__].body
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                words = str(ast.literal_eval(text.value)).split()
                docs[ast.unparse(field.target)] = " ".join(words)
    for hint in typing.get_type_hints(kind).values():
        if dataclasses.is_dataclass(hint):
            docs |= docs_of(hint)
    return docs


@functools.cache
def _classes_of(module: types.ModuleType) -> dict[str, ast.ClassDef]:
    """The source of the classes of a module."""
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
