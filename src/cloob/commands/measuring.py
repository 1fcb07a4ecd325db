"""What ``cloob eval``, ``cloob analyze`` and ``cloob data`` can be asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from cloob.commands.arguments import CacheArguments, tyro


@dataclass(frozen=True)
class EvalArguments:
    """Zero-shot classification, linear probes, retrieval and geometry of one or several models, side by side."""

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL …")]
    """Run folders (their best checkpoint; RUN:last is the last), checkpoint folders, open_clip NAME/TAG, hf-hub:… or
    local-dir:…"""
    zeroshot: tuple[str, ...] = ()
    """Labelled sets: CLIP_benchmark WebDataset folders, folders with one sub-folder a class, or demo:noto-emoji."""
    suite: tuple[str, ...] = ()
    """Many labelled sets: paper, pictograms or vtab+, each followed by its folder unless --root is given."""
    root: Path | None = None
    """Folder of the suites that have no folder of their own."""
    retrieval: tuple[str, ...] = ()
    """Pictures and captions: whatever `cloob train --data` reads, CLIP_benchmark's retrieval folders, or demo:val.
    Several captions of a picture are rows of one path, or a list in JSON lines."""
    image_column: str = "filepath"
    """Column of a table of --retrieval with the path of the picture."""
    caption_column: str = "title"
    """Column of a table of --retrieval with the caption."""
    held_out: bool = False
    """Judge by the pairs that a run held out of its training (--val-split, --val-data), as by --retrieval."""
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


@dataclass(frozen=True)
class AnalyzeArguments:
    """Geometry of models on image-caption pairs, effective eigenvalues by epoch, similar pictures and duplicates."""

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL …")]
    """Run folders (all their checkpoints count), checkpoint or model folders, open_clip NAME/TAG, hf-hub:…"""
    pairs: str = "demo:val"
    """Image-caption pairs to measure on: what `cloob eval --retrieval` reads (of several captions the first)."""
    image_column: str = "filepath"
    """Column of a table with the path of the picture."""
    caption_column: str = "title"
    """Column of a table with the caption."""
    limit: int = 10_000
    """Pairs whose geometry is measured at most; similar pictures and duplicates are sought among all of them, in time
    that grows with their square."""
    similar: int = 20
    """Most similar pictures to list for each model."""
    duplicate: float = 0.999
    """Cosine from which two pictures count as one."""
    out: Path = Path("runs/analyze")
    """Folder of analysis.json and report.html."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    batch_size: int = 256
    """Images or texts a forward pass."""
    workers: int = 2
    """Decoding threads."""
    cache: CacheArguments = field(default_factory=CacheArguments)


@dataclass(frozen=True)
class DataArguments:
    """Say what is in a data set, what is bad in it, and what is there twice; or count the samples of its shards."""

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """Whatever `cloob train --data` reads; with --count a folder or pattern of shards."""
    most: int = 10_000
    """Pairs to look at, spread evenly (over four files of a streamed set); 0 looks at all."""
    out: Path | None = None
    """Write a contact sheet, one HTML file; with --count the list of counts, by default a local folder's sizes.json."""
    pictures: int = 60
    """Pictures on the contact sheet."""
    json: bool = False
    """Print one JSON object instead of the table."""
    count: bool = False
    """Count the samples in each shard, and nothing else; what streamed shards need before they can be read."""
    image_column: str = "filepath"
    """Column of a table with the path of the picture."""
    caption_column: str = "title"
    """Column of a table with the caption."""
    workers: int = 2
    """Decoding threads."""
    cache: CacheArguments = field(default_factory=CacheArguments)
