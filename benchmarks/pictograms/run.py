"""One run from its towers to its record: the library's steps on the cached pictures."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.machine import processor
from benchmarks.pictograms import plan, wrong
from benchmarks.pictograms.data import (
    Augmented,
    Data,
    Labelled,
    Pairs,
    load,
    pixels,
    with_wrong_captions,
)
from benchmarks.pictograms.plan import Cell, Setting
from benchmarks.studies import records
from benchmarks.studies.records import pack_numbers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cloob.data.order import EpochOrder, ShardSizes
from cloob.evaluation.embed import embed_texts, evaluating
from cloob.evaluation.measures import (
    RECALLS,
    class_embeddings,
    geometry,
    retrieval_ranks,
    zeroshot_ranks,
)
from cloob.functional import ranking
from cloob.models.encoder import DualEncoder
from cloob.models.towers import create_model
from cloob.objective import ContrastiveObjective, make_objective
from cloob.training.config.parts import OptimConfig
from cloob.training.optim import make_optimizer, make_schedule
from cloob.training.step import Stepper, TowersWithLoss


def build_objective(method: str, setting: Setting) -> ContrastiveObjective:
    overrides: dict[str, Any] = {
        "inv_tau": setting.inv_tau,
        "learnable_inv_tau": setting.learnable_inv_tau,
    }
    if setting.beta is not None:
        overrides["beta"] = setting.beta
    return make_objective(method.removesuffix("-warm"), **overrides)


def retrieves(setting: Setting, progress: float) -> bool | None:
    """Whether a step retrieves at a ``progress`` in [0, 1]; None leaves it to the
    objective.
    """
    return False if setting.option == "warm" and progress < 0.5 else None


GEOMETRY_INV_TAU, GEOMETRY_BETA = 30.0, 8.0
"""One τ⁻¹ and β for all methods: the measures are to tell embeddings apart, not
settings.
"""
_BATCH = 500


def embed_images(encoder: DualEncoder, images: np.ndarray) -> Tensor:
    """(n, D) float32 unit rows, in evaluation mode and without gradients."""
    with evaluating(encoder):
        parts = [
            encoder.encode_image(pixels(images[i : i + _BATCH])).cpu()
            for i in range(0, len(images), _BATCH)
        ]
    return torch.cat(parts)


def score_pairs(encoder: DualEncoder, pairs: Pairs) -> dict[str, float]:
    """As ``score_rows``, of held-out pairs."""
    return score_rows(
        embed_images(encoder, pairs.images),
        embed_texts(encoder, pairs.captions),
        pairs.captions,
    )


def score_rows(
    images: Tensor, texts: Tensor, captions: Sequence[str]
) -> dict[str, float]:
    """Recall@k both ways, its mean, and the paper's measures of geometry, from (n, D)
    unit rows of n pairs.
    """
    scores = recalls(images, texts, captions)
    measures = geometry(images, texts, GEOMETRY_INV_TAU, GEOMETRY_BETA)
    scores |= {
        key: value
        for key, value in measures.items()
        if not key.startswith("spectrum") and key != "n"
    }
    return {key: round(value, 6) for key, value in scores.items()}


def recalls(images: Tensor, texts: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Recall@k both ways and ``mean_recall``, the mean of all."""
    ranks = retrieval_ranks(images, texts, captions=captions)
    scores = {
        f"{way}@{k}": ranking.recall_at_k(r, k)
        for way, r in ranks._asdict().items()
        for k in RECALLS
    }
    return scores | {"mean_recall": sum(scores.values()) / len(scores)}


def score_zeroshot(
    encoder: DualEncoder, sets: Mapping[str, Labelled]
) -> dict[str, dict[str, Any]]:
    """As ``score_set``, by set."""
    scores = {}
    for name, data in sets.items():
        classes = class_embeddings(encoder, data.classnames, data.templates)
        scores[name] = score_set(
            embed_images(encoder, data.images), np.array(data.labels), classes
        )
    return scores


def score_set(images: Tensor, labels: np.ndarray, classes: Tensor) -> dict[str, Any]:
    """Zero-shot accuracies from unit rows; ``predictions`` packs the class that each
    picture is taken for.
    """
    right = torch.from_numpy(labels)
    ranks = zeroshot_ranks(images, right, classes)
    cosines = images.double() @ classes.double().T
    # As the ranks count a tie: against the right class.
    cosines[torch.arange(len(right)), right] -= 1e-12
    return {
        "acc1": round(ranking.topk_accuracy(ranks, 1), 6),
        "acc5": round(ranking.topk_accuracy(ranks, 5), 6),
        "mean_per_class_recall": round(
            float(ranking.per_class_recall(ranks < 1, right, len(classes)).nanmean()), 6
        ),
        "predictions": pack_numbers(cosines.argmax(1).numpy()),
    }


STUDY = Path(__file__).parent
CURVE_POINTS = 8
"""How often a cell's test scores are taken along the run (never looked at by the
search).
"""
_BAD_STEPS = 50


class Run:
    """One cell being trained; ``full`` takes test scores too, at ``CURVE_POINTS``
    epochs, and more at the end.
    """

    def __init__(self, cell: Cell, data: Data, full: bool = True) -> None:
        self.cell, self.data, self.full = cell, data, full
        setting = cell.setting
        self.encoder = create_model(cell.tower, seed=cell.seed)
        self.objective = build_objective(cell.method, setting)
        optim = OptimConfig(
            lr=setting.lr, weight_decay=setting.weight_decay, schedule="cosine"
        )
        self.optimizer = make_optimizer(
            self.encoder, self.objective, optim, torch.device("cpu")
        )
        self.stepper = Stepper(
            TowersWithLoss(self.encoder, self.objective, "bf16"), self.optimizer
        )
        self.batches = Augmented(data.pairs["train"], cell.seed)
        self.steps_an_epoch = len(data.pairs["train"]) // setting.batch_size
        self.total = cell.epochs * self.steps_an_epoch
        self.schedule = make_schedule(optim, self.total)
        self.step = 0
        self.skipped = 0
        self.wall = self.cpu = 0.0
        self.losses: list[float] = []
        self.curve: list[dict[str, Any]] = []
        torch.manual_seed(cell.seed)

    def go(self) -> dict[str, Any]:
        n, size, bad = len(self.data.pairs["train"]), self.cell.setting.batch_size, 0
        for epoch in range(self.cell.epochs):
            order = EpochOrder([ShardSizes((n,))], self.cell.seed).epoch(epoch)(
                np.arange(n)
            )
            for place in range(self.steps_an_epoch):
                bad = (
                    0
                    if self.train_on(epoch, order[place * size : (place + 1) * size])
                    else bad + 1
                )
                if bad >= _BAD_STEPS:
                    raise RuntimeError(
                        f"{self.cell.id}: {bad} steps in a row were not finite"
                    )
            self._look(epoch + 1)
        return self._record()

    def train_on(self, epoch: int, indices: np.ndarray) -> bool:
        """One step on these pairs, as augmented in this epoch.

        Returns whether it was finite.
        """
        wall, cpu = time.perf_counter(), time.process_time()
        self.encoder.train()
        images, tokens, ids = self.batches.batch(epoch, indices)
        hopfield = retrieves(self.cell.setting, self.step / self.total)
        ids_or_none = ids if self.cell.setting.mask_duplicates else None
        # In bfloat16 torch's fused attention takes up to five times as long for
        # sequences as short as these on a CPU.
        with sdpa_kernel(SDPBackend.MATH):
            result = self.stepper(
                (images, tokens),
                ids_or_none,
                self.schedule(self.step),
                hopfield=hopfield,
            )
        self.step += 1
        if result.finite:
            self.losses.append(result.loss)
        else:
            self.skipped += 1
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu
        return result.finite

    def _look(self, epoch: int) -> None:
        """Scores after an epoch: validation pairs always, test sets at a few points of
        a full run.
        """
        recent = self.losses[-self.steps_an_epoch :]
        self.losses = []
        line: dict[str, Any] = {
            "epoch": epoch,
            "step": self.step,
            "wall_seconds": round(self.wall, 1),
            "cpu_seconds": round(self.cpu, 1),
            "loss": round(sum(recent) / len(recent), 5) if recent else None,
            **self._scales(),
            "val": score_pairs(self.encoder, self.data.pairs["val"]),
        }
        every = max(1, math.ceil(self.cell.epochs / CURVE_POINTS))
        if self.full and epoch % every == 0 and epoch < self.cell.epochs:
            scores = score_zeroshot(self.encoder, self.data.test)
            line["zeroshot"] = {name: found["acc1"] for name, found in scores.items()}
        self.curve.append(line)

    def _scales(self) -> dict[str, float]:
        scales = {"inv_tau": round(float(self.objective.inv_tau.detach()), 4)}
        return scales | (
            {"beta": round(float(self.objective.beta.detach()), 4)}
            if self.objective.hopfield
            else {}
        )

    def _record(self) -> dict[str, Any]:
        """Everything that tables are made from; no name of this machine, no path."""
        last = self.curve[-1]
        record: dict[str, Any] = {
            "id": self.cell.id,
            "config": self.cell.config(),
            "steps": self.step,
            "pairs_seen": self.step * self.cell.setting.batch_size,
            "skipped_steps": self.skipped,
            "wall_seconds": round(self.wall, 1),
            "cpu_seconds": round(self.cpu, 1),
            "machine": {
                "cpu": processor(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            },
            "device": "cpu",
            "val": last["val"],
        }
        if self.full:
            record["zeroshot"] = score_zeroshot(self.encoder, self.data.test)
            record["retrieval"] = {
                "tuxpaint-captions": score_pairs(
                    self.encoder, self.data.pairs["tuxpaint-captions"]
                )
            }
            last["zeroshot"] = {
                name: found["acc1"] for name, found in record["zeroshot"].items()
            }
        return record | {"curve": self.curve}


def study(
    data: Path, cache: Path
) -> tuple[Callable[[], Iterable[Cell]], Callable[[Cell], dict[str, Any]]]:
    @functools.cache
    def pictures(tests: bool) -> Data:
        found = load(data, cache, create_model(plan.TOWERS[0], seed=0), tests)
        for name, labelled in found.test.items():
            records.write_set(
                name, np.array(labelled.labels), len(labelled.classnames), STUDY
            )
        return found

    def listed() -> Iterator[Cell]:
        scores = plan.search_scores(records.read("search", STUDY))
        yield from plan.search_cells(scores)
        yield from plan.grid(scores)
        searched = records.read(wrong.SEARCH, STUDY)
        yield from (
            cell
            for method in wrong.MEMBERS
            for cell in wrong.search(method, scores, searched)
        )
        yield from wrong.cells(scores, searched)

    def do(cell: Cell) -> dict[str, Any]:
        full = cell.stage in ("cells", wrong.RUNS)
        seen = pictures(full)
        if cell.stage in (wrong.SEARCH, wrong.RUNS):
            seen = with_wrong_captions(seen, wrong.SHARE, cell.seed)
        return Run(cell, seen, full).go()

    return listed, do
