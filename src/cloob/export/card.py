"""The model card: use, and training as its run tells of it."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from cloob.citation import BIBTEX
from cloob.errors import needs
from cloob.export.exported import CARD_FILE, Exported
from cloob.family import CONTRASTS, FAMILY, member_name
from cloob.files import write_whole
from cloob.models import runs
from cloob.models.encoder import DualEncoder
from cloob.models.importing import read_json
from cloob.models.load import find_model_folder
from cloob.models.source import PORT

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
    """
    run = runs.run_of(folder)
    if run is None or folder is None:
        return {}
    config = read_json(run / runs.RUN_CONFIG_FILE)
    sources = [data_name(source) for source in config.get("data") or ()]
    step = runs.checkpoint_step(folder.resolve().parent)
    rows: dict[str, object] = {"data": ", ".join(sources), "steps": f"{step:,}"}
    for line in runs.read_lines(run / runs.EPOCHS_FILE):
        if line.get("step") == step:
            rows["pairs seen"] = f"{line['samples_seen']:,}"
    for label, key in _TRAINING.items():
        rows[label] = config.get(key)
    if config.get("init"):
        rows["starts from"] = model_name(str(config["init"]))
    if config.get("retrieval_from"):
        rows["retrieval joins"] = f"after {config['retrieval_from']:.0%}"
    return rows


def model_name(source: str) -> str:
    """A model as a card names it: one of the hub with its owner, any other as
    ``data_name`` does.
    """
    if re.fullmatch(r"hf-hub:[\w-][\w.-]*/[\w.-]+", source):
        return source
    path, _ = runs.split_checkpoint(source.removeprefix("local-dir:"))
    return data_name(path.removesuffix(PORT))


def data_name(source: str) -> str:
    """A data source as a card names it: a relative path or packaged set, else the last
    part: no host, no key.
    """
    if source.startswith("demo"):
        return source
    address = re.match(r"[A-Za-z][A-Za-z0-9+.-]+:(?://[^/]*)?", source)
    place = source
    if address:
        place = re.split(r"[?#]", source[address.end() :])[0]
    path = PurePosixPath(place)
    is_elsewhere = address or path.is_absolute() or ".." in path.parts
    if source and not is_elsewhere and not source.startswith("~"):
        return source
    return path.name.lstrip("~.") or "a folder"
