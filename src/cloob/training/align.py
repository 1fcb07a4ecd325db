"""Heads on two frozen encoders, or on two files of vectors: features are computed once
and cached.

The rest is the ordinary loop. A ``FeatureLoader``, whose batches hold features, takes
the place of the ``PairLoader``.
"""

from __future__ import annotations

import contextlib
import csv
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cloob.cache import Cache
from cloob.data.bad import check_fraction
from cloob.data.batch import Batch, Skip
from cloob.data.loader import Loader, PairLoader
from cloob.data.order import EpochOrder, Pictures, ShardSizes
from cloob.data.source import Source, content_key, pictures_of, spread
from cloob.data.sources.arrow import reading
from cloob.data.vectors import VectorPairs, open_pairs
from cloob.distributed import no_timeout, on_rank_zero, rank, world_size
from cloob.errors import InputError, counted
from cloob.heads.head import Head
from cloob.heads.suspects import clean
from cloob.models.aligned.encoders import open_image_encoder, row_keys
from cloob.models.aligned.encoders import open_text_encoder as open_text
from cloob.models.aligned.model import AlignedEncoder, VectorEncoder, aligned_encoder
from cloob.models.encoder import DualEncoder
from cloob.models.load import load_model
from cloob.models.runs import RUN_CONFIG_FILE, SUSPECTS_FILE
from cloob.objective import ContrastiveObjective
from cloob.training.config import TrainConfig

logger = logging.getLogger(__name__)

_LEAST = 100  # distinct ids for --clean
_BATCH = 128
_KEPT = ("images", "texts", "ids", "images_rows", "texts_rows")
# the keys, scores and probabilities of pairs, lowest score first, and their places
LeftOut = list[tuple[str, str, str, int]]


def cleaned(pairs: VectorPairs, config: TrainConfig) -> tuple[VectorPairs, LeftOut]:
    """The pairs without suspicious ones, and these, which a resumed run reads from its
    folder; called on every rank.
    """
    how, run = config.align.clean or "auto", config.save.out
    file = run / SUSPECTS_FILE

    def left_out() -> LeftOut:
        if (
            config.save.resume != "none"
            and file.is_file()
            and TrainConfig.from_json(run / RUN_CONFIG_FILE).align.clean == how
        ):
            with (
                reading(file, ValueError),
                file.open(encoding="utf-8", newline="") as lines,
            ):
                return [
                    (key, score, probability, int(place))
                    for key, score, probability, place in list(csv.reader(lines))[1:]
                ]
        a, b, ids, keys = pairs.take(np.arange(len(pairs)))
        if (distinct := len(torch.unique(ids))) < _LEAST:
            raise InputError(
                f"{pairs.name}: {distinct} distinct ids; --clean needs {_LEAST} or more"
            )
        result = clean(a, b, ids, how)
        low, high = result.interval
        message = "wrong training pairs, by their scores: %s (95 %%: %s to %s)"
        logger.info(message, f"{result.share:.1%}", f"{low:.1%}", f"{high:.1%}")
        return [
            (
                keys[place],
                f"{result.scores[place]:.6g}",
                f"{result.probability[place]:.4f}",
                place,
            )
            for place in result.left_out().tolist()
        ]

    listed = on_rank_zero(left_out, slow=True)
    if rank() == 0:
        message = "%s of %s training pairs are left out (--clean %s); %s lists them"
        logger.info(message, f"{len(listed):,}", f"{len(pairs):,}", how, SUSPECTS_FILE)
    return (
        pairs.only(np.delete(np.arange(len(pairs)), [place for *_, place in listed])),
        listed,
    )


def make_aligned(config: TrainConfig) -> AlignedEncoder:
    """The two encoders, opened, with fresh heads, whose weights depend on the seed
    alone.
    """
    align = config.align
    assert align.image_encoder is not None and align.text_encoder is not None
    image = open_image_encoder(
        align.image_encoder, load_model, config.towers.image_size
    )
    text = open_text(align.text_encoder, load_model)
    way = "one" if align.standardise in (None, "auto") else align.standardise
    heads = new_heads(config, (image.features, text.features), (way, way))
    names = {"image_encoder": align.image_encoder, "text_encoder": align.text_encoder}
    encoder = aligned_encoder(image, text, *heads, names)
    encoder.on_features = True
    return encoder


def new_heads(
    config: TrainConfig, widths: tuple[int, int], standardise: Sequence[Any]
) -> tuple[Head, Head]:
    """Fresh heads for features of these widths; their weights depend on the seed
    alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.run.seed)
        kind, embed_dim, dropout = config.align.heads().values()
        if (
            config.loss.objective == "cca"
        ):  # its weights are singular values, so a direction more does no harm
            kind, embed_dim, dropout = (
                "linear",
                max(2, min(config.align.embed_dim or max(widths), *widths)),
                0.0,
            )
        first, second = (
            Head(n, embed_dim, kind, dropout, how)
            for n, how in zip(widths, standardise, strict=True)
        )
        return first, second


def head_settings(encoder: DualEncoder) -> dict[str, Any]:
    """What ``AlignConfig`` would have to say for the heads of this encoder."""
    options = encoder.model.image_head.options
    return {
        "head": options["kind"],
        "embed_dim": options["embed_dim"],
        "head_dropout": options["dropout"],
    }


class ClosedForm(ContrastiveObjective):
    """The objective of a run with ``cca``: its value is NaN, as no loss was
    minimised.
    """

    def __init__(self) -> None:
        super().__init__(hopfield=False)
        self.chosen: dict[
            str, Any
        ] = {}  # ridge, power, by_column (see ``functional.cca``)

    def config(self) -> dict[str, Any]:
        return {"closed_form": "cca", **self.chosen}

    def forward(self, image_features: Tensor, *_: Any, **__: Any) -> Tensor:
        return image_features.new_full((), torch.nan)


class FeatureLoader(Loader):
    """A ``Loader`` of features.

    The first batch of the first epoch, on rank 0, lists all pairs that cannot be used.

    A picture with several captions is one pair of an epoch; for the closed form every
    caption is one.
    """

    left_out: LeftOut | None = None

    def __init__(
        self, pairs: VectorPairs, config: TrainConfig, *, train: bool, by_id: bool
    ) -> None:
        name = pairs.name
        if train and config.align.clean is not None:
            pairs, self.left_out = cleaned(pairs, config)
        learns = train and config.loss.objective != "cca"
        _, first, which = np.unique(
            pairs.rows[:, 0], return_index=True, return_inverse=True
        )
        by_picture = (learns or not train) and len(first) < len(pairs)
        self._pictures = Pictures(first[which], [len(pairs)]) if by_picture else None
        count = len(first) if by_picture else len(pairs)
        order = EpochOrder([ShardSizes((count,))], seed=config.run.seed, shuffle=learns)
        super().__init__(
            name,
            order,
            config.run.batch_size,
            drop_last=learns,
            rank=rank(),
            world_size=world_size(),
        )
        self.pairs, self.by_id = pairs, by_id
        self._seed = config.run.seed if learns else None

    def _batches(
        self, epoch: int, starts: range, rows: Callable[[int], np.ndarray]
    ) -> Iterator[Batch]:
        for start in starts:
            places = rows(start)
            if self._pictures is not None:
                drawn = (
                    self._pictures.row(place, self._seed, epoch)
                    for place in places.tolist()
                )
                places = np.fromiter(drawn, np.int64)
            images, texts, ids, keys = self.pairs.take(places)
            yield Batch(
                (images, texts),
                ids,
                keys,
                self.pairs.skipped if epoch == start == rank() == 0 else (),
            )


def feature_loader(
    source: Source,
    encoder: DualEncoder,
    config: TrainConfig,
    device: torch.device,
    cache: Cache,
    *,
    train: bool,
) -> FeatureLoader:
    """The features of a source in batches; computed here unless they are cached.

    Fits fresh heads when training.
    """
    encoder = encoder.to(device)
    assert isinstance(encoder, AlignedEncoder)
    # Named by what they are made from: both encoders, by which `cloob eval` finds them,
    # and the bytes of all pairs.
    key = on_rank_zero(
        lambda: "-".join((*encoder.encoder_keys(), content_key(source)[:20])), slow=True
    )

    def get() -> VectorPairs:
        path = cache.get(
            "features",
            f"{key}.safetensors",
            partial(_compute, source, encoder, config.pairs.workers),
        )
        with reading(path, SafetensorError), safe_open(path, framework="pt") as file:
            keys, skips = (
                json.loads(file.metadata()[name]) for name in ("keys", "skipped")
            )
            images, texts, ids, pixels = (
                file.get_tensor(name).numpy() for name in _KEPT[:4]
            )
        skipped, rows = (
            tuple(Skip(*skip) for skip in skips),
            np.arange(len(keys)).repeat(2).reshape(-1, 2),
        )
        if pictures_of(source) is not None:  # with several captions
            _, first, rows[:, 0] = np.unique(
                pixels, axis=0, return_index=True, return_inverse=True
            )
            images, keys = images[first], [keys[row] for row in first]
        kind = "samples" if train else "held-out pairs"
        check_fraction(
            source.name,
            kind,
            skipped,
            len(rows) + len(skipped),
            config.pairs.max_bad_fraction,
        )
        return VectorPairs(source.name, images, texts, rows, ids, keys, skipped)

    # Every rank comes here, and rank 0 goes first. A rank on another host has another
    # cache, and computes them there.
    first: list[VectorPairs] = []
    on_rank_zero(lambda: first.append(get()), slow=True)
    with no_timeout():
        pairs = first[0] if first else get()
    if (
        train and config.towers.init is None
    ):  # heads that were trained before keep their standardisation
        for head, side in zip(encoder.heads, (pairs.a, pairs.b), strict=True):
            cast(Head, head).fit(torch.from_numpy(np.asarray(side)))
    return FeatureLoader(pairs, config, train=train, by_id=False)


def _compute(
    source: Source, encoder: AlignedEncoder, workers: int, target: Path
) -> None:
    """Features of all pairs, and (N, 16) uint8 keys of pictures and texts, by which
    `cloob eval` finds them.
    """
    preprocess, tokenizer = encoder.preprocess, encoder.tokenizer
    loader = PairLoader(
        source,
        preprocess,
        tokenizer,
        _BATCH,
        shuffle=False,
        drop_last=False,
        workers=workers,
    )
    parts: list[tuple[Tensor, ...]] = []
    keys: list[str] = []
    skipped: list[Skip] = []
    shown = -1
    with contextlib.closing(loader):
        for batch in loader.epoch(0):
            target.touch()  # still running
            skipped += batch.skipped
            keys += batch.keys
            if len(batch):
                images, texts = encoder.features(batch.images, batch.tokens)
                parts.append(
                    (
                        images.cpu(),
                        texts.cpu(),
                        batch.ids,
                        row_keys(batch.images),
                        row_keys(batch.tokens),
                    )
                )
            place = len(keys) + len(skipped)
            if place * 10 // len(source) > shown:
                shown = place * 10 // len(source)
                logger.info(
                    "%s: features of %d of %d pairs", source.name, place, len(source)
                )
    columns = (
        [torch.cat(column) for column in zip(*parts, strict=True)]
        if parts
        else [torch.empty(0)] * len(_KEPT)
    )
    reasons = [(skip.key, skip.reason, skip.detail) for skip in skipped]
    metadata = {"keys": json.dumps(keys), "skipped": json.dumps(reasons)}
    target.write_bytes(save(dict(zip(_KEPT, columns, strict=True)), metadata=metadata))


_FITTED, _FITTED_NUMBERS = 32_768, 1 << 24  # rows, and numbers of a side
_FEW = 20  # held-out ids: one of them is 5 points of recall


def open_vectors(config: TrainConfig) -> tuple[VectorPairs, VectorPairs | None]:
    files, share = config.vectors, config.pairs.val_split
    assert files.a is not None and files.b is not None
    pairs = open_pairs(files.a, files.b, files.ids, files.a_ids, files.b_ids)
    held_out = None
    if files.val_a is not None and files.val_b is not None:
        held_out = open_pairs(files.val_a, files.val_b, files.val_ids)
        for side in ("a", "b"):
            width, other = (getattr(item, side).shape[1] for item in (pairs, held_out))
            if width != other:
                raise InputError(
                    f"val_{side} has {other:,} columns, {side} has {width:,}"
                )
    for item in [pairs] if held_out is None else [pairs, held_out]:
        total = len(item) + len(item.skipped)
        check_fraction(
            item.name, "pairs", item.skipped, total, config.pairs.max_bad_fraction
        )
    return with_held_out(pairs, held_out, share)


def with_held_out(
    pairs: VectorPairs, held_out: VectorPairs | None, share: float
) -> tuple[VectorPairs, VectorPairs | None]:
    """The training pairs and the held-out ones: those that are given, or a ``share`` of
    the ids.
    """
    if share:
        ids = len(np.unique(pairs.ids))
        if ids < 4:
            raise InputError(
                f"{pairs.name}: {counted(ids, 'ids')}; 2 to train on and 2 to hold out"
                " are needed"
            )
        pairs, held_out = pairs.split(share)
    if held_out is not None and (ids := len(np.unique(held_out.ids))) < _FEW:
        logger.warning("%s held out: their recall means little", counted(ids, "ids"))
    return pairs, held_out


def make_vector_encoder(config: TrainConfig, pairs: VectorPairs) -> VectorEncoder:
    """Fresh heads, standardised by the training pairs: by all, or by 32,768 evenly
    spread ones (fewer wide ones).
    """
    most = max(
        2, min(_FITTED, _FITTED_NUMBERS // max(pairs.a.shape[1], pairs.b.shape[1]))
    )
    a, b, *_ = pairs.take(np.array(spread(len(pairs), most)))
    for side, rows in (("a", a), ("b", b)):
        if bool((rows == rows[0]).all()):
            logger.warning(
                "all rows of %s are equal: nothing can be learned from them", side
            )
    requested = config.align.standardise or "auto"
    ways = [requested, requested]
    if (
        requested == "auto"
    ):  # by column where one scale would all but hide half of the columns
        variances = [
            rows[:: -(-len(rows) // 4096)].double().var(0, unbiased=False)
            for rows in (a, b)
        ]
        ways = [
            "column" if variance.median() < 0.01 * variance.mean() else "one"
            for variance in variances
        ]
        if "column" in ways:
            sides = " and ".join(
                f"--{side}"
                for side, way in zip("ab", ways, strict=True)
                if way == "column"
            )
            message = (
                "columns of %s vary unlike: they are divided by their spreads"
                " (--standardise one: all alike)"
            )
            logger.info(message, sides)
    heads = new_heads(config, (a.shape[1], b.shape[1]), ways)
    for head, rows in zip(heads, (a, b), strict=True):
        head.fit(rows)
    return VectorEncoder(*heads)
