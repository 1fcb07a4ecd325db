"""What ``cloob index`` can be asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from cloob.commands.arguments import CacheArguments, tyro
from cloob.machine import decoders


@dataclass(frozen=True)
class IndexArguments:
    """Index pictures, or bring an index up to date: new, changed and removed files."""

    sources: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SRC …")] = ()
    """Folders of pictures, or what `cloob train --data` reads (captions are not needed); none: all that the index
    knows."""
    out: Annotated[str, tyro.conf.arg(aliases=["--store"], metavar="DIR|postgresql://…")] = ""
    """The index: a folder, made where it is missing, or a PostgreSQL database with pgvector."""
    model: str | None = None
    """Run (its best checkpoint) or checkpoint folder, open_clip NAME/TAG, hf-hub:… or local-dir:…; left out, the only
    one of the index."""
    name: str | None = None
    """What the index calls the model; its file name or tag when left out."""
    replace_model: bool = False
    """Make all vectors anew where the model of this name has other weights, --precision or --draft than it had."""
    exclude: tuple[str, ...] = ()
    """Globs; files and folders that match one are left out: --exclude '*.gif' cache. The index remembers them; given
    anew they replace those of before, and --exclude '' clears them."""
    max_megapixels: float | None = None
    """Leave larger pictures out. A limit above cloob's own (179, of JPEG 2,048) changes nothing."""
    remove_all: bool = False
    """Remove all pictures of a source of which nothing is there any more."""
    merge: str | None = None
    """Another index, to be taken into this one."""
    faults: bool = False
    """List the files that could not be read, and why; index nothing."""
    export: Path | None = None
    """Write a Parquet table: path, caption, date, size, columns, vector, and x, y on a map."""
    image_column: str | None = None
    """Column of a table with the picture or its path."""
    caption_column: str | None = None
    """Column of a table with the caption."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Literal["fp32", "bf16"] | None = None
    """Of the image tower; bf16 is for GPUs and for processors with AMX, others are slower in it. Left out, as the index
    has it, else fp32."""
    draft: bool = False
    """Decode large JPEG files at a half, a quarter or an eighth of their size: faster, and other vectors by a hair. An
    index that was begun so goes on so."""
    batch_size: int = 64
    """Pictures a forward pass, and a transaction."""
    workers: int = field(default_factory=decoders)
    """Decoding threads; left out, one a processor."""
    cache: CacheArguments = field(default_factory=CacheArguments)
