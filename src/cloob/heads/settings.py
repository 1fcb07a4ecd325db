"""The settings of heads: one flat dataclass, checked as it is made. No torch here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal, Self, get_args

from annotated_types import Ge, Interval

from cloob.errors import InputError
from cloob.family import ObjectiveName
from cloob.machine import check_device_name
from cloob.settings import (
    SCALES,
    AtLeastOne,
    Count,
    Decay,
    NotNegative,
    ObjectiveSettings,
    Positive,
)

ClosedForm = Literal["cca", "kcca"]
CLOSED_FORMS: tuple[ClosedForm, ...] = get_args(ClosedForm)
USUAL_DIM = 256
USUAL_SCALES: dict[str, dict[str, float | bool]] = {
    "infoloob": {"inv_tau": 10.0},
    "clip": {"inv_tau": 10.0, "learnable_inv_tau": False},
}
"""Where heads on vectors start, where that is not the objective's own start."""
FREE = (
    *("epochs", "patience", "device", "refit"),
    *("out", "resume", "overwrite", "workers", "max_bad_fraction"),
)
"""What may differ when a run is taken up again."""
OF_THE_LOOP = ("lr", "weight_decay", "epochs", "batch_size", "patience", "seed")
"""What a closed form has no use for."""


@dataclass(frozen=True)
class HeadSettings(ObjectiveSettings):
    """How heads are chosen and fitted; what is None takes the usual value.

    Example:
        >>> from cloob import HeadSettings
        >>> HeadSettings(objective="cca").override(standardise="one").standardise
        'one'
    """

    objective: Literal[ObjectiveName, "auto", ClosedForm, "dcl"] = "auto"
    """auto: held-out pairs choose one and join it with others; cca: linear heads in
    closed form; kcca: the same of 512 random waves of the columns, which approaches a
    kernel; else a member of the family.
    """
    members: AtLeastOne | None = None
    """Heads of other first weights, joined with a closed form. Left out, 1; with auto
    2, or 1 where it starts in one way.
    """
    clean: Literal["auto"] | None = None
    """auto: leave training pairs out that are more probably wrong than right. Held-out
    pairs are never left out.
    """
    head: Literal["linear", "mlp"] | None = None
    """linear: one matrix a side; mlp: also a hidden layer. Left out, mlp."""
    embed_dim: Annotated[int, Ge(2)] | None = None
    """Dimension of the shared space, to which joined heads are cut. Left out, 256 a
    head, and no cut.
    """
    dropout: Decay | None = None
    """Dropout before a linear head's matrix, or in an mlp's hidden layer. Left out,
    0.1.
    """
    standardise: Literal["auto", "column", "one", "none"] = "auto"
    """Columns lose their mean and are divided, by column: their spread; one: one
    number; none: neither. auto: what finds more in one half of the training pairs after
    the closed form of the other; before a closed form and what starts from it also
    signed roots, logarithms or ranks.
    """
    lr: Positive = 1e-3
    """Peak learning rate, to which it rises over a tenth of the run, 2,000 steps at
    most; then it falls to 0 by half a cosine.
    """
    weight_decay: NotNegative = 0.1
    """Decoupled weight decay of matrices; biases and temperatures have none."""
    start: Literal["closed-form", "random"] | None = None
    """First weights: closed-form: the closed form's matrices, scaled to the spread of
    random ones. Left out, random; auto tries both.
    """
    epochs: AtLeastOne = 60
    """Passes over the training pairs."""
    batch_size: Count = 0
    """Pairs a step; 0: 256, of fewer than 4,096 pairs a power of two that makes 16
    steps or more of an epoch, 8 at least, or 64 where a side has 16 columns or fewer.
    """
    patience: Count = 5
    """Stop after this many epochs in which the held-out pairs' mean recall at 1, 5 and
    10 in both directions was no better; 0 never stops early. With a batch size of 0 and
    16 columns or fewer on a side three times as many.
    """
    refit: bool = False
    """After choosing, fit anew on all pairs, for as long as the best took. What is
    reported of held-out pairs is the recall before that.
    """
    seed: Annotated[int, Interval(ge=0, lt=2**63)] = 0
    """Seed of the first weights, the order of the pairs and dropout."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_device_name(self.device)
        if self.batch_size == 1:
            raise InputError("batch_size is 1; it must be 2 or more, or 0 to fit it")
        if self.objective == "auto":
            other = "the objective auto, which tries several"
            self.refuse(SCALES, other)
        elif self.is_closed_form:
            names = (*SCALES, "members", "head", "dropout", "start")
            other = f"the objective {self.objective}, whose heads are in closed form"
            self.refuse((*names, *OF_THE_LOOP), other)
        else:
            self.check_member()

    @property
    def is_closed_form(self) -> bool:
        """Whether the heads are solved, and not trained."""
        return self.objective in CLOSED_FORMS

    def override(self, **changes: object) -> Self:
        """As of every objective; the closed form also begins without the settings of
        the loop.
        """
        if changes.get("objective") in CLOSED_FORMS and not self.is_closed_form:
            fields = {field.name: field.default for field in dataclasses.fields(self)}
            changes = {**{name: fields[name] for name in OF_THE_LOOP}, **changes}
        return super().override(**changes)

    def resumable_settings(self) -> dict[str, object]:
        """The settings that a run must have again when it is taken up."""
        values = self.to_dict()
        return {name: value for name, value in values.items() if name not in FREE}


def check_held_out(settings: HeadSettings, *, holds_out: bool, advice: str) -> None:
    """Refuses what held-out pairs have to choose where there are none."""
    if holds_out:
        return
    other = f"a fit without held-out pairs; give {advice}"
    if settings.objective == "auto":
        raise InputError(f"objective is 'auto'; name another for {other}")
    settings.refuse(("members", "refit"), other)
    if settings.patience and not settings.is_closed_form:
        raise InputError(f"patience is {settings.patience}; it must be 0 with {other}")
