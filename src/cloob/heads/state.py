"""The state of a fit after its last epoch, in one file that is whole or absent."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from cloob.data.source import digest
from cloob.data.vectors import VectorPairs
from cloob.files import write_whole
from cloob.heads.fitted import EpochLine
from cloob.heads.head import Head
from cloob.heads.settings import HeadSettings


@dataclass
class Progress:
    """Where a fit stands."""

    epoch: int = 0  # epochs done
    step: int = 0  # steps done
    seconds: float = 0.0
    stale: int = 0  # validations in a row that found nothing better
    best_value: float | None = None
    best: dict[str, Tensor] | None = None  # weights of heads and objective
    history: list[EpochLine] = field(default_factory=list)


def copied(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state, on the CPU."""
    return {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}


def key_of(
    pairs: VectorPairs,
    held_out: VectorPairs | None,
    settings: HeadSettings,
    heads: tuple[Head, Head],
) -> str:
    """A digest of all that a fit depends on, but for its length and its device: of the
    heads it has the options, which say how columns are prepared.
    """
    parts = [
        pairs.fingerprint(),
        None if held_out is None else held_out.fingerprint(),
        settings.resumable_settings(),
        [head.options for head in heads],
    ]
    return digest([json.dumps(parts, sort_keys=True, default=str)])


def write_state(
    file: Path,
    key: str,
    progress: Progress,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Writes where a fit stands; InputError where the disk refuses it."""
    content = {
        "key": key,
        "progress": vars(progress),
        "model": copied(model),
        "optimizer": optimizer.state_dict(),
    }
    stream = io.BytesIO()
    torch.save(content, stream)
    write_whole(file, stream.getvalue())


def read_state(
    file: Path, key: str, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Progress | None:
    """Takes a fit up where it stood; None where the file is not of the same pairs and
    settings, cut short, or not there.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        if content["key"] != key:
            return None
        progress = Progress(**content["progress"])
    except (
        OSError,
        RuntimeError,
        KeyError,
        TypeError,
        EOFError,
        ValueError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ):
        return None
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    return progress
