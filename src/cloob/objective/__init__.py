"""The objective as a module: the members of the family and their scales.

``batch`` reads a call, ``values`` looks at its values, ``backends`` says by which path
it is computed, and ``loss`` computes it, on one rank or over several.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from cloob import distributed
from cloob.family import (
    ALIASES,
    CONTRASTS,
    FAMILY,
    OBJECTIVES,
    PAPER_OBJECTIVES,
    Contrast,
    member_name,
)
from cloob.functional.checks import NonFiniteFeaturesError, check_number, one_of
from cloob.functional.pairs import Scale, check_member
from cloob.functional.private import in_program, in_transform, readable
from cloob.functional.scores import Targets
from cloob.objective.backends import Backend, Products, check_products
from cloob.objective.batch import (
    Batch,
    Call,
    Member,
    read_batch,
    read_batch_over_ranks,
)
from cloob.objective.labels import Labels
from cloob.objective.loss import loss_of
from cloob.objective.notices import Notices
from cloob.objective.values import Scales, check_finite
from cloob.scales import ScaledModule, scalar_parameter

__all__ = [
    "OBJECTIVES",
    "PAPER_OBJECTIVES",
    "ContrastiveObjective",
    "NonFiniteFeaturesError",
    "check_finite",
    "make_objective",
]

# CLIP's bound on a learnable τ⁻¹ (Radford et al. 2021).
MAX_INV_TAU = 100.0
_BIAS = -10.0  # what SigLIP's starts from


class ContrastiveObjective(ScaledModule):
    """The family {InfoLOOB, InfoNCE} × {Hopfield retrieval, none}, and the sigmoid loss
    without retrieval; CLOOB, CLIP and SigLIP are members.

    The state has τ⁻¹ and β, learnable (``log_inv_tau``) or fixed (``fixed_inv_tau``),
    and the sigmoid loss's ``bias``. A fixed value that differs in a loaded state is
    taken, with a ``FixedScaleWarning``.

    Args:
        contrast: ``"infoloob"``, ``"infonce"`` or ``"sigmoid"`` (SigLIP's,
            arXiv:2303.15343).
        hopfield: Contrast embeddings retrieved from the batch (Eq. 4, 5) instead of the
            plain ones; the sigmoid loss needs False.
        inv_tau: Inverse temperature τ⁻¹ > 0 of the contrast; the start value if it is
            learnable.
        beta: Inverse temperature β > 0 of the retrieval; likewise.
        learnable_inv_tau: Learn ln τ⁻¹ (parameter ``log_inv_tau``), bounded by 100 as
            in CLIP (the sigmoid loss has no bound, as in SigLIP); with ``"unit"`` only.
        learnable_beta: Learn ln β (parameter ``log_beta``); with retrieval only.
        scale: ``"paper"`` returns τ · (sum of both directions), ``"unit"`` their mean:
            paper = unit · 2τ. None is ``"paper"``, but ``"unit"`` where τ⁻¹ is learned:
            the derivative of τ · loss by τ⁻¹ is −τ² H, H ≥ 0 the entropy of the softmax
            over the denominator, so that τ⁻¹ would rise to its bound whatever the
            embeddings. The sigmoid loss has only ``"unit"``: without retrieval the sum
            over all N² pairs, divided by N.
        bias: Start of the sigmoid loss's learned bias, None for −10; with that contrast
            only.
        backend: ``"reference"`` keeps N×N matrices, ``"streamed"`` needs O(N·D) memory;
            ``"auto"`` streams where it retrieves, where that is faster, and where
            autocast or TF32 would round the reference's backward pass; it takes the
            reference inside ``torch.func`` and ``torch.export``.
        gather: Contrast over the batches of all ranks of the process group: True needs
            one, ``"auto"`` takes the local batch if there is none. Every rank returns
            the global loss; gradients are exact after the averaging of DDP or FSDP. So
            DDP has to wrap a learnable scale; FSDP takes no scalars: there average its
            gradient yourself.
        exclude_above: Margin m: a candidate that is more similar to the anchor than its
            positive by more than m is no negative; None keeps all. See
            :func:`cloob.functional.info_loob`.
        matmul: ``"bfloat16"`` lets the streamed paths multiply in bfloat16 with float32
            accumulation.
        check: Check the values, which waits once for the device: refuses rows that are
            NaN, infinite or zero, and learned scales that are not positive; warns once
            about rows that are not unit length. Nothing is checked while
            ``torch.compile`` or ``torch.export`` trace, nor inside ``torch.func.vmap``.

    Raises:
        ValueError: A value is not one of the above.

    Example:
        >>> import torch
        >>> from cloob import ContrastiveObjective
        >>> objective = ContrastiveObjective(inv_tau=30.0, beta=8.0)
        >>> images = torch.eye(4, 8, requires_grad=True)  # four pairs of unit vectors
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
        bias: float | None = None,
        backend: Backend = "auto",
        gather: bool | Literal["auto"] = False,
        exclude_above: float | None = None,
        matmul: Products = "float32",
        check: bool = True,
    ) -> None:
        super().__init__()
        one_of("contrast", contrast, tuple(CONTRASTS))
        softmax = CONTRASTS[contrast].softmax
        if scale is None:
            scale = "paper" if softmax and not learnable_inv_tau else "unit"
        check_member(contrast, scale, hopfield)
        check_products(backend, matmul)
        self._bounded = learnable_inv_tau and softmax
        if learnable_inv_tau:
            check_learnable(inv_tau, scale, bounded=self._bounded)
        if learnable_beta and not hopfield:
            raise ValueError(
                "learnable_beta=True needs hopfield=True: without it β has no gradient"
            )
        if exclude_above is not None:
            check_number("exclude_above", exclude_above, torch.float32, positive=False)
        self.contrast: Contrast = contrast
        self.hopfield = hopfield
        self.scale: Scale = scale
        self.backend: Backend = backend
        self.matmul: Products = matmul
        self.gather = gather
        self.check = check
        self.exclude_above = exclude_above
        self._notices = Notices()
        self.add_scale("inv_tau", inv_tau, learnable=learnable_inv_tau)
        self.add_scale("beta", beta, learnable=learnable_beta)
        self.bias = start_bias(bias, softmax)
        if not learnable_inv_tau:
            self._notices.warn_of_logarithm("inv_tau", inv_tau)

    @classmethod
    def cloob(cls, **overrides: Any) -> Self:
        """The paper's objective: InfoLOOB on retrieved embeddings, τ⁻¹ = 30 and β = 8
        fixed, τ · sum.
        """
        return cls(**_arguments("cloob", overrides))

    @classmethod
    def clip(cls, **overrides: Any) -> Self:
        """CLIP's objective: InfoNCE on the embeddings, mean of both directions, τ⁻¹
        learnable from 1/0.07.
        """
        return cls(**_arguments("clip", overrides))

    @classmethod
    def siglip(cls, **overrides: Any) -> Self:
        """SigLIP's objective: sigmoid loss on the embeddings, τ⁻¹ learnable from 10 and
        the bias from −10.
        """
        return cls(**_arguments("siglip", overrides))

    @property
    def name(self) -> str:
        """The member of the family, one of ``OBJECTIVES``; of a contrast that no member
        has, the contrast.
        """
        return member_name(self.contrast, self.hopfield) or self.contrast

    @property
    def inv_tau(self) -> Tensor:
        """0-d τ⁻¹: float32 with its graph if it is learnable, else float64 on the
        CPU.
        """
        return self._scale_tensor("inv_tau")

    @property
    def beta(self) -> Tensor:
        """0-d β, likewise."""
        return self._scale_tensor("beta")

    def _scale_tensor(self, name: str) -> Tensor:
        dtype = None if self.learns(name) else torch.float64
        return torch.as_tensor(self.scale_value(name), dtype=dtype)

    def scale_value(self, name: str) -> float | Tensor:
        """As the base's; beyond its bound τ⁻¹ has the value and the gradient at the
        bound.
        """
        if name == "inv_tau" and self._bounded:
            excess = (self.log_inv_tau.detach() - math.log(MAX_INV_TAU)).clamp_min(0.0)
            return (self.log_inv_tau - excess).exp()
        return super().scale_value(name)

    def scale_values(self) -> dict[str, float | Tensor]:
        """τ⁻¹ (``inv_tau``), β (``beta``) and the sigmoid loss's ``bias``: fixed ones
        as numbers, others as tensors.
        """
        scales: Scales = {name: self.scale_value(name) for name in ("inv_tau", "beta")}
        if self.bias is not None:
            scales["bias"] = self.bias
        return scales

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, τ⁻¹, β and bias at their present values;
        serialisable as JSON.
        """
        config: dict[str, Any] = {
            "contrast": self.contrast,
            "hopfield": self.hopfield,
            "inv_tau": float(self.inv_tau.detach()),
            "beta": float(self.beta.detach()),
            "learnable_inv_tau": self.learns("inv_tau"),
            "learnable_beta": self.learns("beta"),
            "scale": self.scale,
            "bias": None if self.bias is None else float(self.bias.detach()),
            "backend": self.backend,
            "gather": self.gather,
            "exclude_above": self.exclude_above,
            "matmul": self.matmul,
            "check": self.check,
        }
        # only what the loss has: other programs read these files
        return {name: value for name, value in config.items() if value is not None}

    def member(self, hopfield: bool | None = None) -> Member:
        """Which loss it computes, in a call with or without retrieval."""
        hopfield = self.hopfield if hopfield is None else hopfield
        return Member(self.contrast, hopfield, self.scale, self.exclude_above)

    def extra_repr(self) -> str:
        """The member, for ``print``."""
        return (
            f"contrast={self.contrast!r}, hopfield={self.hopfield!r},"
            f" scale={self.scale!r}"
        )

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bounds the parameter of a learnable τ⁻¹ of a softmax, so that τ⁻¹ ≤ 100;
        autograd does not see it.

        The forward pass in training mode calls it, except inside ``torch.func`` and
        while a graph is traced.
        """
        if (
            self._bounded
            and self.log_inv_tau.is_leaf
            and not self.log_inv_tau.is_inference()
        ):
            self.log_inv_tau.data.clamp_(max=math.log(MAX_INV_TAU))

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor | None = None,
        logit_bias: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        targets: Targets | None = None,
        weights: Tensor | None = None,
        hopfield: bool | None = None,
        output_dict: bool = False,
        trusted: distributed.Layout | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch of pairs.

        Args:
            image_features: (N, D) image embeddings, unit rows; float64 with float64,
                lower precisions as they come.
            text_features: (N, D) text embeddings, unit rows; row i belongs to image i.
            logit_scale: Takes the place of τ⁻¹, as in open_clip; one that learns needs
                ``scale="unit"`` (see above).
            logit_bias: Takes the place of the sigmoid loss's bias; in InfoLOOB and
                InfoNCE a bias cancels.
            ids: (N,) integers (tensor, numpy, list); pairs of equal id are no negatives
                of one another (``cloob.ids``).
            targets: (N, N) shares T ≥ 0 whose rows sum to 1 (with the sigmoid loss:
                between 0 and 1), or (N, k) int64 columns and their (N, k) shares. Pair
                j is a share T_ij of the positive of pair i, for its image among the
                texts and for its text among the images; None is the identity. Pairs
                with a share stay negatives of the other positives; give ``ids`` too
                where they shall not. Over ranks: (n, N) or (n, k) of this rank's pairs,
                whose columns count the pairs of all ranks in their order. See
                :func:`cloob.functional.contrast_scores`.
            weights: (N,) factors ≥ 0 of both terms of every pair; the loss is divided
                by N and not by their sum. A pair of weight 0 stays a candidate.
            hopfield: Takes the place of the constructor's for this call; with
                ``gather`` the same on all ranks.
            output_dict: Return ``{"contrastive_loss": loss}``, as open_clip's trainers
                expect.
            trusted: The number of rows of every rank. With it the call reads nothing
                from a device: values go unchecked
                (``cloob.objective.values.acceptable`` checks them there), rows are
                taken to be of unit length (much longer ones may overflow), and a rank
                with wrong arguments leaves the others waiting.

        Returns:
            0-d loss, float32 (float64 for float64 input), or the dictionary.

        Raises:
            NonFiniteFeaturesError: A row is NaN, infinite or zero; the message names
                it. Not with ``check=False``.
            ValueError: Shapes, dtypes or devices do not fit; N < 2; ids, targets or
                weights of the wrong shape; targets or weights that are negative, do not
                sum to 1 or require a gradient; targets with ``exclude_above``, either
                with ``matmul="bfloat16"``; a ``logit_scale`` that learns with
                ``scale="paper"``; ranks whose τ⁻¹, β, bias or member differ. With
                ``gather`` every rank raises, and the message names the rank.
            RuntimeError: ``gather=True`` without a process group; ``torch.func`` or
                ``torch.export`` with ``backend="streamed"``.
        """
        if self.training and not in_program():
            self.clamp_()
        scales = self._scales_of_call(logit_scale, logit_bias)
        call = Call(
            image_features,
            text_features,
            Labels(ids, targets, weights),
            scales,
            self.member(hopfield),
            may_read=self.check and trusted is None and readable(),
            trains=self.training,
            gives_inv_tau=logit_scale is not None,
            trusted=trusted,
        )
        read = read_batch_over_ranks if self._gathers() else read_batch
        batch = read(call, self._notices)
        loss = loss_of(batch, self.backend, self.matmul)
        if call.may_read:
            self._look_for_negatives(batch)
        loss = self._touch(
            loss,
            log_beta=batch.member.hopfield,
            log_inv_tau=logit_scale is None,
            bias=logit_bias is None,
        )
        return {"contrastive_loss": loss} if output_dict else loss

    def _gathers(self) -> bool:
        """Whether the rows of several ranks are contrasted; refuses to where that
        cannot be, and warns where there are several and each contrasts its own.
        """
        if self.gather is True and not distributed.is_initialized():
            raise RuntimeError(
                "gather=True needs a process group: start with torchrun, call"
                " init_process_group first, or give gather='auto'"
            )
        n_ranks = distributed.world_size()
        if n_ranks == 1:
            return False
        if not self.gather:
            self._notices.warn(
                "ranks",
                f"gather is False: each of the {n_ranks} ranks contrasts its own rows"
                " alone; gather='auto' takes those of all",
            )
            return False
        if not torch.compiler.is_compiling() and in_transform():
            raise RuntimeError(
                "gathering over ranks goes through no torch.func (grad, vmap, …);"
                " gather=False does"
            )
        return True

    def _scales_of_call(
        self, logit_scale: float | Tensor | None, logit_bias: Tensor | None
    ) -> Scales:
        """The scales of a call: its own, else the module's; a bias of 0 where it has no
        part.
        """
        scales = {"bias": 0.0} | self.scale_values()
        if logit_scale is not None:
            scales["inv_tau"] = logit_scale
        if logit_bias is not None and self.bias is not None:
            scales["bias"] = logit_bias
        return scales

    def _look_for_negatives(self, batch: Batch) -> None:
        """Warns if ids or the margin leave no anchor any negative, looked for once: an
        InfoLOOB of 0 has none.
        """
        excludes = batch.labels.ids is not None or self.exclude_above is not None
        if not excludes or not self._notices.is_first("look for negatives"):
            return
        as_infoloob = batch._replace(
            labels=Labels(batch.labels.ids),
            member=batch.member._replace(contrast="infoloob", scale="unit"),
        )
        with torch.no_grad():
            loss = loss_of(as_infoloob, self.backend, self.matmul)
        if loss == 0:
            self._notices.warn(
                "no negatives",
                "ids or exclude_above leave no anchor any negative: nothing is"
                " contrasted (looked for at the first batch)",
            )

    def _touch(self, loss: Tensor, **used: bool) -> Tensor:
        """The loss, also of parameters that this call did not use: DDP stops at one
        without any gradient.
        """
        for name, is_used in used.items():
            scale = getattr(self, name, None)
            if isinstance(scale, Tensor) and not is_used:
                loss = loss + 0.0 * scale.to(loss)
        return loss


def start_bias(bias: float | None, softmax: bool) -> nn.Parameter | None:
    """The sigmoid loss's bias, None in the softmax contrasts."""
    if softmax:
        if bias is not None:
            raise ValueError("bias needs contrast='sigmoid': it cancels in the others")
        return None
    number = _BIAS if bias is None else float(bias)
    check_number("bias", number, torch.float32, positive=False)
    return scalar_parameter(number)


def check_learnable(inv_tau: float, scale: Scale, *, bounded: bool) -> None:
    """Refuses a τ⁻¹ to learn from which training would go wrong."""
    if scale == "paper":
        raise ValueError(
            "learnable_inv_tau=True needs scale='unit': τ · loss only falls"
        )
    # exp(ln 100) in float32 is a little above 100
    if bounded and inv_tau > MAX_INV_TAU * (1 + 1e-5):
        raise ValueError(
            f"inv_tau is {inv_tau:g}; a learnable one is kept at {MAX_INV_TAU:g} or"
            " below"
        )


def make_objective(name: str, **overrides: Any) -> ContrastiveObjective:
    """A member of the family by its name.

    Args:
        name: ``"clip"`` and ``"cloob"`` as published; ``"infoloob"`` and
            ``"infonce-hopfield"`` are the two between them, with CLOOB's fixed τ⁻¹, β
            and scale. ``"siglip"`` is as published. ``"dcl"`` is another name of
            ``"infoloob"``.
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
    name = ALIASES.get(name, name)
    one_of("objective", name, OBJECTIVES)
    return ContrastiveObjective(**_arguments(name, overrides))


def _arguments(name: str, overrides: dict[str, Any]) -> dict[str, Any]:
    member = FAMILY[name]
    return {
        "contrast": member.contrast,
        "hopfield": member.hopfield,
        **member.starts,
        **overrides,
    }
