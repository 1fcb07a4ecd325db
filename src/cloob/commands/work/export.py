"""Exports one model as ``cloob export`` was asked to."""

from __future__ import annotations

import json
from pathlib import Path

from cloob.commands.exporting import ExportArguments, check_repository
from cloob.commands.steps import say_next
from cloob.errors import InputError
from cloob.export.card import gather_facts, write_card
from cloob.export.exported import Exported
from cloob.files import whole_folder
from cloob.models.encoder import DualEncoder
from cloob.models.load import load_model
from cloob.models.runs import OBJECTIVE_FILE


def run(arguments: ExportArguments, licence: str | None) -> int:
    """Writes the export, whole or not at all; returns the exit code."""
    encoder = load_model(arguments.source, device="cpu")
    facts = gather_facts(arguments.source, encoder, arguments.results)
    with whole_folder(arguments.target) as folder:
        exported = _export(encoder, folder, arguments)
        settings = json.dumps(encoder.objective_config, indent=2, allow_nan=False)
        (folder / OBJECTIVE_FILE).write_text(settings, encoding="utf-8")
        name = arguments.target.resolve().name
        write_card(
            folder,
            facts,
            name=name,
            library=exported.library,
            usage=exported.usage.replace("DIR", name),
            notes=exported.notes,
            tags=(*([facts.objective] if facts.objective else []), *exported.tags),
            license=licence,
        )
    print(f"{arguments.target}: {encoder.name}, embeddings of {encoder.embed_dim} numbers; {exported.summary}")
    steps: list[list[str | Path]] = []
    if arguments.to != "torch-export":  # which alone is not read back
        steps.append(["eval", arguments.source, arguments.target, "--zeroshot", "demo:noto-emoji"])
    if arguments.to == "onnx":
        steps.append(["index", "PICTURES", "--model", arguments.target, "--out", "pictures.idx"])
    if licence is not None:
        of_results: list[str | Path] = ["--results", arguments.results] if arguments.results is not None else []
        steps.append(["push", arguments.source, _repository(name), "--license", licence, *of_results, "--dry-run"])
    say_next(*steps)
    return 0


def _repository(name: str) -> str:
    """A repository called as a folder is, if the hub takes that name."""
    try:
        check_repository(f"me/{name}")
    except InputError:
        return "me/model"
    return f"me/{name}"


def _export(encoder: DualEncoder, folder: Path, arguments: ExportArguments) -> Exported:
    """Imports the one exporter that is asked for."""
    match arguments.to:
        case "transformers":
            from cloob.export.transformers import export_transformers  # transformers

            return export_transformers(encoder, folder)
        case "onnx":
            from cloob.export.programs.onnx import export_onnx  # onnx

            return export_onnx(encoder, folder, int8=arguments.int8, sets=arguments.eval)
        case _:
            from cloob.export.programs.torch_export import export_torch  # torch.export

            return export_torch(encoder, folder)
