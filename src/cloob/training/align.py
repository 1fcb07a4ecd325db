"""Heads on two frozen encoders, or on two files of vectors: features are computed once and kept.

All else is the ordinary loop's: a ``FeatureLoader`` takes the place of the ``PairLoader``; its batches hold features
where the others hold pixels and tokens. ``--clean`` leaves training pairs out, never held-out ones.
"""

from __future__ import annotations

import contextlib
import csv
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cloob.cache import Cache
from cloob.data.batch import Batch, Skip
from cloob.data.loader import Loader, PairLoader
from cloob.data.order import EpochOrder, Part
from cloob.data.source import Source, content_key, spread
from cloob.data.sources.arrow import reading
from cloob.data.vectors import VectorPairs, open_pairs
from cloob.distributed import no_timeout, on_rank_zero, rank, world_size
from cloob.errors import counted
from cloob.functional.suspects import suspicion
from cloob.models.aligned.encoders import open_image_encoder, row_keys
from cloob.models.aligned.encoders import open_text_encoder as open_text
from cloob.models.aligned.heads import Head, Standardise
from cloob.models.aligned.model import AlignedEncoder, VectorEncoder, aligned_encoder
from cloob.models.load import load_model
from cloob.objective import ContrastiveObjective
from cloob.training.config import TrainConfig
from cloob.training.config.checks import wrong
from cloob.training.log import check_fraction

logger = logging.getLogger(__name__)

SUSPECTS_FILE = "suspects.csv"
_LEAST = 100  # distinct ids for --clean
_BATCH = 128
LeftOut = list[tuple[str, float]]  # the keys and scores of pairs, lowest first


@dataclass(frozen=True)
class Features:
    """The usable pairs of a source as the frozen encoders see them."""

    images: Tensor  # (N, F) float32
    texts: Tensor  # (N, F') float32
    ids: Tensor  # (N,) int64 caption ids
    keys: tuple[str, ...]
    skipped: tuple[Skip, ...] = ()  # the pairs that cannot be used

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, places: np.ndarray) -> tuple[Tensor, Tensor, Tensor, tuple[str, ...]]:
        index = torch.from_numpy(places)
        return self.images[index], self.texts[index], self.ids[index], tuple(self.keys[i] for i in places.tolist())

    def only(self, places: np.ndarray) -> Features:
        """Some of the pairs."""
        return Features(*self.take(places), self.skipped)


def cleaned(pairs: Features | VectorPairs, how: str, name: str) -> tuple[Features | VectorPairs, LeftOut]:
    """The pairs without the suspicious ones, ``"auto"`` or a share of all, and those; every rank calls this."""

    def judge() -> tuple[np.ndarray, LeftOut]:
        a, b, ids, keys = pairs.take(np.arange(len(pairs)))
        distinct = len(torch.unique(ids))
        if distinct < _LEAST:
            wrong(f"{name}: {distinct} distinct ids; --clean needs {_LEAST} or more")
        found = suspicion(a, b, ids)
        order = found.scores.argsort().numpy()
        count = found.count() if how == "auto" else round(float(how) * len(order))
        return np.sort(order[count:]), [(keys[place], float(found.scores[place])) for place in order[:count]]

    kept, left_out = on_rank_zero(judge, slow=True)
    if rank() == 0:
        message = "%s of %s training pairs are left out (--clean %s); %s lists them"
        logger.info(message, f"{len(left_out):,}", f"{len(pairs):,}", how, SUSPECTS_FILE)
    return pairs.only(kept), left_out


def write_left_out(run: Path, left_out: LeftOut) -> None:
    """Lists the pairs that a run leaves out."""
    with (run / SUSPECTS_FILE).open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("pair", "score"), *left_out])


def as_vectors(features: Features | VectorPairs, name: str) -> VectorPairs:
    """Features as pairs of vectors."""
    if isinstance(features, VectorPairs):
        return features
    rows = np.broadcast_to(np.arange(len(features))[:, None], (len(features), 2))
    return VectorPairs(name, features.images.numpy(), features.texts.numpy(), rows, features.ids.numpy())


def make_aligned(config: TrainConfig) -> AlignedEncoder:
    """The two encoders, opened, with fresh heads, whose weights depend on the seed alone."""
    align = config.align
    assert align.image_encoder is not None and align.text_encoder is not None
    image = open_image_encoder(align.image_encoder, load_model, config.towers.image_size)
    text = open_text(align.text_encoder, load_model)
    way: Standardise = "one" if align.standardise is None or align.standardise == "auto" else align.standardise
    heads = new_heads(config, (image.features, text.features), (way, way))
    names = {"image_encoder": align.image_encoder, "text_encoder": align.text_encoder}
    encoder = aligned_encoder(image, text, heads[0], heads[1], names)
    encoder.on_features = True
    return encoder


def new_heads(
    config: TrainConfig, widths: tuple[int, int], standardise: Sequence[Standardise] = ("one", "one")
) -> list[Head]:
    """Fresh heads for features of these widths; their weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.run.seed)
        kind, embed_dim, dropout = config.align.heads().values()
        if config.loss.objective == "cca":  # its weights are singular values, so a direction more does no harm
            kind, embed_dim, dropout = "linear", min(config.align.embed_dim or max(widths), *widths), 0.0
        return [Head(width, embed_dim, kind, dropout, how) for width, how in zip(widths, standardise, strict=True)]


def head_settings(encoder: AlignedEncoder) -> dict[str, Any]:
    """What ``AlignConfig`` would have to say for these heads."""
    options = encoder.model.image_head.options
    return {"head": options["kind"], "embed_dim": options["embed_dim"], "head_dropout": options["dropout"]}


@dataclass
class Chosen:
    """What the closed form took; see ``functional.cca``."""

    ridge: float
    power: float
    by_column: bool


class ClosedForm(ContrastiveObjective):
    """Stands where a run has its objective; its value is NaN, as no loss was minimised."""

    def __init__(self) -> None:
        super().__init__(hopfield=False)
        self.chosen: Chosen | None = None

    def config(self) -> dict[str, Any]:
        """What ``objective.json`` holds."""
        return {"closed_form": "cca", **(asdict(self.chosen) if self.chosen else {})}

    def forward(self, image_features: Tensor, *_: Any, **__: Any) -> Tensor:
        return image_features.new_full((), torch.nan)


class FeatureLoader(Loader):
    """A ``Loader`` of features; the first batch of the first epoch, on rank 0, lists all pairs that cannot be used."""

    left_out: LeftOut | None = None  # by --clean

    def __init__(self, features: Features | VectorPairs, name: str, *, batch_size: int, seed: int, train: bool) -> None:
        order = EpochOrder([Part((len(features),))], seed=seed, shuffle=train)
        super().__init__(name, order, batch_size, drop_last=train, rank=rank(), world_size=world_size())
        self.features = features
        self.by_id = isinstance(features, VectorPairs)

    def _batches(self, epoch: int, starts: range, rows: Callable[[int], np.ndarray]) -> Iterator[Batch]:
        for start in starts:
            images, texts, ids, keys = self.features.take(rows(start))
            yield Batch(images, texts, ids, keys, self.features.skipped if epoch == start == rank() == 0 else ())


def feature_loader(
    source: Source, encoder: AlignedEncoder, config: TrainConfig, device: torch.device, cache: Cache, *, train: bool
) -> FeatureLoader:
    """The features of a source in batches; computed here unless they are cached. Fits fresh heads when training."""
    limit = config.pairs.max_bad_fraction
    encoder = encoder.to(device)
    # Named by what they are made from: both encoders, by which `cloob eval` finds them, and the bytes of all pairs.
    key = on_rank_zero(lambda: "-".join((*encoder.encoder_keys(), content_key(source)[:20])), slow=True)

    def checked(features: Features) -> Features:
        kind, total = "samples" if train else "held-out pairs", len(features) + len(features.skipped)
        check_fraction(source.name, kind, features.skipped, total, limit)
        return features

    def make(target: Path) -> None:  # what is refused is not kept: the pictures may be there again tomorrow
        features, rows = _compute(source, encoder, config.pairs.workers, target.touch)
        _write(target, checked(features), rows)

    def get() -> Features:
        return checked(_read(cache.get("features", f"{key}.safetensors", make)))

    # Every rank comes here, and rank 0 goes first. A rank on another host has another cache, and computes them there.
    first: list[Features] = []
    on_rank_zero(lambda: first.append(get()), slow=True)
    with no_timeout():
        features = first[0] if first else get()
    if train and config.towers.init is None:  # heads that were trained before keep their standardisation
        encoder.fit(features.images, features.texts)
    return loader_of(features, source.name, config, train=train)


def loader_of(features: Features | VectorPairs, name: str, config: TrainConfig, *, train: bool) -> FeatureLoader:
    """Features in batches, when training without those that --clean leaves out."""
    left_out = None
    if train and config.align.clean is not None:
        features, left_out = cleaned(features, config.align.clean, name)
    shuffles, seed = train and config.loss.objective != "cca", config.run.seed
    loader = FeatureLoader(features, name, batch_size=config.run.batch_size, seed=seed, train=shuffles)
    loader.left_out = left_out
    return loader


def _compute(
    source: Source, encoder: AlignedEncoder, workers: int, still_running: Callable[[], object]
) -> tuple[Features, list[Tensor]]:
    """Features of all pairs, and (N, 16) uint8 keys of pictures and texts, by which `cloob eval` finds them."""
    preprocess, tokenizer = encoder.preprocess, encoder.tokenizer
    loader = PairLoader(source, preprocess, tokenizer, _BATCH, shuffle=False, drop_last=False, workers=workers)
    parts: list[tuple[Tensor, ...]] = []
    keys: list[str] = []
    skipped: list[Skip] = []
    shown = -1
    with contextlib.closing(loader):
        for batch in loader.epoch(0):
            still_running()
            skipped += batch.skipped
            keys += batch.keys
            if len(batch):
                images, texts = encoder.features(batch.images, batch.tokens)
                parts.append((images.cpu(), texts.cpu(), batch.ids, row_keys(batch.images), row_keys(batch.tokens)))
            place = len(keys) + len(skipped)
            if place * 10 // len(source) > shown:
                shown = place * 10 // len(source)
                logger.info("%s: features of %d of %d pairs", source.name, place, len(source))
    columns = [torch.cat(column) for column in zip(*parts, strict=True)] if parts else [torch.empty(0)] * 5
    images, texts, ids, *rows = columns
    return Features(images, texts, ids, tuple(keys), tuple(skipped)), rows


def _write(path: Path, features: Features, rows: Sequence[Tensor]) -> None:
    tensors = {"images": features.images, "texts": features.texts, "ids": features.ids}
    tensors |= {"images_rows": rows[0], "texts_rows": rows[1]}
    skipped = [(skip.key, skip.reason, skip.detail) for skip in features.skipped]
    metadata = {"keys": json.dumps(features.keys), "skipped": json.dumps(skipped)}
    path.write_bytes(save(tensors, metadata=metadata))


def _read(path: Path) -> Features:
    with reading(path, SafetensorError), safe_open(path, framework="pt") as file:
        images, texts, ids = (file.get_tensor(name) for name in ("images", "texts", "ids"))
        keys, skipped = (json.loads(file.metadata()[name]) for name in ("keys", "skipped"))
        return Features(images, texts, ids, tuple(keys), tuple(Skip(*skip) for skip in skipped))


_FITTED, _FITTED_NUMBERS = 32_768, 1 << 24  # rows, and numbers of a side
_FEW = 20  # held-out ids: one more or less found is 5 points of recall


def open_vectors(config: TrainConfig) -> tuple[VectorPairs, VectorPairs | None]:
    files, share = config.vectors, config.pairs.val_split
    assert files.a is not None and files.b is not None
    pairs = open_pairs(files.a, files.b, files.ids, files.a_ids, files.b_ids)
    held_out = None
    if files.val_a is not None and files.val_b is not None:
        held_out = open_pairs(files.val_a, files.val_b, files.val_ids)
        for side in ("a", "b"):
            width, other = (getattr(each, side).shape[1] for each in (pairs, held_out))
            if width != other:
                wrong(f"val_{side} has {other:,} columns, {side} has {width:,}")
    for each in (pairs, held_out):
        if each is not None:
            total = len(each) + len(each.skipped)
            check_fraction(each.name, "pairs", each.skipped, total, config.pairs.max_bad_fraction)
    return with_held_out(pairs, held_out, share)


def with_held_out(
    pairs: VectorPairs, held_out: VectorPairs | None, share: float
) -> tuple[VectorPairs, VectorPairs | None]:
    """The training pairs and the held-out ones: those that are given, or a ``share`` of the ids."""
    if share:
        ids = len(np.unique(pairs.ids))
        if ids < 4:
            wrong(f"{pairs.name}: {counted(ids, 'ids')}; 2 to train on and 2 to hold out are needed")
        pairs, held_out = pairs.split(share)
    if held_out is not None and (ids := len(np.unique(held_out.ids))) < _FEW:
        logger.warning("%s held out: their recall means little", counted(ids, "ids"))
    return pairs, held_out


def make_vector_encoder(config: TrainConfig, pairs: VectorPairs) -> VectorEncoder:
    """Fresh heads, standardised by the training pairs: by all, or by 32,768 evenly spread ones (fewer wide ones)."""
    most = max(2, min(_FITTED, _FITTED_NUMBERS // max(pairs.a.shape[1], pairs.b.shape[1])))
    a, b, *_ = pairs.take(np.array(spread(len(pairs), most)))
    for side, rows in (("a", a), ("b", b)):
        if bool((rows == rows[0]).all()):
            logger.warning("all rows of %s are equal: nothing can be learned from them", side)
    asked = config.align.standardise or "auto"
    ways = [_way(side) if asked == "auto" else asked for side in (a, b)]
    if asked == "auto" and "column" in ways:
        sides = " and ".join(f"--{side}" for side, way in zip("ab", ways, strict=True) if way == "column")
        message = "columns of %s vary unlike: each is divided by its own spread (--standardise one: all alike)"
        logger.info(message, sides)
    of_a, of_b = new_heads(config, (a.shape[1], b.shape[1]), ways)
    encoder = VectorEncoder(of_a, of_b)
    encoder.fit(a, b)
    return encoder


def _way(rows: Tensor) -> Standardise:
    """By column where one scale would all but hide half of the columns; features of an encoder keep one scale."""
    variance = rows[:: -(-len(rows) // 4096)].double().var(0, unbiased=False)
    return "column" if variance.median() < 0.01 * variance.mean() else "one"
