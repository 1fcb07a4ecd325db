"""``cloob export``: write a model for transformers, sentence-transformers or ONNX."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cloob.commands.console import Positional, arg, as_words, refuse, say_next
from cloob.export.exported import (
    check_exportable,
    check_packages,
    check_target,
    is_export,
)
from cloob.files import whole_folder
from cloob.models.runs import OBJECTIVE_FILE

LICENCE, ONE_WORD = (
    re.compile(r"[a-z0-9.+-]+"),
    "it must be one word of the hub's, such as mit, apache-2.0 or other",
)
REPOSITORY = re.compile(
    r"(?!.*(\.\.|--|\.git$))[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(?<![.-])"
)


@dataclass(frozen=True)
class Options:
    """Write a model for transformers and sentence-transformers, or for ONNX
    runtimes.
    """

    source: Annotated[Positional[str], arg(metavar="RUN")]
    """A run or model: what `cloob eval` takes."""
    target: Annotated[Positional[Path], arg(metavar="DEST")]
    """The folder that is made."""
    to: Literal["transformers", "onnx"]
    """transformers: read by sentence-transformers too. onnx: both towers as graphs."""
    int8: bool = False
    """With --to onnx: weights as 8-bit integers."""
    license: str | None = None
    """The weights' licence for the card, as the hub spells it: mit, apache-2.0,
    cc-by-4.0, …
    """
    results: Path | None = None
    """A results.json of `cloob eval` for the card; left out, that of the run."""
    overwrite: bool = False
    """Replace DEST where it is an earlier export."""


def run(options: Options) -> int:
    licence = (options.license or "").strip().lower()
    refuse(
        {
            f"--int8 needs --to onnx, not --to {options.to}": (
                options.int8 and options.to != "onnx"
            )
        }
    )
    refuse(
        {f"--license {licence}: {ONE_WORD}": licence and not LICENCE.fullmatch(licence)}
    )
    check_target(
        options.source, options.target, "export", is_export, overwrite=options.overwrite
    )
    check_packages(options.to)
    from cloob.export.card import gather_facts, write_card
    from cloob.models.load import load_model

    encoder = load_model(options.source, device="cpu")
    check_exportable(encoder.config.kind, options.source)
    facts = gather_facts(options.source, encoder, options.results)
    name = options.target.resolve().name
    with whole_folder(options.target) as folder:
        if options.to == "transformers":
            from cloob.export.transformers import export_transformers

            exported = export_transformers(encoder, folder)
        else:
            from cloob.export.onnx import export_onnx

            exported = export_onnx(encoder, folder, int8=options.int8)
        settings = json.dumps(encoder.objective_config, indent=2, allow_nan=False)
        (folder / OBJECTIVE_FILE).write_text(settings, encoding="utf-8")
        write_card(folder, facts, exported, name, licence or None)
    print(
        f"{options.target}: {encoder.name}, embeddings of {encoder.embed_dim} numbers;"
        f" {exported.summary}"
    )
    steps: list[list[str | Path]] = [
        ["eval", options.source, options.target, "--zeroshot", "demo:noto-emoji"]
    ]
    if options.to == "onnx":
        steps.append(
            ["index", "PICTURES", "--model", options.target, "--out", "pictures.idx"]
        )
    if licence:
        repository = f"me/{name}" if REPOSITORY.fullmatch(f"me/{name}") else "me/model"
        results = as_words(options, "results")
        steps.append(
            [
                "push",
                options.source,
                repository,
                "--license",
                licence,
                *results,
                "--dry-run",
            ]
        )
    say_next(*steps)
    return 0
