"""``cloob train vectors`` and ``cloob train align``: heads on vectors, or on two frozen
encoders.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import logging
import typing
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import cloob
from cloob import settings as cloob_settings
from cloob.commands.console import parse, say, say_next
from cloob.errors import InputError
from cloob.family import ALIASES
from cloob.heads import config as configs
from cloob.heads import settings
from cloob.heads.config import HeadsConfig, check_config, option
from cloob.models.runs import CHECKPOINTS_FOLDER
from cloob.models.source import check_packages
from cloob.recipes import describe

if typing.TYPE_CHECKING:
    from cloob.heads.run import HeadsResult

USAGE = "{} [--config FILE]"
DESCRIPTION = (
    "{} --config FILE (JSON or TOML, such as the config.json of a run) changes the"
    " defaults, and sets what has no option here."
)
VECTORS = (
    *("a", "b", "ids", "groups", "weights", "drop", "a_ids", "b_ids"),
    *("val_a", "val_b", "val_ids"),
)
ALIGN = (
    *("data", "val_data", "image_encoder", "text_encoder", "image_size"),
    *("image_column", "caption_column", "workers", "mask_duplicates"),
)
USUAL = (
    *("objective", "epochs", "batch_size", "lr", "val_split", "device", "seed"),
    *("resume", "out"),
)
OTHER = (
    *("clean", "members", "standardise", "embed_dim", "head", "dropout", "inv_tau"),
    *("beta", "learnable_inv_tau", "retrieval_from", "patience", "best", "refit"),
    *("weight_decay", "warmup", "max_bad_fraction", "overwrite"),
)


def read(recipe: str, words: Sequence[str]) -> HeadsConfig:
    """The configuration that the words describe: the recipe, a file over it, and
    options over both.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", nargs="?", const="")
    early.add_argument("--objective", nargs="?")
    first, _ = early.parse_known_args(words)
    if first.config == "":
        raise InputError("--config needs a value")
    objective = ALIASES.get(first.objective, first.objective)
    known = typing.get_args(typing.get_type_hints(HeadsConfig)["objective"])
    named: Any = objective if objective in known else None
    start: Any = cloob.get_recipe(recipe, objective=named)
    if first.config is not None:
        start = over_file(start, Path(first.config), named)
    names = (*(VECTORS if recipe == "vectors" else ALIGN), *USUAL, *OTHER)
    rest = without_config(words)
    refuse_unlisted(rest, names)
    about = describe(recipe)
    parsed = parse(
        options(start, names, [cloob_settings, settings, configs]),
        rest,
        "cloob train",
        usage=USAGE.format(recipe),
        description=DESCRIPTION.format(about),
    )
    return HeadsConfig(**{**vars(start), **vars(parsed)})


def over_file(start: HeadsConfig, file: Path, objective: str | None) -> HeadsConfig:
    """The start with the settings of a file; one of a run does not go on with it."""
    config = start.merge_file(file).override(overwrite=False)
    if (file.parent / CHECKPOINTS_FOLDER).is_dir():
        config = config.override(resume="none")
    if objective is not None:
        config = config.override(objective=objective)
    return config


def without_config(words: Sequence[str]) -> list[str]:
    """The words but for --config and its value."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", nargs="?")
    return early.parse_known_args(words)[1]


def refuse_unlisted(words: Sequence[str], names: Sequence[str]) -> None:
    """Refuses an option for a setting that only a file sets."""
    typed = {word.partition("=")[0] for word in words if word.startswith("--")}
    for field in dataclasses.fields(HeadsConfig):
        spelled = option(field.name)
        if field.name in names or spelled not in typed:
            continue
        if field.name in (*VECTORS, *ALIGN):
            other = "vectors" if field.name in VECTORS else "align"
            raise InputError(f"{spelled} goes with `cloob train {other}`")
        raise InputError(
            f"{spelled} is set in a file: --config more.toml, with the line"
            f" {field.name} = …"
        )


def options(start: Any, names: Sequence[str], modules: Sequence[ModuleType]) -> Any:
    """A dataclass for tyro of some settings, whose defaults are those of ``start``."""
    import tyro

    hints = typing.get_type_hints(type(start))
    helps: dict[str, str] = {}
    for module in modules:
        helps |= docs_of(module)
    fields = []
    for name in names:
        kind: Any = Annotated[hints[name], tyro.conf.arg(help=helps[name])]
        default = dataclasses.field(default=getattr(start, name))
        fields.append((name, kind, default))
    return dataclasses.make_dataclass("Options", fields, frozen=True)


def docs_of(module: ModuleType) -> dict[str, str]:
    """The docstrings of the fields of a module's dataclasses, from the source."""
    found = {}
    for kind in ast.parse(inspect.getsource(module)).body:
        body = getattr(kind, "body", ())
        for leaf, text in itertools.pairwise(body if isinstance(body, list) else ()):
            is_doc = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            if isinstance(leaf, ast.AnnAssign) and is_doc:
                words = str(text.value.value).split()
                found[ast.unparse(leaf.target)] = " ".join(words)
    return found


def run(config: HeadsConfig) -> int:
    """Trains heads; 0 when the run reached its end."""
    check_config(config)
    if not config.has_vectors:
        check_packages([str(config.image_encoder), str(config.text_encoder)])
    say("opening data …")  # the imports alone take seconds
    from cloob.heads.run import train_heads

    for name in ("cloob.heads", "cloob.data.open", "cloob.data.vectors"):
        logging.getLogger(name).setLevel(logging.INFO)
    result = train_heads(config, on_epoch=show_epoch(config.objective))
    print_result(config, result)
    return 0


def show_epoch(title: str) -> Any:
    """A callback that says how good an epoch is."""

    def show(line: dict[str, Any]) -> None:
        if line["loss"] is None:
            message = f"{title}: solved"
        else:
            loss = f"mean loss {line['loss']:.4f}"
            message = f"{title}: epoch {line['epoch']} done, {loss}"
        if line["val_loss"] is not None:
            message += f", validation loss {line['val_loss']:.4f}"
        if line["val_recall"] is not None:
            message += f", mean recall {100 * line['val_recall']:.1f} %"
        say(message)

    return show


def print_result(config: HeadsConfig, result: HeadsResult) -> None:
    """Says what a run came to, and what may come next."""
    out = result.run
    done = f"{result.epochs} epochs, {result.steps:,} steps"
    if result.already_finished:
        why = "a longer one goes on"
        if result.out_of_patience:
            why = "the patience was used up, --patience 0 goes on"
        print(f"{out}: already finished ({done}); {why}")
        return
    print(f"{out}: {done}, {result.samples_seen:,} pairs, {result.seconds:,.0f} s")
    if result.out_of_patience:
        epochs = f"no better for {config.patience} epochs"
        print(f"stopped at epoch {result.epochs}: {epochs}")
    if result.skipped:
        counts = ", ".join(f"{n:,} {reason}" for reason, n in result.skipped.items())
        print(f"skipped (named in skipped.jsonl): {counts}")
    if result.recall is not None:
        place = result.checkpoint.name
        print(
            f"{out}:best: val_recall {result.recall:.4g} ({place}), of the pairs that"
            " chose it: lower on others"
        )
    if config.has_vectors:
        judge = ["--held-out"] if config.holds_out else ["--a", "A.npy", "--b", "B.npy"]
        embed: list[str | Path] = ["embed", out, "--a", str(config.a)]
        say_next(["eval", out, *judge], [*embed, "--out", "vectors.npz"])
        return
    pictures = config.sources[0] if Path(config.sources[0]).is_dir() else "PICTURES"
    judge = ["--held-out"] if config.holds_out else ["--retrieval", "PAIRS"]
    index: list[str | Path] = ["index", pictures, "--model", out]
    index += ["--out", "pictures.idx"]
    say_next(["eval", out, *judge], index, ["search", "pictures.idx", "a red bird"])
