"""The pairs that runs held out of their training, and those that they were trained on."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from cloob.data.content import Reader
from cloob.data.fingerprint import digest
from cloob.data.shards.spec import is_remote
from cloob.errors import InputError
from cloob.evaluation.sets.captioned import ByPicture, Renamed, open_captioned
from cloob.models.load import find_model_folder
from cloob.models.runs import RUN_CONFIG_FILE, read_validation, run_of
from cloob.training.build import open_both
from cloob.training.config import TrainConfig
from cloob.training.config.parts import PairsConfig


def open_held_out(models: Sequence[str]) -> list[Reader]:
    """The held-out pairs of the runs among the models, which must be the same for all of them.

    Raises:
        InputError: No model is of a run, a run held none or others out, or they cannot be read or have changed.
    """
    runs = list(_runs(models))
    if not runs:
        raise InputError("--held-out: no model here is a run of `cloob train`; name one, or pairs by --retrieval")
    model, folder, pairs = runs[0]
    for other, _, its_pairs in runs:
        if not its_pairs.holds_out:
            raise InputError(f"{other}: held no pairs out of its training; name pairs by --retrieval")
        if _split(its_pairs) != _split(pairs):
            raise InputError(f"{model} and {other} held different pairs out; evaluate one at a time")
    specs = pairs.val_data or pairs.data
    if any(map(is_remote, specs)):  # a run folder may come from a stranger: nothing is fetched or run that nobody typed
        raise InputError(f"{model}: its held-out pairs are streamed; type them: --retrieval {' '.join(specs)}")
    columns = {"image_column": pairs.image_column, "caption_column": pairs.caption_column}
    try:
        if pairs.val_data:
            opened = [open_captioned(spec, **columns) for spec in pairs.val_data]
            return [Renamed(each, f"{each.name} (held out)") for each in opened]
        held_out = open_both(TrainConfig(pairs))[1]
    except InputError as error:
        raise InputError(f"{model}: its held-out pairs cannot be read; {error}") from None
    assert held_out is not None
    known = (read_validation(folder.parent) or {}).get("held_out")
    if known not in (None, digest([json.dumps(held_out.fingerprint(), sort_keys=True)])):
        raise InputError(f"{model}: its pairs have changed since the training, so nobody knows which were held out")
    return [ByPicture(f"{', '.join(Path(spec).name for spec in pairs.data)} (held out)", held_out)]


def say_trained_on(models: Sequence[str], sources: Sequence[str]) -> None:
    """Says on stderr which models were trained on pairs that they are to be judged by."""
    both = functools.cache(lambda pairs: open_both(TrainConfig(pairs)))
    places = [os.path.realpath(spec) for spec in sources if not is_remote(spec)]
    for model, _, pairs in _runs(models):
        same = any(place in map(os.path.realpath, pairs.data) for place in places)
        if not same or any(map(is_remote, (*pairs.data, *pairs.val_data))):
            continue
        with contextlib.suppress(InputError):  # other pairs of the run may be gone
            source, held_out = both(pairs)
            total = len(source) + (len(held_out) if pairs.val_split and held_out is not None else 0)
            advice = "; --held-out judges by pairs that were not" if pairs.holds_out else ""
            of = f"{len(source):,} of {total:,} pairs of {', '.join(pairs.data)}"
            print(f"cloob: {model}: {of} were trained on{advice}", file=sys.stderr)


def _runs(models: Sequence[str]) -> Iterator[tuple[str, Path, PairsConfig]]:
    """The models that are of a run: each with its model folder and the pairs of the run."""
    for model in models:
        with contextlib.suppress(InputError):  # which loading it says
            folder = find_model_folder(model)
            if folder is not None and (run := run_of(folder)) is not None:
                yield model, folder, TrainConfig.from_json(run / RUN_CONFIG_FILE).pairs


def _split(pairs: PairsConfig) -> tuple[object, ...]:
    """What decides over the held-out pairs."""
    columns = pairs.image_column, pairs.caption_column
    return (pairs.val_data, columns) if pairs.val_data else (pairs.data, pairs.val_split, columns)
