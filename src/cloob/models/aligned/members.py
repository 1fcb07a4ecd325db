"""Several heads over the same features as one, and a bias against hubs, which are near to everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cloob.models.aligned.heads import Head

_NEAREST = 10
_MOST = 0.25  # the largest bias
_SHARE = _MOST**0.5


class Members(nn.Module):
    """(n, F) features to (n, D) unit rows: those of several heads side by side, each times its weight.

    The squares of the weights add up to 1, so a cosine of two rows is the weighted mean of the heads' cosines.

    With a ``bank``, unit rows of the other side, an item x loses b(x) = strength · (m(x) − mean of m), where m is the
    mean cosine of its ten nearest rows of the bank: half of it is CSLS (Conneau et al. 2018). As a dot product alone
    knows it, the rows have four columns more: (x, −b(x)/s, s, r, 0) on one side and (y, s, −b(y)/s, 0, r) on the other
    have the product x·y − b(x) − b(y), and r gives all rows one length. A query's own bias moves all answers alike.

    Args:
        heads: Those of one side.
        weights: One for each.
        cut: Columns that are left of those side by side, by ``axes``, an orthogonal matrix; 0 keeps all.
        side: 0 for the first side, 1 for the second.
        rows: Size of the bank; 0 for none.
        strength: Of the bias.
    """

    axes: Tensor
    bank: Tensor
    usual: Tensor

    def __init__(
        self,
        heads: Sequence[Head],
        weights: Sequence[float],
        *,
        cut: int = 0,
        side: Literal[0, 1] = 0,
        rows: int = 0,
        strength: float = 0.5,
    ) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.side, self.strength = side, strength
        norm = sum(weight**2 for weight in weights) ** 0.5
        self.weights = [weight / norm for weight in weights]
        width = sum(head.options["embed_dim"] for head in heads)
        if cut:
            self.register_buffer("axes", torch.zeros(width, cut))
            width = cut
        if rows:
            self.register_buffer("bank", torch.zeros(rows, width))
            self.register_buffer("usual", torch.zeros(()))
        self.options: dict[str, Any] = {
            "features": heads[0].options["features"],
            "embed_dim": width + 4 * (rows > 0),
            "kind": "members",
            "dropout": 0.0,
            "members": [head.options for head in heads],
            "weights": list(weights),
            "cut": cut,
            "hubs": {"side": side, "rows": rows, "strength": strength},
        }

    def forward(self, features: Tensor) -> Tensor:
        rows = self.side_by_side(features)
        if not self.options["hubs"]["rows"]:
            return rows
        bias = (self.strength * (self._nearness(rows) - self.usual)).clamp(-_MOST, _MOST).unsqueeze(1) / _SHARE
        share, rest = torch.full_like(bias, _SHARE), (_MOST - bias**2).clamp_min(0).sqrt()
        pairs = ((-bias, share), (rest, torch.zeros_like(rest)))
        return torch.cat([rows, *(column for pair in pairs for column in (pair if self.side == 0 else pair[::-1]))], 1)

    def side_by_side(self, features: Tensor) -> Tensor:
        """The rows without a bias."""
        rows = self.uncut(features)
        return F.normalize(rows @ self.axes, dim=1) if self.options["cut"] else rows

    def uncut(self, features: Tensor) -> Tensor:
        """All columns of them."""
        parts = zip(self.heads, self.weights, strict=True)
        return torch.cat([weight * F.normalize(head(features), dim=1) for head, weight in parts], 1)

    @torch.no_grad()
    def fill(self, bank: Tensor, own: Tensor) -> None:
        """Takes the bank, (rows, D) unit rows of the other side, and the usual nearness of this side's (n, D) rows."""
        self.bank.copy_(bank)
        self.usual.copy_(self._nearness(own).mean())

    def _nearness(self, rows: Tensor) -> Tensor:
        near: Tensor = (rows @ self.bank.T).topk(min(_NEAREST, len(self.bank)), 1).values.mean(1)
        return near


def head_of(options: Mapping[str, Any]) -> Head | Members:
    """A head with these ``options``, its weights not yet filled."""
    if "members" not in options:
        return Head(**options)
    heads = [Head(**head) for head in options["members"]]
    return Members(heads, options["weights"], cut=options["cut"], **options["hubs"])


@torch.no_grad()
def fit_members(a: Members, b: Members, features_a: Tensor, features_b: Tensor) -> None:
    """Takes what the members of both sides need beside their heads from the features of some training pairs.

    The axes of a cut are the principal directions of both sides' rows, not centred, since cosines are compared.
    """
    if cut := a.options["cut"]:
        both = torch.cat([a.uncut(features_a), b.uncut(features_b)])
        axes = torch.linalg.eigh((both.T @ both).double())[1][:, -cut:]
        for side in (a, b):
            side.axes.copy_(axes)
    if a.options["hubs"]["rows"]:
        rows_a, rows_b = a.side_by_side(features_a), b.side_by_side(features_b)
        a.fill(rows_b, rows_a)
        b.fill(rows_a, rows_b)
