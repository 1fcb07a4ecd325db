"""One cell from its towers to its record: the library's steps on the cached pictures, stopped and resumed anywhere."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.machine import processor
from benchmarks.pictograms.cache import Augmented, Data
from benchmarks.pictograms.cells import Cell
from benchmarks.pictograms.scoring import score_pairs, score_probe, score_zeroshot
from benchmarks.pictograms.variants import Variant, build_objective
from torch.nn.attention import SDPBackend, sdpa_kernel

from cloob.data.order import epoch_order
from cloob.functional.geometry import saturation
from cloob.models.folder import save_model
from cloob.models.towers import create_model
from cloob.objective import ContrastiveObjective
from cloob.training.config import OptimConfig
from cloob.training.optim import make_optimizer, make_schedule
from cloob.training.step import Stepper, StepResult, TowersWithLoss

CURVE_POINTS = 8
"""How often a cell's test scores are taken along the run (never looked at by the search)."""
_BAD_STEPS = 50


class Interrupted(Exception):  # noqa: N818 - a request, not an error
    """The run was asked to stop; its state is on the disk."""


class Run:
    """One cell being trained.

    Args:
        cell: What to run.
        data: The cached pictures.
        state: File that the run's state is kept in until it is finished.
        device: Where to train.
        full: Take test scores too: at ``CURVE_POINTS`` epochs, and probe and test retrieval at the end.
        report: Told a line after each epoch.
    """

    def __init__(
        self,
        cell: Cell,
        data: Data,
        state: Path,
        device: str = "cpu",
        full: bool = True,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.cell, self.data, self.state, self.full, self.report = cell, data, state, full, report
        self.device = torch.device(device)
        setting = cell.setting
        self.encoder = create_model(cell.tower, seed=cell.seed, device=device)
        self.objective = build_objective(cell.method, setting).to(self.device)
        optim = OptimConfig(lr=setting.lr, weight_decay=setting.weight_decay, schedule="cosine")
        self.optimizer = make_optimizer(self.encoder, self.objective, optim, self.device)
        # Anything with the objective's call and clamp_ will do for these two.
        towers = TowersWithLoss(self.encoder, self.objective, "bf16")  # type: ignore[arg-type]
        self.stepper = Stepper(towers, self.optimizer)
        self.batches = Augmented(data.pairs["train"], cell.seed)
        self.steps_an_epoch = len(data.pairs["train"]) // setting.batch_size
        self.total = cell.epochs * self.steps_an_epoch
        self.schedule = make_schedule(optim, self.total)
        self.step = 0
        self.skipped = 0
        self.wall = self.cpu = 0.0
        self.losses: list[float] = []
        self.last: StepResult | None = None
        self.curve: list[dict[str, Any]] = []
        torch.manual_seed(cell.seed)
        if state.is_file():
            self._restore()

    def go(self, stop: Callable[[], bool]) -> dict[str, Any]:
        """Trains to the end.

        Returns:
            The cell's record.

        Raises:
            Interrupted: ``stop()`` said so.
            RuntimeError: Too many steps in a row were not finite.
        """
        bad, ordered, order = 0, -1, np.empty(0, np.int64)
        while self.step < self.total:
            epoch, place = divmod(self.step, self.steps_an_epoch)
            if epoch != ordered:
                order, ordered = epoch_order(len(self.data.pairs["train"]), self.cell.seed, epoch), epoch
            size = self.cell.setting.batch_size
            bad = 0 if self.train_on(epoch, order[place * size : (place + 1) * size]) else bad + 1
            if bad >= _BAD_STEPS:
                raise RuntimeError(f"{self.cell.id}: {bad} steps in a row were not finite")
            if self.step % self.steps_an_epoch == 0:
                self._look(self.step // self.steps_an_epoch)
                self._save()
            if stop():
                self._save()
                raise Interrupted
        return self._record()

    def train_on(self, epoch: int, indices: np.ndarray) -> bool:
        """One step on these pairs, as augmented in this epoch. Returns whether it was finite."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.encoder.train()
        if isinstance(self.objective, Variant):
            self.objective.progress = self.step / self.total
        images, tokens, ids = (t.to(self.device) for t in self.batches.batch(epoch, indices))
        ids_or_none = ids if self.cell.setting.mask_duplicates else None
        # In bfloat16 torch's fused attention takes up to five times as long for sequences as short as these on a CPU.
        with sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else contextlib.nullcontext():
            result = self.stepper(images, tokens, ids_or_none, self.schedule(self.step))
        self.step += 1
        if result.finite:
            self.losses.append(result.loss)
            self.last = result
        else:
            self.skipped += 1
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu
        return result.finite

    def _look(self, epoch: int) -> None:
        """Scores after an epoch: validation pairs always, test sets at a few points of a full run."""
        recent = self.losses[-self.steps_an_epoch :]
        self.losses = []
        line: dict[str, Any] = {
            "epoch": epoch,
            "step": self.step,
            "wall_seconds": round(self.wall, 1),
            "cpu_seconds": round(self.cpu, 1),
            "loss": round(sum(recent) / len(recent), 5) if recent else None,
            **self._scales(),
            "train_saturation": self._saturation(),
            "val": score_pairs(self.encoder, self.data.pairs["val"]),
        }
        every = max(1, math.ceil(self.cell.epochs / CURVE_POINTS))
        if self.full and epoch % every == 0 and epoch < self.cell.epochs:
            scores = score_zeroshot(self.encoder, self.data.test)
            line["zeroshot"] = {name: found["acc1"] for name, found in scores.items()}
        self.curve.append(line)
        self.report(f"  epoch {epoch}: mean recall {line['val']['mean_recall']:.4f}, {self.cpu:.0f} CPU s")

    def _scales(self) -> dict[str, float]:
        inner = self.objective.objective if isinstance(self.objective, Variant) else self.objective
        assert isinstance(inner, ContrastiveObjective)
        scales = {"inv_tau": round(float(inner.inv_tau.detach()), 4)}
        return scales | ({"beta": round(float(inner.beta.detach()), 4)} if inner.hopfield else {})

    def _saturation(self) -> float | None:
        """1 − p of the last training batch, at the run's own temperature: what is left of InfoNCE's gradient."""
        if self.last is None or self.last.features is None:
            return None
        scale = self._scales()["inv_tau"]
        return round(float(saturation(*self.last.features, scale)), 6)

    def _record(self) -> dict[str, Any]:
        """Everything that tables are made from; no name of this machine, no path."""
        last = self.curve[-1]
        record: dict[str, Any] = {
            "id": self.cell.id,
            "config": self.cell.config(),
            "steps": self.step,
            "pairs_seen": self.step * self.cell.setting.batch_size,
            "skipped_steps": self.skipped,
            "wall_seconds": round(self.wall, 1),
            "cpu_seconds": round(self.cpu, 1),
            "machine": {"cpu": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__},
            "device": self.device.type,
            "val": last["val"],
        }
        if self.full:
            record["zeroshot"] = score_zeroshot(self.encoder, self.data.test)
            record["retrieval"] = {"tuxpaint-captions": score_pairs(self.encoder, self.data.pairs["tuxpaint-captions"])}
            record["probe"] = score_probe(self.encoder, self.data)
            last["zeroshot"] = {name: found["acc1"] for name, found in record["zeroshot"].items()}
        return record | {"curve": self.curve}

    def save_towers(self, folder: Path) -> None:
        """Writes the model folder, for looking at it later."""
        inner = self.objective.objective if isinstance(self.objective, Variant) else self.objective
        assert isinstance(inner, ContrastiveObjective)
        save_model(folder, self.encoder, inner.config())

    def _parts(self) -> dict[str, Any]:
        return {"encoder": self.encoder, "objective": self.objective, "optimizer": self.optimizer}

    def _save(self) -> None:
        self.state.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.state.with_name(f".tmp-{os.getpid()}-{self.state.name}")
        kept = ("step", "skipped", "wall", "cpu", "losses", "curve")
        torch.save(
            {"progress": {key: getattr(self, key) for key in kept}, "random": torch.get_rng_state()}
            | {name: part.state_dict() for name, part in self._parts().items()},
            temporary,
        )
        temporary.replace(self.state)

    def _restore(self) -> None:
        state = torch.load(self.state, map_location=self.device, weights_only=True)
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        for key, value in state["progress"].items():
            setattr(self, key, value)
        torch.set_rng_state(state["random"].cpu())
