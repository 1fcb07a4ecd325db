"""The study's heads on cached features: the pairs as a run sees them, training, scores
on the test sets.
"""

from __future__ import annotations

import copy
from typing import Any, Literal, cast

import numpy as np
import torch
from benchmarks.frozen.captions import wrong_rows
from benchmarks.frozen.data import Data, Pairs
from benchmarks.studies.cells import Captions, HeadsCell
from benchmarks.studies.measures import (
    build_objective,
    recalls,
    retrieves,
    score_rows,
    score_set,
)
from torch import Tensor, nn
from torch.nn import functional as F

from cloob.data.order import EpochOrder, ShardSizes
from cloob.distributed import Layout
from cloob.heads.head import Head
from cloob.objective import ContrastiveObjective
from cloob.training.config import TrainConfig
from cloob.training.optim import make_optimizer, make_schedule
from cloob.training.step import StepBatch, Stepper, TowersWithLoss

EMBED_DIM = 256
DROPOUT = 0.1  # as `cloob train align` begins with
_ROWS = 4096  # embedded together
_TRAIN, _HELD_OUT = 0, 1  # the streams of a seed's draws


class Heads(nn.Module):
    """(n, F) and (n, F') features to (n, D) unit rows; the same initial weights as
    ``cloob train align`` by seed.

    The branch of an mlp begins with a layer norm, which the library's heads had when
    the settings were chosen.
    """

    def __init__(
        self,
        features: tuple[int, int],
        kind: str,
        seed: int,
        embed_dim: int = EMBED_DIM,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            known = cast(Literal["linear", "mlp"], kind)
            self.visual, self.text = (
                Head(n, embed_dim, known, DROPOUT) for n in features
            )
        for n, head in zip(features, (self.visual, self.text), strict=True):
            if head.branch is not None:
                head.branch = nn.Sequential(
                    nn.LayerNorm(n), *cast(nn.Sequential, head.branch)
                )

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(self.visual(images), dim=1), F.normalize(
            self.text(texts), dim=1
        )


class View:
    """The pairs as a cell sees them: which pictures it trains on, and which text stands
    beside each.

    Attributes:
        pictures: (n,) rows of the training pictures.
        rows: (n,) rows of the texts beside them.
        held_out: The validation pairs' texts, as wrong as these.
    """

    def __init__(self, data: Data, world: Captions, seed: int) -> None:
        generator = np.random.default_rng([seed, _TRAIN])
        train = data.pairs["train"]
        self.pictures = np.arange(len(train))
        if world.pairs < len(train):
            self.pictures = generator.permutation(self.pictures)[: world.pairs]
        self.rows = _wrong(world, data, train, self.pictures, generator)
        val = data.pairs["val"]
        generator = np.random.default_rng([seed, _HELD_OUT])
        self.held_out = _wrong(world, data, val, np.arange(len(val)), generator)

    def held_out_recall(self, visual: nn.Module, text: nn.Module, data: Data) -> float:
        """Mean recall of the validation pairs, as wrong as the training pairs."""
        images = embedded(visual, data.pairs["val"].images)
        texts = embedded(text, data.table[self.held_out])
        captions = [data.texts[row] for row in self.held_out]
        return round(recalls(images, texts, captions)["mean_recall"], 6)


def _wrong(
    world: Captions,
    data: Data,
    pairs: Pairs,
    chosen: np.ndarray,
    generator: np.random.Generator,
) -> np.ndarray:
    own = pairs.own[chosen]
    parts = pairs.cut[chosen]
    return wrong_rows(world.kind, world.share, own, parts, data.names, generator)


def train(
    cell: HeadsCell, view: View, data: Data, first: int = 0, embed_dim: int = EMBED_DIM
) -> tuple[Heads, ContrastiveObjective, list[dict[str, Any]]]:
    """The heads of the best epoch, the objective, and loss and held-out recall by
    epoch.

    ``first`` gives other first weights and another order with the same wrong captions.
    """
    seed = cell.seed + 1000 * first
    images = data.pairs["train"].images
    texts = data.table
    heads = Heads((images.shape[1], texts.shape[1]), cell.world.head, seed, embed_dim)
    heads.visual.fit(images[view.pictures])
    heads.text.fit(texts[view.rows])
    setting = cell.setting
    objective = build_objective(cell.method, setting)
    optim = TrainConfig(
        lr=setting.lr, weight_decay=setting.weight_decay, schedule="cosine"
    )
    optimizer = make_optimizer(heads, objective, optim, torch.device("cpu"))
    stepper = Stepper(TowersWithLoss(heads, objective), optimizer)
    size = setting.batch_size
    n = len(view.rows)
    steps = n // size
    total = cell.epochs * steps
    schedule = make_schedule(optim, total)
    torch.manual_seed(seed)
    curve: list[dict[str, Any]] = []
    best_recall = -1.0
    best: dict[str, Any] = {}
    for epoch in range(cell.epochs):
        order = EpochOrder([ShardSizes((n,))], seed).epoch(epoch)(np.arange(n))
        losses = []
        heads.train()
        for place in range(steps):
            step = epoch * steps + place
            rows = order[place * size : (place + 1) * size]
            pair = images[view.pictures[rows]], texts[view.rows[rows]]
            hopfield = retrieves(setting, step / total)
            batch = StepBatch(pair, Layout((len(rows),)), hopfield=hopfield)
            result = stepper.launch(batch, schedule(step)).read()
            if result.finite:  # else it left no trace
                losses.append(result.loss)
        heads.eval()
        recall = view.held_out_recall(heads.visual, heads.text, data)
        if recall > best_recall:
            best_recall = recall
            best = copy.deepcopy(heads.state_dict())
        loss = round(float(np.mean(losses)), 5) if losses else None
        skipped = steps - len(losses)
        curve.append({"loss": loss, "recall": recall, "skipped_steps": skipped})
    heads.load_state_dict(best)
    return heads.eval(), objective, curve


def tested(visual: nn.Module, text: nn.Module, data: Data) -> dict[str, Any]:
    """Scores on the test sets, and on the validation pairs with their own captions."""
    scores: dict[str, Any] = {"zeroshot": {}}
    texts = data.table
    for name, labelled in data.sets.items():
        n_classes, templates = labelled.prompts.shape
        prompts = embedded(text, texts[labelled.prompts.reshape(-1)])
        classes = F.normalize(prompts.view(n_classes, templates, -1).mean(1), dim=1)
        scores["zeroshot"][name] = score_set(
            embedded(visual, labelled.images), labelled.labels, classes
        )
    for name in ("val", "tuxpaint-captions"):
        pairs = data.pairs[name]
        both = embedded(visual, pairs.images), embedded(text, texts[pairs.own])
        scores[name] = score_rows(*both, [data.texts[i] for i in pairs.own])
    return scores


@torch.no_grad()
def embedded(head: nn.Module, inputs: Tensor) -> Tensor:
    """(n, F) features to (n, D) unit rows."""
    return torch.cat([F.normalize(head(part), dim=1) for part in inputs.split(_ROWS)])
