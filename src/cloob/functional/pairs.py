"""The objective of a batch of pairs, by the functions of a backend.

A backend is a module: ``reference``, which keeps every N×N matrix for the backward
pass, or ``streamed``, which has fast paths of the same names, and ``softmax_two`` for
two directions in one sweep.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from types import ModuleType
from typing import Literal, Unpack, get_args

import torch
from torch import Tensor

from cloob.family import CONTRASTS, Contrast
from cloob.functional import reference
from cloob.functional.checks import as_rows, one_of, scalar
from cloob.functional.reference import Pairing
from cloob.functional.scores import Targets

Scale = Literal["paper", "unit"]


def cloob_reference(
    image_features: Tensor,
    text_features: Tensor,
    inv_tau: float | Tensor,
    beta: float | Tensor = 8.0,
    *,
    contrast: Contrast = "infoloob",
    hopfield: bool = True,
    scale: Scale = "paper",
    bias: float | Tensor = -10.0,
    ids: Tensor | None = None,
    exclude_above: float | None = None,
    targets: Targets | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """The objective of a batch of N pairs; every N×N matrix is built and kept for the
    backward pass.

    Args:
        image_features: (N, D) image embeddings X, unit rows.
        text_features: (N, D) text embeddings Y, unit rows; row i belongs to image i.
        inv_tau: Inverse temperature τ⁻¹ > 0 of the contrast.
        beta: Inverse temperature β > 0 of the retrieval; unused without it.
        contrast: ``"infoloob"``, ``"infonce"`` or ``"sigmoid"``.
        hopfield: Contrast retrieved embeddings (CLOOB) or the plain ones (CLIP,
            SigLIP).
        scale: ``"paper"`` is τ · (sum of both directions), as the authors' code;
            ``"unit"`` their mean, as CLIP. Paper = unit · 2τ, so at τ⁻¹ = 30 unit is 15
            times as large. The sigmoid loss has no ``"paper"`` scale.
        bias: b of the sigmoid loss; unused by the others, in which it cancels.
        ids: (N,) integer ids; pairs of equal id are not each other's negatives.
        exclude_above: Margin by which a candidate may exceed the positive and still be
            a negative; None for any, see :func:`info_loob`. It compares what is
            contrasted: retrieved embeddings with retrieval.
        targets: (N, N) shares T, or (N, k) columns and their (N, k) shares: pair j is a
            share T_ij of the positive of pair i, of its image among the texts and of
            its text among the images. See :func:`cloob.functional.contrast_scores`.
        weights: (N,) factors of both terms of every pair.

    Returns:
        0-d loss, float32 (float64 for float64 input).

    Raises:
        ValueError: As the functions it calls; N < 2; an unknown ``contrast`` or
            ``scale``, or two that do not fit.
    """
    pair_contrast = PairContrast(
        reference,
        contrast,
        bias=bias,
        exclude_above=exclude_above,
        targets=targets,
        weights=weights,
    )
    return pair_contrast.loss(
        image_features,
        text_features,
        inv_tau,
        beta,
        hopfield=hopfield,
        scale=scale,
        ids=ids,
    )


@dataclass(frozen=True)
class PairContrast:
    """A contrast of pairs by the functions of a backend, and by those of ``reference``
    where it has none; ``matmul`` is ``streamed``'s alone.
    """

    backend: ModuleType
    contrast: Contrast = "infoloob"
    _: KW_ONLY
    bias: float | Tensor = -10.0
    exclude_above: float | None = None
    matmul: torch.dtype | None = None
    targets: Targets | None = None
    weights: Tensor | None = None

    @property
    def is_weighted(self) -> bool:
        """Whether pairs have soft targets or weights."""
        return self.targets is not None or self.weights is not None

    @property
    def directions_are_equal(self) -> bool:
        """Whether both directions are one sum without retrieval: where no softmax runs
        over rows or columns.
        """
        softmax = CONTRASTS[self.contrast].softmax
        return not (softmax or self.is_weighted) and self.exclude_above is None

    @property
    def options(self) -> dict[str, object]:
        """What a function is handed besides rows, τ⁻¹ and pairing."""
        options: dict[str, object] = {}
        if self.exclude_above is not None:
            options["exclude_above"] = self.exclude_above
        if self.matmul is not None:
            options["matmul"] = self.matmul
        return options

    def loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        inv_tau: float | Tensor,
        beta: float | Tensor,
        *,
        hopfield: bool = True,
        scale: Scale = "paper",
        ids: Tensor | None = None,
        beta_of_unit_rows: float | None = None,
    ) -> Tensor:
        """The objective of a batch of pairs; ``beta_of_unit_rows`` is ``streamed``'s
        alone.
        """
        check_member(self.contrast, scale, hopfield)
        x, y = check_pairs(image_features, text_features)
        if not hopfield:
            return in_scale(self.of_plain(x, y, inv_tau, ids), inv_tau, scale)
        options: dict[str, object] = {}
        if self.matmul is not None:
            options["matmul"] = self.matmul
        if beta_of_unit_rows is not None:
            options["beta_of_unit_rows"] = beta_of_unit_rows
        u_x, u_y, v_x, v_y = self.backend.retrieve(x, y, beta, **options)
        both = self.of_retrieved((u_x, v_y), (u_y, v_x), inv_tau, ids=ids)
        return in_scale(both, inv_tau, scale)

    def of_plain(
        self, x: Tensor, y: Tensor, inv_tau: float | Tensor, ids: Tensor | None
    ) -> Tensor:
        """The sum of both directions without retrieval, whose logits are each other's
        transpose.
        """
        softmax_both = self.function_of_two("softmax_both")
        if softmax_both is not None:
            return softmax_both(x, y, inv_tau, ids=ids, **self.options)
        images = self.one_direction(x, y, inv_tau, ids=ids)
        if self.directions_are_equal:
            return 2 * images
        return images + self.one_direction(y, x, inv_tau, ids=ids)

    def of_retrieved(
        self,
        anchors: tuple[Tensor, Tensor],
        candidates: tuple[Tensor, Tensor],
        inv_tau: float | Tensor,
        **pairing: Unpack[Pairing],
    ) -> Tensor:
        """The sum of two directions, each with logits of its own."""
        softmax_two = self.function_of_two("softmax_two")
        if softmax_two is not None and len(candidates[0]) == len(candidates[1]):
            stacks = torch.stack(anchors), torch.stack(candidates)
            return softmax_two(*stacks, inv_tau, **self.options, **pairing)
        first = self.one_direction(anchors[0], candidates[0], inv_tau, **pairing)
        second = self.one_direction(anchors[1], candidates[1], inv_tau, **pairing)
        return first + second

    def function_of_two(self, name: str) -> Callable[..., Tensor] | None:
        """The backend's function of two directions of InfoLOOB or InfoNCE, if it has
        one and it applies.
        """
        if self.is_weighted or self.contrast not in ("infoloob", "infonce"):
            return None
        function = getattr(self.backend, name, None)
        return function and partial(function, contrast=self.contrast)

    def one_direction(
        self,
        anchors: Tensor,
        candidates: Tensor,
        inv_tau: float | Tensor,
        **pairing: Unpack[Pairing],
    ) -> Tensor:
        """The loss of one direction."""
        if self.is_weighted:
            return self._one_weighted(anchors, candidates, inv_tau, **pairing)
        row = CONTRASTS[self.contrast]
        function = getattr(self.backend, row.function, None)
        if function is None:
            function = getattr(reference, row.function)
        options = self.options
        if not row.softmax:
            options["bias"] = self.bias
        loss: Tensor = function(anchors, candidates, inv_tau, **options, **pairing)
        return loss

    def _one_weighted(
        self,
        anchors: Tensor,
        candidates: Tensor,
        inv_tau: float | Tensor,
        **pairing: Unpack[Pairing],
    ) -> Tensor:
        """One direction with targets or weights."""
        if self.targets is not None and self.exclude_above is not None:
            raise ValueError(
                "exclude_above compares with the positive, and targets name several:"
                " leave one out"
            )
        if self.matmul is not None:
            raise ValueError("targets and weights need matmul='float32'")
        loss: Tensor = self.backend.weighted_contrast(
            anchors,
            candidates,
            inv_tau,
            contrast=self.contrast,
            bias=0.0 if CONTRASTS[self.contrast].softmax else self.bias,
            exclude_above=self.exclude_above,
            targets=self.targets,
            weights=self.weights,
            **pairing,
        )
        return loss


def check_pairs(
    image_features: Tensor, text_features: Tensor, at_least: int = 2
) -> list[Tensor]:
    """Both sides of the batch as float32 or float64 matrices of equal shape."""
    x, y = as_rows(image_features=image_features, text_features=text_features)
    if len(x) != len(y) or len(x) < at_least:
        problem = (
            f"{len(x)} image_features and {len(y)} text_features: pairs are expected,"
            f" at least {at_least} of them"
        )
        raise ValueError(
            f"{problem}; for a last batch of one give the loader drop_last=True"
        )
    return [x, y]


def check_member(contrast: str, scale: str, hopfield: bool) -> None:
    """Refuses what is no member of the family: τ · sum takes the τ⁻¹ out of a logit,
    but not out of one with a bias; the sigmoid loss has no form with retrieval.
    """
    one_of("contrast", contrast, tuple(CONTRASTS))
    one_of("scale", scale, get_args(Scale))
    if not CONTRASTS[contrast].softmax and scale == "paper":
        raise ValueError(
            f"scale='paper' is that of the softmax contrasts; {contrast=} needs"
            " scale='unit'"
        )
    if not CONTRASTS[contrast].softmax and hopfield:
        raise ValueError(
            f"hopfield=True is for the softmax contrasts; {contrast=} needs"
            " hopfield=False"
        )


def in_scale(both: Tensor, inv_tau: float | Tensor, scale: Scale) -> Tensor:
    """The loss from the sum of both directions: τ · sum (``"paper"``) or mean
    (``"unit"``).
    """
    if scale == "paper":
        return both / scalar("inv_tau", inv_tau, both)
    return both / 2
