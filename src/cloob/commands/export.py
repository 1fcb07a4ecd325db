"""``cloob export``: write a model as a model folder, or for transformers,
sentence-transformers or ONNX.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cloob.commands.console import say_next
from cloob.errors import InputError
from cloob.export.exported import check_target, is_export, write_json
from cloob.files import whole_folder
from cloob.models.runs import OBJECTIVE_FILE, config_file

if TYPE_CHECKING:
    from cloob.models.encoder import DualEncoder

_LICENCE = re.compile(r"[a-z0-9.+-]+")


@dataclass(frozen=True)
class Options:
    """Write a model as a model folder, for transformers and sentence-transformers, or
    for ONNX runtimes.
    """

    source: Annotated[str, "RUN"]
    """A run or model: what `cloob eval` takes."""
    out: Path
    """The folder that is made."""
    to: Literal["cloob", "transformers", "onnx"]
    """cloob: a model folder, which open_clip reads where it has such towers.
    transformers: read by sentence-transformers too. onnx: both towers as graphs.
    """
    license: str | None = None
    """The weights' licence for the card, as the hub spells it: mit, apache-2.0,
    cc-by-4.0, …
    """
    overwrite: bool = False
    """Replace --out where it is an earlier export."""


def run(options: Options) -> int:
    """Exports; the folder appears when it is whole."""
    licence = (options.license or "").strip().lower()
    _check(options, licence)
    from cloob.models.load import load_model

    encoder = load_model(options.source, device="cpu")
    has_pictures = encoder.config.kind != "vectors"
    if not has_pictures and options.to != "cloob":
        raise InputError(
            f"{options.source}: heads of vectors go to no other program; --to cloob"
            f" copies them, `cloob embed {options.source} --a …` writes their rows"
        )
    with whole_folder(options.out) as folder:
        if options.to == "cloob":
            readers = _write_model_folder(encoder, folder, options.out)
        else:
            readers = _write_export(encoder, folder, options, licence or None)
    numbers = f"embeddings of {encoder.embed_dim} numbers"
    print(f"{options.out}: {encoder.name}, {numbers}; {readers}")
    if has_pictures:
        say_next(*_next_commands(options))
    return 0


def _check(options: Options, licence: str) -> None:
    """Raises InputError for options that do not go together, and a target in use."""
    if options.to == "cloob" and licence:
        raise InputError(
            "--license is for the card of an export; --to cloob writes none"
        )
    if licence and not _LICENCE.fullmatch(licence):
        raise InputError(
            f"--license {licence}: it must be one word of the hub's, such as mit,"
            " apache-2.0 or other"
        )
    check_target(
        options.source,
        options.out,
        "model folder" if options.to == "cloob" else "export",
        _is_model_folder if options.to == "cloob" else is_export,
        overwrite=options.overwrite,
    )


def _is_model_folder(folder: Path) -> bool:
    return config_file(folder).is_file()


def _write_model_folder(encoder: DualEncoder, folder: Path, out: Path) -> str:
    """Writes what ``cloob.load_model`` reads; says who else reads it in its place."""
    from cloob.models.folder import save_model

    save_model(folder, encoder, encoder.objective_config)
    if encoder.config.kind == "open_clip":
        return f"open_clip reads it as local-dir:{out}"
    return "cloob alone reads it"


def _write_export(
    encoder: DualEncoder, folder: Path, options: Options, licence: str | None
) -> str:
    """Writes what other programs read, with a card; says who reads it."""
    from cloob.export.card import write_card

    if options.to == "transformers":
        from cloob.export.transformers import export_transformers

        exported = export_transformers(encoder, folder)
    else:
        from cloob.export.onnx import export_onnx

        exported = export_onnx(encoder, folder)
    write_json(folder / OBJECTIVE_FILE, encoder.objective_config)
    name = options.out.resolve().name
    write_card(folder, options.source, encoder, exported, name, licence)
    return exported.summary


def _next_commands(options: Options) -> list[list[str]]:
    """What may come next: a judgement, of an export beside its model, or an index."""
    out = str(options.out)
    models = [out] if options.to == "cloob" else [options.source, out]
    commands = [["eval", *models, "--zeroshot", "demo:noto-emoji"]]
    if options.to == "onnx":
        commands.append(["index", "PICTURES", "--model", out, "--out", "pictures.idx"])
    return commands
