"""CLOOB inside an unmodified ``open_clip_train``: its data, models, schedules and
checkpoints, our objective.

    python -m cloob.interop.open_clip --cloob-inv-tau 30 -- --train-data pairs.csv
    --csv-separator , --model ViT-B-32 … torchrun --nproc-per-node 8 -m
    cloob.interop.open_clip --cloob-objective cloob -- --train-data …

Options that begin with ``--cloob-`` are ours (``--help`` lists them), all others
open_clip_train's (3.3, or 4 as of its main branch), of which the launcher replaces
``create_loss`` (in 4 ``create_task``), ``train_one_epoch``, ``parse_args`` and
``create_model_and_transforms``. Our tiny models exist there (``--model tiny-vit``).

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
from cloob.errors import InputError, command_line, needs, refuse
from cloob.family import FAMILY, PAPER_OBJECTIVES
from cloob.objective import BACKENDS, MAX_INV_TAU, ContrastiveObjective, make_objective

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
            loss = (
                loss if scalar is None else loss + 0.0 * scalar.sum()
            )  # DDP stops at a parameter without gradient
        return {"contrastive_loss": loss} if output_dict else loss


def _option(default: Any, help: str | None = None, **settings: Any) -> Any:
    return field(default=default, metadata={"help": help, **settings})


@dataclass(frozen=True)
class Options:
    """The launcher's options; ``backend`` and ``matmul`` as
    :class:`cloob.objective.ContrastiveObjective`.
    """

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
    backend: str = _option("auto", choices=BACKENDS)
    matmul: str = _option("float32", choices=("float32", "bfloat16"))

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
        given: dict[str, Any] = {
            "inv_tau": self.inv_tau,
            "scale": "unit" if self.learned else self.scale,
        }
        given |= {"beta": self.beta, "backend": self.backend, "matmul": self.matmul}
        chosen = {key: value for key, value in given.items() if value is not None}
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
    plain_epochs = 0.0

    def parse_args(argv: Sequence[str]) -> Any:
        args = theirs["parse_args"](argv)  # params.txt and the loggers write all of it
        args.cloob, args.cloob_retrieval_from = (
            options.build(gather=False).config(),
            options.retrieval_from,
        )
        return args

    def create_loss(args: Any) -> OpenClipLoss:
        nonlocal plain_epochs
        plain_epochs = options.retrieval_from * args.epochs
        objective = options.build(gather=distributed.is_initialized())
        return OpenClipLoss(
            objective, learn_inv_tau=options.learned, evaluations=args.accum_freq
        )

    def create_task(args: Any, *given: Any, **named: Any) -> Any:
        task = theirs["create_task"](args, *given, **named)
        kind = type(task).__name__
        refuse(
            {
                f"--model {args.model}: is trained by a {kind}, which has another loss": (
                    kind != "CLIPTask"
                )
            }
        )
        task.loss = create_loss(args)
        return task

    def train_one_epoch(first: Any, data: Any, *rest: Any, **named: Any) -> None:
        if "create_task" in theirs:  # (state, data, args, …)
            model, loss, epoch, optimizer = (
                first.task.trainable_module,
                first.task.loss,
                first.epoch,
                first.optimizer,
            )
        else:  # (model, data, loss, epoch, optimizer, …)
            model, (loss, epoch, optimizer) = first, rest[:3]
        loss.retrieves = FAMILY[options.objective].hopfield and epoch >= plain_epochs
        inv_tau = float(loss.objective.inv_tau)
        if not options.learned or (options.inv_tau is not None and epoch == 0):
            _logit_scale(model).data.fill_(math.log(inv_tau))
        theirs["train_one_epoch"](first, data, *rest, **named)
        if not options.learned:
            _logit_scale(model).data.fill_(
                math.log(inv_tau)
            )  # once more, since every step clamps it to [1, 100]
        # A checkpoint holds the optimiser's groups with whatever is in them: load_model
        # reads the objective there.
        inv_tau = (
            float(_logit_scale(model).detach().exp()) if options.learned else inv_tau
        )
        optimizer.param_groups[0]["cloob"] = loss.objective.config() | {
            "inv_tau": inv_tau
        }

    def create_model_and_transforms(
        *given: Any, **named: Any
    ) -> tuple[Any, Any, Any]:  # no objective trains a bias
        model, *transforms = theirs["create_model_and_transforms"](*given, **named)
        if getattr(model, "logit_bias", None) is not None:
            model.logit_bias = None
        return model, *transforms

    ours = (
        parse_args,
        create_loss,
        create_task,
        train_one_epoch,
        create_model_and_transforms,
    )
    theirs = {
        item.__name__: getattr(main, item.__name__)
        for item in ours
        if hasattr(main, item.__name__)
    }
    vars(main).update({item.__name__: item for item in ours if item.__name__ in theirs})
    try:
        yield
    finally:
        vars(main).update(theirs)


def parse(argv: Sequence[str]) -> tuple[Options, list[str]]:
    """Our options and open_clip_train's arguments; the ``--`` is optional, as torchrun
    swallows a leading one.
    """
    name, usage = (
        "python -m cloob.interop.open_clip",
        "%(prog)s [--cloob-OPTION …] -- OPEN_CLIP_TRAIN_ARGUMENT …",
    )
    purpose = "Runs open_clip_train with an objective of this package."
    parser = argparse.ArgumentParser(
        prog=name, usage=usage, description=purpose, allow_abbrev=False
    )
    for option in fields(Options):
        flag = f"--cloob-{option.name.replace('_', '-')}"
        parser.add_argument(
            flag, dest=option.name, default=option.default, **option.metadata
        )
    if "--" in argv:
        cut = list(argv).index("--")
        values, rest = parser.parse_args(argv[:cut]), list(argv[cut + 1 :])
    else:
        values, rest = parser.parse_known_args(argv)
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
    retrieves = FAMILY[options.objective].hopfield
    learns, inv_tau, starts, most = (
        options.learned,
        options.inv_tau,
        options.retrieval_from,
        MAX_INV_TAU,
    )
    late = 0 < starts < 1 and math.ceil(starts * args.epochs) >= args.epochs
    other_loss = "asks for another loss than CLIP's"
    refuse(
        {
            "--cloob-scale paper: a learned temperature needs unit": (
                learns and options.scale == "paper"
            ),
            f"--cloob-inv-tau {inv_tau}: 1 to {most:g} can be learned": (
                learns and not 1 <= (inv_tau or 1) <= most
            ),
            f"--cloob-retrieval-from {starts:g}: a share of the epochs, from 0 to below 1": (
                not 0 <= starts < 1
            ),
            f"--cloob-retrieval-from: {options.objective} does not retrieve": (
                starts and not retrieves
            ),
            f"--cloob-retrieval-from of --epochs {args.epochs} leaves no whole epoch that retrieves": (
                late
            ),
            f"--siglip: {other_loss}": args.siglip,
            f"--distill-model: {other_loss}": args.distill_model,
            f"--model {args.model}: {other_loss}": "coca" in args.model.lower(),
            "--horovod: cloob gathers over torch.distributed; start with torchrun": (
                getattr(args, "horovod", False)
            ),
            "open_clip_train: version 3.3 or 4 is expected": (
                not {
                    "create_loss",
                    "create_task",
                }
                & vars(main).keys()
            ),
        }
    )
    if (
        retrieves
        and os.environ.get("RANK", "0") == "0"
        and not (starts or args.pretrained or args.resume)
    ):
        print(_RANDOM, file=sys.stderr)
    with installed(main, options):
        return 1 if main.main(rest) else 0


if __name__ == "__main__":
    with command_line(__name__):
        sys.exit(run(sys.argv[1:]))
