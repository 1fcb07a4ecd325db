"""``cloob eval``: models side by side on labelled sets and pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cloob.commands.arguments import CacheArguments, check_amounts, parse
from cloob.errors import InputError, require

if TYPE_CHECKING:
    import tyro
else:  # the annotations below are read when the words are parsed
    tyro = require("tyro", "train")


@dataclass(frozen=True)
class EvalArguments:
    """Zero-shot classification, linear probes, retrieval and geometry of one or several models, side by side."""

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL …")]
    """Run or checkpoint folders, open_clip NAME/TAG, hf-hub:… or local-dir:…"""
    zeroshot: tuple[str, ...] = ()
    """Labelled sets: CLIP_benchmark WebDataset folders, folders with one sub-folder a class, or demo:noto-emoji."""
    suite: tuple[str, ...] = ()
    """Many labelled sets: paper, pictograms or vtab+, each followed by its folder unless --root is given."""
    root: Path | None = None
    """Folder of the suites that have no folder of their own."""
    retrieval: tuple[str, ...] = ()
    """Pictures and captions: whatever `cloob train --data` reads, CLIP_benchmark's retrieval folders, or demo:val.
    Several captions of a picture are rows of one path, a list in JSON lines, or lines of a .txt."""
    image_column: str = "filepath"
    """Column of a table of --retrieval with the path of the picture."""
    caption_column: str = "title"
    """Column of a table of --retrieval with the caption."""
    probe: bool = False
    """Also fit a linear probe for each labelled set that has training images (train/ beside test/)."""
    shots: int | None = None
    """Training images a class of a probe; all when left out."""
    probe_seeds: tuple[int, ...] = (0,)
    """One probe a seed, which draws its shots and its validation images."""
    out: Path = Path("runs/eval")
    """Folder of results.json, report.html, clip_benchmark/ and per_class/."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    batch_size: int = 256
    """Images or texts a forward pass."""
    workers: int = 2
    """Decoding threads."""
    cache: CacheArguments = field(default_factory=CacheArguments)


def main(words: Sequence[str]) -> int:
    """Evaluates; exit code 1 when a part could not be evaluated, with what there is written."""
    arguments = parse(EvalArguments, words, "cloob eval")
    if not arguments.models:
        raise InputError("no model given: name a run folder, or NAME/TAG of open_clip (cloob eval --help)")
    if not arguments.zeroshot and not arguments.retrieval and not arguments.suite:
        raise InputError("nothing to evaluate on: give --zeroshot DIR …, --suite NAME DIR or --retrieval SOURCE …")
    if not arguments.probe and (arguments.shots is not None or arguments.probe_seeds != (0,)):
        raise InputError("--shots and --probe-seeds are those of a linear probe; add --probe")
    check_amounts(arguments.batch_size, arguments.workers)
    arguments.cache.use()
    from cloob.commands.work.evaluate import run  # torch: only for words that are right

    return run(arguments)
