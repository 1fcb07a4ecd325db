"""What is asked of trained encoders.

Embeddings are unit rows; every measure comes from a few lines of torch.
"""

from __future__ import annotations

from typing import Any

import torch
from benchmarks.factors.model import Encoders
from benchmarks.factors.world import FACTORS, VALUES, Sample
from torch import Tensor
from torch.nn import functional as F

from cloob.functional import hopfield_retrieval, ranking
from cloob.functional.geometry import effective_eigenvalues
from cloob.objective import ContrastiveObjective

RECALLS = (1, 10, 100)
COMMON_BETA = 8.0
"""One β for all methods where embeddings are to be told apart and not settings."""
_RIDGE = 1e-3


def ranks(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Of n pairs the (n,) ranks of the own caption for each picture, and of the own
    picture for each caption.
    """
    return ranking.mutual_ranks(
        x, y, torch.arange(len(x))[:, None].expand(-1, 2).contiguous()
    )


def mean_recall(x: Tensor, y: Tensor) -> float:
    """Mean of recall@1, @10 and @100 both ways, the pairs taken as given: what settings
    are chosen by.
    """
    return sum(ranking.recall_at_k(r, k) for r in ranks(x, y) for k in RECALLS) / (
        2 * len(RECALLS)
    )


def zero_shot(x: Tensor, values: Tensor, prompts: Tensor) -> list[float]:
    """By factor, how often the caption that names the picture's own value alone is the
    nearest of V.

    Args:
        x: (n, D) pictures.
        values: (n, F).
        prompts: (F, V, D).
    """
    return [
        ranking.topk_accuracy(ranking.ranks(x, prompts[f], values[:, f]), 1)
        for f in range(FACTORS)
    ]


def probe(
    x: Tensor, values: Tensor, test_x: Tensor, test_values: Tensor
) -> list[float]:
    """By factor, the accuracy of a linear classifier on the embeddings, fitted by ridge
    regression.
    """
    ones = torch.ones(len(x), 1)
    inputs, targets = (
        torch.cat([x, ones], 1).double(),
        F.one_hot(values, VALUES).flatten(1).double(),
    )
    gram = inputs.T @ inputs + _RIDGE * len(x) / x.shape[1] * torch.eye(inputs.shape[1])
    weights = torch.linalg.solve(gram, inputs.T @ targets)
    scores = torch.cat([test_x, torch.ones(len(test_x), 1)], 1).double() @ weights
    answers = scores.view(len(test_x), FACTORS, VALUES).argmax(2)
    return [float(share) for share in (answers == test_values).double().mean(0)]


def retrieved(x: Tensor, values: Tensor, beta: float, batch: int) -> dict[str, Any]:
    """What retrieval averages: the weights of softmax(β x xᵀ) in batches of pictures as
    in training.

    Returns:
        ``own``: the weight of the picture itself. ``patterns``: how many pictures the
        weights are worth (exp of their entropy). ``alike``: by factor, of the weight of
        the *other* pictures the part on those with the same value, less the part of
        such pictures among the others, so that 0 is no better than any picture.
    """
    own, entropy, alike = [], [], []
    for rows, things in zip(batches(x, batch), batches(values, batch), strict=True):
        weights = (beta * rows @ rows.T).softmax(1)
        others = ~torch.eye(batch, dtype=torch.bool)
        same = (things[:, None] == things[None]) & others[:, :, None]  # (n, n, F)
        rest = (weights * others) / (weights * others).sum(1, keepdim=True)
        share = torch.einsum("ij,ijf->if", rest, same.float()) - same.float().sum(1) / (
            batch - 1
        )
        own.append(weights.diagonal().mean())
        entropy.append(-(weights * weights.log()).sum(1).mean())
        alike.append(share.mean(0))
    return {
        "own": float(torch.stack(own).mean()),
        "patterns": float(torch.stack(entropy).exp().mean()),
        "alike": torch.stack(alike).mean(0).tolist(),
    }


def unfit(
    x: Tensor, y: Tensor, wrong: Tensor, objective: ContrastiveObjective, batch: int
) -> dict[str, float]:
    """1 − p in batches of training pairs at the method's own scales, retrieval
    included: of right and of wrong pairs.

    p is the softmax probability of the own caption or picture. 1 − p is the factor that
    InfoNCE's gradient carries.
    """
    inv_tau, beta = (
        float(scale.detach()) for scale in (objective.inv_tau, objective.beta)
    )
    left = []
    for a, b in zip(batches(x, batch), batches(y, batch), strict=True):
        if objective.hopfield:
            images = hopfield_retrieval(a, a, beta) @ hopfield_retrieval(b, a, beta).T
            texts = hopfield_retrieval(b, b, beta) @ hopfield_retrieval(a, b, beta).T
        else:
            images, texts = a @ b.T, b @ a.T
        left.append(
            1
            - torch.stack(
                [(inv_tau * s).softmax(1).diagonal() for s in (images, texts)]
            ).mean(0)
        )
    return by_truth("unfit", torch.cat(left), torch.cat(batches(wrong, batch)))


def batches(rows: Tensor, size: int) -> list[Tensor]:
    """The rows in batches of one size; an incomplete one is left out, since all of
    these measures depend on it.
    """
    return [part for part in rows.split(size) if len(part) == size]


def by_truth(name: str, values: Tensor, wrong: Tensor) -> dict[str, float]:
    parts = {"right": values[~wrong], "wrong": values[wrong]}
    return {
        f"{name}_{which}": float(part.double().mean())
        for which, part in parts.items()
        if len(part)
    }


def all_of_it(
    sample: Sample, encoders: Encoders, objective: ContrastiveObjective, batch: int
) -> dict[str, Any]:
    """Everything that a cell's record holds about the encoders.

    Args:
        sample: The drawing.
        encoders: Of pictures and of captions.
        objective: For the scales.
        batch: Pairs a step.
    """
    n, values = len(sample.held_out), sample.test[1]
    x_probe, x_test = (
        encoders.pictures(sample.probe[0]),
        encoders.pictures(sample.test[0]),
    )
    held_x, held_y = (
        encoders.pictures(sample.held_out.pictures),
        encoders.captions(sample.held_out.captions),
    )
    train_x, train_y = (
        encoders.pictures(sample.train.pictures[:n]),
        encoders.captions(sample.train.captions[:n]),
    )
    wrong = sample.train.wrong[:n]
    first = torch.stack([r < 1 for r in ranks(train_x, train_y)]).double().mean(0)
    beta = float(objective.beta) if objective.hopfield else COMMON_BETA
    return {
        "zero_shot": zero_shot(x_test, values, encoders.captions(sample.prompts)),
        "probe": probe(x_probe, sample.probe[1], x_test, values),
        "held_out_recall": mean_recall(held_x, held_y),
        "train_recall": mean_recall(train_x, train_y),
        **by_truth("train_first", first, wrong),
        **unfit(train_x, train_y, wrong, objective, batch),
        "eigenvalues": {
            "pictures": int(effective_eigenvalues(x_test)),
            "captions": int(effective_eigenvalues(held_y)),
            "pictures_retrieved": int(
                effective_eigenvalues(hopfield_retrieval(x_test, x_test, COMMON_BETA))
            ),
        },
        "retrieved": retrieved(x_test, values, beta, batch),
        "retrieved_common": retrieved(x_test, values, COMMON_BETA, batch),
    }
