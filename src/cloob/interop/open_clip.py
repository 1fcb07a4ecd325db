"""CLOOB inside an unmodified ``open_clip_train``: its data, models, schedules and
checkpoints, our objective.

    python -m cloob.interop.open_clip --cloob-inv-tau 30 -- --train-data pairs.csv
    --csv-separator , --model ViT-B-32 … torchrun --nproc-per-node 8 -m
    cloob.interop.open_clip --cloob-objective cloob -- --train-data …

Options that begin with ``--cloob-`` are ours (``--help`` lists them), all others
open_clip_train's (3.3), of which the launcher replaces ``create_loss``,
``train_one_epoch``, ``parse_args`` and ``create_model_and_transforms``. Our tiny models
exist there (``--model tiny-vit``).

With a fixed τ⁻¹ the model's ``logit_scale`` has no influence on the loss, and is set to
ln τ⁻¹ for checkpoints, logs and open_clip's evaluation. A learned one is
exp(logit_scale), which open_clip_train clamps to [1, 100].
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor, nn

from cloob import distributed
from cloob.errors import InputError, command_line, needs
from cloob.family import FAMILY, PAPER_OBJECTIVES
from cloob.objective import MAX_INV_TAU, ContrastiveObjective, make_objective

with command_line(__name__), needs("train"):
    from cloob.models.importing import open_clip

_RANDOM = (
    "cloob: towers from random weights: in trials of some hundred steps retrieval from"
    " the start did not leave chance; --cloob-retrieval-from 0.5 retrieves later,"
    " --cloob-objective infoloob never (the page “Which objective”)"
)


class OpenClipLoss(nn.Module):
    """A loss with the call contract of open_clip's trainers: ``loss(**model_out,
    output_dict=True)``.

    Args:
        objective: Without learnable parameters: open_clip's optimisers hold the model's
            only.
        learn_inv_tau: Take τ⁻¹ from ``logit_scale`` with its gradient, which needs
            ``scale="unit"``; else the objective's fixed τ⁻¹ holds.
        evaluations: How often the trainer evaluates the loss on one batch
            (``--accum-freq``): an evaluation carries 1/evaluations of the gradient of
            ``logit_scale``, which open_clip's losses count as often.
    """

    def __init__(
        self,
        objective: ContrastiveObjective,
        *,
        learn_inv_tau: bool = False,
        evaluations: int = 1,
    ) -> None:
        super().__init__()
        if next(objective.parameters(), None) is not None:
            right = (
                "learn_inv_tau=True learns the model's logit_scale, and the sigmoid"
                " loss is --siglip of their own"
            )
            raise ValueError(
                "open_clip's optimiser would not know the objective's parameters:"
                f" {right}"
            )
        self.objective = objective
        self.learn_inv_tau = learn_inv_tau
        self.evaluations = evaluations
        self.retrieves = objective.hopfield

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The objective's value; arguments as open_clip's models return them.

        ``logit_bias`` cancels.
        """
        inv_tau = None
        if self.learn_inv_tau:
            value = logit_scale.detach()
            inv_tau = value + (logit_scale - value) / self.evaluations
        loss = self.objective(
            image_features, text_features, logit_scale=inv_tau, hopfield=self.retrieves
        )
        for scalar in (logit_scale, logit_bias):
            # DDP stops at a parameter without gradient
            loss = loss if scalar is None else loss + 0.0 * scalar.sum()
        return {"contrastive_loss": loss} if output_dict else loss


def _option(default: Any, help: str | None = None, **settings: Any) -> Any:
    return field(default=default, metadata={"help": help, **settings})


@dataclass(frozen=True)
class Options:
    """The launcher's options."""

    objective: str = _option("cloob", "default: cloob", choices=PAPER_OBJECTIVES)
    inv_tau: float | None = _option(
        None, "1/temperature; default: 30 (clip: the model's)", type=float
    )
    beta: float = _option(8.0, "of the Hopfield retrieval; default: 8", type=float)
    temperature: str | None = _option(
        None, "default: fixed (clip: learned)", choices=("fixed", "learned")
    )
    scale: str | None = _option(
        None,
        "tau * sum, or mean; default: paper (learned: unit)",
        choices=("paper", "unit"),
    )
    retrieval_from: float = _option(
        0.0,
        "share of the epochs, at the start, without retrieval; default: 0",
        type=float,
    )

    @property
    def learned(self) -> bool:
        """Whether τ⁻¹ is the model's ``logit_scale``."""
        return self.temperature == "learned" or (
            self.temperature is None and self.objective == "clip"
        )

    def build(self, *, gather: bool) -> ContrastiveObjective:
        """The objective, without parameters; ValueError where a value is out of
        range.
        """
        chosen: dict[str, Any] = {"beta": self.beta}
        if self.inv_tau is not None:
            chosen["inv_tau"] = self.inv_tau
        if self.learned:
            chosen["scale"] = "unit"
        elif self.scale is not None:
            chosen["scale"] = self.scale
        return make_objective(
            self.objective, learnable_inv_tau=False, gather=gather, **chosen
        )


def _logit_scale(model: Any) -> nn.Parameter:
    """The ``logit_scale`` of an open_clip model, however wrapped (DDP,
    ``torch.compile``).
    """
    while (
        wrapped := getattr(model, "_orig_mod", getattr(model, "module", None))
    ) is not None:
        model = wrapped
    scale: nn.Parameter = model.logit_scale
    return scale


@contextlib.contextmanager
def installed(main: Any, options: Options) -> Iterator[None]:
    """Inside, the module ``open_clip_train.main`` trains with our objective."""
    launcher = _Launcher(options, dict(vars(main)))
    names = [name for name in _REPLACED if hasattr(main, name)]
    vars(main).update({name: getattr(launcher, name) for name in names})
    try:
        yield
    finally:
        vars(main).update({name: launcher.theirs[name] for name in names})


class _Launcher:
    """What stands in the place of functions of open_clip_train's."""

    def __init__(self, options: Options, theirs: dict[str, Any]) -> None:
        self.options = options
        self.theirs = theirs
        self.plain_epochs = 0.0  # at the start, without retrieval

    def parse_args(self, argv: Sequence[str]) -> Any:
        """Their arguments with ours, all of which params.txt and the loggers write."""
        args = self.theirs["parse_args"](argv)
        args.cloob = self.options.build(gather=False).config()
        args.cloob_retrieval_from = self.options.retrieval_from
        return args

    def create_loss(self, args: Any) -> OpenClipLoss:
        self.plain_epochs = self.options.retrieval_from * args.epochs
        objective = self.options.build(gather=distributed.is_initialized())
        learns = self.options.learned
        return OpenClipLoss(
            objective, learn_inv_tau=learns, evaluations=args.accum_freq
        )

    def create_model_and_transforms(self, *args: Any, **options: Any) -> Any:
        """Theirs without the bias, which no objective trains."""
        create = self.theirs["create_model_and_transforms"]
        model, *transforms = create(*args, **options)
        if getattr(model, "logit_bias", None) is not None:
            model.logit_bias = None
        return model, *transforms

    def train_one_epoch(
        self,
        model: Any,
        data: Any,
        loss: OpenClipLoss,
        epoch: int,
        optimizer: Any,
        *rest: Any,
        **options: Any,
    ) -> None:
        """Theirs, with τ⁻¹ in ``logit_scale`` and the objective in the checkpoint."""
        retrieves = FAMILY[self.options.objective].hopfield
        loss.retrieves = retrieves and epoch >= self.plain_epochs
        scale = _logit_scale(model).data
        inv_tau = float(loss.objective.inv_tau)
        learns = self.options.learned
        if not learns or (self.options.inv_tau is not None and epoch == 0):
            scale.fill_(math.log(inv_tau))
        train = self.theirs["train_one_epoch"]
        train(model, data, loss, epoch, optimizer, *rest, **options)
        if learns:
            inv_tau = float(scale.exp())
        else:  # once more, since every step clamps it to [1, 100]
            scale.fill_(math.log(inv_tau))
        # A checkpoint holds the optimiser's groups with whatever is in them: load_model
        # reads the objective there.
        stored = loss.objective.config() | {"inv_tau": inv_tau}
        optimizer.param_groups[0]["cloob"] = stored


_REPLACED = (
    "parse_args",
    "create_loss",
    "create_model_and_transforms",
    "train_one_epoch",
)


def parse(argv: Sequence[str]) -> tuple[Options, list[str]]:
    """Our options and open_clip_train's arguments; the ``--`` is optional, as torchrun
    swallows a leading one.
    """
    name = "python -m cloob.interop.open_clip"
    usage = "%(prog)s [--cloob-OPTION …] -- OPEN_CLIP_TRAIN_ARGUMENT …"
    purpose = "Runs open_clip_train with an objective of this package."
    parser = argparse.ArgumentParser(
        prog=name, usage=usage, description=purpose, allow_abbrev=False
    )
    for option in fields(Options):
        flag = f"--cloob-{option.name.replace('_', '-')}"
        parser.add_argument(
            flag, dest=option.name, default=option.default, **option.metadata
        )
    words = [word for word in argv if word != "--"]
    values, rest = parser.parse_known_args(words)
    options = Options(**vars(values))
    try:
        options.build(gather=False)
    except ValueError as error:
        raise InputError(f"--cloob options: {error}") from error
    return options, rest


def run(argv: Sequence[str]) -> int:
    """Runs the launcher with our options, ``--``, and open_clip_train's arguments;
    returns the exit code.
    """
    options, rest = parse(argv)
    open_clip()
    with needs("open-clip-train"):
        main = importlib.import_module("open_clip_train.main")
        args = importlib.import_module("open_clip_train.params").parse_args(rest)
    if not hasattr(main, "create_loss"):
        raise InputError("open_clip_train: version 3.3 is expected")
    _check_options(options, args.epochs)
    _check_arguments(args)
    starts_late = options.retrieval_from or args.pretrained or args.resume
    is_first = os.environ.get("RANK", "0") == "0"
    if FAMILY[options.objective].hopfield and is_first and not starts_late:
        print(_RANDOM, file=sys.stderr)
    with installed(main, options):
        return 1 if main.main(rest) else 0


def _check_options(options: Options, epochs: int) -> None:
    """Raises InputError for options of ours that do not go together."""
    inv_tau = options.inv_tau
    start = options.retrieval_from
    if options.learned and options.scale == "paper":
        raise InputError("--cloob-scale paper: a learned temperature needs unit")
    if options.learned and inv_tau is not None and not 1 <= inv_tau <= MAX_INV_TAU:
        raise InputError(
            f"--cloob-inv-tau {inv_tau}: 1 to {MAX_INV_TAU:g} can be learned"
        )
    if not 0 <= start < 1 or math.ceil(start * epochs) >= epochs:
        raise InputError(
            f"--cloob-retrieval-from {start:g}: a share of --epochs {epochs}, from 0,"
            " that leaves a whole epoch that retrieves"
        )
    if start and not FAMILY[options.objective].hopfield:
        raise InputError(
            f"--cloob-retrieval-from: {options.objective} does not retrieve"
        )


def _check_arguments(args: Any) -> None:
    """Raises InputError for arguments of theirs that ask for another loss."""
    if args.horovod:
        raise InputError(
            "--horovod: cloob gathers over torch.distributed; start with torchrun"
        )
    asked = ""
    if args.siglip:
        asked = "--siglip"
    elif args.distill_model:
        asked = "--distill-model"
    elif "coca" in args.model.lower():
        asked = f"--model {args.model}"
    if asked:
        raise InputError(f"{asked}: asks for another loss than CLIP's")


if __name__ == "__main__":
    with command_line(__name__):
        sys.exit(run(sys.argv[1:]))
