"""Settings: dataclasses whose annotations say what a value may be.

pydantic converts and checks the values as an instance is made; it is imported then, so
that help, which reads the annotations alone, does not wait for it. No torch here.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import tomllib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from annotated_types import Ge, Gt, Interval

from cloob.errors import InputError, nearest, one_line, require
from cloob.family import ALIASES, CONTRASTS, FAMILY

if TYPE_CHECKING:
    from pydantic import BaseModel

Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Interval(ge=0, le=1)]
Decay = Annotated[float, Interval(ge=0, lt=1)]
Count = Annotated[int, Ge(0)]
AtLeastOne = Annotated[int, Ge(1)]
Pixels = Annotated[int, Ge(8)]

SCALES = (
    "inv_tau",
    "beta",
    "bias",
    "learnable_inv_tau",
    "learnable_beta",
    "scale",
    "exclude_above",
)


@dataclass(frozen=True)
class Settings:
    """Values that are converted and checked as they are made."""

    def __post_init__(self) -> None:
        for name, value in _checked(type(self), vars(self)).items():
            object.__setattr__(self, name, value)

    def override(self, **changes: Any) -> Self:
        """A copy with some settings changed; InputError names one that does not
        exist, or is not right.
        """
        names = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in names:
                raise InputError(f"unknown key {name!r}; {nearest(name, names)}")
        return dataclasses.replace(self, **changes)

    def merge(self, values: Mapping[str, Any], source: str = "config") -> Self:
        """As ``override``; ``source`` is what errors call the values."""
        try:
            return self.override(**values)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None

    def merge_file(self, file: Path | str) -> Self:
        """As ``merge``, of a JSON or TOML file, such as the ``config.json`` of a
        run.
        """
        return self.merge(read_table(Path(file)), str(file))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        values: dict[str, Any] = json.loads(self.to_json())
        return values

    def to_json(self) -> str:
        """The text of ``config.json``."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=str) + "\n"

    def refuse(self, names: Iterable[str], other: str) -> None:
        """InputError for the first of some settings that has another value than its
        default.
        """
        for name in names:
            value = getattr(self, name)
            if value != getattr(type(self), name):
                raise InputError(
                    f"{name} is {value!r}; it must be left out with {other}"
                )


@dataclass(frozen=True)
class ObjectiveSettings(Settings):
    """The objective and its scales; what is None takes the objective's own."""

    objective: str = "cloob"
    inv_tau: Positive | None = None
    """Inverse temperature of the contrast (its start when it is learned)."""
    beta: Positive | None = None
    """Inverse temperature of the Hopfield retrieval."""
    bias: float | None = None
    """Start of the bias that the sigmoid loss learns; siglip alone."""
    learnable_inv_tau: bool | None = None
    """Learn the contrast's inverse temperature (with the scale unit, which is then the
    default).
    """
    learnable_beta: bool | None = None
    """Learn the retrieval's inverse temperature."""
    scale: Literal["paper", "unit"] | None = None
    """paper: tau times the sum of both directions; unit: their mean."""
    exclude_above: float | None = None
    """A candidate that is more similar to a row than its partner by more than this is
    no negative of it.
    """

    def __post_init__(self) -> None:
        name = ALIASES.get(self.objective, self.objective)
        object.__setattr__(self, "objective", name)
        super().__post_init__()

    def override(self, **changes: Any) -> Self:
        """A copy with some settings changed; another objective begins with its own
        scales.

        Raises:
            InputError: There is no such setting, or the value is not right for it.
        """
        objective = changes.get("objective", self.objective)
        if ALIASES.get(objective, objective) != self.objective:
            changes = {**dict.fromkeys(SCALES), **changes}
        return super().override(**changes)

    def given_scales(self) -> dict[str, Any]:
        """The scales that are not left out: what ``make_objective(name, **scales)``
        takes.
        """
        values = {name: getattr(self, name) for name in SCALES}
        return {name: value for name, value in values.items() if value is not None}

    def check_member(self) -> None:
        """Refuses settings that the member of the family has no use for."""
        member = FAMILY[self.objective]
        if not member.hopfield:
            names = ("beta", "learnable_beta")
            self.refuse(names, f"{self.objective}, which has no retrieval")
        if CONTRASTS[member.contrast].softmax:
            self.refuse(["bias"], f"{self.objective}, in which it would cancel")
        elif self.scale == "paper":
            self.refuse(["scale"], self.objective)
        if self.scale == "paper" and self.learnable_inv_tau:
            self.refuse(
                ["learnable_inv_tau"], "the scale paper: it would rise to its bound"
            )


def read_table(file: Path) -> dict[str, Any]:
    """The values of a JSON or TOML file."""
    kind = "TOML" if file.suffix == ".toml" else "JSON"
    try:
        text = file.read_bytes().decode("utf-8-sig")
        values: object = tomllib.loads(text) if kind == "TOML" else json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{file}: is not {kind}, or cannot be read ({one_line(error)})"
        ) from None
    if not isinstance(values, dict):
        raise InputError(f"{file}: holds a {type(values).__name__}, not settings")
    return values


def _checked(kind: type, values: Mapping[str, object]) -> dict[str, object]:
    """The values as their types want them; InputError says what is wrong with one."""
    pydantic = require("pydantic", "train")
    try:
        return dict(vars(_model(kind)(**values)))
    except pydantic.ValidationError as error:
        mistake = error.errors(include_url=False)[0]
    expected = re.sub(r"^\w+ should", "it must", mistake["msg"])
    raise InputError(f"{mistake['loc'][0]} is {mistake['input']!r}; {expected}")


@functools.cache
def _model(kind: type) -> type[BaseModel]:
    """The pydantic model of a class of settings."""
    pydantic = require("pydantic", "train")
    config = pydantic.ConfigDict(allow_inf_nan=False, str_min_length=1)
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {name: (hint, ...) for name, hint in hints.items()}
    model: type[BaseModel]
    model = pydantic.create_model(kind.__name__, __config__=config, **fields)
    return model
