"""CLOOB inside an unmodified ``open_clip_train``: its data, models, schedules and
checkpoints, our objective.

    python -m cloob.interop.open_clip --cloob-inv-tau 30 -- --train-data pairs.csv
    --csv-separator , --model ViT-B-32 … torchrun --nproc-per-node 8 -m
    cloob.interop.open_clip --cloob-objective cloob -- --train-data …

Options that begin with ``--cloob-`` are ours (``--help`` lists them), all others
open_clip_train's (3.3), of which the launcher replaces ``create_loss``,
``train_one_epoch``, ``parse_args`` and ``create_model_and_transforms``. Our tiny models
exist there (``--model tiny-vit``).

τ⁻¹ is fixed. The model's ``logit_scale`` has no influence on the loss, and is set to ln
τ⁻¹ for checkpoints, logs and open_clip's evaluation.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor, nn
from torch.optim import Optimizer

from cloob import distributed
from cloob.errors import InputError, command_line, needs
from cloob.family import FAMILY
from cloob.objective import ContrastiveObjective, make_objective

with command_line(__name__), needs("train"):
    from cloob.models.importing import open_clip

OBJECTIVES = ("infoloob", "infonce-hopfield", "cloob")
_REPLACED = (
    "parse_args",
    "create_loss",
    "create_model_and_transforms",
    "train_one_epoch",
)
_RANDOM_TOWERS = (
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
    """

    def __init__(self, objective: ContrastiveObjective) -> None:
        super().__init__()
        if next(objective.parameters(), None) is not None:
            raise ValueError(
                "open_clip's optimiser would not know the objective's parameters: fix"
                " its temperature and bias"
            )
        self.objective = objective
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

        ``logit_scale`` and ``logit_bias`` have no influence, and zero gradients: DDP
        stops at a parameter without one.
        """
        loss = self.objective(image_features, text_features, hopfield=self.retrieves)
        for unused in (logit_scale, logit_bias):
            if unused is not None:
                loss = loss + 0.0 * unused.sum()
        return {"contrastive_loss": loss} if output_dict else loss


@dataclass(frozen=True)
class Options:
    """The launcher's options."""

    objective: str = "cloob"
    inv_tau: float = 30.0
    beta: float = 8.0
    retrieval_from: float = 0.0  # share of the epochs

    def build(self, *, gather: bool) -> ContrastiveObjective:
        """The objective, without parameters; ValueError where a value is out of
        range.
        """
        return make_objective(
            self.objective,
            inv_tau=self.inv_tau,
            beta=self.beta,
            learnable_inv_tau=False,
            gather=gather,
        )


def _logit_scale(model: nn.Module) -> nn.Parameter:
    """The ``logit_scale`` of an open_clip model, however wrapped (DDP,
    ``torch.compile``).
    """
    [scale] = [
        parameter
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] == "logit_scale"
    ]
    return scale


@contextlib.contextmanager
def installed(main: ModuleType, options: Options) -> Iterator[None]:
    """Inside, the module ``open_clip_train.main`` trains with our objective."""
    launcher = _Launcher(main, options)
    theirs = {name: getattr(main, name) for name in _REPLACED}
    vars(main).update({name: getattr(launcher, name) for name in _REPLACED})
    try:
        yield
    finally:
        vars(main).update(theirs)


class _Launcher:
    """What stands in the place of functions of open_clip_train's."""

    def __init__(self, main: ModuleType, options: Options) -> None:
        self.options = options
        self.parse_theirs = main.parse_args
        self.create_theirs = main.create_model_and_transforms
        self.train_theirs = main.train_one_epoch
        self.plain_epochs = 0.0  # at the start, without retrieval

    def parse_args(self, argv: Sequence[str]) -> argparse.Namespace:
        """Their arguments with ours, all of which params.txt and the loggers write."""
        args: argparse.Namespace = self.parse_theirs(argv)
        args.cloob = self.options.build(gather=False).config()
        args.cloob_retrieval_from = self.options.retrieval_from
        return args

    def create_loss(self, args: argparse.Namespace) -> OpenClipLoss:
        self.plain_epochs = self.options.retrieval_from * args.epochs
        return OpenClipLoss(self.options.build(gather=distributed.is_initialized()))

    def create_model_and_transforms(
        self, *args: object, **options: object
    ) -> tuple[object, ...]:
        """Theirs without the bias, which no objective trains."""
        model, *transforms = self.create_theirs(*args, **options)
        if getattr(model, "logit_bias", None) is not None:
            model.logit_bias = None
        return model, *transforms

    def train_one_epoch(
        self,
        model: nn.Module,
        data: object,
        loss: OpenClipLoss,
        epoch: int,
        optimizer: Optimizer,
        *rest: object,
        **options: object,
    ) -> None:
        """Theirs, with τ⁻¹ in ``logit_scale`` and the objective in the checkpoint."""
        is_late = epoch >= self.plain_epochs
        loss.retrieves = loss.objective.hopfield and is_late
        scale = _logit_scale(model).data
        scale.fill_(math.log(self.options.inv_tau))
        self.train_theirs(model, data, loss, epoch, optimizer, *rest, **options)
        # once more, since every step clamps it to [1, 100]
        scale.fill_(math.log(self.options.inv_tau))
        # A checkpoint holds the optimiser's groups with whatever is in them: load_model
        # reads the objective there.
        optimizer.param_groups[0]["cloob"] = loss.objective.config()


def parse(argv: Sequence[str]) -> tuple[Options, list[str]]:
    """Our options and open_clip_train's arguments; the ``--`` is optional, as torchrun
    swallows a leading one.
    """
    parser = argparse.ArgumentParser(
        prog="python -m cloob.interop.open_clip",
        usage="%(prog)s [--cloob-OPTION …] -- OPEN_CLIP_TRAIN_ARGUMENT …",
        description="Runs open_clip_train with an objective of this package.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    ours = Options()

    def number(name: str, default: float, text: str) -> None:
        parser.add_argument(f"--cloob-{name}", type=float, default=default, help=text)

    parser.add_argument(
        "--cloob-objective", choices=OBJECTIVES, default=ours.objective, help="member"
    )
    number("inv-tau", ours.inv_tau, "1/temperature")
    number("beta", ours.beta, "of the Hopfield retrieval")
    number("retrieval-from", 0.0, "share of the epochs, at the start, without it")
    words = [word for word in argv if word != "--"]
    values, rest = parser.parse_known_args(words)
    options = Options(
        objective=values.cloob_objective,
        inv_tau=values.cloob_inv_tau,
        beta=values.cloob_beta,
        retrieval_from=values.cloob_retrieval_from,
    )
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
    retrieves = FAMILY[options.objective].hopfield
    _check_start(options, retrieves, args.epochs)
    _check_arguments(args)
    starts_late = options.retrieval_from or args.pretrained or args.resume
    is_rank_zero = os.environ.get("RANK", "0") == "0"
    if retrieves and is_rank_zero and not starts_late:
        print(_RANDOM_TOWERS, file=sys.stderr)
    with installed(main, options):
        return 1 if main.main(rest) else 0


def _check_start(options: Options, retrieves: bool, epochs: int) -> None:
    """Raises InputError where retrieval would begin too late, or never does."""
    start = options.retrieval_from
    if not 0 <= start < 1 or math.ceil(start * epochs) >= epochs:
        raise InputError(
            f"--cloob-retrieval-from {start:g}: a share of --epochs {epochs}, from 0,"
            " that leaves a whole epoch that retrieves"
        )
    if start and not retrieves:
        raise InputError(
            f"--cloob-retrieval-from: {options.objective} does not retrieve"
        )


def _check_arguments(args: argparse.Namespace) -> None:
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
