"""CLOOB and InfoLOOB for text pairs, as losses of ``SentenceTransformerTrainer``
(sentence-transformers issue 1337).

    loss = CLOOBLoss(model, inv_tau=30.0, beta=8.0)
    trainer = SentenceTransformerTrainer(model, train_dataset=pairs, loss=loss)

Columns: anchor x, positive y, and any number K of hard-negative columns z, further
candidates of every anchor, N·K of them, stored in no memory. Without them this is the
paper's objective on anchors and positives; :class:`InfoLOOBLoss` has no retrieval.
Embeddings are normalised here: the model needs no ``Normalize`` module.
``BatchSamplers.NO_DUPLICATES`` keeps a text from being its own negative. The cached
variants bound memory by ``mini_batch_size`` with sentence-transformers' gradient
caching: one evaluation of the objective on the full batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cloob import distributed
from cloob.citation import BIBTEX
from cloob.errors import require
from cloob.functional.pairs import Scale
from cloob.interop.negatives import contrast_with_negatives
from cloob.objective import ContrastiveObjective, check_finite

require("sentence_transformers", "sentence-transformers")
from sentence_transformers.base.losses import gradcache  # noqa: E402
from sentence_transformers.base.losses.merged_forward import embed_columns  # noqa: E402
from transformers import (  # noqa: E402
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)


def _unit_rows(parts: list[Tensor]) -> Tensor:
    """(N, D) unit rows of a column's embeddings, in float32 at least."""
    rows = torch.cat(parts)
    return F.normalize(rows if rows.dtype == torch.float64 else rows.float(), dim=1)


class InfoLOOBLoss(nn.Module):
    """InfoLOOB on (anchor, positive[, negative_1, …]) columns: InfoNCE with the
    positive left out of the denominator.

    Args:
        model: The ``SentenceTransformer``.
        inv_tau: Inverse temperature τ⁻¹ > 0, the ``scale`` of
            ``MultipleNegativesRankingLoss``.
        scale: ``"paper"`` is τ · (sum of both directions), ``"unit"`` their mean, in
            the size of the losses of sentence-transformers; paper = unit · 2τ. It
            matters for ``max_grad_norm`` and for mixtures of losses.
        gather_across_devices: Contrast over the batches of all ranks; the loss is the
            global one, and the gradient is exact after DDP's averaging, also for
            batches of unequal size.
    """

    citation = BIBTEX  # for the model card
    _has_contrasted = False  # whether a batch had a second pair

    def __init__(
        self,
        model: nn.Module,
        inv_tau: float = 30.0,
        *,
        scale: Scale = "paper",
        gather_across_devices: bool = False,
    ) -> None:
        if not isinstance(scale, str):
            raise ValueError(
                "scale is 'paper' or 'unit'; MultipleNegativesRankingLoss's scale is"
                " inv_tau here"
            )
        super().__init__()
        self.model = model
        self.gather_across_devices = gather_across_devices
        self._train_with(
            ContrastiveObjective(hopfield=False, inv_tau=inv_tau, scale=scale)
        )

    def _train_with(self, objective: ContrastiveObjective) -> None:
        """Sets the objective, and writes it into the ``config.json`` of a
        ``CLIPModel``, for ``cloob.load_model``.
        """
        self.objective = objective
        for module in self.model.modules():
            config = getattr(module, "config", None)
            if config is not None and getattr(config, "model_type", "") == "clip":
                config.cloob = objective.config()

    def forward(
        self,
        sentence_features: Iterable[dict[str, Tensor]],
        labels: Tensor | None = None,
    ) -> Tensor:
        """The 0-d loss of a batch: per column N tokenised texts; ``labels`` have no
        effect.

        A batch of one pair, which a sampler may leave at the end of an epoch, gives 0
        and zero gradients.
        """
        return self.calculate_loss(
            [[rows] for rows in embed_columns(self.model, sentence_features)]
        )

    def calculate_loss(
        self,
        reps: list[list[Tensor]],
        labels: Tensor | None = None,
        *,
        with_backward: bool = False,
    ) -> Tensor:
        """The loss of the columns' embeddings, in parts of (n, D): gradient caching and
        ``MatryoshkaLoss`` call it.
        """
        anchors, positives, *negatives = [_unit_rows(parts) for parts in reps]
        several = self.gather_across_devices and distributed.world_size() > 1
        self.objective.gather = several
        if len(anchors) == len(positives) < 2 and not several:
            loss = self._zero_loss([anchors, positives, *negatives])
        elif negatives:
            loss = contrast_with_negatives(
                self.objective, anchors, positives, torch.cat(negatives)
            )
        else:
            loss = self.objective(anchors, positives)
        self._has_contrasted = True
        if with_backward:
            # as in cached_backward
            with torch.autocast(loss.device.type, enabled=False):
                torch.autograd.backward(loss)
            loss = loss.detach()
        return loss

    def _zero_loss(self, columns: list[Tensor]) -> Tensor:
        """0, with zero gradients, for one pair; warns if the first batch is one."""
        negatives = [f"negative_{k}" for k in range(1, len(columns) - 1)]
        names = ["anchors", "positives", *negatives]
        check_finite(**dict(zip(names, columns, strict=True)))
        if not self._has_contrasted:  # else it is the last batch of an epoch
            warnings.warn(
                "a batch of one pair teaches nothing: raise"
                " per_device_train_batch_size",
                stacklevel=3,
            )
        return 0.0 * torch.cat(columns).sum()

    def get_config_dict(self) -> dict[str, object]:
        """The arguments, for the model card."""
        config = self.objective.config()
        names = ["inv_tau", "scale"]
        if self.objective.hopfield:
            names.insert(1, "beta")
        arguments = {name: config[name] for name in names}
        return {**arguments, "gather_across_devices": self.gather_across_devices}


class CLOOBLoss(InfoLOOBLoss):
    """InfoLOOB on embeddings retrieved from modern Hopfield memories of the batch (over
    ranks: of all batches).

    Arguments as :class:`InfoLOOBLoss`, and ``beta``: inverse temperature β > 0 of the
    retrieval.
    """

    def __init__(
        self,
        model: nn.Module,
        inv_tau: float = 30.0,
        beta: float = 8.0,
        *,
        scale: Scale = "paper",
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__(
            model, inv_tau, scale=scale, gather_across_devices=gather_across_devices
        )
        self._train_with(
            ContrastiveObjective.cloob(inv_tau=inv_tau, beta=beta, scale=scale)
        )


class RetrievalFrom(TrainerCallback):  # type: ignore[misc] # its types are not read
    """``callbacks=[RetrievalFrom(loss, 0.5)]``: InfoLOOB for half of the steps, as
    random weights need, then CLOOB.
    """

    def __init__(self, loss: nn.Module, share: float) -> None:
        # A MatryoshkaLoss holds the loss.
        self.objective = next(
            part for part in loss.modules() if isinstance(part, ContrastiveObjective)
        )
        if not self.objective.hopfield:
            raise ValueError(
                "RetrievalFrom: this loss has no retrieval that could begin later; take"
                " CLOOBLoss"
            )
        self.share = share

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **others: object,
    ) -> None:
        """Called by the trainer."""
        self.objective.hopfield = state.global_step >= self.share * state.max_steps


class _Cached(InfoLOOBLoss, gradcache.CachedLossMixin):
    """The forward pass with gradient caching, for a loss of this module that follows it
    among the bases.
    """

    def _set_mini_batches(
        self, mini_batch_size: int, mini_batch_num_tokens: int | None
    ) -> None:
        """Sets how much of a batch is embedded at a time; refuses what cannot be
        cut.
        """
        if gradcache.has_static_embedding_input(self.model):
            raise ValueError(
                "a StaticEmbedding's input has no batch dimension to cut; use the loss"
                " without cache"
            )
        gradcache._validate_mini_batch_num_tokens(mini_batch_num_tokens)
        self.mini_batch_size = mini_batch_size
        self.mini_batch_num_tokens = mini_batch_num_tokens

    def forward(
        self,
        sentence_features: Iterable[dict[str, Tensor]],
        labels: Tensor | None = None,
    ) -> Tensor:
        """As the loss without cache; the backward pass embeds again."""
        loss: Tensor = self.forward_cached(sentence_features, labels)
        return loss

    def get_config_dict(self) -> dict[str, object]:
        """The arguments, for the model card."""
        sizes = {
            "mini_batch_size": self.mini_batch_size,
            "mini_batch_num_tokens": self.mini_batch_num_tokens,
        }
        return {**super().get_config_dict(), **sizes}


class CachedInfoLOOBLoss(_Cached):
    """:class:`InfoLOOBLoss` with gradient caching, ``mini_batch_size`` texts or
    ``mini_batch_num_tokens`` at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        inv_tau: float = 30.0,
        *,
        scale: Scale = "paper",
        gather_across_devices: bool = False,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
    ) -> None:
        super().__init__(
            model, inv_tau, scale=scale, gather_across_devices=gather_across_devices
        )
        self._set_mini_batches(mini_batch_size, mini_batch_num_tokens)


class CachedCLOOBLoss(_Cached, CLOOBLoss):
    """:class:`CLOOBLoss` with gradient caching, cut as in
    :class:`CachedInfoLOOBLoss`.
    """

    def __init__(
        self,
        model: nn.Module,
        inv_tau: float = 30.0,
        beta: float = 8.0,
        *,
        scale: Scale = "paper",
        gather_across_devices: bool = False,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
    ) -> None:
        CLOOBLoss.__init__(
            self,
            model,
            inv_tau,
            beta,
            scale=scale,
            gather_across_devices=gather_across_devices,
        )
        self._set_mini_batches(mini_batch_size, mini_batch_num_tokens)
