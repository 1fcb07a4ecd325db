"""The options of ``cloob train``: a dataclass of the leaves that have one, and what the typed ones change."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
from collections.abc import Sequence
from typing import Annotated, Any

from cloob.errors import InputError, require
from cloob.family import FAMILY
from cloob.training.config import TrainConfig, hints, leaf_homes, parts

_USUAL = "data val_data val_split model init objective epochs batch_size lr workers precision device seed resume out"
_OTHER = """image_column caption_column max_bad_fraction image_size freeze image_encoder text_encoder clean members
inv_tau beta learnable_inv_tau retrieval_from mask_duplicates steps patience micro_batch_size grad_checkpointing compile
fsdp weight_decay schedule warmup save_every best overwrite wandb"""
USUAL, OTHER = tuple(_USUAL.split()), tuple(_OTHER.split())
"""The leaves with an option, first those that people type, in the order of the help; the others are set in a file."""
VECTORS = ("a", "b", "ids", "a_ids", "b_ids", "val_a", "val_b", "val_ids", "standardise")
"""Those that `cloob train vectors` alone has."""


def options(start: TrainConfig, words: Sequence[str], *, vectors: bool = False) -> Any:
    """A dataclass for tyro of groups of options, whose defaults are the values of ``start``."""
    tyro, groups = require("tyro", "train"), []
    helps = _helps() if {"--help", "-h"} & set(words) else {}
    for name, leaves in (*([("vectors", VECTORS)] if vectors else []), ("usual", USUAL), ("other", OTHER)):
        fields = []
        for leaf in leaves:
            part = getattr(start, leaf_homes()[leaf])
            home: Any = type(part)
            kind: Any = Annotated[hints(home)[leaf], tyro.conf.arg(help=helps.get(leaf))]
            fields.append((leaf, kind, dataclasses.field(default=getattr(part, leaf))))
        groups.append((name, dataclasses.make_dataclass(name, fields, frozen=True)))
    return dataclasses.make_dataclass("Options", groups, frozen=True)


def typed_leaves(words: Sequence[str]) -> list[str]:
    """The leaves whose options are among the words; InputError for one that is set in a file."""
    given = {word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}
    typed = [leaf for leaf in leaf_homes() if given & {_option(leaf), _option(f"no-{leaf}")}]
    for leaf in typed:
        if leaf not in USUAL + OTHER + VECTORS:
            lines = f"[{leaf_homes()[leaf]}] and {leaf} = …"
            raise InputError(f"{_option(leaf)} is set in a file: --config more.toml, with the lines {lines}")
    return typed


def changed(start: TrainConfig, parsed: Any, typed: Sequence[str]) -> TrainConfig:
    """``start`` with the typed values of ``options``; as of ``override``, they take the place of others."""
    values = {leaf: value for group in vars(parsed).values() for leaf, value in vars(group).items()}
    return start.override(**{leaf: values[leaf] for leaf in typed})


def _option(leaf: str) -> str:
    return f"--{leaf.replace('_', '-')}"


def _helps() -> dict[str, str]:
    """The docstring under each field of a configuration; they are in the source alone."""
    helps = {}
    for kind in ast.parse(inspect.getsource(parts)).body:
        for field, text in itertools.pairwise(getattr(kind, "body", ())):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                helps[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    members = ". ".join(f"{name}: {member.title}" for name, member in FAMILY.items())
    return helps | {"objective": f"{helps['objective']} {members}."}
