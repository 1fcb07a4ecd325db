"""Converts one model into a model folder."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

from cloob.commands.steps import say_next
from cloob.errors import InputError
from cloob.models.folder import save_model
from cloob.models.load import load_model


def run(source: str, target: Path) -> int:
    """Writes the model of ``source`` to ``target``, whole or not at all; returns the exit code."""
    encoder = load_model(source, device="cpu")
    temporary = target.with_name(f".tmp-{target.name}-{uuid.uuid4().hex[:8]}")
    try:
        save_model(temporary, encoder, encoder.objective_config)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    theirs = encoder.config.kind == "open_clip"
    kind = f"open_clip reads it as local-dir:{target}" if theirs else "cloob alone reads it"
    print(f"{target}: {encoder.name}, embeddings of {encoder.embed_dim} numbers; {kind}")
    say_next(["eval", target, "--zeroshot", "demo:noto-emoji"])
    return 0
