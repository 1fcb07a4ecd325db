"""Two hosts: two torchrun launchers that find each other over a rendezvous, as on two machines."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from train_helpers import Trained, exact, lines, wait_until

from cloob.data.open import open_source
from cloob.models.load import load_model
from cloob.models.runs import list_checkpoints
from cloob.objective import make_objective
from cloob.training.build import make_loader
from cloob.training.loop import train
from cloob.training.step import TowersWithLoss
from cloob.training.validate import validate
from support import fork, free_port


def launcher(endpoint: str, *more: str) -> tuple[str, ...]:
    rendezvous = ("--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=7")
    return ("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *rendezvous, *more)


@pytest.mark.nightly
def test_two_launchers_on_loopback(trained: Trained, launch: Callable[..., Any], tmp_path: Path) -> None:
    """The numbers of one host with two processes; SIGTERM to both launchers ends the ranks with a checkpoint."""
    endpoint = f"127.0.0.1:{free_port()}"
    common = trained.config.override(batch_size=10, epochs=1, learnable_inv_tau=True, scale="unit", save_every=100)
    job = {"config": common.override(out=tmp_path / "here").to_dict()}
    stopped = common.override(out=tmp_path / "stopped", epochs=1000)
    words = [launcher(endpoint, f"--node-rank={rank}", "--local-addr=127.0.0.1") for rank in range(2)]
    hosts = [launch(job, {"config": stopped.to_dict(), "slow": 0.02}, launcher=each) for each in words]
    log = stopped.save.out / "metrics.jsonl"
    try:
        wait_until(lambda: log.is_file() and log.read_text().count("\n") >= 3, hosts[0])
        for host in hosts:
            host.send_signal(signal.SIGTERM)
        outputs = [host.communicate(timeout=100)[0] for host in hosts]
    finally:
        for host in hosts:
            host.terminate()  # torchrun ends its ranks
            host.communicate(timeout=60)
    (saved,) = list_checkpoints(stopped.save.out)
    for output in outputs:  # torchrun hands the signal on to its ranks, waits for them, and reports it as its own end
        assert f"stopped=SIGTERM steps={int(saved.name[5:])}" in output, outputs
    one = common.override(out=tmp_path / "one")
    ranks = fork(tmp_path / "one-host", 2, lambda: train(one) and None)
    assert ranks.wait() == [0, 0], ranks.told()
    assert exact(tmp_path / "here") == exact(one.save.out)


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
