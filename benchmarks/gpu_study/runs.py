"""One run of the study: towers, the library's step, a state from which it goes on, and its scores."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu_study.data import Labelled, Pairs, epoch
from benchmarks.pictograms.scoring import recalls

from cloob.distributed import Layout
from cloob.evaluate.embed import embed_texts
from cloob.evaluate.measures.zeroshot import class_embeddings, zeroshot_ranks
from cloob.files import write_whole
from cloob.functional import ranking
from cloob.models.encoder import DualEncoder
from cloob.models.encoding import evaluating
from cloob.models.towers import create_model, open_clip
from cloob.objective import make_objective
from cloob.train.config.run import OptimConfig
from cloob.train.optim import learning_rate, make_optimizer
from cloob.train.step import Launched, Stepper, StepResult, TowersWithLoss
from cloob.train.towers.fsdp import load_whole_optimizer

CONFIGS = Path(__file__).parent / "configs"
JUDGED = 12  # times in a run the held-out pairs are looked at


@dataclass(frozen=True)
class Plan:
    """What a run is.

    Attributes:
        tower: ``"tiny-resnet"`` or ``"vit-s"``, or another model's name.
        method: Member of the family.
        epochs: Passes over the training pairs.
        batch: Pairs of a step.
        lr: Peak learning rate; a tenth of the run it rises, then falls as a cosine.
        seed: Of weights, order and augmentation.
        precision: ``"bf16"`` or ``"fp32"``.
    """

    tower: str
    method: str
    epochs: int = 300
    batch: int = 1024
    lr: float = 1e-3
    seed: int = 0
    precision: str = "bf16"

    @property
    def name(self) -> str:
        """Of its record and state."""
        return f"{self.tower}-{self.method}-{self.seed}"


class Run:
    """A run that can be left after any epoch.

    Args:
        plan: What it is.
        train: Training pairs on the device.
        state: Where its state is kept; one that is there is gone on from if it is of the same plan.
    """

    def __init__(self, plan: Plan, train: Pairs, state: Path) -> None:
        self.plan, self.train, self.path = plan, train, state
        device = train.images.device
        open_clip().add_model_config(CONFIGS)
        encoder = create_model(plan.tower, seed=plan.seed).to(device)
        objective = make_objective(plan.method).to(device)
        self.encoder: DualEncoder = encoder
        optimizer = make_optimizer(encoder, objective, OptimConfig(lr=plan.lr, beta2=0.98), device)
        module = TowersWithLoss(encoder, objective, plan.precision).train()
        self.stepper = Stepper(module, optimizer, 1.0, late=device.type == "cuda")
        self.steps = len(train) // plan.batch
        self.done, self.seconds = 0, 0.0
        self.losses: list[float] = []
        self.judged: list[dict[str, float]] = []
        if state.is_file():
            self._restore(torch.load(state, map_location=device, weights_only=True))

    def _restore(self, state: dict[str, Any]) -> None:
        if state["plan"] != asdict(self.plan):
            return
        self.stepper.module.load_state_dict(state["module"])
        load_whole_optimizer(self.stepper.optimizer, state["optimizer"])  # in the memory layout of the weights
        for key in ("done", "seconds", "losses", "judged"):
            setattr(self, key, state[key])

    def save(self) -> None:
        """Keeps the state."""
        kept = {key: getattr(self, key) for key in ("done", "seconds", "losses", "judged")}
        module, optimizer = self.stepper.module.state_dict(), self.stepper.optimizer.state_dict()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        torch.save({"plan": asdict(self.plan), "module": module, "optimizer": optimizer, **kept}, temporary)
        temporary.replace(self.path)

    def go(self, val: Pairs, until: float) -> bool:
        """Trains until the end or the time (``time.monotonic``); returns whether it is at the end."""
        every = max(1, self.plan.epochs // JUDGED)
        last = 0.0
        while self.done < self.plan.epochs:
            if time.monotonic() + last > until:
                self.save()
                return False
            began = time.monotonic()
            self._epoch()
            if self.done % every == 0 or self.done == self.plan.epochs:
                scores = recalls(*_rows(self.encoder, val), val.captions)
                self.judged.append({"epoch": self.done, **scores})
                self.stepper.module.train()
            last = time.monotonic() - began
            self.seconds += last
        self.save()
        return True

    def _epoch(self) -> None:
        """One pass; the device is looked at once, at its end."""
        plan, total = self.plan, self.plan.epochs * self.steps
        taken: list[Launched | StepResult] = []
        for place, (images, tokens, ids) in enumerate(epoch(self.train, plan.batch, plan.seed, self.done)):
            step = self.done * self.steps + place
            lr = learning_rate(step, peak=plan.lr, total=total, warmup=min(2000, total // 10), schedule="cosine")
            if self.stepper.late:
                launched = self.stepper.launch(images, tokens, ids, lr, layout=Layout((len(images),)))
                launched.features = None
                taken.append(launched)
            else:
                taken.append(self.stepper(images, tokens, ids, lr))
        results = [one if isinstance(one, StepResult) else one.result(one.numbers.tolist()) for one in taken]
        bad = [place for place, result in enumerate(results) if not result.finite]
        if bad:
            raise RuntimeError(f"{plan.name}: epoch {self.done + 1}: loss or gradient not finite in steps {bad}")
        self.losses.append(sum(result.loss for result in results) / len(results))
        self.done += 1

    def record(self, val: Pairs, sets: Mapping[str, Labelled], machine: str) -> dict[str, Any]:
        """What the run came to."""
        pairs = self.done * self.steps * self.plan.batch
        return {
            **asdict(self.plan),
            "machine": machine,
            "pairs_seen": pairs,
            "seconds": self.seconds,
            "pairs_per_second": pairs / self.seconds,
            "losses": self.losses,
            "judged": self.judged,
            "val": recalls(*_rows(self.encoder, val), val.captions),
            "zeroshot": {name: _accuracy(self.encoder, found) for name, found in sets.items()},
        }


def _rows(encoder: DualEncoder, data: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, D) unit rows of both sides, on the CPU."""
    with evaluating(encoder):
        images = encoder.encode_image(data.images).cpu()
    return images, embed_texts(encoder, data.captions)


def _accuracy(encoder: DualEncoder, data: Labelled) -> dict[str, float]:
    """Zero-shot accuracies, in [0, 1]."""
    classes = class_embeddings(encoder, data.classnames, data.templates)
    with evaluating(encoder):
        ranks = zeroshot_ranks(encoder.encode_image(data.images).cpu(), data.labels, classes)
    return {"acc1": ranking.topk_accuracy(ranks, 1), "acc5": ranking.topk_accuracy(ranks, 5), "n": float(len(ranks))}


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a record."""
    write_whole(path, json.dumps(record, indent=1) + "\n")
