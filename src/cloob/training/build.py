"""From a configuration to the things a run is made of, each checked before the first step."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence

import torch

from cloob.cache import Cache
from cloob.data.builder import Tokenizer
from cloob.data.loader import Loader, PairLoader
from cloob.data.mix import mix
from cloob.data.open import open_source
from cloob.data.source import Source
from cloob.data.split import choose_held_out, split
from cloob.data.transforms import TrainTransform
from cloob.data.vectors import VectorPairs
from cloob.distributed import rank, world_size
from cloob.errors import InputError
from cloob.functional.checks import float32_products
from cloob.machine import warn_of_emulated_bfloat16
from cloob.models.aligned import AlignedEncoder, VectorEncoder
from cloob.models.encoder import DualEncoder
from cloob.models.load import load_model
from cloob.models.texts import TrimmedTokenizer
from cloob.models.towers import create_model
from cloob.objective import ContrastiveObjective, make_objective
from cloob.training import align, finetune, vectors
from cloob.training.config import TrainConfig
from cloob.training.config.checks import check_start
from cloob.training.config.parts import RETRIEVING
from cloob.training.optim import warmup_steps
from cloob.training.ranks import gather_objects, on_rank_zero

logger = logging.getLogger(__name__)
DEFAULT_MODEL = "RN50"


def make_cache(config: TrainConfig) -> Cache:
    """The cache that the configuration names; what it leaves out says the environment."""
    gigabytes = config.pairs.cache_gb
    return Cache(config.pairs.cache_dir, None if gigabytes is None else int(gigabytes * 1024**3))


def open_pairs(specs: Sequence[str], config: TrainConfig) -> Source:
    """Opens one source or several as one; errors as of ``open_source``."""
    return mix(_open(specs, config))


def open_all(config: TrainConfig) -> tuple[Source | VectorPairs, Source | VectorPairs | None]:
    """As ``open_both``, also of vectors."""
    return open_both(config) if config.vectors.a is None else vectors.open_vectors(config)


def open_both(config: TrainConfig) -> tuple[Source, Source | None]:
    """The training pairs and the held-out pairs, if there are any: of their own, or held out of the training pairs."""
    pairs = config.pairs
    if not pairs.val_split:
        source = open_pairs(pairs.data, config)
        return source, open_pairs(pairs.val_data, config) if pairs.val_data else None
    sources = _open(pairs.data, config)
    if rank() == 0:
        logger.info("reading all pairs once, to hold some out (--val-split) …")
    rows = on_rank_zero(lambda: choose_held_out(sources, pairs.val_split), slow=True)
    source, held_out = split(sources, rows)
    if rank() == 0:
        total = len(source) + len(held_out)
        logger.info("%d of %d pairs are held out; none has a picture or caption of the others", len(held_out), total)
    return source, held_out


def _open(specs: Sequence[str], config: TrainConfig) -> list[Source]:
    pairs = config.pairs
    columns = {"image_column": pairs.image_column, "caption_column": pairs.caption_column}
    return [open_source(spec, **columns, cache=make_cache(config)) for spec in specs]


def fit_batch(config: TrainConfig, pairs: int) -> TrainConfig:
    """The configuration with a batch size that suits so many training pairs, unless it has one.

    A batch of the large sets' 256 would leave a small set a handful of steps, most of them warm-up. A power of two that
    makes 16 to 32 steps of an epoch keeps the number of steps alike from 128 to 8,000 pairs, and with it the epochs and
    the warm-up, a tenth of the steps.
    """
    if config.run.batch_size:
        return config
    power = 1 << max(pairs // 16, 1).bit_length() - 1
    size = max(2, 2 * world_size(), min(pairs, 256, max(8, power)))
    config = config.override(batch_size=size)
    if rank() == 0:
        steps = config.run.total_steps(pairs // size)
        warmup = warmup_steps(config.optim, steps)
        logger.info("%s pairs: batch size %d, %s steps, warm-up %s", f"{pairs:,}", size, f"{steps:,}", f"{warmup:,}")
    return config


def make_encoder(config: TrainConfig, source: Source | VectorPairs | None = None) -> DualEncoder:
    """The towers to start from, on the CPU: created by name, loaded, one of each, or frozen encoders with heads.

    Heads for vectors are made for those of ``source``.
    """
    towers = config.towers
    if isinstance(source, VectorPairs):
        return vectors.make_vector_encoder(config, source)
    if config.align.encoders():
        return align.make_aligned(config)
    if towers.init_image is not None:
        return finetune.beside_image_tower(towers.init_image, towers.model, towers.image_size, config.run.seed)
    if towers.init is None:
        return create_model(towers.model or DEFAULT_MODEL, image_size=towers.image_size, seed=config.run.seed)
    encoder = load_model(towers.init, device="cpu")
    encoder.check_weights()
    if isinstance(encoder, VectorEncoder):
        raise InputError(f"init {towers.init!r} holds heads for vectors; `cloob train vectors` begins anew")
    check_start(config, aligned=isinstance(encoder, AlignedEncoder))
    if isinstance(encoder, AlignedEncoder):
        align.check_same_heads(encoder, config)
        encoder.on_features = True
    if towers.model not in (None, encoder.name):
        raise InputError(
            f"model is {towers.model!r}, but init {towers.init!r} holds {encoder.name!r}; leave --model out"
        )
    if towers.image_size not in (None, encoder.image_size):
        raise InputError(
            f"image_size is {towers.image_size}, but init {towers.init!r} holds a model for {encoder.image_size} pixels"
        )
    return encoder


def make_loss(config: TrainConfig, encoder: DualEncoder) -> ContrastiveObjective:
    """The configuration's objective, gathering over several ranks; ``init_scales`` are those of ``encoder``."""
    overrides = config.loss.overrides()
    if config.loss.init_scales:
        trained = encoder.make_objective(**({"beta": config.loss.beta} if config.loss.beta is not None else {}))
        shared = ["inv_tau"]
        if trained.hopfield and config.loss.objective in RETRIEVING:
            shared.append("beta")
        if trained.bias is not None and config.loss.objective.startswith("siglip"):
            shared.append("bias")
        overrides = {name: trained.config()[name] for name in shared} | overrides
    try:
        return make_objective(config.loss.objective, gather=world_size() > 1, **overrides)
    except (ValueError, TypeError) as error:
        raise InputError(f"objective {config.loss.objective!r}: {error}") from error


def make_loader(
    source: Source | VectorPairs, encoder: DualEncoder, config: TrainConfig, device: torch.device
) -> Loader:
    """The training batches of this rank."""
    size = config.run.batch_size
    if size < 2 * world_size():
        raise InputError(f"batch_size is {size} for {world_size()} processes; it must be {2 * world_size()} or more")
    if isinstance(source, VectorPairs):
        return vectors.vector_loader(source, config, train=True)
    if isinstance(encoder, AlignedEncoder):
        return align.feature_loader(source, encoder, config, device, make_cache(config), train=True)
    transform = TrainTransform(encoder.image_size, scale=config.pairs.crop_scale, flip=config.pairs.flip)
    return PairLoader(
        source,
        transform,
        _tokenizer(encoder, config),
        size,
        seed=config.run.seed,
        shuffle_buffer=config.pairs.shuffle_buffer,
        rank=rank(),
        world_size=world_size(),
        workers=config.pairs.workers,
        pin_memory=device.type == "cuda",
    )


def make_val_loader(source: Source | VectorPairs, encoder: DualEncoder, config: TrainConfig) -> Loader:
    """The held-out pairs, whole, in order and without augmentation."""
    if isinstance(source, VectorPairs):
        return vectors.vector_loader(source, config, train=False)
    if isinstance(encoder, AlignedEncoder):
        return align.feature_loader(source, encoder, config, encoder.device, make_cache(config), train=False)
    return PairLoader(
        source,
        encoder.preprocess,
        _tokenizer(encoder, config),
        config.run.batch_size,
        shuffle=False,
        drop_last=False,
        rank=rank(),
        world_size=world_size(),
        workers=config.pairs.workers,
    )


def _tokenizer(encoder: DualEncoder, config: TrainConfig) -> Tokenizer:
    """The encoder's, without shared padding where that is exact; a compiled tower wants one shape."""
    trims = encoder.trims_texts and not config.run.compile
    return TrimmedTokenizer(encoder.tokenizer) if trims else encoder.tokenizer


def resolved(
    config: TrainConfig, encoder: DualEncoder, objective: ContrastiveObjective, device: torch.device
) -> TrainConfig:
    """The configuration with every default that was chosen while building filled in; every rank calls this."""
    chosen = objective.config()
    names = ["inv_tau", "learnable_inv_tau", "learnable_beta", "scale", *(["beta"] if objective.hopfield else [])]
    names += [] if objective.bias is None else ["bias"]
    leaves = {name: chosen[name] for name in names if getattr(config.loss, name) is None}
    if isinstance(encoder, AlignedEncoder):
        leaves |= align.head_settings(encoder)
    if config.towers.init is None and not isinstance(encoder, AlignedEncoder):
        leaves |= {"model": config.towers.model or encoder.name, "image_size": encoder.image_size}
    if config.run.precision == "auto":
        leaves["precision"] = "bf16" if all(gather_objects(has_bfloat16(device))) else "fp32"
    if config.run.tf32 is None:
        leaves["tf32"] = config.run.precision == "auto" and device.type == "cuda"
    if config.run.precision == "bf16" and device.type == "cpu" and rank() == 0:
        warn_of_emulated_bfloat16()
    return config.override(**leaves)


def products(config: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Inside, float32 matrix products on CUDA are as the configuration says; a GPU without TF32 takes no notice."""
    return float32_products("high") if config.run.tf32 and device.type == "cuda" else contextlib.nullcontext()


def has_bfloat16(device: torch.device) -> bool:
    """Whether a GPU computes in bfloat16 by itself; a CPU that does cannot be told from those that emulate it."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
