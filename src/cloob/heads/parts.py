"""What the loop of ``fit`` is made of: first weights, optimiser, learning rate, and
batches.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cloob.data.order import EpochOrder, Pictures, ShardSizes
from cloob.data.rows import as_numbers
from cloob.data.vectors import VectorPairs
from cloob.distributed import Layout
from cloob.errors import InputError
from cloob.heads.columns import Both, make_heads
from cloob.heads.fitted import Rows, to_device
from cloob.heads.head import Head
from cloob.heads.settings import USUAL_DIM, HeadSettings
from cloob.objective import ContrastiveObjective, make_objective

logger = logging.getLogger(__name__)

N_FITTED = 32_768  # rows that standardise a side, at most
N_FITTED_NUMBERS = 1 << 24  # and numbers of a side
FEW_COLUMNS = 16
SHARE_OF_DEVICE = 0.5  # of its free memory, that the rows may take


class Model(nn.Module):
    """Two heads, and the objective that brings their rows together."""

    def __init__(self, a: Head, b: Head, objective: ContrastiveObjective) -> None:
        super().__init__()
        self.a, self.b, self.objective = a, b, objective

    @property
    def heads(self) -> tuple[Head, Head]:
        return self.a, self.b

    def forward(self, batch: Rows) -> Tensor:
        """The 0-d loss of a batch; it waits for no device and checks no value."""
        x = F.normalize(self.a(batch.a), dim=1)
        y = F.normalize(self.b(batch.b), dim=1)
        trusted = Layout((len(x),))
        loss: Tensor = self.objective(
            x, y, ids=batch.ids, weights=batch.weights, trusted=trusted
        )
        return loss


def with_batch_size(settings: HeadSettings, pairs: VectorPairs) -> HeadSettings:
    """The settings with a batch size where it is left open: of few pairs, 16 to 32
    steps an epoch. Few columns need more negatives and learn for longer.
    """
    n = n_anchors(pairs)
    size, patience = settings.batch_size, settings.patience
    if not size:
        power = 1 << max(n // 16, 1).bit_length() - 1
        size = max(2, min(n, 256, max(8, power)))
        if min(pairs.a.shape[1], pairs.b.shape[1]) <= FEW_COLUMNS:
            size, patience = max(size, min(64, n // 4)), 3 * patience
    if n < 2 or size > n:
        needed = "2 or more are needed" if n < 2 else f"batch_size is {size}"
        raise InputError(f"{pairs.name}: {n:,} training pairs; {needed}")
    check_ids(pairs)
    return settings.override(batch_size=size, patience=patience)


def check_ids(pairs: VectorPairs) -> None:
    """Refuses pairs of one id, which tell nothing apart."""
    if len(np.unique(pairs.ids)) < 2:
        raise InputError(
            f"{pairs.name}: all pairs have one id, so none is a negative"
            f" ({len(pairs):,} pairs)"
        )


def n_anchors(pairs: VectorPairs) -> int:
    """Pairs of an epoch: a row of a that has several partners counts once."""
    return len(np.unique(pairs.rows[:, 0]))


def objective_of(settings: HeadSettings) -> ContrastiveObjective:
    """The member with its scales."""
    try:
        return make_objective(settings.objective, **settings.given_scales())
    except (ValueError, TypeError) as error:
        raise InputError(f"objective {settings.objective!r}: {error}") from error


def fresh_heads(
    pairs: VectorPairs, settings: HeadSettings, columns: Both
) -> tuple[Head, Head]:
    """Heads with random weights, which prepare columns by the training pairs, or by
    32,768 evenly spread ones (fewer wide ones).
    """
    rows = sampled(pairs)
    for name, side in (("a", rows.a), ("b", rows.b)):
        if bool((side == side[0]).all()):
            logger.warning(
                "all rows of %s are equal: nothing can be learned from them", name
            )
    return make_heads(
        rows,
        columns,
        settings.embed_dim or USUAL_DIM,
        settings.head or "mlp",
        dropout=0.1 if settings.dropout is None else settings.dropout,
        seed=settings.seed,
    )


def sampled(pairs: VectorPairs) -> Rows:
    """The rows that standardise."""
    widest = max(pairs.a.shape[1], pairs.b.shape[1])
    return Rows.of(pairs, max(2, min(N_FITTED, N_FITTED_NUMBERS // widest)))


class AdamW(torch.optim.AdamW):
    """torch's without its decorators, which import torch._dynamo: that takes more time
    than most fits.
    """

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def adamw(model: nn.Module, settings: HeadSettings, device: torch.device) -> AdamW:
    """AdamW, whose decay is for matrices alone."""
    parameters = list(model.parameters())
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    others = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=settings.lr, fused=device.type in ("cpu", "cuda"))


def learning_rate(peak: float, step: int, n_steps: int) -> float:
    """Linear to the peak over a tenth of the run, 2,000 steps at most, then half a
    cosine to 0.
    """
    warmup = min(2000, n_steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, n_steps - warmup)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


class Batches:
    """The batches of an epoch; the rows stay on a GPU where they fit."""

    def __init__(
        self, pairs: VectorPairs, settings: HeadSettings, device: torch.device
    ) -> None:
        self.pairs, self.device = pairs, device
        self._seed, self._size = settings.seed, settings.batch_size
        _, first_pairs, anchor_of = np.unique(
            pairs.rows[:, 0], return_index=True, return_inverse=True
        )
        n_anchors = len(first_pairs)
        self._partners: Pictures | None = None  # where a row of a has several
        if n_anchors < len(pairs):
            self._partners = Pictures(first_pairs[anchor_of])
        self._order = EpochOrder([ShardSizes((n_anchors,))], seed=settings.seed)
        self.steps = n_anchors // self._size
        self._ids = torch.from_numpy(pairs.ids).to(device)
        self._weights: Tensor | None = None
        if pairs.weights is not None:
            self._weights = torch.from_numpy(pairs.weights).float().to(device)
        self._sides = resident(pairs, device)

    def epoch(self, epoch: int) -> Iterator[Rows]:
        """All rows of a once, each with one of its rows of b; what is left over is
        another epoch's.
        """
        places = self._places(epoch)
        # One copy to the device an epoch, none a step.
        chosen = torch.from_numpy(places).to(self.device)
        rows = torch.from_numpy(self.pairs.rows[places])
        if self._sides is not None:
            rows = rows.to(self.device)
        for start in range(0, len(places), self._size):
            part = slice(start, start + self._size)
            if self._sides is None:
                a, b = self.pairs.batch(places[part]).parts
                a, b = to_device(a, self.device), to_device(b, self.device)
            else:
                a, b = self._sides[0][rows[part, 0]], self._sides[1][rows[part, 1]]
            weights = None if self._weights is None else self._weights[chosen[part]]
            yield Rows(a, b, self._ids[chosen[part]], weights)

    def _places(self, epoch: int) -> np.ndarray:
        """The pairs of an epoch in its order."""
        order = self._order.epoch(epoch)
        anchors = order(np.arange(self.steps * self._size))
        if self._partners is None:
            return anchors
        drawn = [
            self._partners.row(anchor, self._seed, epoch) for anchor in anchors.tolist()
        ]
        return np.array(drawn, np.int64)


def resident(pairs: VectorPairs, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """All rows on a GPU, if they fit; else None."""
    a, b = pairs.a, pairs.b
    is_sparse = hasattr(a, "toarray") or hasattr(b, "toarray")
    if device.type != "cuda" or is_sparse:
        return None
    n_bytes = 8 * (a.shape[0] * a.shape[1] + b.shape[0] * b.shape[1])
    if n_bytes > SHARE_OF_DEVICE * torch.cuda.mem_get_info(device)[0]:
        return None
    return as_numbers(np.asarray(a)).to(device), as_numbers(np.asarray(b)).to(device)


@contextlib.contextmanager
def seeded(seed: int, epoch: int, device: torch.device) -> Iterator[None]:
    """Inside, torch draws what (seed, epoch) says; its generators stay as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed((seed * 1_000_003 + epoch) % 2**63)
        yield
