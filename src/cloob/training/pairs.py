"""The pairs of a run, training and held-out: opened, split, compared over ranks, and in batches."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from cloob.cache import Cache
from cloob.data.items import ItemLoader, Items
from cloob.data.loader import Loader, PairLoader
from cloob.data.open import open_source
from cloob.data.source import Fingerprint, Source, choose_held_out, mix, split
from cloob.data.transforms import TrainTransform
from cloob.data.vectors import VectorPairs
from cloob.distributed import gather_objects, on_rank_zero, rank, world_size
from cloob.files import write_whole
from cloob.models.encoder import DualEncoder, trimmed_tokens
from cloob.models.importing import read_json
from cloob.models.runs import CHECKPOINTS_FOLDER, HELD_OUT_FILE
from cloob.training import align
from cloob.training.config import TrainConfig
from cloob.training.config.checks import wrong

logger = logging.getLogger(__name__)

Pairs = Source | VectorPairs | Items
GivenPairs = Source | VectorPairs | Dataset[Any]


def open_pairs(
    config: TrainConfig, given: GivenPairs | None = None, given_held_out: GivenPairs | None = None
) -> tuple[Pairs, Pairs | None]:
    """The training pairs and the held-out pairs, if there are any: those that are given, else the configuration's."""
    share = config.pairs.val_split
    parts: Any = (given, given_held_out)
    pairs, held_out = (part if part is None or hasattr(part, "fingerprint") else Items(part) for part in parts)
    if pairs is None:
        both = align.open_vectors(config) if config.vectors.a is not None else open_both(config, train=True)
        return both[0], both[1] if held_out is None else held_out
    if isinstance(pairs, VectorPairs) and not isinstance(held_out, Items):
        return align.with_held_out(pairs, held_out, share)
    if share:
        if isinstance(pairs, Items | VectorPairs):
            wrong(f"val_split is {share}, but pairs= is a Dataset; split it yourself, and give a part as held_out=")
        return _without_held_out([pairs], config, train=True)
    if held_out is None and config.pairs.val_data:
        held_out = mix(_open(config.pairs.val_data, config))
    return pairs, held_out


def open_both(config: TrainConfig, *, train: bool = False) -> tuple[Source, Source | None]:
    """The training and held-out pairs; a run keeps the rows of held-out ones beside its checkpoints."""
    pairs = config.pairs
    sources = _open(pairs.data, config)
    if pairs.val_split:
        return _without_held_out(sources, config, train)
    return mix(sources), mix(_open(pairs.val_data, config)) if pairs.val_data else None


def _without_held_out(sources: Sequence[Source], config: TrainConfig, train: bool) -> tuple[Source, Source]:
    file, share = config.save.out / CHECKPOINTS_FOLDER / HELD_OUT_FILE, config.pairs.val_split

    def held_out_rows() -> list[np.ndarray]:
        key = [share, *(source.fingerprint() for source in sources)]
        resumes = train and config.save.resume != "none" and file.is_file()
        if resumes and (kept := read_json(file))["of"] == key:
            return [np.array(rows, np.int64) for rows in kept["rows"]]
        logger.info("reading all pairs once, to hold some out (--val-split) …")
        rows = choose_held_out(sources, share)
        if train:
            write_whole(file, json.dumps({"of": key, "rows": [part.tolist() for part in rows]}))
        return rows

    source, held_out = split(sources, on_rank_zero(held_out_rows, slow=True))
    if rank() == 0:
        total = len(source) + len(held_out)
        logger.info("%d of %d pairs are held out; none has a picture or caption of the others", len(held_out), total)
    return source, held_out


def _open(specs: Sequence[str], config: TrainConfig) -> list[Source]:
    pairs = config.pairs
    columns = {"image_column": pairs.image_column, "caption_column": pairs.caption_column}
    return [open_source(spec, **columns, cache=_cache(config)) for spec in specs]


def _cache(config: TrainConfig) -> Cache:
    gigabytes = config.pairs.cache_gb
    return Cache(config.pairs.cache_dir, None if gigabytes is None else int(gigabytes * 1024**3))


def same_on_every_rank(pairs: Pairs) -> Fingerprint:
    """The fingerprint of pairs; InputError where some host has others: ranks divide them by their number."""
    looks = int(os.environ.get("LOCAL_RANK", "0")) == 0  # once on each host: it may look into a hundred thousand files
    first, *others = gather_objects((len(pairs), pairs.fingerprint() if looks else {}))
    for number, (size, found) in enumerate(others, 1):
        if size != first[0] or (found and found != first[1]):
            other = f"finds other data than rank 0 ({size:,} pairs, not {first[0]:,}, or with other contents)"
            wrong(f"{pairs.name}: rank {number} {other}; give all the same")
    return first[1]


def make_loader(
    pairs: Pairs, encoder: DualEncoder, config: TrainConfig, device: torch.device, *, train: bool = True
) -> Loader:
    """This rank's training batches, or those of held-out pairs: all of them, in order and without augmentation."""
    size, seed, workers = config.run.batch_size, config.run.seed, config.pairs.workers
    if train and size < 2 * world_size():
        wrong(f"batch_size is {size} for {world_size()} processes; it must be {2 * world_size()} or more")
    ranks = {"rank": rank(), "world_size": world_size()}
    if isinstance(pairs, Items):
        return ItemLoader(pairs, size, seed=seed, train=train, workers=workers, **ranks)
    if isinstance(pairs, VectorPairs):
        return align.FeatureLoader(pairs, config, train=train, by_id=True)
    if encoder.heads is not None:
        return align.feature_loader(pairs, encoder, config, device, _cache(config), train=train)
    augmented = TrainTransform(encoder.image_size, scale=config.pairs.crop_scale, flip=config.pairs.flip)
    # Shared padding is left out where that is exact; a compiled tower wants one shape.
    trims = encoder.trims_texts and not config.run.compile
    return PairLoader(
        pairs,
        augmented if train else encoder.preprocess,
        partial(trimmed_tokens, encoder.tokenizer) if trims else encoder.tokenizer,
        size,
        seed=seed,
        shuffle=train,
        drop_last=train,
        shuffle_buffer=config.pairs.shuffle_buffer if train else None,
        workers=workers,
        pin_memory=train and device.type == "cuda",
        by_picture=True,
        **ranks,
    )
