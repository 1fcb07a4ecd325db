"""Which pairs a training run reads, and how. Field docstrings are help texts of the command line. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cloob.training.config.strict import check, positive

VAL_SPLIT = 0.1
"""The share of the pairs that is held out where nothing is said of it."""


@dataclass(frozen=True)
class PairsConfig:
    """The image-caption pairs and how they are read."""

    data: tuple[str, ...] = ()
    """Training pairs: a table (.csv, .tsv, .parquet, .jsonl), WebDataset tars (path, pattern, folder, or streamed
    by pipe:…, s3://, https://), a Hugging Face datasets folder, a folder of images with .txt files beside them, or
    "demo"; several are read as one. See docs/data.md."""
    data_weights: tuple[float, ...] = ()
    """Passes over each source of --data in an epoch, one number a source; a fraction takes another part each time."""
    val_data: tuple[str, ...] = ()
    """Held-out pairs for a validation loss at the end of an epoch; the same forms as --data. A recipe's demo:val judges
    the demo alone: of other data a tenth is held out where neither this nor --val-split is given."""
    val_split: float = 0.0
    """Hold this share of --data out in place of --val-data, say 0.1: always the same pairs, none with a picture or
    caption that is trained on. All pairs are read once for it."""
    val_every: int = 1
    """Epochs from one look at --val-data to the next; the end of the run has one anyway."""
    image_column: str = "filepath"
    """Column of a table that holds the image path."""
    caption_column: str = "title"
    """Column of a table that holds the caption."""
    shuffle_buffer: int | None = None
    """Read shard by shard, shuffled within a window of this many pairs a process; 0 shuffles everything. Left out:
    10,000 for streamed shards, 0 for local data."""
    cache_dir: Path | None = None
    """Where what can be made again is kept: streamed shards, encoders' features and the like; left out, $CLOOB_CACHE
    or the user's cache folder. Runs and processes of one host share it."""
    cache_gb: float | None = None
    """Room for it in GiB; what was used longest ago goes first. Left out, $CLOOB_CACHE_BYTES or 50."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Range of the area kept by the random crop of the training images."""
    flip: bool = False
    """Mirror training images at random (not for captions that say left or right)."""
    workers: int = 2
    """Processes that decode images, per rank; 0 decodes in the training process."""
    max_bad_fraction: float = 0.05
    """Stop when more than this fraction of an epoch's samples cannot be used."""

    @property
    def holds_out(self) -> bool:
        """Whether there are held-out pairs."""
        return bool(self.val_data or self.val_split)

    @property
    def judged_by_demo(self) -> bool:
        """Whether the held-out pairs are the demo's and the training pairs are not."""
        demo, val_demo = (
            bool(specs) and all(spec.partition(":")[0] == "demo" for spec in specs)
            for specs in (self.data, self.val_data)
        )
        return val_demo and not demo

    def __post_init__(self) -> None:
        check(all(self.data), "data", self.data, "sources without empty names")
        check(all(self.val_data), "val_data", self.val_data, "sources without empty names")
        check(0 <= self.val_split < 1, "val_split", self.val_split, "a share of the pairs below 1, or 0 for none")
        check(not (self.val_split and self.val_data), "val_split", self.val_split, "left out with --val-data")
        check(self.val_every >= 1, "val_every", self.val_every, "a number of epochs, 1 or more")
        check(
            len(self.data_weights) in (0, len(self.data)) and all(positive(weight) for weight in self.data_weights),
            "data_weights",
            self.data_weights,
            f"a positive number for each of the {len(self.data)} sources",
        )
        buffer = self.shuffle_buffer
        check(buffer is None or buffer >= 0, "shuffle_buffer", buffer, "a number of pairs, or 0 for a full shuffle")
        check(self.cache_gb is None or positive(self.cache_gb), "cache_gb", self.cache_gb, "a positive number of GiB")
        check(bool(self.image_column), "image_column", self.image_column, "the name of a column")
        check(bool(self.caption_column), "caption_column", self.caption_column, "the name of a column")
        low, high = self.crop_scale
        check(0 < low <= high <= 1, "crop_scale", self.crop_scale, "two fractions with 0 < low <= high <= 1")
        check(self.workers >= 0, "workers", self.workers, "0 or more")
        check(0 <= self.max_bad_fraction <= 1, "max_bad_fraction", self.max_bad_fraction, "between 0 and 1")
