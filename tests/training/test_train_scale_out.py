"""Two hosts: two torchrun launchers that find each other over a rendezvous, as on two machines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from train_helpers import Trained, lines

from cloob.data.open import open_source
from cloob.models.load import load_model
from cloob.models.runs import list_checkpoints
from cloob.objective import make_objective
from cloob.training.build import make_loader
from cloob.training.loop import train
from cloob.training.step import TowersWithLoss
from cloob.training.validate import validate
from support import fork


def test_two_ranks_judge_one_model(trained: Trained, pairs_folder: Path, tmp_path: Path) -> None:
    """Running statistics are each rank's own in training; held-out pairs are judged by those that are exported."""
    own = {"model": "nano-resnet", "epochs": 2, "batch_size": 12, "micro_batch_size": 3, "save_every": 0, "keep": 0}
    config = trained.config.override(**own, val_data=[str(pairs_folder)], out=tmp_path / "run")
    ranks = fork(tmp_path / "ranks", 2, lambda: train(config) and None)
    assert ranks.wait() == [0, 0], ranks.told()
    for line, checkpoint in zip(
        lines(config.save.out / "epochs.jsonl"), list_checkpoints(config.save.out), strict=True
    ):
        model = load_model(checkpoint)
        loader = make_loader(open_source(str(pairs_folder)), model, config, torch.device("cpu"), train=False)
        towers = TowersWithLoss(model, make_objective("cloob"))
        alone = validate(towers, loader, torch.device("cpu"), mask_duplicates=False)
        assert line["val_loss"] == pytest.approx(alone.loss, rel=1e-5)
        assert line["val_recall"] == pytest.approx(alone.recall)
