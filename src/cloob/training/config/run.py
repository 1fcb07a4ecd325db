"""How a training run goes: its length and numbers, the optimiser, checkpoints and the log.

A field's docstring is its help text on the command line. No torch is imported here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cloob.errors import InputError
from cloob.training.config.strict import check, check_choice, positive

LENGTHS = ("epochs", "samples", "steps")
"""The three ways to give the length of a run; exactly one of them has a value."""
DEFAULT_EPOCHS = 30
ScheduleName = Literal["constant", "cosine", "cosine-restarts"]


@dataclass(frozen=True)
class RunConfig:
    """Length, batch, numbers and place of the run."""

    epochs: int | None = None
    """Length of the run: passes over the training pairs; 30 where neither --samples nor --steps is given."""
    samples: int | None = None
    """Length of the run in place of --epochs: pairs seen, rounded up to whole batches."""
    steps: int | None = None
    """Length of the run in place of --epochs: steps."""
    patience: int = 0
    """Stop after this many looks at --val-data that gave no better --best; 0 trains to the end."""
    batch_size: int = 0
    """Pairs per step over all ranks together; 0: 256, of fewer than 4,096 pairs a power of two that makes 16 steps or
    more of an epoch, 8 at least."""
    micro_batch_size: int = 0
    """Pairs whose activations are held at a time on each rank (gradient caching: the loss is still that of the whole
    batch, at the price of a second forward pass); 0 holds all."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the towers; weights and loss stay in float32. auto: bf16 on a GPU that has it, else fp32
    (config.json says which). fp16 scales the loss, and lowers the scale after a step whose gradient overflows."""
    tf32: bool | None = None
    """On a GPU that has it, round the inputs of float32 matrix products to TF32, the objective's among them; left out,
    with --precision auto alone. False leaves torch's own settings as they are, by which convolutions use it."""
    channels_last: bool = True
    """Keep image towers in the channels-last memory layout, in which convolutions are faster."""
    grad_checkpointing: bool = False
    """Recompute the towers' blocks in the backward pass instead of keeping their activations: less memory, about a
    third more time."""
    compile: bool = False
    """Compile the towers with torch.compile: the first steps take longer, the others less."""
    compile_backend: Literal["inductor", "aot_eager", "eager"] = "inductor"
    """Backend of --compile; inductor generates code (on a CPU it needs a C++ compiler), the others only trace."""
    sync_bn: bool = False
    """Batch normalisation over the batches of all ranks (CUDA only) instead of each rank's own."""
    fsdp: bool = False
    """Shard weights, gradients and optimiser state over the ranks (FSDP2) instead of a copy on each (DDP)."""
    seed: int = 0
    """Seed of the initial weights, the order of the pairs and their augmentation."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    max_nonfinite: int = 10
    """Stop after this many steps in a row whose loss or gradient is not finite; such steps are skipped."""

    def __post_init__(self) -> None:
        self._check_length()
        check(
            self.patience >= 0, "patience", self.patience, "a number of looks at --val-data, or 0 for no early stopping"
        )
        check(
            self.batch_size >= 2 or self.batch_size == 0,
            "batch_size",
            self.batch_size,
            "2 or more (the others in a batch are the negatives), or 0 to fit the number of pairs",
        )
        check(
            self.micro_batch_size >= 0, "micro_batch_size", self.micro_batch_size, "1 or more, or 0 for the whole batch"
        )
        check_choice("precision", self.precision, Literal["auto", "fp32", "bf16", "fp16"])
        check_choice("compile_backend", self.compile_backend, Literal["inductor", "aot_eager", "eager"])
        self._check_combinations()
        check(0 <= self.seed < 2**63, "seed", self.seed, "0 or more")
        kind, _, index = self.device.partition(":")
        plain = self.device in ("auto", "cpu", "cuda", "mps")
        check(
            plain or (kind == "cuda" and index.isdigit()),
            "device",
            self.device,
            "auto, cpu, cuda, cuda:N or mps",
        )
        check(self.max_nonfinite >= 1, "max_nonfinite", self.max_nonfinite, "1 or more")

    def _check_length(self) -> None:
        given = {name: value for name in LENGTHS if (value := getattr(self, name)) is not None}
        if not given:
            object.__setattr__(self, "epochs", DEFAULT_EPOCHS)
        for name, value in given.items():
            check(value >= 1, name, value, "1 or more")
        if len(given) > 1:
            both = " and ".join(f"{name} is {value}" for name, value in given.items())
            raise InputError(f"{both}; give one of them, each is the length of the run")

    def total_steps(self, steps_per_epoch: int) -> int:
        """Steps of the whole run."""
        if self.epochs is not None:
            return self.epochs * steps_per_epoch
        return self.steps if self.steps is not None else math.ceil((self.samples or 0) / self.batch_size)

    def _check_combinations(self) -> None:
        """Refuses what does not go together; docs/training-step.md has the whole table."""
        # A rank whose batch lost samples has fewer micro-batches, and both of these talk in each forward pass: the
        # other ranks would wait for it.
        for key in ("sync_bn", "fsdp"):
            check(not (getattr(self, key) and self.micro_batch_size), key, True, "left out with --micro-batch-size")
        # GradScaler looks for overflow in one rank's shard and would scale each rank by another factor.
        check(not (self.fsdp and self.precision == "fp16"), "fsdp", True, "left out with --precision fp16 (take bf16)")
        check(not (self.fsdp and self.compile), "fsdp", True, "left out with --compile")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and the course of its learning rate."""

    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay of weight matrices and kernels; norms, biases and temperatures have none."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.999
    """Decay of AdamW's second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    clip_grad_norm: float = 0.0
    """Scale gradients down to this global norm; 0 does not."""
    ema: float = 0.0
    """Also keep a running average of the weights with this decay, say 0.999 (it rises to that from the start), and
    validate and export the average; 0 does not."""
    schedule: ScheduleName = "cosine"
    """Learning rate after the warm-up."""
    warmup: int | None = None
    """Steps of linear warm-up; left out, a tenth of the run, at most 2000."""
    restarts: int = 10
    """Cosine cycles of the cosine-restarts schedule."""
    layer_decay: float = 1.0
    """Factor of the learning rate from a layer to the one below it, in each tower; 1 treats all alike."""

    def __post_init__(self) -> None:
        check(positive(self.lr), "lr", self.lr, "a positive number")
        check(
            self.weight_decay >= 0 and math.isfinite(self.weight_decay),
            "weight_decay",
            self.weight_decay,
            ">= 0",
        )
        for key in ("beta1", "beta2"):
            check(0 <= getattr(self, key) < 1, key, getattr(self, key), "in [0, 1)")
        check(positive(self.eps), "eps", self.eps, "a positive number")
        check(
            self.clip_grad_norm >= 0 and math.isfinite(self.clip_grad_norm),
            "clip_grad_norm",
            self.clip_grad_norm,
            "a positive number, or 0 for no clipping",
        )
        check(0 <= self.ema < 1, "ema", self.ema, "a decay below 1 such as 0.999, or 0 for none")
        check_choice("schedule", self.schedule, ScheduleName)
        check(self.warmup is None or self.warmup >= 0, "warmup", self.warmup, "a number of steps, 0 or more")
        check(self.restarts >= 1, "restarts", self.restarts, "1 or more")
        check(0 < self.layer_decay <= 1, "layer_decay", self.layer_decay, "above 0 and at most 1")


@dataclass(frozen=True)
class SaveConfig:
    """The run folder and its checkpoints."""

    out: Path = Path("runs/train")
    """Run folder: config.json, metrics.jsonl, epochs.jsonl, checkpoints."""
    save_every: int = 0
    """Steps between checkpoints; 0 writes one at the end of each epoch."""
    keep: int = 3
    """Newest checkpoints to keep, beside the best one; 0 keeps all."""
    best: Literal["val_loss", "val_recall"] = "val_loss"
    """With --val-data, what makes a checkpoint the best, which RUN then means: the held-out pairs' loss, or their mean
    recall at 1, 5 and 10 in both directions."""
    resume: str = "none"
    """none; auto: go on from the newest whole checkpoint in --out, if any; or a checkpoint or run."""
    overwrite: bool = False
    """Replace the run that --out already holds."""
    accept_changed_data: bool = False
    """Resume although the pairs have changed since the checkpoint was written."""

    def __post_init__(self) -> None:
        check(self.save_every >= 0, "save_every", self.save_every, "a number of steps, or 0 for every epoch")
        check(self.keep >= 0, "keep", self.keep, "1 or more, or 0 to keep all")
        check_choice("best", self.best, Literal["val_loss", "val_recall"])
        check(bool(self.resume), "resume", self.resume, "none, auto or a path")
        check(
            not (self.overwrite and self.resume != "none"),
            "overwrite",
            True,
            f"left out with --resume {self.resume}",
        )


@dataclass(frozen=True)
class LogConfig:
    """What is written down while training."""

    log_every: int = 50
    """Steps between measurements of the batch's effective eigenvalues and, but for siglip, saturation."""
    tensorboard: bool = True
    """Also write TensorBoard events, when TensorBoard is installed."""
    wandb: str | None = None
    """Also log to this Weights & Biases project."""
    profile: bool = False
    """Also write OUT/profile: where the time of the first steps goes, as a table, and a trace of three of them."""

    def __post_init__(self) -> None:
        check(self.log_every >= 1, "log_every", self.log_every, "1 or more")
        check(self.wandb != "", "wandb", "", "the name of a project")
