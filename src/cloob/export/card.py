"""The model card: use, and training as its run tells of it."""

from __future__ import annotations

import re
from pathlib import Path

from cloob.citation import BIBTEX
from cloob.errors import needs
from cloob.export.exported import CARD_FILE, Exported
from cloob.family import CONTRASTS, FAMILY, member_name
from cloob.files import write_whole
from cloob.models import runs
from cloob.models.encoder import DualEncoder
from cloob.models.importing import read_json
from cloob.models.source import find_model_folder

with needs("export"):
    import jinja2

_TRAINING = {
    "batch size": "batch_size",
    "precision": "precision",
    "learning rate": "lr",
    "schedule": "schedule",
    "weight decay": "weight_decay",
    "seed": "seed",
}
_TEMPLATE = Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8")


def write_card(
    folder: Path,
    source: str,
    encoder: DualEncoder,
    exported: Exported,
    name: str,
    license: str | None = None,
) -> None:
    """Writes the card of an export of a model, called ``name`` where it will be."""
    settings = encoder.objective_config
    member = member_name(settings.get("contrast"), settings.get("hopfield"))
    objective = member or settings.get("closed_form")
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["cell"] = _cell
    parameters = encoder.model.parameters()
    page = environment.from_string(_TEMPLATE).render(
        encoder=encoder,
        objective=objective,
        training=_training_of(find_model_folder(source)),
        exported=exported,
        tags=dict.fromkeys(filter(None, [objective, *exported.tags])),
        name=name.rpartition("/")[2],
        place=name,
        license=license,
        millions=sum(value.numel() for value in parameters) / 1e6,
        member=FAMILY.get(str(objective)),
        contrasts=CONTRASTS,
        citation=BIBTEX,
    )
    write_whole(folder / CARD_FILE, page)


def _cell(text: object) -> str:
    """Text that stays inside a cell and is no markup."""
    return re.sub(r"([|\\`*_\[\]<>])", r"\\\1", " ".join(str(text).split()))


def _training_of(folder: Path | None) -> dict[str, object]:
    """The training of a run up to the checkpoint of a model folder, label to value;
    empty without a run.

    Data and the model that it began with are left to the person: their names are places
    of this machine.
    """
    run = runs.run_of(folder)
    if run is None or folder is None:
        return {}
    config = read_json(run / runs.RUN_CONFIG_FILE)
    step = runs.checkpoint_step(folder.resolve().parent)
    rows: dict[str, object] = {"steps": f"{step:,}"}
    for line in runs.read_lines(run / runs.EPOCHS_FILE):
        if line.get("step") == step:
            rows["pairs seen"] = f"{line['samples_seen']:,}"
    for label, key in _TRAINING.items():
        rows[label] = config.get(key)
    if config.get("retrieval_from"):
        rows["retrieval joins"] = f"after {config['retrieval_from']:.0%}"
    return rows
