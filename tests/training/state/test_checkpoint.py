from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_helpers import Trained

from cloob.errors import InputError
from cloob.models.folder import save_model
from cloob.models.load import load_model
from cloob.models.runs import list_checkpoints
from cloob.models.towers import create_model
from cloob.objective import make_objective
from cloob.training.config.run import OptimConfig
from cloob.training.loop import train
from cloob.training.optim import make_optimizer
from cloob.training.state import checkpoint as module
from cloob.training.state.checkpoint import Progress, TrainerState, save_checkpoint
from cloob.training.state.resume import find_checkpoint, read_checkpoint, restore
from cloob.training.state.rng import preserved_rng, rng_state, set_rng_state

CPU = torch.device("cpu")


def draw() -> tuple[Any, ...]:
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.normal(), torch.rand(3).tolist()  # noqa: NPY002


def test_generators_come_back_through_a_file(tmp_path: Path) -> None:
    random.gauss(0, 1)  # leaves a half-used pair behind, as numpy's does
    np.random.normal()  # noqa: NPY002
    torch.save(rng_state(CPU), tmp_path / "rng.pt")
    first = draw()
    assert draw() != first
    set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True), CPU)
    assert draw() == first


def test_preserved_rng_also_when_something_fails() -> None:
    state = rng_state(CPU)
    with contextlib.suppress(KeyError), preserved_rng(CPU):
        draw()
        raise KeyError
    found = draw()
    set_rng_state(state, CPU)
    assert draw() == found


@pytest.fixture
def save(nano_configs: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes checkpoints of one model into one run."""
    encoder, objective = create_model("nano-vit", seed=0), make_objective("clip")
    optimizer = make_optimizer(encoder, objective, OptimConfig(), CPU)

    def write(step: int, keep: int = 0, run: Path = tmp_path / "run") -> Path:
        progress = Progress(step=step, reasons={"corrupt image": 2})
        rng = [rng_state(CPU)]
        trainer = TrainerState(optimizer.state_dict(), {}, progress, rng, 8, pairs=40, data={}, best="val_loss")
        return save_checkpoint(run, encoder, objective, trainer, keep=keep)

    return write


def hidden(run: Path) -> list[Path]:
    return list((run / "checkpoints").glob(".*"))


def test_layout_and_keep(save: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (2, 4, 10):
        path = save(step, keep=2)
    assert path == run / "checkpoints" / "step-00000010"
    assert [p.name for p in list_checkpoints(run)] == ["step-00000004", "step-00000010"]
    assert {p.name for p in path.iterdir()} == {"model", "trainer.pt"} and not hidden(run)
    assert len({file.stat().st_mode for file in (path / "model").iterdir()}) == 1  # who may read one reads all
    assert read_checkpoint(path).progress == Progress(step=10, reasons={"corrupt image": 2})
    again = save(10)  # in the place of one that may be damaged
    assert again == path and len(list_checkpoints(run)) == 2 and not hidden(run)


def test_weights_are_written_from_where_they_are(
    save: Callable[..., Path], nano_configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of the model at each checkpoint would take its memory again; two weights are copied, see below."""
    encoder, saved = create_model("nano-vit", seed=0), {}
    encoder.model.register_buffer("tied", encoder.model.visual.proj.detach())
    monkeypatch.setattr("safetensors.torch.save_file", lambda tensors, *_, **__: saved.update(tensors))
    monkeypatch.setattr(Path, "chmod", lambda *_: None)
    save_model(save(1).parent / "other", encoder, {})
    ours = {name: weight.data_ptr() for name, weight in encoder.model.state_dict().items()}
    copied = {name for name, weight in saved.items() if weight.data_ptr() != ours[name]}
    assert copied == {"visual.proj", "visual.conv1.weight"}  # the one shares memory, the other is in channels_last


def test_trainer_file_is_data_only(trained: Trained) -> None:
    state = torch.load(trained.result.checkpoint / "trainer.pt", weights_only=True)  # type: ignore[operator]
    assert state["progress"]["step"] == 15 and len(state["rng"]) == 1 and state["batch_size"] == 8


@pytest.mark.parametrize("moment", ["save_model", "torch.save", "rename"])
@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full"), ZeroDivisionError("a bug")])
def test_an_interrupted_write_leaves_the_one_before(
    save: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, fault: BaseException
) -> None:
    run = tmp_path / "run"
    save(1, keep=1)

    def fail(*_: object, **__: object) -> None:
        raise fault

    owner, name = {"save_model": (module, "save_model"), "torch.save": (torch, "save"), "rename": (Path, "rename")}[
        moment
    ]
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, fail)
        with pytest.raises(InputError if isinstance(fault, OSError) else type(fault)):
            save(2, keep=1)
    assert [p.name for p in list_checkpoints(run)] == ["step-00000001"]
    assert not hidden(run)
    assert load_model(str(run)).name == "nano-vit"
    save(2, keep=1)
    assert [p.name for p in list_checkpoints(run)] == ["step-00000002"]


@pytest.mark.parametrize("file", ["model/open_clip_model.safetensors", "trainer.pt"])
def test_no_space_within_a_file(save: Callable[..., Path], tmp_path: Path, file: str) -> None:
    """The kernel refuses to let a file grow, in the middle of the one or the other."""
    first = save(1)
    limit = (first / file).stat().st_size // 2
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(
            InputError, match=r"step-00000002: checkpoint cannot be written \(.+\); the last whole"
        ) as e:
            save(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert "\n" not in str(e.value) and "step-00000001" in str(e.value)
    assert list_checkpoints(tmp_path / "run") == [first] and not hidden(tmp_path / "run")


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A real file system of 6 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    if os.name != "posix" or mount is None or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=6m", "none", str(place)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_fills_up(save: Callable[..., Path], small_disk: Path) -> None:
    run = small_disk / "run"
    names = []

    def fill() -> None:
        for step in range(1, 9):
            names.append(save(step, run=run).name)  # noqa: PERF401 (what was written before it failed)

    with pytest.raises(InputError, match=r"checkpoint cannot be written \(No space left on device\); the last whole"):
        fill()
    assert names and [p.name for p in list_checkpoints(run)] == names and not hidden(run)
    assert read_checkpoint(run / "checkpoints" / names[-1]).progress.step == len(names)


@pytest.mark.parametrize("damaged", ["trainer.pt", "model/open_clip_model.safetensors"])
def test_auto_passes_over_a_checkpoint_cut_short(
    save: Callable[..., Path], tmp_path: Path, damaged: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    for step in (3, 6):
        path = save(step)
    file = path / damaged
    os.truncate(file, file.stat().st_size // 2)
    with caplog.at_level(logging.WARNING):
        found = find_checkpoint(run, "auto")
    assert found is not None and found.progress.step == 3
    assert damaged.rpartition("/")[2] in caplog.text and "trying the checkpoint before it" in caplog.text
    with pytest.raises(InputError, match=file.name):
        find_checkpoint(run, str(path))
    shutil.rmtree(run / "checkpoints" / "step-00000003")
    with pytest.raises(
        InputError, match=f"none of its 1 checkpoints can be used; the newest: .*{file.name}.*another --out"
    ):
        find_checkpoint(run, "auto")


def test_where_to_resume_from(save: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert find_checkpoint(run, "auto") is None
    save(1)
    save(2)
    assert find_checkpoint(run, "none") is None
    for choice, step in {"auto": 2, str(run): 2, str(run / "checkpoints" / "step-00000001"): 1}.items():
        found = find_checkpoint(run, choice)
        assert found is not None and found.progress.step == step
    with pytest.raises(InputError, match="no such folder; give none, auto, a checkpoint or a run"):
        find_checkpoint(run, str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="holds no whole checkpoint"):
        find_checkpoint(run, str(tmp_path))


def test_another_architecture_or_objective(save: Callable[..., Path]) -> None:
    found = read_checkpoint(save(1))
    wide, same = create_model("nano-wide", seed=0), create_model("nano-vit", seed=1)
    clip, cloob = make_objective("clip"), make_objective("cloob")
    with pytest.raises(InputError, match=r"holds another architecture \(.+ has \(.*16.*\), the configured .* \(.*24"):
        restore(found, encoder=wide, objective=clip, optimizer=make_optimizer(wide, clip, OptimConfig(), CPU))
    with pytest.raises(InputError, match="was trained with other parameters, or is damaged"):
        restore(found, encoder=same, objective=cloob, optimizer=make_optimizer(same, cloob, OptimConfig(), CPU))


def test_restore_takes_weights_and_keeps_the_configured_options(trained: Trained) -> None:
    found = read_checkpoint(trained.result.checkpoint)  # type: ignore[arg-type]
    encoder, objective = create_model("nano-dropout", seed=5), make_objective("cloob")
    optimizer = make_optimizer(encoder, objective, OptimConfig(weight_decay=0.7, beta2=0.5), CPU)
    restore(found, encoder=encoder, objective=objective, optimizer=optimizer)
    for name, value in found.encoder.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], value), name
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.7, 0.0]
    assert all(group["betas"] == (0.9, 0.5) for group in optimizer.param_groups)
    assert all(float(state["step"]) == 15 for state in optimizer.state.values())


@pytest.mark.parametrize("part", ["format", "progress", "optimizer", "objective"])
def test_a_state_that_no_run_writes_is_one_line(trained: Trained, tmp_path: Path, part: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run, run)
    file = list_checkpoints(run)[-1] / "trainer.pt"
    torch.save(torch.load(file, weights_only=True) | {part: {"x": torch.ones(2)}}, file)
    with pytest.raises(InputError) as caught:
        train(trained.config.override(out=run, resume=str(file.parent), epochs=4))
    assert str(caught.value).startswith(str(file.parent)) and "\n" not in str(caught.value)


def test_moments_of_other_shapes_are_refused(save: Callable[..., Path]) -> None:
    path = save(4)
    state = torch.load(path / "trainer.pt", weights_only=True)
    zero = torch.zeros(())
    state["optimizer"]["state"] = {0: {"step": zero, "exp_avg": torch.zeros(3, 3), "exp_avg_sq": torch.zeros(3, 3)}}
    torch.save(state, path / "trainer.pt")
    encoder, objective = create_model("nano-vit", seed=5), make_objective("clip")
    optimizer = make_optimizer(encoder, objective, OptimConfig(), CPU)
    with pytest.raises(InputError, match=r"is damaged \(moments"):
        restore(read_checkpoint(path), encoder=encoder, objective=objective, optimizer=optimizer)
