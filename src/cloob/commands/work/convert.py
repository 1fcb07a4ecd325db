"""Converts one model into a model folder."""

from __future__ import annotations

from pathlib import Path

from cloob.commands.steps import say_next
from cloob.files import whole_folder
from cloob.models.folder import save_model
from cloob.models.load import load_model


def run(source: str, target: Path) -> int:
    """Writes the model of ``source`` to ``target``, whole or not at all; returns the exit code."""
    encoder = load_model(source, device="cpu")
    with whole_folder(target) as folder:
        save_model(folder, encoder, encoder.objective_config)
    theirs = encoder.config.kind == "open_clip"
    kind = f"open_clip reads it as local-dir:{target}" if theirs else "cloob alone reads it"
    print(f"{target}: {encoder.name}, embeddings of {encoder.embed_dim} numbers; {kind}")
    say_next(["eval", target, "--zeroshot", "demo:noto-emoji"])
    return 0
