"""The run folder before the first step: no two runs are mixed up in it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from cloob.errors import InputError
from cloob.models.load import find_model_folder
from cloob.models.runs import (
    AVERAGED_FOLDER,
    CHECKPOINTS_FOLDER,
    EPOCHS_FILE,
    METRICS_FILE,
    PROFILE_FOLDER,
    RUN_CONFIG_FILE,
    SKIPPED_FILE,
    list_checkpoints,
)
from cloob.training.config import TrainConfig
from cloob.training.state.checkpoint import Checkpoint, set_aside

_RUN_FILES = (RUN_CONFIG_FILE, METRICS_FILE, EPOCHS_FILE, SKIPPED_FILE, CHECKPOINTS_FOLDER)


def refuse_another_run(config: TrainConfig, checkpoint: Checkpoint | None) -> None:
    """Refuses a run folder that holds a run which is neither gone on from nor to be replaced.

    What torchrun starts again after a rank has died replaces nothing: that would be the run itself.
    """
    save = config.save
    if save.overwrite and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 and _held_files(save.out):
        raise InputError(
            f"{save.out}: holds the run that torchrun has started again, which --overwrite would remove; "
            "give --resume auto in its place"
        )
    for key in ("init", "init_image") if save.overwrite and _held_files(save.out) else ():
        spec = getattr(config.towers, key)
        folder = find_model_folder(spec) if spec is not None else None
        if folder is not None and folder.resolve().is_relative_to(save.out.resolve()):
            raise InputError(f"{key} {spec!r} lies in {save.out}, which --overwrite would remove; give another --out")
    goes_on = save.resume == "auto" or (checkpoint is not None and _is_of(checkpoint, save.out))
    if not goes_on and not save.overwrite and _held_files(save.out):
        raise InputError(
            f"{save.out}: already holds a run; go on with --resume auto, or give --overwrite or another --out"
        )


def _is_of(checkpoint: Checkpoint, out: Path) -> bool:
    return checkpoint.path.parent.parent.resolve() == out.resolve()


def _held_files(out: Path) -> list[Path]:
    """The files of a run that a folder holds."""
    return [out / name for name in _RUN_FILES if (out / name).exists()]


def prepare_run_folder(config: TrainConfig, checkpoint: Checkpoint | None) -> None:
    """Makes the run folder, and sees to it that no earlier run is mixed up with this one.

    Raises:
        InputError: The folder cannot be written, or holds a newer checkpoint of the run.
    """
    out, save = config.save.out, config.save
    if checkpoint is not None and _is_of(checkpoint, out):
        newest = list_checkpoints(out)[-1]
        asked = save.resume != "auto" and Path(save.resume).resolve() != out.resolve()  # for this checkpoint
        if asked and newest.name > checkpoint.path.name:
            raise InputError(
                f"{out}: holds {newest.name}, which is newer than {checkpoint.path.name}; "
                f"resume that one, or into another --out"
            )
        set_aside(checkpoint.path)
    try:
        if save.overwrite:
            beside = [out / name for name in ("tensorboard", AVERAGED_FOLDER, PROFILE_FOLDER, "results.json")]
            for path in [*_held_files(out), *out.glob("nonfinite-step-*.json"), *beside]:
                folder = path.is_dir() and not path.is_symlink()
                shutil.rmtree(path) if folder else path.unlink(missing_ok=True)
        (out / CHECKPOINTS_FOLDER).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: the run folder cannot be written ({error.strerror or error})") from None
