"""``cloob train``: train on your image-caption pairs, or a named recipe."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cloob
from cloob import settings
from cloob.cache import use_cache
from cloob.commands.console import parse, say, say_next
from cloob.errors import InputError, Stopped
from cloob.family import ALIASES, OBJECTIVES, ObjectiveName
from cloob.models.runs import AVERAGED_FOLDER, CHECKPOINTS_FOLDER, find_best

if TYPE_CHECKING:
    from cloob.training.callbacks import RunResult

_USAGE = "[RECIPE] [--config FILE] | --list"
_DESCRIPTION = (
    "Trains two towers, starting from a recipe (`cloob train --list` prints recipes and"
    " towers) or from the defaults below. --config FILE (JSON or TOML, such as the"
    " config.json of a run) changes them, and sets what has no option here; the page"
    " “Train” describes it."
    " Under torchrun one process a device: torchrun --nproc-per-node 8 -m cloob train …"
)


NAMES = (
    *("data", "val_data", "val_split", "model", "init", "objective", "epochs"),
    *("batch_size", "lr", "workers", "precision", "device", "seed", "resume", "out"),
    *("image_column", "caption_column", "max_bad_fraction", "image_size", "freeze"),
    *("inv_tau", "beta", "learnable_inv_tau", "retrieval_from", "mask_duplicates"),
    *("steps", "patience", "micro_batch_size", "grad_checkpointing", "compile"),
    *("fsdp", "weight_decay", "schedule", "warmup", "save_every", "best"),
    *("overwrite", "wandb"),
)
"""The settings with an option, first those that people type, in the order of the help;
the others are set in a file.
"""


def read(words: Sequence[str]) -> cloob.TrainConfig | cloob.HeadsConfig | None:
    """The configuration that the words describe: a recipe, a file over it, and options
    over both; None for ``--list``.
    """
    if "--list" in words:
        if len(words) > 1:
            raise InputError("--list stands alone: cloob train --list")
        return None
    recipe = recipe_of_heads(words)
    if recipe is not None:
        from cloob.commands import train_heads

        return train_heads.read(recipe, words[words[0] == recipe :])
    return read_config(words)


def recipe_of_heads(words: Sequence[str]) -> str | None:
    """The recipe of heads that the words name, by itself or by the configuration of
    such a run.
    """
    from cloob.heads.config import read_config
    from cloob.recipes import HEADS

    if words and not words[0].startswith("-"):
        return words[0] if words[0] in HEADS else None
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", nargs="?")
    file = early.parse_known_args(words)[0].config
    if file is None or not file.endswith(".json") or not Path(file).is_file():
        return None
    config = read_config(Path(file))
    if config is None:
        return None
    return "vectors" if config.has_vectors else "align"


def read_config(words: Sequence[str]) -> cloob.TrainConfig:
    """The configuration that the words describe."""
    from cloob.commands import train_heads
    from cloob.training import config as configs

    rest = list(words)
    recipe = rest.pop(0) if rest and not rest[0].startswith("-") else None
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", nargs="?", const="")
    first, rest = early.parse_known_args(rest)
    if first.config == "":
        raise InputError("--config needs a value")
    start = cloob.TrainConfig()
    if recipe is not None:
        early.add_argument("--objective", nargs="?")  # an unknown one is refused later
        early.add_argument("--model", nargs="?")
        first, _ = early.parse_known_args(rest, first)
        typed_name = ALIASES.get(first.objective, first.objective)
        objective: ObjectiveName | None = next(
            (name for name in OBJECTIVES if name == typed_name), None
        )
        start = cloob.get_recipe(recipe, objective=objective, model=first.model or None)
    if first.config is not None:
        # perhaps of a run: this one may not overwrite, and does not go on
        start = start.merge_file(first.config).override(overwrite=False)
        if (Path(first.config).parent / CHECKPOINTS_FOLDER).is_dir():
            start = start.override(resume="none")
    refuse_options_of_heads(rest)
    typed = typed_settings(rest)
    kind = train_heads.options(start, NAMES, [settings, configs])
    parsed = parse(kind, rest, "cloob train", usage=_USAGE, description=_DESCRIPTION)
    return start.override(**{name: getattr(parsed, name) for name in typed})


def typed_settings(words: Sequence[str]) -> list[str]:
    """The settings whose options are among the words; InputError for one that is set in
    a file.
    """
    options = {word.partition("=")[0] for word in words if word.startswith("--")}
    typed = []
    for field in dataclasses.fields(cloob.TrainConfig):
        word = field.name.replace("_", "-")
        if not options & {f"--{word}", f"--no-{word}"}:
            continue
        if field.name not in NAMES:
            raise InputError(
                f"--{word} is set in a file: --config more.toml, with the line"
                f" {field.name} = …"
            )
        typed.append(field.name)
    return typed


def refuse_options_of_heads(words: Sequence[str]) -> None:
    """Refuses an option that only runs of heads have."""
    typed = {word.partition("=")[0] for word in words}
    for name in ("image_encoder", "text_encoder"):
        spelled = f"--{name.replace('_', '-')}"
        if spelled in typed:
            raise InputError(f"{spelled} goes with `cloob train align`")
    for spelled in ("--clean", "--members"):
        if spelled in typed:
            raise InputError(
                f"{spelled} goes with `cloob train align` and `cloob train vectors`"
            )


def print_choices() -> int:
    """Prints the recipes and the names of the towers."""
    from cloob.models.source import known_models
    from cloob.recipes import RECIPES, describe

    width = max(map(len, RECIPES))
    for name in RECIPES:
        print(f"{name:<{width}}  {describe(name)}")
    print("\ntowers (--model):", *known_models(), sep="\n")
    say_next(["train", "align", "--data", "demo"])
    return 0


def run(config: cloob.TrainConfig | cloob.HeadsConfig | None) -> int:
    """Trains, or without a configuration prints what can be trained."""
    if config is None:
        return print_choices()
    if isinstance(config, cloob.HeadsConfig):
        from cloob.commands import train_heads

        return train_heads.run(config)
    return run_training(config)


def train_to_the_signal(config: cloob.TrainConfig, title: str) -> RunResult:
    """Trains under a progress display; the result also where SIGTERM ended it."""
    from cloob.training.callbacks import ProgressDisplay

    try:
        return cloob.train(config, callbacks=[ProgressDisplay(title=title)])
    except Stopped as stopped:
        result: RunResult = stopped.result
        return result


def run_training(config: cloob.TrainConfig) -> int:
    """Trains; 0 when the run reached its end or was stopped by SIGTERM."""
    from cloob.training.checks import preflight

    preflight(config)
    first = (
        os.environ.get("RANK", "0") == "0"
    )  # torchrun's other processes have nothing to say
    if first:
        say("opening data …")  # the imports alone take seconds

    use_cache(config.cache_dir, config.cache_gb)
    logging.getLogger("cloob.training").setLevel(
        logging.INFO
    )  # progress of encoders, held-out pairs, what was tried
    logging.getLogger("cloob.data.open").setLevel(
        logging.INFO if first else logging.ERROR
    )  # what was opened
    result = train_to_the_signal(config, config.objective)
    run, metric, out, holds_out = (
        result.run,
        config.best,
        config.out,
        config.holds_out,
    )
    code = 0 if result.checkpoint is not None else 1
    if not first:
        return code
    if result.already_finished:
        why = (
            "the patience was used up, --patience 0 goes on"
            if result.out_of_patience
            else "a longer one goes on"
        )
        print(
            f"{run}: already finished ({result.epochs} epochs, {result.steps:,} steps);"
            f" {why}"
        )
        return code
    if result.stopped:
        print(
            f"stopped by {result.stopped} after step {result.steps:,}; go on with"
            " --resume auto"
        )
    print(
        f"{run}: {result.steps:,} steps, {result.samples_seen:,} pairs,"
        f" {result.seconds:,.0f} s"
    )
    if result.out_of_patience:
        print(
            f"stopped at epoch {result.epochs}: no better for {config.patience} epochs"
        )
    if holds_out and (best := find_best(run, metric)) is not None:
        print(f"{run}:best: {metric} {best[1]:.4g} ({best[0].name})")
    if result.stopped is not None or result.checkpoint is None:
        return code
    if config.average_with_start is not None:
        print(f"{run / AVERAGED_FOLDER}: averaged with {config.init}")
    pictures = config.data[0] if Path(config.data[0]).is_dir() else "PICTURES"
    judge = ["--held-out"] if holds_out else ["--retrieval", "PAIRS"]
    index: list[str | Path] = [
        "index",
        pictures,
        "--model",
        out,
        "--out",
        "pictures.idx",
    ]
    say_next(["eval", out, *judge], index, ["search", "pictures.idx", "a red bird"])
    return code
