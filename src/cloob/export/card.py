"""The model card: metadata as the hub wants them, how to use the model, how it was trained and how good it is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cloob.citation import BIBTEX
from cloob.errors import require
from cloob.evaluation.report.numbers import MISSING, number, part
from cloob.export.exported import CARD_FILE
from cloob.export.facts import Facts
from cloob.files import write_whole

PIPELINE = "zero-shot-image-classification"
_SECTIONS = {
    "zeroshot": ("zero-shot", {"acc1": "top-1 %", "acc5": "top-5 %", "mean_per_class_recall": "mean per class %"}),
    "probe": ("linear probe", {"acc1": "top-1 %", "mean_per_class_recall": "mean per class %"}),
    "retrieval": (
        "retrieval",
        {
            f"{direction}@{k}": f"{arrow}, recall@{k} %"
            for direction, arrow in (("image_to_text", "image → text"), ("text_to_image", "text → image"))
            for k in (1, 5, 10)
        },
    ),
}
_SETTINGS = {"inv_tau": "τ⁻¹", "beta": "β", "bias": "bias", "scale": "scale"}


def write_card(
    folder: Path,
    facts: Facts,
    *,
    name: str,
    library: str,
    usage: str,
    notes: Sequence[str] = (),
    tags: Sequence[str] = (),
    license: str | None = None,
) -> None:
    """Writes ``README.md``.

    Args:
        folder: Where it goes.
        facts: Of the model.
        name: Its heading.
        library: ``library_name``.
        usage: Markdown: how to use the model.
        notes: Sentences of "What to know".
        tags: For the hub.
        license: As the hub spells it; None: the card says that none is given.
    """
    short = name.rpartition("/")[2]
    parts = [f"# {short}", _summary(facts), f"## How to use it\n\n{usage.strip()}"]
    if notes:
        parts.append("## What to know\n\n" + "\n".join(f"- {note}" for note in notes))
    parts += [f"## Training\n\n{_training(facts)}", f"## Results\n\n{_results(facts)}"]
    given = f"`{license}`." if license else "Not given; ask whoever published the model before you use it."
    parts += [f"## Licence\n\n{given}", f"## Citation\n\n```bibtex\n{BIBTEX}```"]
    head = _metadata(facts, short, library, [*dict.fromkeys(tags)], license)
    write_whole(folder / CARD_FILE, f"---\n{head}\n---\n\n" + "\n\n".join(parts) + "\n")


def _metadata(facts: Facts, name: str, library: str, tags: list[str], license: str | None) -> str:
    hub: Any = require("huggingface_hub", "export")
    results = [
        hub.EvalResult(
            task_type=PIPELINE,
            dataset_type=re.sub(r"[^\w.-]+", "-", set_name),
            dataset_name=set_name,
            metric_type="accuracy",
            metric_name=f"zero-shot top-{k}",
            metric_value=round(100 * accuracy, 2),
        )
        for set_name, numbers in part(facts.results, "zeroshot").items()
        for k in (1, 5)
        if (accuracy := number(numbers.get(f"acc{k}"))) is not None
    ]
    more = {"model_name": name, "eval_results": results} if results else {}
    data = hub.ModelCardData(license=license, library_name=library, pipeline_tag=PIPELINE, tags=tags, **more)
    text: str = data.to_yaml(line_break="\n")
    return text.strip()


def _summary(facts: Facts) -> str:
    objective = f", trained with {_OBJECTIVES.get(facts.objective, facts.objective)}" if facts.objective else ""
    encoder = facts.encoder
    millions = sum(value.numel() for value in encoder.model.parameters()) / 1e6
    return (
        f"An image tower and a text tower that share an embedding space ({encoder.name}, {millions:.1f} million "
        f"parameters, pictures of {encoder.image_size} × {encoder.image_size} pixels, texts of up to "
        f"{encoder.context_length} tokens, embeddings of {encoder.embed_dim} numbers){objective}."
    )


_OBJECTIVES = {
    "cloob": "CLOOB (InfoLOOB on embeddings retrieved from modern Hopfield networks, arXiv:2110.11316)",
    "clip": "CLIP's objective (InfoNCE)",
    "infoloob": "InfoLOOB (arXiv:2110.11316, without retrieval)",
    "infonce-hopfield": "InfoNCE on embeddings retrieved from modern Hopfield networks",
    "siglip": "SigLIP's sigmoid loss (arXiv:2303.15343)",
    "siglip-hopfield": "SigLIP's sigmoid loss on embeddings retrieved from modern Hopfield networks",
}


_LEARNABLE = {"learnable_inv_tau": "τ⁻¹", "learnable_beta": "β"}


def _training(facts: Facts) -> str:
    rows = {}
    if facts.objective:
        rows["objective"] = facts.objective
        stored = facts.encoder.objective_config
        settings = {label: stored[key] for key, label in _SETTINGS.items() if key in stored}
        if not stored.get("hopfield"):
            settings.pop("β", None)
        learned = [label for key, label in _LEARNABLE.items() if stored.get(key)]
        for label in (*learned, "bias"):  # the bias always is
            if label in settings:
                settings[label] = f"{settings[label]:.4g} (learned)"
        rows |= {label: str(value) for label, value in settings.items()}
    rows |= facts.training
    if not rows:
        return "What the model was trained on, and how, is not known here."
    if not facts.training:
        rows["data"] = "not known here"
    return _table(["", ""], [[label, _cell(value)] for label, value in rows.items()])


def _results(facts: Facts) -> str:
    rows = []
    for section, (kind, keys) in _SECTIONS.items():
        for set_name, numbers in part(facts.results, section).items():
            for key, label in keys.items():
                if (value := number(numbers.get(key))) is not None:
                    shown = _value(value, numbers.get(f"{key}_interval"))
                    rows.append([f"{kind}, {_cell(set_name)}", label, shown, _cell(numbers.get("n", MISSING))])
    if not rows:
        return "Not measured: `cloob eval` measures, and writes a results.json that a card takes up."
    table = _table(["", "", f"({facts.level:.0%} interval)", "n"], rows)
    return f"{table}\n\nMeasured by `cloob eval`; intervals by bootstrap."


def _value(value: float, low_high: Sequence[float] | None) -> str:
    around = f" ({100 * low_high[0]:.1f}–{100 * low_high[1]:.1f})" if low_high else ""
    return f"{100 * value:.1f}{around}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: object) -> str:
    """Text that stays inside a cell and is no markup."""
    return re.sub(r"([|\\`*_\[\]<>])", r"\\\1", " ".join(str(text).split()))
