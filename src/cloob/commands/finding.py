"""What ``cloob search``, ``cloob classify`` and ``cloob embed`` can be asked."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from cloob.commands.arguments import CacheArguments, tyro
from cloob.errors import InputError
from cloob.machine import decoders


@dataclass(frozen=True)
class SearchArguments:
    """Find pictures of an index by words and pictures, with weights, filters and a cutoff below which nothing fits.

    A QUERY is words ("a red bird"), a picture (photo.jpg) or its https:// address; several add up. +0.5:beach counts
    half. What is taken away comes behind --, as in: cloob search IDX beach +0.5:photo.jpg -- -people
    """

    index: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="IDX")]
    """What `cloob index` made: a folder, or postgresql://…."""
    query: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="QUERY …")] = ()
    """Words, pictures and addresses; none with --like or --duplicates."""
    where: str | None = None
    """Only among these: "date >= 2024 and caption like '%dog%'" (docs/find.md)."""
    top: int = 20
    """How many at most."""
    cutoff: str = "auto"
    """Leave out what is nearer to the query by less than this many standard deviations than unrelated queries are; auto
    is 3, 2 for pictures alone, and none for --like alone; none leaves out nothing."""
    like: str | None = None
    """More like this picture of the index: its id or its path."""
    duplicates: bool = False
    """Groups of pictures that look alike, the best of each first: most pixels, most bytes, oldest date."""
    threshold: float = 0.97
    """Of --duplicates: the least cosine of any two pictures of a group."""
    exact: bool = False
    """Of --duplicates: files of equal bytes alone."""
    explain: bool = False
    """What the query retrieves from the pictures as a Hopfield memory: the associated pictures with their weights."""
    beta: float | None = None
    """Of --explain: small averages over all pictures, large takes the nearest; left out, the model's own, else 8."""
    json: bool = False
    """Print one JSON object."""
    paths: bool = False
    """Print the paths alone, for pipes; of --duplicates all of each group, an empty line between groups."""
    null: bool = False
    """End each path with a NUL instead of a line feed; also -0."""
    copy_to: Path | None = None
    """Copy what is found into this folder; nothing there is overwritten."""
    sheet: Path | None = None
    """Write a contact sheet, one HTML file."""
    open: bool = False
    """Show a contact sheet in the browser."""
    model: str | None = None
    """Which of the index's models, by its name or by what it is loaded from; the first when left out."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    cache: CacheArguments = field(default_factory=CacheArguments)


@dataclass(frozen=True)
class ClassifyArguments:
    """Sort pictures by the names of classes, or by a few examples of each."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC|IDX")]
    """An index, or whatever `cloob index` takes: a folder, a table, shards."""
    labels: str | None = None
    """cat,dog,… or FILE.txt with one label a line; lines that begin with # are comments."""
    templates: tuple[str, ...] = ()
    """Prompts with {c} in the place of the label; left out, "a photo of a {c}." and "{c}"."""
    examples: Path | None = None
    """A folder with a folder of pictures for each label: fits a head to them and says how good it is."""
    head: Path | None = None
    """Where a head of --examples is kept, FILE.safetensors; left out, in IDX/heads/ of an index. Without --examples,
    the head to use."""
    multi: bool = False
    """Each label that fits, any number of them."""
    none: bool = False
    """A picture may also be none of these."""
    cutoff: float = 1.75
    """Of --multi and --none: a label fits from so many standard deviations above unrelated texts."""
    inv_tau: float | None = None
    """Inverse temperature of the softmax; left out, the model's own."""
    where: str | None = None
    """Only these pictures of an index."""
    json: bool = False
    """Print one JSON object a line."""
    csv: bool = False
    """Print CSV: path, label, probability, margin."""
    move_to: Path | None = None
    """Move each file into a folder of its label here; nothing is overwritten, and what fits none stays."""
    model: str | None = None
    """What `cloob eval` takes, for a SRC; for an index the name of one of its models."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    workers: int = field(default_factory=decoders)
    """Threads that read and decode; left out, one a processor."""
    cache: CacheArguments = field(default_factory=CacheArguments)


@dataclass(frozen=True)
class EmbedArguments:
    """Write the vectors of pictures into one file."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """Whatever `cloob index` takes: a folder, a table, shards; or an index."""
    out: Path
    """FILE.npz, FILE.safetensors or FILE.parquet."""
    model: str | None = None
    """What `cloob eval` takes; for an index the name of one of its models."""
    overwrite: bool = False
    """Replace the file where it is there."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    workers: int = field(default_factory=decoders)
    """Threads that read and decode; left out, one a processor."""
    cache: CacheArguments = field(default_factory=CacheArguments)


def read_cutoff(text: str) -> float | str | None:
    """``auto``, ``none`` (None) or a number."""
    if text in ("auto", "none"):
        return None if text == "none" else text
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--cutoff is {text!r}; auto, none or a number such as 3 is wanted") from None


def read_labels(text: str) -> tuple[str, ...]:
    """The labels of ``--labels``: one a line of a file, which ends in .txt or is written with a slash; or by commas."""
    if text.endswith(".txt") or ("/" in text and os.path.isfile(text)):  # noqa: PTH113 - of many labels a Path raises
        try:
            lines = Path(text).read_text(encoding="utf-8-sig").splitlines()
        except FileNotFoundError:
            raise InputError(f"--labels {text}: no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--labels {text}: no text file of labels ({type(error).__name__})") from None
        return tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    return tuple(label.strip() for label in text.split(","))
