"""Models that are runs of ``cloob train``: their held-out pairs, and what these pairs
chose.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import cloob
from cloob.data.shards.spec import is_remote
from cloob.errors import InputError
from cloob.heads.config import HeadsConfig, read_config
from cloob.heads.settings import CLOSED_FORMS
from cloob.models.importing import read_json
from cloob.models.runs import (
    DECISIONS_FILE,
    RUN_CONFIG_FILE,
    find_best,
    read_validation,
    run_of,
)
from cloob.models.source import check_source, find_model_folder

if TYPE_CHECKING:
    from cloob.data.source import Source
    from cloob.data.vectors import VectorPairs
    from cloob.evaluation.results import Row
    from cloob.evaluation.sets.paper import Sets
    from cloob.evaluation.sets.pictures import CaptionedSet

SECTIONS: tuple[Literal["retrieval", "vectors"], ...] = ("retrieval", "vectors")
"""Sections of a row of results.json whose pairs may have chosen the model."""


@dataclass(frozen=True)
class Run:
    """A model that ``cloob train`` made."""

    model: str  # as it was typed
    checkpoint: Path
    folder: Path
    config: cloob.TrainConfig | HeadsConfig  # of heads with what a default means

    @property
    def has_vectors(self) -> bool:
        """Whether it is a run on vectors."""
        return isinstance(self.config, HeadsConfig) and self.config.has_vectors

    @property
    def split(self) -> str | None:
        """A digest of its held-out pairs; None where no checkpoint has it."""
        validation = read_validation(self.checkpoint) or {}
        digest: str | None = validation.get("held_out")
        return digest

    def choices(self) -> list[str]:
        """What its held-out pairs chose of this model, such as ``ridge``."""
        if not self.config.holds_out:
            return []
        members = ""  # of joined heads, such as "infoloob + cca + hubs"
        with contextlib.suppress(InputError):
            decisions = read_json(self.folder / DECISIONS_FILE)
            members = decisions.get("joined", {}).get("joined", "")
        is_closed = self.config.objective in CLOSED_FORMS
        best = find_best(self.folder)
        is_best = best is not None and best[0].samefile(self.checkpoint)
        choices = {
            "objective": self.config.objective == "auto",
            "epoch": is_best and not is_closed,
            "ridge": is_closed or "cca" in members,
            "members": bool(members),
            "bias against hubs": "hubs" in members,
        }
        return [name for name, was_made in choices.items() if was_made]

    def held_out_files(self) -> set[str]:
        """The files of its held-out pairs, as real paths."""
        specs = [*self.config.val_data]
        if isinstance(self.config, HeadsConfig) and self.config.val_a:
            specs = [self.config.val_a]
        return {os.path.realpath(spec) for spec in specs}

    def training_files(self) -> list[str]:
        """What it was trained on, as it was typed."""
        if isinstance(self.config, HeadsConfig) and self.config.a:
            return [self.config.a]
        return list(self.config.data)


def find_runs(models: Mapping[str, str]) -> dict[str, Run]:
    """Those of the models that are runs, by their names.

    Raises:
        InputError: Of a run whose settings cannot be read. Other models that cannot be
            read are reported when they are loaded.
    """
    runs = {}
    for name, model in models.items():
        weights = folder = None
        with contextlib.suppress(InputError):
            weights = find_model_folder(model)
            folder = run_of(weights)
        if weights is not None and folder is not None:
            config = _settings_of(folder / RUN_CONFIG_FILE)
            runs[name] = Run(model, weights.parent, folder, config)
    return runs


def _settings_of(file: Path) -> cloob.TrainConfig | HeadsConfig:
    heads = read_config(file)
    if heads is None:
        return cloob.TrainConfig().merge_file(file)
    return heads.override(
        data=heads.sources,
        val_data=heads.held_out_sources,
        val_split=heads.held_out_share,
    )


def add_held_out(
    sets: Sets, runs: Mapping[str, Run], models: Sequence[str]
) -> list[str]:
    """Adds the held-out pairs of runs, among the models, to the sets, which must be the
    same for all of them; returns the names of the sets.
    """
    if not runs:
        for model in models:
            check_source(model)
    run = _only_split(list(runs.values()))
    _check_local(run)
    held_out = _open_held_out(run)
    if not isinstance(held_out, list):
        sets.vectors.append(held_out)
        return [held_out.name]
    named = [replace(pairs, name=f"{pairs.name} (held out)") for pairs in held_out]
    sets.pairs.extend(named)
    return [pairs.name for pairs in named]


def _check_local(run: Run) -> None:
    """Refuses held-out pairs that no file of this machine has.

    A run folder may come from a stranger: nothing is fetched that nobody typed.
    """
    config = run.config
    if isinstance(config, cloob.TrainConfig) and config.given_held_out:
        raise InputError(
            f"{run.model}: its held-out pairs were given by Python code; name them by"
            f" {_other_option(run)}"
        )
    specs = config.val_data or config.data
    if any(map(is_remote, specs)):
        raise InputError(
            f"{run.model}: its held-out pairs are streamed; type them: --retrieval"
            f" {' '.join(specs)}"
        )


def _open_held_out(run: Run) -> VectorPairs | list[CaptionedSet]:
    """The pairs of vectors that a run held out, or its sets of pictures."""
    from cloob.data.vectors import VectorPairs
    from cloob.evaluation.sets.pictures import group_captions, open_captioned

    config = run.config
    try:
        if config.val_data:
            image, caption = config.image_column, config.caption_column
            return [
                open_captioned(spec, image_column=image, caption_column=caption)
                for spec in config.val_data
            ]
        opened = _open_split(run)
    except InputError as error:
        raise InputError(
            f"{run.model}: its held-out pairs cannot be read; {error}"
        ) from None
    _check_unchanged(run, opened)
    if isinstance(opened, VectorPairs):
        return opened
    files = ", ".join(Path(spec).name for spec in config.data)
    return [group_captions(files, opened, by_content=True)]


def _only_split(runs: Sequence[Run]) -> Run:
    """The first run, where all hold the same pairs out."""
    if not runs:
        raise InputError(
            "--held-out: no model here is a run of `cloob train`; name one, or pairs by"
            " --retrieval"
        )
    first = runs[0]
    if not first.config.holds_out:
        raise InputError(
            f"{first.model}: held no pairs out of its training; name pairs by"
            f" {_other_option(first)}"
        )
    for other in runs[1:]:
        if None not in (first.split, other.split) and first.split != other.split:
            raise InputError(
                f"{first.model} and {other.model} held different pairs out; evaluate"
                " one at a time"
            )
    return first


def _other_option(run: Run) -> str:
    return "--a and --b" if run.has_vectors else "--retrieval"


def _open_split(run: Run) -> VectorPairs | Source:
    """The held-out pairs that a run took from its training pairs, or ``--val-a``."""
    opened: VectorPairs | Source | None
    if isinstance(run.config, HeadsConfig):
        from cloob.heads.run import open_held_out

        config = HeadsConfig().merge_file(run.folder / RUN_CONFIG_FILE)
        opened = open_held_out(config.override(out=run.folder))
    else:
        from cloob.data.items import Items
        from cloob.training.pairs import open_pairs

        found = open_pairs(run.config)[1]
        assert not isinstance(found, Items)  # which _check_local refuses
        opened = found
    assert opened is not None  # the run holds pairs out
    return opened


def _check_unchanged(run: Run, held_out: VectorPairs | Source) -> None:
    """Refuses held-out pairs that are others than those of the training."""
    from cloob.data.source import digest

    found = digest([json.dumps(held_out.fingerprint(), sort_keys=True)])
    if run.split not in (None, found):
        raise InputError(
            f"{run.model}: its pairs have changed since the training, so nobody knows"
            " which were held out"
        )


def note_choices(
    rows: Sequence[Row],
    runs: Mapping[str, Run],
    typed: Mapping[str, str],
    held_out: Sequence[str],
) -> list[str]:
    """Writes ``chose`` beside every recall of a run: what these pairs chose of it;
    returns a sentence per set whose pairs chose something.

    ``runs`` are by the name of the model, ``typed`` is what was typed for a set;
    ``held_out`` are the sets that ``--held-out`` added.
    """
    chosen_by_set: dict[str, list[str]] = {}
    for row in rows:
        run = runs.get(row["model"])
        if run is None:
            continue
        for section in SECTIONS:
            for name, numbers in row.get(section, {}).items():
                file = os.path.realpath(typed.get(name, name))
                judged = name in held_out or file in run.held_out_files()
                choices = run.choices() if judged else []
                numbers["chose"] = choices
                if choices:
                    words = f"{' and '.join(choices)} of {row['model']}"
                    chosen_by_set.setdefault(name, []).append(words)
    return [
        f"the pairs of {name} chose {', '.join(chosen)}: recall on new pairs is lower"
        for name, chosen in chosen_by_set.items()
    ]
