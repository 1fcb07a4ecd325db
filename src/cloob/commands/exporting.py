"""What ``cloob export`` and ``cloob push`` can be asked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cloob.commands.arguments import tyro
from cloob.errors import InputError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


@dataclass(frozen=True)
class ExportArguments:
    """Write a model for transformers and sentence-transformers, for ONNX runtimes, or as programs of torch.export."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run, checkpoint or model folder, or whatever else `cloob eval` takes."""
    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DEST")]
    """The folder that is made."""
    to: Literal["transformers", "onnx", "torch-export"] | None = None
    """transformers: CLIPModel, processor and tokenizer, which sentence-transformers reads too. onnx: both towers as
    graphs. torch-export: both towers as programs of torch.export."""
    int8: bool = False
    """With --to onnx: weights as 8-bit integers; the card says what that costs on the sets of --eval."""
    eval: tuple[str, ...] = ()
    """With --int8: labelled sets, as of `cloob eval --zeroshot`."""
    license: str | None = None
    """The weights' licence for the card, as the hub spells it: mit, apache-2.0, cc-by-4.0, …"""
    results: Path | None = None
    """A results.json of `cloob eval` or `cloob demo` for the card; left out, the one in or beside the run."""
    overwrite: bool = False
    """Replace DEST where it is an earlier export."""


@dataclass(frozen=True)
class PushArguments:
    """Push a model to the Hugging Face hub: open_clip's files, transformers' where it has such towers, and a card."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run, checkpoint or model folder, or whatever else `cloob eval` takes."""
    repository: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ORG/NAME")]
    """The repository on the hub; it is made if it is not there."""
    license: str | None = None
    """The weights' licence, as the hub spells it: mit, apache-2.0, cc-by-4.0, … It has to be given."""
    private: bool = False
    """Let nobody but you or your organisation see a repository that is made."""
    results: Path | None = None
    """A results.json of `cloob eval` or `cloob demo` for the card; left out, the one in or beside the run."""
    dry_run: bool = False
    """List the files and their sizes, and send nothing."""


def spelled(licence: str | None) -> str | None:
    """A licence as the hub spells it; the hub knows which there are.

    Raises:
        InputError: It is no single word.
    """
    word = licence.strip().lower() if licence is not None else None
    if word is not None and not re.fullmatch(r"[a-z0-9.+-]+", word):
        raise InputError(f"--license {licence}: one word of the hub's is wanted, such as mit, apache-2.0 or other")
    return word


def check_repository(name: str) -> None:
    """Raises InputError where a name is not ``ORG/NAME`` as the hub takes it."""
    if not _REPOSITORY.fullmatch(name) or ".." in name or "--" in name or name.endswith((".git", ".", "-")):
        raise InputError(f"{name}: ORG/NAME is wanted, of letters, digits, '-', '_' and '.'")
