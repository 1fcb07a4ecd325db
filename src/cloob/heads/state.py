"""The state of a fit after its last epoch, in one file that is whole or absent."""

from __future__ import annotations

import io
import json
import pickle
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

    history: list[EpochLine] = field(default_factory=list)  # of the epochs done
    best: dict[str, Tensor] | None = None  # weights of heads and objective

    @property
    def seconds(self) -> float:
        """How long it took so far."""
        return self.history[-1]["seconds"] if self.history else 0.0


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
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        return None
    if content["key"] != key:
        return None
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    return Progress(**content["progress"])
