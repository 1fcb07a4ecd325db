"""One run from its towers to its record: the library's steps on the cached pictures."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.machine import processor
from benchmarks.pictograms.data import (
    Augmented,
    Data,
    Labelled,
    Pairs,
    load,
    pixels,
    with_wrong_captions,
)
from benchmarks.studies import records
from benchmarks.studies.cells import TowerCell, as_config
from benchmarks.studies.measures import (
    build_objective,
    retrieves,
    score_rows,
    score_set,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cloob.data.order import EpochOrder, ShardSizes
from cloob.distributed import Layout
from cloob.evaluation.embed import embed_texts, evaluating
from cloob.evaluation.measures import class_embeddings
from cloob.models.encoder import DualEncoder
from cloob.models.towers import create_model
from cloob.training.config import TrainConfig
from cloob.training.optim import make_optimizer, make_schedule
from cloob.training.step import StepBatch, Stepper, TowersWithLoss

STUDY = Path(__file__).parent
WRONG = 0.4
"""Share of wrong captions of the runs of the stage ``wrong``."""
CURVE_POINTS = 8
"""How often test scores are taken along the run."""
_BATCH = 500
_BAD_STEPS = 50

cell_of = TowerCell.from_config


def runner(data: Path, cache: Path) -> Callable[[TowerCell], dict[str, Any]]:
    """How a run is done."""
    right = load(data, cache, create_model("tiny-resnet", seed=0))
    for name, labelled in right.test.items():
        labels = np.array(labelled.labels)
        records.write_set(name, labels, len(labelled.classnames), STUDY)

    def do(cell: TowerCell) -> dict[str, Any]:
        seen = right
        if cell.stage == "wrong":
            seen = with_wrong_captions(right, WRONG, cell.seed)
        return Run(cell, seen).go()

    return do


def embed_images(encoder: DualEncoder, images: np.ndarray) -> Tensor:
    """(n, D) float32 unit rows, in evaluation mode and without gradients."""
    with evaluating(encoder):
        parts = [
            encoder.encode_image(pixels(images[i : i + _BATCH])).cpu()
            for i in range(0, len(images), _BATCH)
        ]
    return torch.cat(parts)


def score_pairs(encoder: DualEncoder, pairs: Pairs) -> dict[str, float]:
    images = embed_images(encoder, pairs.images)
    texts = embed_texts(encoder, pairs.captions)
    return score_rows(images, texts, pairs.captions)


def score_zeroshot(
    encoder: DualEncoder, sets: Mapping[str, Labelled]
) -> dict[str, dict[str, Any]]:
    """As ``score_set``, by set."""
    scores = {}
    for name, data in sets.items():
        classes = class_embeddings(encoder, data.classnames, data.templates)
        images = embed_images(encoder, data.images)
        scores[name] = score_set(images, np.array(data.labels), classes)
    return scores


class Run:
    """One cell being trained."""

    def __init__(self, cell: TowerCell, data: Data) -> None:
        self.cell = cell
        self.data = data
        setting = cell.setting
        self.encoder = create_model(cell.tower, seed=cell.seed)
        self.objective = build_objective(cell.method, setting)
        optim = TrainConfig(
            lr=setting.lr, weight_decay=setting.weight_decay, schedule="cosine"
        )
        optimizer = make_optimizer(
            self.encoder, self.objective, optim, torch.device("cpu")
        )
        towers = TowersWithLoss(self.encoder, self.objective, "bf16")
        self.stepper = Stepper(towers, optimizer)
        self.batches = Augmented(data.pairs["train"], cell.seed)
        self.steps_an_epoch = len(data.pairs["train"]) // setting.batch_size
        self.total = cell.epochs * self.steps_an_epoch
        self.schedule = make_schedule(optim, self.total)
        self.step = 0
        self.skipped = 0
        self.losses: list[float] = []
        self.curve: list[dict[str, Any]] = []
        torch.manual_seed(cell.seed)

    def go(self) -> dict[str, Any]:
        began = time.process_time()
        n = len(self.data.pairs["train"])
        size = self.cell.setting.batch_size
        for epoch in range(self.cell.epochs):
            pairs = EpochOrder([ShardSizes((n,))], self.cell.seed).epoch(epoch)
            order = pairs(np.arange(n))
            bad_before = self.skipped
            for place in range(self.steps_an_epoch):
                self._train_on(epoch, order[place * size : (place + 1) * size])
            if self.skipped - bad_before >= _BAD_STEPS:
                raise RuntimeError(f"{self.cell.id}: the loss is not finite")
            self._look(epoch + 1)
        return self._record() | {"cpu_seconds": round(time.process_time() - began, 1)}

    def _train_on(self, epoch: int, indices: np.ndarray) -> None:
        """One step on these pairs, as augmented in this epoch."""
        self.encoder.train()
        images, tokens, ids = self.batches.batch(epoch, indices)
        batch = StepBatch(
            (images, tokens),
            Layout((len(images),)),
            ids if self.cell.setting.mask_duplicates else None,
            retrieves(self.cell.setting, self.step / self.total),
        )
        # In bfloat16 torch's fused attention takes up to five times as long for
        # sequences as short as these on a CPU.
        with sdpa_kernel(SDPBackend.MATH):
            result = self.stepper.launch(batch, self.schedule(self.step)).read()
        self.step += 1
        if result.finite:
            self.losses.append(result.loss)
        else:
            self.skipped += 1

    def _look(self, epoch: int) -> None:
        """Scores after an epoch: validation pairs always, test sets at a few points."""
        recent = self.losses
        self.losses = []
        line: dict[str, Any] = {
            "epoch": epoch,
            "step": self.step,
            "loss": round(sum(recent) / len(recent), 5) if recent else None,
            "inv_tau": round(float(self.objective.inv_tau.detach()), 4),
            "val": score_pairs(self.encoder, self.data.pairs["val"]),
        }
        every = max(1, math.ceil(self.cell.epochs / CURVE_POINTS))
        if epoch % every == 0 and epoch < self.cell.epochs:
            scores = score_zeroshot(self.encoder, self.data.test)
            line["zeroshot"] = {name: found["acc1"] for name, found in scores.items()}
        self.curve.append(line)

    def _record(self) -> dict[str, Any]:
        """Everything that tables are made from; no name of this machine, no path."""
        zeroshot = score_zeroshot(self.encoder, self.data.test)
        captions = self.data.pairs["tuxpaint-captions"]
        last = self.curve[-1]
        last["zeroshot"] = {name: found["acc1"] for name, found in zeroshot.items()}
        return {
            "id": self.cell.id,
            "config": as_config(self.cell),
            "steps": self.step,
            "skipped_steps": self.skipped,
            "machine": {"cpu": processor(), "torch": torch.__version__},
            "val": last["val"],
            "zeroshot": zeroshot,
            "retrieval": {"tuxpaint-captions": score_pairs(self.encoder, captions)},
            "curve": self.curve,
        }
