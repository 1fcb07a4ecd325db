"""``cloob convert``: write weights of other projects as a model folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cloob.commands.console import Positional, arg, say_next
from cloob.export.exported import check_target
from cloob.files import whole_folder
from cloob.models.runs import config_file


@dataclass(frozen=True)
class Options:
    """Write a model as a model folder, which open_clip reads as `local-dir:` where it
    has such towers.
    """

    source: Annotated[Positional[str], arg(metavar="SRC")]
    """A model: what --init and `cloob eval` take."""
    target: Annotated[Positional[Path], arg(metavar="DEST")]
    """The folder that is made."""
    overwrite: bool = False
    """Replace DEST where it is a model folder already."""


def run(options: Options) -> int:
    source, target = options.source, options.target
    check_target(
        source,
        target,
        "model folder",
        lambda it: config_file(it).is_file(),
        overwrite=options.overwrite,
    )
    from cloob.models.folder import save_model
    from cloob.models.load import load_model

    encoder = load_model(source, device="cpu")
    with whole_folder(target) as folder:
        save_model(folder, encoder, encoder.objective_config)
    reader = (
        "open_clip reads it as local-dir:{}"
        if encoder.config.kind == "open_clip"
        else "cloob alone reads it"
    )
    print(
        f"{target}: {encoder.name}, embeddings of {encoder.embed_dim} numbers;"
        f" {reader.format(target)}"
    )
    if encoder.config.kind != "vectors":
        say_next(["eval", target, "--zeroshot", "demo:noto-emoji"])
    return 0
