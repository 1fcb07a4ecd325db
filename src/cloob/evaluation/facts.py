"""What evaluation knows of a model besides its embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cloob.errors import InputError
from cloob.evaluation.embed import Encoder
from cloob.models.fingerprint import fingerprint
from cloob.objective import OBJECTIVES, make_objective

PAPER_BETA = 8.0
"""β of the retrievals that are measured for a model that has none of its own."""


@dataclass(frozen=True)
class ModelFacts:
    """What evaluation reports of a model besides its numbers.

    Attributes:
        objective: Name of the family's member that it was trained with, None if unknown.
        settings: Its ``objective.json``; empty if unknown.
        inv_tau: τ⁻¹ of its objective, else of its ``logit_scale``, else CLIP's initial 1/0.07.
        beta: β of its objective if it retrieves and says so, else the paper's 8.
        fingerprint: As of :func:`cloob.models.fingerprint.fingerprint`; None where it has none.
    """

    objective: str | None
    settings: Mapping[str, Any]
    inv_tau: float
    beta: float
    fingerprint: str | None


def model_facts(encoder: Encoder) -> ModelFacts:
    """What is known of a loaded model; InputError where its settings say no number for one of them."""
    settings: Mapping[str, Any] = getattr(encoder, "objective_config", None) or {}
    members = {}
    for name in OBJECTIVES:
        config = make_objective(name).config()
        members[config["contrast"], config["hopfield"]] = name
    scale = getattr(getattr(encoder, "model", None), "logit_scale", None)
    trained_scale = float(scale.detach().exp()) if isinstance(scale, Tensor) else 1 / 0.07
    try:
        objective = members.get((settings.get("contrast"), settings.get("hopfield")))
        inv_tau = float(settings.get("inv_tau", trained_scale))
        beta = float(settings.get("beta", PAPER_BETA)) if settings.get("hopfield") else PAPER_BETA
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the settings of its objective are not readable ({error})") from None
    own = isinstance(encoder, nn.Module) or hasattr(encoder, "fingerprint")
    return ModelFacts(objective, settings, inv_tau, beta, fingerprint(encoder) if own else None)
