"""Pairs, towers and objective of a run: what the caller gave to ``train``, or what the
configuration names.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import Dataset

from cloob.data.items import ItemLoader, Items
from cloob.data.loader import Loader, PairLoader
from cloob.data.open import open_source
from cloob.data.sampler import SamplerOrder
from cloob.data.source import Fingerprint, Source, choose_held_out, mix, split
from cloob.data.transforms import TrainTransform
from cloob.distributed import (
    gather_objects,
    on_rank_zero,
    rank,
    world_size,
)
from cloob.errors import InputError
from cloob.models.encoder import DualEncoder, trimmed_tokens
from cloob.models.load import load_model
from cloob.models.towers import create_model
from cloob.objective import ContrastiveObjective, make_objective
from cloob.settings import SCALES
from cloob.training.callbacks import Metrics
from cloob.training.config import TrainConfig
from cloob.training.custom import (
    BatchObjective,
    GivenObjective,
    GivenTowers,
    takes,
)
from cloob.training.optim import GivenOptimizer

logger = logging.getLogger(__name__)
Pairs = Source | Items
GivenPairs = Source | Dataset[Any]
DEFAULT_MODEL = "RN50"


@dataclass(frozen=True)
class CustomParts:
    """What the caller of ``train`` hands over in the place of what the configuration
    names; None for the rest.
    """

    pairs: GivenPairs | None = None
    held_out: GivenPairs | None = None
    towers: nn.Module | None = None
    objective: nn.Module | None = None
    optimizer: GivenOptimizer | None = None
    sampler: Any = None
    batch_sampler: Any = None
    metrics: Metrics | None = None

    def named(self, config: TrainConfig) -> TrainConfig:
        """The configuration with the class of every part that is not None, and without
        what the part takes the place of.
        """
        names: dict[str, Any] = {}
        for name, part in vars(self).items():
            before = getattr(config, f"given_{name}")
            if before is not None and part is None:
                raise InputError(
                    f"the configuration has {name} of the class {before!r}, which"
                    f" Python code gave; give them to cloob.train(config, {name}=…)"
                )
            names[f"given_{name}"] = None if part is None else _name_of(part)
        self._check(config)
        if self.pairs is not None:
            names["data"] = ()
        if self.held_out is not None:
            config = config.override(val_split=0.0, val_data=())
        if self.towers is not None:
            names |= {"model": None, "image_size": config.image_size}
        if self.objective is not None:
            config = config.override(objective="cloob")
        if self.optimizer is not None:
            names["optimizer"] = "adamw"
        return config.override(**names)

    def _check(self, config: TrainConfig) -> None:
        """InputError for parts that do not go together, and for a setting that a given
        part leaves without effect.
        """
        self._check_samplers(config)
        if self.metrics is not None and not config.holds_out and self.held_out is None:
            raise InputError(
                "metrics= judges held-out pairs, and there are none; give held_out="
            )
        if self.objective is not None:
            config.refuse((*SCALES, "retrieval_from"), "objective=")
            if not is_family(self.objective):
                config.refuse(["mask_duplicates"], "objective=")
        if self.optimizer is not None:
            config.refuse(("lr", "weight_decay", "beta1", "beta2", "eps"), "optimizer=")
        if self.pairs is not None:
            self._check_settings_of_pairs(config)

    def _check_settings_of_pairs(self, config: TrainConfig) -> None:
        """Refuses settings that the caller's pairs leave without effect."""
        reads_files = bool(config.val_data)
        if not reads_files:
            columns = ("image_column", "caption_column")
            config.refuse(columns, "pairs=")
        if not isinstance(self.pairs, Dataset):
            return
        config.refuse(("shuffle_buffer", "crop_scale", "flip"), "pairs=")
        if self.towers is not None and not reads_files:
            config.refuse(["image_size"], "pairs= and towers=")

    def _check_samplers(self, config: TrainConfig) -> None:
        """Refuses samplers that exclude each other, or have nothing to order."""
        if self.sampler is None and self.batch_sampler is None:
            return
        if self.sampler is not None and self.batch_sampler is not None:
            raise InputError("sampler= and batch_sampler= exclude each other")
        if self.pairs is None or hasattr(self.pairs, "fingerprint"):
            raise InputError(
                "a sampler orders the rows of a Dataset: give one as pairs="
            )
        if self.batch_sampler is not None and not config.batch_size:
            raise InputError(
                "batch_sampler= needs batch_size, the size of its largest batch"
            )

    def order(self, rows: int, config: TrainConfig) -> SamplerOrder | None:
        """The order that a sampler of the caller makes; None without one."""
        seed = config.seed
        if self.batch_sampler is not None:
            return SamplerOrder(self.batch_sampler, rows, seed, config.batch_size)
        if self.sampler is not None:
            return SamplerOrder(self.sampler, rows, seed)
        return None


def is_family(objective: nn.Module) -> bool:
    """Whether a loss is one of the family; one that extends the class may compute
    something else.
    """
    return type(objective) is ContrastiveObjective


def _name_of(part: object) -> str:
    """The name of a part's class or function, wherever it was defined."""
    if isinstance(part, Sequence):  # optimisers with their predicates
        return ", ".join(_name_of(make) for _, make in part)
    while isinstance(part, functools.partial):
        part = part.func
    named: Any = part if hasattr(part, "__qualname__") else type(part)
    return str(named.__qualname__).rpartition("<locals>.")[2]


def open_pairs(
    config: TrainConfig,
    custom_pairs: GivenPairs | None = None,
    custom_held_out: GivenPairs | None = None,
) -> tuple[Pairs, Pairs | None]:
    """The training pairs and the held-out pairs, if there are any: the caller's own,
    else the configuration's.
    """
    share = config.val_split
    pairs, held_out = _as_pairs(custom_pairs), _as_pairs(custom_held_out)
    if share and isinstance(pairs, Items):
        raise InputError(
            f"val_split is {share}, but pairs= is a Dataset; split it yourself, and"
            " give a part as held_out="
        )
    sources: Any = _open(config.data, config) if pairs is None else [pairs]
    if share:
        return _without_held_out(sources, share)
    if held_out is None and config.val_data:
        held_out = mix(_open(config.val_data, config))
    return mix(sources) if pairs is None else pairs, held_out


def _as_pairs(pairs: GivenPairs | None) -> Any:
    """The pairs as training reads them: a source as it is, a Dataset as Items."""
    if pairs is None or hasattr(pairs, "fingerprint"):
        return pairs
    return Items(cast(Any, pairs))


def _open(specs: Sequence[str], config: TrainConfig) -> list[Source]:
    open_ = partial(
        open_source,
        image_column=config.image_column,
        caption_column=config.caption_column,
    )
    return [open_(spec) for spec in specs]


def _without_held_out(sources: Sequence[Source], share: float) -> tuple[Source, Source]:
    """The pairs without a share of them, always the same, and that share."""
    logger.info("reading all pairs once, to hold some out (--val-split) …")
    rows = on_rank_zero(lambda: choose_held_out(sources, share), slow=True)
    source, held_out = split(sources, rows)
    if rank() == 0:
        logger.info(
            "%d of %d pairs are held out; none has a picture or caption of the others",
            len(held_out),
            len(source) + len(held_out),
        )
    return source, held_out


def same_on_every_rank(pairs: Pairs) -> Fingerprint:
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
    pairs: Pairs,
    encoder: DualEncoder,
    config: TrainConfig,
    device: torch.device,
    *,
    train: bool = True,
    whole: bool = False,
    order: SamplerOrder | None = None,
) -> Loader:
    """This rank's training batches, or those of held-out pairs: all of them, in order
    and without augmentation; ``whole``: towers or loss take the whole batch.
    """
    size, least = config.batch_size, 2 * world_size()
    if train and size < least:
        raise InputError(
            f"batch_size is {size} for {world_size()} processes; it must be {least} or"
            " more"
        )
    if isinstance(pairs, Items):
        return ItemLoader(
            pairs,
            size,
            train=train,
            whole=whole,
            order=order,
            seed=config.seed,
            workers=config.workers,
            rank=rank(),
            world_size=world_size(),
        )
    augmented = TrainTransform(
        encoder.image_size, scale=config.crop_scale, flip=config.flip
    )
    tokenize: Any = encoder.tokenizer
    # Shared padding is left out where that is exact; a compiled tower wants one shape.
    if encoder.trims_texts and not config.compile:
        tokenize = partial(trimmed_tokens, encoder.tokenizer)
    return PairLoader(
        pairs,
        augmented if train else encoder.preprocess,
        tokenize,
        size,
        shuffle=train,
        drop_last=train,
        shuffle_buffer=config.shuffle_buffer if train else None,
        pin_memory=train and device.type == "cuda",
        by_picture=True,
        seed=config.seed,
        workers=config.workers,
        rank=rank(),
        world_size=world_size(),
    )


def make_encoder(config: TrainConfig, towers: nn.Module | None = None) -> DualEncoder:
    """The towers to start from, on the CPU: given, by name, or loaded."""
    if towers is not None:
        return GivenTowers(towers, config.image_size)
    if config.init is None:
        return create_model(
            config.model or DEFAULT_MODEL,
            image_size=config.image_size,
            seed=config.seed,
        )
    encoder = load_model(config.init, device="cpu")
    encoder.check_weights()
    if encoder.config.kind in ("vectors", "aligned"):
        command = "align" if encoder.config.kind == "aligned" else "vectors"
        raise InputError(
            f"init {config.init!r} holds heads; `cloob train {command}` begins anew"
        )
    return encoder


def make_loss(config: TrainConfig, custom: nn.Module | None) -> ContrastiveObjective:
    """The caller's loss, else the configuration's; over several ranks it gathers."""
    if custom is not None and is_family(custom):
        assert isinstance(custom, ContrastiveObjective)
        custom.gather = world_size() > 1
        return custom
    if custom is not None:
        kind = BatchObjective if takes(custom, "batch") else GivenObjective
        return kind(custom)  # type: ignore[return-value] # has what training uses
    try:
        return make_objective(
            config.objective, gather=world_size() > 1, **config.given_scales()
        )
    except (ValueError, TypeError) as error:
        raise InputError(f"objective {config.objective!r}: {error}") from error
