"""The pairs of a run, the caller's own or the configuration's, and their batches."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch.utils.data import Dataset

from cloob.data.items import Items
from cloob.data.loader import Loader, PicturePairs, Tokenizer, Transform
from cloob.data.open import open_source
from cloob.data.pairs import Pairs
from cloob.data.sampler import SamplerOrder
from cloob.data.source import Fingerprint, Source, choose_held_out, mix, split
from cloob.data.transforms import TrainTransform
from cloob.distributed import gather_objects, on_rank_zero, rank, world_size
from cloob.errors import InputError
from cloob.models.encoder import DualEncoder, trimmed_tokens
from cloob.training.config import TrainConfig

logger = logging.getLogger(__name__)
GivenPairs = Source | Dataset[object]


def open_pairs(
    config: TrainConfig,
    custom_pairs: GivenPairs | None = None,
    custom_held_out: GivenPairs | None = None,
) -> tuple[Source | Items, Source | Items | None]:
    """The training pairs and the held-out pairs, if there are any: the caller's own,
    else the configuration's.
    """
    pairs = _as_pairs(custom_pairs, config.seed)
    held_out = _as_pairs(custom_held_out, config.seed)
    if config.val_split:
        if isinstance(pairs, Items):
            raise InputError(
                f"val_split is {config.val_split}, but pairs= is a Dataset; split it"
                " yourself, and give a part as held_out="
            )
        source = _open(config.data, config) if pairs is None else pairs
        return _without_held_out(source, config.val_split)
    if pairs is None:
        pairs = _open(config.data, config)
    if held_out is None and config.val_data:
        held_out = _open(config.val_data, config)
    return pairs, held_out


def is_source(pairs: object) -> bool:
    """Whether pairs are a source as ``open_source`` gives, and no Dataset."""
    return not isinstance(pairs, Dataset) and hasattr(pairs, "fingerprint")


def _as_pairs(pairs: GivenPairs | None, seed: int) -> Source | Items | None:
    """A source as it is, a Dataset as Items."""
    if pairs is None or is_source(pairs):
        return cast("Source | None", pairs)
    return Items(cast("Dataset[object]", pairs), seed)


def _open(specs: Sequence[str], config: TrainConfig) -> Source:
    image, caption = config.image_column, config.caption_column
    sources = [
        open_source(spec, image_column=image, caption_column=caption) for spec in specs
    ]
    return mix(sources)


def _without_held_out(source: Source, share: float) -> tuple[Source, Source]:
    """The pairs without a share of them, always the same, and that share."""
    logger.info("reading all pairs once, to hold some out (--val-split) …")
    rows = on_rank_zero(lambda: choose_held_out(source, share), slow=True)
    training, held_out = split(source, rows)
    if rank() == 0:
        logger.info(
            f"{len(held_out)} of {len(source)} pairs are held out; none has a picture"
            " or caption of the others"
        )
    return training, held_out


def same_on_every_rank(pairs: Source | Items) -> Fingerprint:
    """The fingerprint of pairs; InputError where some host has others: ranks divide
    them by their number.
    """
    # once on every host: it may read a hundred thousand files
    looks = os.environ.get("LOCAL_RANK", "0") == "0"
    mine = (len(pairs), pairs.fingerprint() if looks else {})
    first, *of_others = gather_objects(mine)
    for number, (size, fingerprint) in enumerate(of_others, 1):
        if size != first[0] or (fingerprint and fingerprint != first[1]):
            raise InputError(
                f"{pairs.name}: rank {number} finds other data than rank 0 ({size:,}"
                f" pairs, not {first[0]:,}, or with other contents); give all the same"
            )
    return first[1]


def make_loader(
    pairs: Source | Items,
    encoder: DualEncoder,
    config: TrainConfig,
    device: torch.device,
    *,
    train: bool = True,
    order: SamplerOrder | None = None,
) -> Loader:
    """This rank's training batches, or those of held-out pairs: all of them, in order
    and without augmentation.
    """
    size, least = config.batch_size, 2 * world_size()
    if train and size < least:
        raise InputError(
            f"batch_size is {size} for {world_size()} processes; it must be {least} or"
            " more"
        )
    if isinstance(pairs, Items):
        taken: Pairs = pairs
    else:
        taken = _for_towers(pairs, encoder, config, train=train)
    return Loader(
        taken,
        size,
        seed=config.seed,
        shuffle=train,
        drop_last=train,
        shuffle_buffer=config.shuffle_buffer if train else None,
        order=order,
        rank=rank(),
        world_size=world_size(),
        workers=config.workers,
        pin_memory=train and device.type == "cuda",
    )


def _for_towers(
    source: Source, encoder: DualEncoder, config: TrainConfig, *, train: bool
) -> PicturePairs:
    """The pairs of a source as these towers take them; augmented for training."""
    transform: Transform = encoder.preprocess
    if train:
        size, scale = encoder.image_size, config.crop_scale
        transform = TrainTransform(size, scale=scale, flip=config.flip)
    tokenize: Tokenizer = encoder.tokenizer
    # Shared padding is left out where that is exact; a compiled tower wants one shape.
    if encoder.trims_texts and not config.compile:
        tokenize = partial(trimmed_tokens, encoder.tokenizer)
    return PicturePairs(source, transform, tokenize, config.seed)
