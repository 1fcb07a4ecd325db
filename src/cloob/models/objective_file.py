"""What a model folder says of the objective that its model was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cloob.models.runs import OBJECTIVE_FILE
from cloob.models.untrusted import read_json
from cloob.models.weights.fields import Fields


def read_objective(folder: Path) -> dict[str, Any]:
    """The settings in a folder's ``objective.json``; empty if it has none.

    Raises:
        InputError: It is damaged, or τ⁻¹, β or the bias is no number that can be one.
    """
    file = folder / OBJECTIVE_FILE
    if not file.is_file():
        return {}
    settings = dict(read_json(file))
    fields = Fields(file, settings)
    for key in ("inv_tau", "beta", "bias"):
        if key in settings:
            fields.number(key, positive=key != "bias")
    return settings
