"""The settings of heads: one flat dataclass, checked as it is made. No torch here."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from cloob.errors import InputError, nearest
from cloob.family import ALIASES, CONTRASTS, FAMILY, ObjectiveName

SCALES = (
    "inv_tau",
    "beta",
    "bias",
    "learnable_inv_tau",
    "learnable_beta",
    "scale",
    "exclude_above",
)
USUAL_DIM = 256
USUAL_SCALES: dict[str, dict[str, Any]] = {
    "infoloob": {"inv_tau": 10.0},
    "clip": {"inv_tau": 10.0, "learnable_inv_tau": False},
}
"""Where heads on vectors start, where that is not the objective's own start."""
FREE = ("epochs", "patience", "val_every", "device", "refit")
"""What may differ when a run is taken up again."""


@dataclass(frozen=True)
class HeadSettings:
    """How heads are chosen and fitted; what is None takes the usual value.

    Example:
        >>> from cloob import HeadSettings
        >>> HeadSettings(objective="cca").override(standardise="one").standardise
        'one'
    """

    objective: Literal[ObjectiveName, "auto", "cca", "dcl"] = "auto"
    """auto: held-out pairs choose one and join it with others; cca: linear heads in
    closed form; else a member of the family.
    """
    inv_tau: float | None = None
    """Inverse temperature of the contrast (its start when it is learned)."""
    beta: float | None = None
    """Inverse temperature of the Hopfield retrieval."""
    bias: float | None = None
    """Start of the bias that the sigmoid loss learns; siglip alone."""
    learnable_inv_tau: bool | None = None
    """Learn the contrast's inverse temperature (with the scale unit)."""
    learnable_beta: bool | None = None
    """Learn the retrieval's inverse temperature."""
    scale: Literal["paper", "unit"] | None = None
    """paper: tau times the sum of both directions; unit: their mean."""
    exclude_above: float | None = None
    """A candidate that is more similar to a row than its partner by more than this is
    no negative of it.
    """
    retrieval_from: float = 0.0
    """Share of the fit after which the Hopfield retrieval begins; before, the plain
    embeddings are contrasted.
    """
    members: int | None = None
    """Heads of other first weights, joined with a closed form. Left out, 1; with auto 2
    of up to 8,192 pairs.
    """
    clean: str | None = None
    """Leave training pairs out that do not seem to belong together: a share of them
    such as 0.2, or auto: those that are more probably wrong than right. Held-out pairs
    are never left out.
    """
    head: Literal["linear", "mlp"] | None = None
    """linear: one matrix a side; mlp: also a hidden layer. Left out, mlp."""
    embed_dim: int | None = None
    """Dimension of the shared space, to which joined heads are cut. Left out, 256 a
    head, and no cut.
    """
    dropout: float | None = None
    """Dropout before a linear head's matrix, or in an mlp's hidden layer. Left out,
    0.1.
    """
    standardise: Literal["auto", "column", "one", "none"] = "auto"
    """Columns lose their mean and are divided, by column: their spread; one: one
    number; none: neither. auto: column where half of the columns vary less than a tenth
    of what all do, else one.
    """
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; biases and temperatures have none."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.999
    """Decay of AdamW's second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    clip_grad_norm: float = 0.0
    """Scale gradients down to this global norm; 0 does not."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Learning rate after the warm-up."""
    warmup: int | None = None
    """Steps of linear warm-up; left out, a tenth of the run, at most 2000."""
    start: Literal["closed-form", "random"] | None = None
    """First weights: closed-form: the closed form's matrices, scaled to the spread of
    random ones. Left out, random; auto tries both.
    """
    epochs: int = 60
    """Passes over the training pairs."""
    batch_size: int = 0
    """Pairs a step; 0: 256, of fewer than 4,096 pairs a power of two that makes 16
    steps or more of an epoch, 8 at least.
    """
    patience: int = 5
    """Stop after this many validations without improvement; 0 never stops early."""
    val_every: int = 1
    """Validate every N epochs, and at the end."""
    best: Literal["val_loss", "val_recall"] = "val_recall"
    """What makes an epoch the best: the held-out pairs' loss, or their mean recall at
    1, 5 and 10 in both directions.
    """
    refit: bool = False
    """After choosing, fit anew on all pairs, for as long as the best took. What is
    reported of held-out pairs is the recall before that.
    """
    seed: int = 0
    """Seed of the first weights, the order of the pairs and dropout."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    def __post_init__(self) -> None:
        name = ALIASES.get(self.objective, self.objective)
        object.__setattr__(self, "objective", name)
        check_types(self)
        check_ranges(self)
        check_objective(self)

    def override(self, **changes: Any) -> Self:
        """A copy with some settings changed; InputError names one that does not
        exist, or is not right.
        """
        names = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in names:
                raise InputError(f"unknown key {name!r}; {nearest(name, names)}")
        return dataclasses.replace(self, **changes)

    @property
    def retrieves(self) -> bool:
        """Whether the objective is a member with Hopfield retrieval."""
        return self.objective in FAMILY and FAMILY[self.objective].hopfield

    def given_scales(self) -> dict[str, Any]:
        """The scales of the objective that are not left out."""
        values = {name: getattr(self, name) for name in SCALES}
        return {name: value for name, value in values.items() if value is not None}

    def kept(self) -> dict[str, Any]:
        """The settings that a run must have again when it is taken up."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in FREE}


def check_types(settings: Any) -> None:
    """Converts texts to paths, lists to tuples, whole numbers to floats; refuses other
    types.
    """
    for name, hint in typing.get_type_hints(type(settings)).items():
        value = _converted(getattr(settings, name), hint, name)
        object.__setattr__(settings, name, value)


def _converted(value: Any, hint: Any, name: str) -> Any:
    origin, kinds = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _converted(value, kinds[0], name)
    if origin is Literal:
        if value in kinds:
            return value
        raise InputError(f"{name} is {value!r}; it must be one of {', '.join(kinds)}")
    if origin is tuple:
        if isinstance(value, list | tuple) and all(isinstance(x, str) for x in value):
            return tuple(value)
        raise InputError(f"{name} is {value!r}; it must be a list of texts")
    if hint is Path and isinstance(value, str | Path) and value != "":
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    is_flag = isinstance(value, bool)
    if isinstance(value, hint) and is_flag == (hint is bool) and value != "":
        return value
    expected = {
        int: "an integer",
        float: "a number",
        str: "a text",
        bool: "true or false",
        Path: "the path of a file or folder",
    }
    raise InputError(f"{name} is {value!r}; it must be {expected[hint]}")


def check_ranges(settings: HeadSettings) -> None:
    """Refuses numbers that a setting cannot be."""
    positive = ("inv_tau", "beta", "lr", "eps")
    shares = ("dropout", "beta1", "beta2", "retrieval_from")
    least = {
        "members": 1,
        "embed_dim": 2,
        "weight_decay": 0,
        "clip_grad_norm": 0,
        "warmup": 0,
        "epochs": 1,
        "batch_size": 0,
        "patience": 0,
        "val_every": 1,
        "seed": 0,
    }
    for name in positive:
        check(settings, name, "a positive number", lambda value: value > 0)
    for name in shares:
        check(settings, name, "in [0, 1)", lambda value: 0 <= value < 1)
    for name, low in least.items():
        check(settings, name, f"{low} or more", lambda value, low=low: value >= low)
    for name in ("bias", "exclude_above"):
        check(settings, name, "a finite number", lambda value: True)
    check(settings, "batch_size", "2 or more, or 0 to fit it", lambda n: n != 1)
    share = re.compile(r"auto|0|0?\.\d+")
    if settings.clean is not None and not share.fullmatch(settings.clean):
        expected = "auto, or a share such as 0.2"
        raise InputError(f"clean is {settings.clean!r}; it must be {expected}")
    device = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
    if not device.fullmatch(settings.device):
        expected = "auto, cpu, cuda, cuda:N or mps"
        raise InputError(f"device is {settings.device!r}; it must be {expected}")


def check(settings: Any, name: str, expected: str, holds: Any) -> None:
    """Refuses a number that is given and not finite, or is not as expected."""
    value = getattr(settings, name)
    if value is not None and not (math.isfinite(value) and holds(value)):
        raise InputError(f"{name} is {value!r}; it must be {expected}")


def check_objective(settings: HeadSettings) -> None:
    """Refuses settings that have no part in what the objective does."""
    name = settings.objective
    reasons: dict[str, str] = {}
    if name == "cca":
        names = *SCALES, "retrieval_from"
        reasons = dict.fromkeys(names, "the objective cca, which has no loss")
        for key in ("members", "head", "dropout", "start"):
            reasons[key] = "the objective cca, whose heads are matrices in closed form"
    elif name == "auto":
        names = *SCALES, "retrieval_from"
        reasons = dict.fromkeys(names, "the objective auto, which tries several")
    else:
        member = FAMILY[name]
        if not member.hopfield:
            reasons["beta"] = f"{name}, which has no retrieval"
            reasons["learnable_beta"] = reasons["beta"]
            reasons["retrieval_from"] = reasons["beta"]
        if CONTRASTS[member.contrast].softmax:
            reasons["bias"] = f"{name}, in which it would cancel"
        elif settings.scale == "paper":
            reasons["scale"] = name
        if settings.learnable_inv_tau and settings.scale == "paper":
            rises = "the scale paper: it would rise to its bound"
            reasons["learnable_inv_tau"] = rises
    for key, reason in reasons.items():
        value = getattr(settings, key)
        if value:
            raise InputError(f"{key} is {value!r}; it must be left out with {reason}")


def check_held_out(settings: HeadSettings, *, holds_out: bool, advice: str) -> None:
    """Refuses what held-out pairs have to choose where there are none."""
    if holds_out:
        chooses = settings.objective == "auto" or (settings.members or 1) > 1
        if chooses and settings.best == "val_loss":
            raise InputError(
                "best is 'val_loss', but objective auto and members go by recall; leave"
                " it out"
            )
        return
    missing = f"but there are no held-out pairs; give {advice}"
    if settings.objective == "auto":
        raise InputError(f"objective is 'auto', {missing}, or name an objective")
    if (settings.members or 1) > 1:
        raise InputError(f"members is {settings.members}, {missing}, or leave it out")
    if settings.patience and settings.objective != "cca":
        raise InputError(f"patience is {settings.patience}, {missing}, or patience 0")
    if settings.val_every > 1:
        raise InputError(f"val_every is {settings.val_every}, {missing}")
    if settings.best == "val_loss" and settings.objective != "cca":
        raise InputError(f"best is 'val_loss', {missing}, or leave it out")
    if settings.refit:
        raise InputError("refit is True, but there are no held-out pairs to add")
