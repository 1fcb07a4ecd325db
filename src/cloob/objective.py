"""The objective as a module: scales, gather over ranks, choice of path, and the call that open_clip's trainers make."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, Self, overload

import torch
from torch import Tensor, nn

from cloob import distributed, functional
from cloob.distributed import Layout
from cloob.functional import streamed
from cloob.functional.checks import (
    NonFiniteFeaturesError,
    as_rows,
    check_ids,
    check_lengths,
    check_positive,
    extremes,
    outside_autocast,
    positive_scalar,
    readable,
)
from cloob.functional.reference import Contrast, Scale, by_name, check_pairs, combine
from cloob.scales import ScaledModule

__all__ = [
    "MAX_INV_TAU",
    "OBJECTIVES",
    "STREAM_FROM",
    "Backend",
    "ContrastiveObjective",
    "Implementation",
    "NonFiniteFeaturesError",
    "check_finite",
    "make_objective",
]

Backend = Literal["auto", "reference", "streamed"]

# At 64 to 256 pairs both paths take about equal time, above the streamed one is faster (benchmarks/objective.py --sizes
# 64 128 256 512 1024; 2 CPU cores, D = 512).
STREAM_FROM = 256

# CLIP's bound on a learnable τ⁻¹ (Radford et al. 2021).
MAX_INV_TAU = 100.0


# Lengths further than this from one are told of: rows made unit in bfloat16 are within half of it.
UNIT_TOLERANCE = 0.01


class Implementation(NamedTuple):
    """One way to compute the objective, and the parts of it that a gather over ranks comes between."""

    objective: Callable[..., Tensor]
    retrieval: Callable[..., Tensor]
    info_loob: Callable[..., Tensor]
    info_nce: Callable[..., Tensor]


_REFERENCE = Implementation(
    functional.cloob_reference, functional.hopfield_retrieval, functional.info_loob, functional.info_nce
)
_STREAMED = Implementation(streamed.cloob_streamed, streamed.hopfield_retrieval, streamed.info_loob, streamed.info_nce)


@dataclass(frozen=True)
class _Member:
    contrast: Contrast
    hopfield: bool


_MEMBERS = {
    "clip": _Member("infonce", False),
    "infoloob": _Member("infoloob", False),
    "infonce-hopfield": _Member("infonce", True),
    "cloob": _Member("infoloob", True),
}
OBJECTIVES = tuple(_MEMBERS)


class ContrastiveObjective(ScaledModule):
    """The family {InfoLOOB, InfoNCE} × {Hopfield retrieval, none}; CLOOB and CLIP are two of its four members.

    The state holds τ⁻¹ and β, learnable (``log_inv_tau``) or fixed (``fixed_inv_tau``): a state with another fixed
    value is taken up with a ``FixedScaleWarning``.

    Args:
        contrast: ``"infoloob"`` or ``"infonce"``.
        hopfield: Contrast embeddings retrieved from the batch (Eq. 4, 5) instead of the plain ones.
        inv_tau: Inverse temperature τ⁻¹ > 0 of the contrast; the start value if it is learnable.
        beta: Inverse temperature β > 0 of the retrieval; likewise.
        learnable_inv_tau: Learn ln τ⁻¹ (parameter ``log_inv_tau``), bounded by 100 as in CLIP; with ``"unit"`` only.
        learnable_beta: Learn ln β (parameter ``log_beta``); with retrieval only.
        scale: ``"paper"`` returns τ · (sum of both directions), ``"unit"`` their mean: paper = unit · 2τ. None is
            ``"paper"``, but ``"unit"`` where τ⁻¹ is learned: the derivative of τ · loss by τ⁻¹ is −τ² H, H ≥ 0 the
            entropy of the softmax over the denominator, so that τ⁻¹ would rise to its bound whatever the embeddings.
        backend: ``"reference"`` keeps N×N matrices, ``"streamed"`` needs O(N·D) memory; ``"auto"`` takes the faster.
        gather: Contrast over the batches of all ranks of the process group. The loss is the global one on every rank;
            gradients are exact after the averaging of DDP or FSDP (not before: they carry a factor W until then), so
            a learnable scale has to be inside what DDP wraps.
        matmul: ``"bfloat16"`` lets the streamed path multiply in bfloat16 with float32 accumulation.
        check: Look at the values: rows that are NaN, infinite or zero and learned scales that are no positive number
            are refused, rows that are no unit vectors told of once. That waits once for the device; False spares it.
            Nothing is looked at while ``torch.compile`` or ``torch.export`` trace, nor inside ``torch.func.vmap``.

    Raises:
        ValueError: A value is not one of the above.

    Example:
        >>> import torch
        >>> from cloob import ContrastiveObjective
        >>> objective = ContrastiveObjective(inv_tau=30.0, beta=8.0)
        >>> images = torch.eye(4, 8, requires_grad=True)  # four pairs, each embedding a unit vector
        >>> loss = objective(images, torch.eye(4, 8))
        >>> loss.backward()
        >>> images.grad.shape
        torch.Size([4, 8])
    """

    log_inv_tau: nn.Parameter
    log_beta: nn.Parameter

    def __init__(
        self,
        *,
        contrast: Contrast = "infoloob",
        hopfield: bool = True,
        inv_tau: float = 30.0,
        beta: float = 8.0,
        learnable_inv_tau: bool = False,
        learnable_beta: bool = False,
        scale: Scale | None = None,
        backend: Backend = "auto",
        gather: bool = False,
        matmul: Literal["float32", "bfloat16"] = "float32",
        check: bool = True,
    ) -> None:
        super().__init__()
        if scale is None:
            scale = "unit" if learnable_inv_tau else "paper"
        _one_of("contrast", contrast, ("infoloob", "infonce"))
        _one_of("scale", scale, ("paper", "unit"))
        _one_of("backend", backend, ("auto", "reference", "streamed"))
        _one_of("matmul", matmul, ("float32", "bfloat16"))
        if matmul == "bfloat16" and backend == "reference":
            raise ValueError("matmul='bfloat16' needs backend='streamed' or 'auto'; the reference has no such path")
        if learnable_beta and not hopfield:
            raise ValueError("learnable_beta=True needs hopfield=True: without retrieval β has no gradient")
        if learnable_inv_tau and scale == "paper":
            raise ValueError("learnable_inv_tau=True needs scale='unit': τ · loss falls with τ⁻¹ for all embeddings")
        if learnable_inv_tau and inv_tau > MAX_INV_TAU * (1 + 1e-5):  # exp(ln 100) in float32 is a little above 100
            raise ValueError(f"inv_tau is {inv_tau:g}; a learnable one is kept at {MAX_INV_TAU:g} or below")
        self.contrast: Contrast = contrast
        self.hopfield = hopfield
        self.scale: Scale = scale
        self.backend: Backend = backend
        self.gather = gather
        self.matmul = torch.bfloat16 if matmul == "bfloat16" else None
        self.check = check
        self._lengths_told = False
        self.add_scale("inv_tau", inv_tau, learnable=learnable_inv_tau)
        self.add_scale("beta", beta, learnable=learnable_beta)

    @classmethod
    def cloob(cls, **overrides: Any) -> Self:
        """The paper's objective: InfoLOOB on retrieved embeddings, τ⁻¹ = 30 and β = 8 fixed, τ · sum."""
        return cls(**{"contrast": "infoloob", "hopfield": True, **overrides})

    @classmethod
    def clip(cls, **overrides: Any) -> Self:
        """CLIP's objective: InfoNCE on the embeddings, mean of both directions, τ⁻¹ learnable from 1/0.07."""
        clip = {"contrast": "infonce", "hopfield": False, "inv_tau": 1 / 0.07, "learnable_inv_tau": True}
        return cls(**{**clip, "scale": "unit", **overrides})

    @property
    def name(self) -> str:
        """The member of the family, one of ``OBJECTIVES``."""
        own = _Member(self.contrast, self.hopfield)
        return next(name for name, member in _MEMBERS.items() if member == own)

    @property
    def inv_tau(self) -> Tensor:
        """0-d τ⁻¹: float32 with its graph if it is learnable, else float64 on the CPU."""
        return _as_tensor(self.scale_value("inv_tau"))

    @property
    def beta(self) -> Tensor:
        """0-d β, likewise."""
        return _as_tensor(self.scale_value("beta"))

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, τ⁻¹ and β at their present values; serialisable as JSON."""
        return {
            "contrast": self.contrast,
            "hopfield": self.hopfield,
            "inv_tau": float(self.inv_tau.detach()),
            "beta": float(self.beta.detach()),
            "learnable_inv_tau": self.learns("inv_tau"),
            "learnable_beta": self.learns("beta"),
            "scale": self.scale,
            "backend": self.backend,
            "gather": self.gather,
            "matmul": "float32" if self.matmul is None else "bfloat16",
            "check": self.check,
        }

    def extra_repr(self) -> str:
        """The member and its settings, for ``print``."""
        return ", ".join(f"{key}={value!r}" for key, value in self.config().items())

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bounds a learnable τ⁻¹ by 100 in place; the forward pass in training mode does so too."""
        if self.learns("inv_tau"):
            self.log_inv_tau.clamp_(max=math.log(MAX_INV_TAU))

    @overload
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor | None = None,
        logit_bias: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        output_dict: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor | None = None,
        logit_bias: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        output_dict: Literal[True],
    ) -> dict[str, Tensor]: ...

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor | None = None,
        logit_bias: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch of pairs.

        Args:
            image_features: (N, D) image embeddings, unit rows; float64 with float64, lower precisions as they come.
            text_features: (N, D) text embeddings, unit rows; row i belongs to image i.
            logit_scale: Takes the place of τ⁻¹ if given: that is how open_clip hands a learnable one over, which needs
                ``scale="unit"`` (see above).
            logit_bias: Without effect: a constant added to all logits cancels in both contrasts.
            ids: (N,) integer ids; pairs of equal id are not each other's negatives.
            output_dict: Return ``{"contrastive_loss": loss}``, as open_clip's trainers expect.

        Returns:
            0-d loss, float32 (float64 for float64 input), or the dictionary.

        Raises:
            NonFiniteFeaturesError: A row is NaN, infinite or zero; the message names it. Not with ``check=False``.
            ValueError: Shapes, dtypes or devices do not fit; N < 2; ids of the wrong length; a ``logit_scale`` that
                learns with ``scale="paper"``. With ``gather`` every rank raises, and the message names the rank; also
                where the ranks' τ⁻¹ or β have drifted apart.
            RuntimeError: ``gather=True`` without a process group; ``torch.func`` or ``torch.export`` and the streamed
                path, where ``backend="reference"`` is asked for.
        """
        if self.training:
            self.clamp_()
        if self.gather and not distributed.is_initialized():
            raise RuntimeError(
                "gather=True needs a process group: start with torchrun, or call init_process_group first"
            )
        if self.gather and distributed.world_size() > 1:
            loss = self._over_ranks(image_features, text_features, logit_scale, ids)
        else:
            x, y = check_pairs(image_features, text_features)
            scales = self._scales(logit_scale, x)
            self._look(x, y, scales)
            loss = self.implementation(len(x)).objective(
                x, y, **scales, contrast=self.contrast, hopfield=self.hopfield, scale=self.scale, ids=ids
            )
        return {"contrastive_loss": loss} if output_dict else loss

    def _scales(self, logit_scale: float | Tensor | None, like: Tensor) -> dict[str, float | Tensor]:
        """τ⁻¹ and β of a call: numbers where they are fixed, else 0-d tensors of the rows' dtype and device."""
        learns = isinstance(logit_scale, Tensor) and logit_scale.requires_grad and torch.is_grad_enabled()
        if learns and self.scale == "paper":
            raise ValueError(
                "logit_scale learns, which needs scale='unit': τ · loss falls with τ⁻¹ for all embeddings; "
                "detach it to use its value alone"
            )
        inv_tau = self.scale_value("inv_tau") if logit_scale is None else logit_scale
        both = {"inv_tau": inv_tau, "beta": self.scale_value("beta")}
        for name, value in both.items():
            if isinstance(value, Tensor):
                both[name] = positive_scalar(name, value, like)
            else:
                check_positive(name, value, like.dtype)
        return both

    def _look(self, x: Tensor, y: Tensor, scales: dict[str, float | Tensor]) -> None:
        """Refuses bad rows and scales, and tells of rows that are no unit vectors; waits for the device once."""
        if not (self.check and readable()):
            return
        sides, learned = {"image_features": x, "text_features": y}, _tensors(scales)
        lengths = extremes(**sides, **learned)
        for name in learned:
            check_positive(name, lengths[name][0], x.dtype)
        check_lengths(lengths, **sides)
        for name in sides:
            least, greatest = lengths[name]
            if not self._lengths_told and max(1 - least, greatest - 1) > UNIT_TOLERANCE:
                self._lengths_told = True
                warnings.warn(
                    f"{name} has rows of length {least:.3g} to {greatest:.3g}, but the objective is one of unit rows: "
                    "torch.nn.functional.normalize makes them (said once; check=False says nothing)",
                    stacklevel=2,
                )

    def implementation(self, n_candidates: int) -> Implementation:
        """The functions that compute the objective against so many candidates, by ``backend`` and ``matmul``."""
        streams = self.matmul is not None or n_candidates >= STREAM_FROM
        if self.backend == "reference" or (self.backend == "auto" and not streams):
            return _REFERENCE
        return Implementation(*(partial(function, matmul=self.matmul) for function in _STREAMED))

    @outside_autocast
    def _over_ranks(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor | None,
        ids: Tensor | None,
    ) -> Tensor:
        """This rank's rows against those of all ranks; see :mod:`cloob.distributed` for the gradient contract."""
        x, y, ids, scales, layout = self._agreed(image_features, text_features, logit_scale, ids)
        inv_tau, beta = scales["inv_tau"], scales["beta"]
        parts = self.implementation(layout.total)
        all_x, all_y = _gather_both(x, y, layout)
        if self.hopfield:
            u_x, u_y, v_x, v_y = (parts.retrieval(query, memory, beta) for memory in (all_x, all_y) for query in (x, y))
            all_u_y, all_v_x = _gather_both(u_y, v_x, layout)
        else:
            u_x, v_y, all_u_y, all_v_x = x, y, all_y, all_x
        direction = by_name({"infoloob": parts.info_loob, "infonce": parts.info_nce}, self.contrast)
        own = {
            "positive_offset": layout.own.start,
            "ids": ids,
            "candidate_ids": None if ids is None else distributed.gather_rows(ids, layout),
        }
        images, texts = direction(u_x, all_u_y, inv_tau, **own), direction(v_y, all_v_x, inv_tau, **own)
        share = len(x) / layout.total
        return distributed.global_sum(combine(images, texts, inv_tau, self.scale) * share)

    def _agreed(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor | None,
        ids: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, dict[str, float | Tensor], Layout]:
        """This rank's rows, ids and scales, and everybody's layout, once every rank found its arguments in order."""
        fault, x, y = None, image_features, text_features
        scales: dict[str, float | Tensor] = {"inv_tau": 1.0, "beta": 1.0}
        facts: dict[str, int | float] = dict.fromkeys(("rows", "embedding dimension", "bytes a number", "ids"), 0)
        facts |= dict.fromkeys(scales, 1.0)
        try:
            x, y = as_rows(image_features=image_features, text_features=text_features)
            if len(x) != len(y) or len(x) < 1:
                raise ValueError(
                    f"{len(x)} image_features and {len(y)} text_features: equally many, at least 1, are expected"
                )
            both = check_ids(ids, None, len(x), len(x), x.device)
            ids = None if both is None else both[0].to(torch.int64)
            scales = self._scales(logit_scale, x)
            self._look(x, y, scales)
            values = (float(scale.detach()) if isinstance(scale, Tensor) else scale for scale in scales.values())
            numbers = (len(x), x.shape[1], x.element_size(), int(ids is not None), *values)
            facts = dict(zip(facts, numbers, strict=True))
        except (TypeError, ValueError) as error:
            fault = error
        device = image_features.device if isinstance(image_features, Tensor) else torch.get_default_device()
        everywhere = distributed.agree(facts, fault, device)
        for name, told in everywhere.items():
            # Processors that differ may give other last bits for the exponential of the same parameter.
            tolerance = 1e-3 * min(told) if name in scales else 0.0
            if name != "rows" and max(told) - min(told) > tolerance:
                named = ", ".join(f"rank {r} has {value}" for r, value in enumerate(told))
                advice = "; a learnable one has to be inside what DDP wraps" if name in scales else ""
                raise ValueError(f"ranks differ in {name}: {named}{advice}")
        return x, y, ids, scales, Layout(everywhere["rows"])


def make_objective(name: str, **overrides: Any) -> ContrastiveObjective:
    """A member of the family by its name.

    Args:
        name: ``"clip"`` and ``"cloob"`` as published; ``"infoloob"`` and ``"infonce-hopfield"`` are the two between
            them, with CLOOB's fixed τ⁻¹, β and scale.
        **overrides: Arguments of :class:`ContrastiveObjective`.

    Raises:
        ValueError: Another name.

    Example:
        >>> from cloob import make_objective
        >>> clip = make_objective("clip")
        >>> clip.contrast, clip.hopfield, round(clip.inv_tau.item(), 2)
        ('infonce', False, 14.29)
        >>> make_objective("cloob", beta=14.3).name
        'cloob'
    """
    _one_of("objective", name, OBJECTIVES)
    if name == "clip":
        return ContrastiveObjective.clip(**overrides)
    member = _MEMBERS[name]
    return ContrastiveObjective(**{"contrast": member.contrast, "hopfield": member.hopfield, **overrides})


def check_finite(**named: Tensor) -> None:
    """Refuses rows that are NaN, infinite or zero; waits once for the device.

    Raises:
        NonFiniteFeaturesError: Names the matrix, how many of its rows, and the first.
    """
    some = {name: rows for name, rows in named.items() if len(rows)}
    check_lengths(extremes(**some), **some)


def _gather_both(left: Tensor, right: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Both matrices from all ranks in one exchange."""
    both = distributed.gather_rows(torch.cat([left, right], dim=1), layout)
    return both[:, : left.shape[1]], both[:, left.shape[1] :]


def _tensors(scales: dict[str, float | Tensor]) -> dict[str, Tensor]:
    return {name: scale for name, scale in scales.items() if isinstance(scale, Tensor)}


def _as_tensor(scalar: float | Tensor) -> Tensor:
    return scalar if isinstance(scalar, Tensor) else torch.tensor(scalar, dtype=torch.float64)


def _one_of(name: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ValueError(f"{name} is {value!r}; one of {', '.join(map(repr, options))} is expected")
