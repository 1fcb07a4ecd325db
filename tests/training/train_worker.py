"""A training process for the tests: ``python train_worker.py JOB.json`` (alone or under torchrun).

The job: {"configs": [a folder of open_clip configs], "runs": [{"config": …, "slow": seconds a step, "kill_at": step,
"stop_at": step, "poison": [first, last]}]}.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cloob.distributed import process_group
from cloob.models.towers import open_clip
from cloob.training.callbacks import Callback, RunInfo
from cloob.training.config import TrainConfig
from cloob.training.loop import train


class Trouble(Callback):
    """Slows a run down; kills the last rank or sends it SIGTERM at a step, or makes its weights NaN for some steps."""

    def __init__(
        self,
        slow: float = 0.0,
        kill_at: int | None = None,
        stop_at: int | None = None,
        poison: tuple[int, int] | None = None,
    ) -> None:
        self.slow, self.poison = slow, poison
        self.signals = {kill_at: signal.SIGKILL, stop_at: signal.SIGTERM}
        self.first_attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"

    def on_start(self, info: RunInfo) -> None:
        self.info = info
        self.last_rank = info.rank == int(os.environ.get("WORLD_SIZE", "1")) - 1

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        time.sleep(self.slow)
        if metrics["step"] in self.signals and self.first_attempt and self.last_rank:
            os.kill(os.getpid(), self.signals[metrics["step"]])
        if self.poison and self.last_rank:
            weight = self.info.encoder.model.token_embedding.weight
            with torch.no_grad():
                if metrics["step"] == self.poison[0]:
                    self.kept = weight.clone()
                    weight.fill_(float("nan"))
                elif metrics["step"] == self.poison[1]:
                    weight.copy_(self.kept)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    for folder in job["configs"]:
        open_clip().add_model_config(Path(folder))
    with process_group(torch.device("cpu")):
        for run in job["runs"]:
            result = train(TrainConfig.from_dict(run.pop("config")), callbacks=[Trouble(**run)])
            print(f"stopped={result.stopped} steps={result.steps}", flush=True)


if __name__ == "__main__":
    main()
