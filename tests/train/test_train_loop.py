from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from train_helpers import Recorder, Trained, exact, lines

from cloob.cli import main
from cloob.data.mix import MixedSource
from cloob.errors import InputError, TrainingFailed
from cloob.models.load import load_model
from cloob.models.runs import chosen_checkpoint, list_checkpoints
from cloob.train import loop
from cloob.train.callbacks import Callback, RunInfo
from cloob.train.config import TrainConfig
from cloob.train.config.model import AlignConfig
from cloob.train.loop import train
from cloob.train.validate import Validation

RUN_FOLDER = {"config.json", "metrics.jsonl", "epochs.jsonl", "skipped.jsonl", "checkpoints"}


class At(Callback):
    """Does something after a step."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self.step, self.action = step, action

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        if metrics["step"] == self.step:
            self.action()


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_model(str(checkpoint)).state_dict()


def same_weights(a: Path, b: Path) -> bool:
    here, there = weights(a), weights(b)
    return here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)


def test_the_run_folder(trained: Trained) -> None:
    assert {p.name for p in trained.run.iterdir()} == RUN_FOLDER
    # Every second step, never the last of an epoch twice, and the end.
    names = [p.name for p in list_checkpoints(trained.run)]
    assert names == [f"step-{n:08d}" for n in (2, 4, 6, 8, 10, 12, 14, 15)]
    result = trained.result
    assert (result.steps, result.epochs, result.stopped) == (15, 3, None)
    assert result.checkpoint == trained.run / "checkpoints" / "step-00000015" and result.seconds > 0


def test_the_log_lines(trained: Trained) -> None:
    found = lines(trained.run / "metrics.jsonl")
    assert [line["step"] for line in found] == list(range(1, 16))
    assert [line["epoch"] for line in found] == [1] * 5 + [2] * 5 + [3] * 5
    # 38 of the 40 pairs can be used, each once an epoch.
    assert [found[i]["samples_seen"] for i in (4, 9, 14)] == [38, 76, 114]
    assert [line["lr"] for line in found[:3]] == pytest.approx([1e-3, 2e-3, 3e-3])
    assert found[-1]["lr"] == pytest.approx(3e-3 * (1 + np.cos(np.pi * 11 / 12)) / 2)
    assert trained.result.loss == found[-1]["loss"] and trained.result.samples_seen == 114
    for line in found:
        assert line["grad_norm"] > 0 and line["inv_tau"] == pytest.approx(30) and line["beta"] == pytest.approx(8)
        assert line["images_per_second"] > 0 and 0 <= line["data_wait"] <= 1
        measured = {"saturation", "effective_eigenvalues_image", "effective_eigenvalues_text"} <= line.keys()
        assert measured == (line["step"] % 4 == 0)
    assert 0 < found[3]["saturation"] < 1 and 1 <= found[3]["effective_eigenvalues_image"] <= 8
    assert np.mean([line["loss"] for line in found[-3:]]) < np.mean([line["loss"] for line in found[:3]])


def test_the_epoch_lines(trained: Trained) -> None:
    found, steps = lines(trained.run / "epochs.jsonl"), lines(trained.run / "metrics.jsonl")
    assert [(line["epoch"], line["step"]) for line in found] == [(1, 5), (2, 10), (3, 15)]
    for line in found:
        assert line["skipped"] == {"corrupt image": 1, "empty caption": 1} and line["val_loss"] is None
        own = [step["loss"] for step in steps if step["epoch"] == line["epoch"]]
        assert line["loss"] == pytest.approx(np.mean(own))
    assert trained.result.skipped == {"corrupt image": 1, "empty caption": 1}


def test_callbacks_see_everything_in_order(trained: Trained) -> None:
    recorder = trained.recorder
    assert recorder.of("step") == lines(trained.run / "metrics.jsonl")
    assert recorder.of("epoch") == lines(trained.run / "epochs.jsonl")
    assert recorder.of("checkpoint") == list_checkpoints(trained.run)
    assert recorder.of("end") == [trained.result]
    info: RunInfo = recorder.of("start")[0]
    assert (info.total_steps, info.steps_per_epoch, info.start_step, info.rank) == (15, 5, 0, 0)
    kinds = [name for name, _ in recorder.events]
    assert kinds[:4] == ["start", "step", "step", "checkpoint"] and kinds[-3:] == ["epoch", "checkpoint", "end"]


def test_config_json_is_resolved_and_trains_the_same(trained: Trained, tmp_path: Path) -> None:
    config = TrainConfig.from_json(trained.run / "config.json")
    assert config.align == AlignConfig()  # where there are no heads, nothing is said of them
    assert config.loss.inv_tau == pytest.approx(30) and config.loss.beta == pytest.approx(8)
    assert config.loss.learnable_inv_tau is False and config.loss.scale == "paper"
    assert config.towers.model == "nano-dropout" and config.towers.image_size == 32
    other = train(config.override(out=tmp_path / "again", save_every=0, keep=1))
    assert exact(other.run) == exact(trained.run)
    assert same_weights(other.run, trained.run)


def test_checkpoints_load_in_open_clip_alone(trained: Trained) -> None:
    import open_clip

    model = open_clip.create_model(f"local-dir:{trained.result.checkpoint}/model")
    assert float(model.logit_scale.detach().exp()) == pytest.approx(30, rel=1e-5)


def cut_back(trained: Trained, out: Path, step: int) -> Path:
    """The run as it would be had it been killed between the checkpoint of ``step`` and the next."""
    shutil.copytree(trained.run, out)
    for path in list_checkpoints(out):
        if path.name > f"step-{step:08d}":
            shutil.rmtree(path)
    return out


@pytest.mark.parametrize(("step", "workers"), [(2, 0), (10, 0), (12, 1)])
def test_resume_is_exact(trained: Trained, tmp_path: Path, step: int, workers: int) -> None:
    """From the middle of an epoch, from its end, and with worker processes; the towers draw random numbers."""
    out = cut_back(trained, tmp_path / "run", step)
    recorder = Recorder()
    result = train(trained.config.override(out=out, resume="auto", workers=workers), callbacks=[recorder])
    assert recorder.of("start")[0].start_step == step and len(recorder.of("step")) == 15 - step
    assert exact(out) == exact(trained.run)
    assert same_weights(out, trained.run)
    here, there = lines(out / "epochs.jsonl"), lines(trained.run / "epochs.jsonl")
    for line in here + there:
        del line["seconds"]
    assert here == there
    assert result.seconds > 0 and result.samples_seen == 114


def test_resume_from_a_path_into_another_folder(trained: Trained, tmp_path: Path) -> None:
    start = trained.run / "checkpoints" / "step-00000012"
    result = train(trained.config.override(out=tmp_path / "new", resume=str(start)))
    assert exact(result.run) == exact(trained.run)[12:]
    with pytest.raises(InputError, match="holds step-00000015, which is newer than step-00000012"):
        train(trained.config.override(resume=str(start)))
    with pytest.raises(InputError, match="already holds a run"):
        train(trained.config.override(out=result.run, resume=str(start)))


def test_a_finished_run_is_left_as_it_is(trained: Trained, tmp_path: Path) -> None:
    out = cut_back(trained, tmp_path / "run", 15)
    result = train(trained.config.override(out=out, resume="auto"))
    assert result.already_finished and (result.run, result.steps, result.epochs) == (out, 15, 3)
    assert exact(out) == exact(trained.run) and result.loss is None


def test_a_finished_run_is_said_to_be_finished(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 0, one line, and not a byte or a time of its files is changed; another model is no such run."""
    out = cut_back(trained, tmp_path / "run", 15)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.rglob("*") if path.is_file()}
    command = ["train", "--config", str(trained.run / "config.json"), "--out", str(out), "--resume", "auto"]
    assert main(command) == 0
    assert capsys.readouterr().out == (
        f"{out}: already finished (3 epochs, 15 steps); more --epochs go on, another --out or --overwrite in place of "
        "--resume starts anew\n"
    )
    assert main([*command, "--model", "nano-wide"]) == 2
    assert "holds another architecture" in capsys.readouterr().err
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.rglob("*") if path.is_file()} == before


def test_more_epochs_continue_and_another_objective_does_not(
    trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = cut_back(trained, tmp_path / "run", 15)
    with pytest.raises(InputError, match=r"was trained with loss\.objective = 'cloob', not 'infoloob'; resume with"):
        train(trained.config.override(out=out, resume="auto", objective="infoloob"))
    with pytest.raises(InputError, match=r"trained with loss\.inv_tau = 30\.\d*, not 20"):
        train(trained.config.override(out=out, resume="auto", inv_tau=20))
    (out / "config.json").rename(out / "aside.json")  # then the checkpoint itself knows
    with pytest.raises(InputError, match=r"step-00000015: is of another objective \(inv_tau was 20 and is 30 now"):
        train(trained.config.override(out=out, resume="auto", inv_tau=20))
    (out / "aside.json").rename(out / "config.json")
    state = torch.load(list_checkpoints(out)[-1] / "trainer.pt", weights_only=True)
    assert sorted(state["objective"]) == ["fixed_beta", "fixed_inv_tau"]
    torch.save({**state, "objective": {}}, list_checkpoints(out)[-1] / "trainer.pt")  # as before they were
    with caplog.at_level(logging.WARNING):
        result = train(trained.config.override(out=out, resume="auto", epochs=4, lr=1e-4))
    assert result.steps == 20 and len(lines(out / "metrics.jsonl")) == 20
    assert "another run.epochs: 4 instead of 3" in caplog.text and "another optim.lr" in caplog.text
    with pytest.raises(InputError, match="another architecture"):
        train(trained.config.override(out=out, resume="auto", model="nano-wide"))


def test_an_earlier_run_is_not_overwritten_unasked(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="already holds a run; go on with --resume auto, or give --overwrite"):
        train(trained.config)
    out = cut_back(trained, tmp_path / "run", 15)
    (out / "nonfinite-step-3.json").write_text("{}")
    (out / "notes.txt").write_text("mine")
    result = train(trained.config.override(out=out, overwrite=True, epochs=1))
    assert result.steps == 5 and len(list_checkpoints(out)) == 3
    assert {p.name for p in out.iterdir()} == RUN_FOLDER | {"notes.txt"}


def test_what_torchrun_starts_again_does_not_overwrite_its_run(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = cut_back(trained, tmp_path / "run", 10)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(InputError, match=r"run: holds the run that torchrun has started again.*--resume auto"):
        train(trained.config.override(out=out, overwrite=True))
    assert list_checkpoints(out)[-1].name == "step-00000010"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert train(trained.config.override(out=out, overwrite=True, epochs=1)).steps == 5


def test_overwriting_takes_links_away_and_not_what_they_lead_to(trained: Trained, tmp_path: Path) -> None:
    out, disk = tmp_path / "run", tmp_path / "disk"
    for path in (out, disk):
        path.mkdir()
    (disk / "mine").write_text("mine")
    (out / "checkpoints").symlink_to(disk)
    result = train(trained.config.override(out=out, overwrite=True, epochs=1))
    assert not (out / "checkpoints").is_symlink() and len(list_checkpoints(result.run)) == 3
    assert (disk / "mine").read_text() == "mine"


def test_a_run_resumed_by_its_own_path_is_as_auto(
    trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its newest checkpoint is cut short: the one before it is taken, and the newest is set aside."""
    out = cut_back(trained, tmp_path / "run", 12)
    os.truncate(out / "checkpoints" / "step-00000012" / "trainer.pt", 1000)
    with caplog.at_level(logging.WARNING):
        train(trained.config.override(out=out, resume=str(out / "checkpoints" / "..")))
    assert "trying the checkpoint before it" in caplog.text
    assert exact(out) == exact(trained.run) and same_weights(out, trained.run)
    assert (out / "checkpoints" / "unreadable-step-00000012").is_dir()


def test_sigterm_checkpoints_and_ends(trained: Trained, tmp_path: Path) -> None:
    config = trained.config.override(out=tmp_path / "run", save_every=100)
    before = signal.getsignal(signal.SIGTERM)
    result = train(config, callbacks=[At(7, lambda: os.kill(os.getpid(), signal.SIGTERM))])
    assert result.stopped == "SIGTERM" and result.steps == 7
    assert signal.getsignal(signal.SIGTERM) is before
    assert [p.name for p in list_checkpoints(result.run)] == ["step-00000007"]
    assert train(config.override(resume="auto")).stopped is None
    assert exact(result.run) == exact(trained.run)


def test_ctrl_c_leaves_the_last_checkpoint(trained: Trained, tmp_path: Path) -> None:
    config = trained.config.override(out=tmp_path / "run")
    recorder = Recorder()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            train(config, callbacks=[recorder, At(7, lambda: signal.raise_signal(signal.SIGINT))])
    finally:
        signal.signal(signal.SIGINT, before)
    assert recorder.of("end") == [None]
    assert load_model(str(tmp_path / "run")).name == "nano-dropout"
    train(config.override(resume="auto"))
    assert exact(tmp_path / "run") == exact(trained.run)


class Evaluates(Callback):
    """Puts the towers into eval mode, and all of them back into training mode if so wanted."""

    def __init__(self, *, back: bool) -> None:
        self.back = back
        self.modes: list[list[bool]] = []

    def on_start(self, info: RunInfo) -> None:
        self.encoder = info.encoder

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        self.modes.append([module.training for module in self.encoder.modules()])
        self.encoder.eval()
        if self.back:
            self.encoder.train()


@pytest.mark.parametrize("back", [False, True])
def test_the_loop_switches_the_towers_back(trained: Trained, tmp_path: Path, back: bool) -> None:
    """Also where a frozen tower was in eval mode before, and a callback puts all of it into training mode."""
    for frozen in ("none", "image"):
        config = trained.config.override(out=tmp_path / frozen, epochs=1, freeze=frozen, model="nano-resnet")
        callback = Evaluates(back=back)
        result = train(config, callbacks=[callback])
        assert all(modes == callback.modes[0] for modes in callback.modes) and len(callback.modes) == 5
        assert callback.encoder.model.visual.bn1.training == (frozen == "none")
        alone = train(config.override(out=tmp_path / f"{frozen}-alone"))
        assert exact(result.run) == exact(alone.run) and same_weights(result.run, alone.run)


class Poison(Callback):
    """Makes a weight NaN after one step and gives it back after another."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last

    def on_start(self, info: RunInfo) -> None:
        self.weight = info.encoder.model.token_embedding.weight

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        with torch.no_grad():
            if metrics["step"] == self.first:
                self.kept = self.weight.clone()
                self.weight.fill_(float("nan"))
            elif metrics["step"] == self.last:
                self.weight.copy_(self.kept)


def test_nonfinite_steps_are_skipped_and_written_down(trained: Trained, tmp_path: Path) -> None:
    recorder = Recorder()
    result = train(trained.config.override(out=tmp_path / "run", epochs=2), callbacks=[recorder, Poison(3, 5)])
    found = lines(result.run / "metrics.jsonl")
    assert [line["step"] for line in found if line.get("skipped") == "not finite"] == [4, 5]
    assert all((line["loss"] is None) == (line["step"] in (4, 5)) for line in found)
    assert exact(result.run)[:3] == exact(trained.run)[:3]
    report = json.loads((result.run / "nonfinite-step-4.json").read_text())
    assert report["step"] == 4 and report["epoch"] == 1 and report["loss"] == "nan" and len(report["keys"]) >= 6
    # The two files of the run name the rows of two batches: none of them the same.
    other = json.loads((result.run / "nonfinite-step-5.json").read_text())
    assert not set(report["keys"]) & set(other["keys"])
    assert found[-1]["samples_seen"] == 76 - len(report["keys"]) - len(other["keys"])
    assert lines(result.run / "epochs.jsonl")[0]["loss"] == pytest.approx(np.mean([x["loss"] for x in found[:3]]))


def test_weights_after_a_step_that_was_not_finite_cannot_be_the_best(
    trained: Trained, pairs_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not saved; so the next epoch's, better than all saved ones, are the best and are kept."""
    losses = iter((3.0, 1.0, 2.0, 2.5))
    monkeypatch.setattr(loop, "validate", lambda *_, **__: Validation(next(losses), 0.5, 38))
    config = trained.config.override(out=tmp_path / "run", val_data=[str(pairs_folder)], epochs=4)
    train(config.override(save_every=100, keep=1), callbacks=[Poison(9, 10)])
    assert [int(path.name[5:]) for path in list_checkpoints(tmp_path / "run")] == [15, 20]
    assert chosen_checkpoint(tmp_path / "run", "best").name == "step-00000015"


def test_sigterm_while_it_validates(trained: Trained, pairs_folder: Path, tmp_path: Path) -> None:
    """The epoch's checkpoint is written; what goes on from it validates first, and ends like a run without a stop."""
    from cloob.train.towers import build

    class Ends:
        """Held-out pairs; SIGTERM comes with the second batch of the second epoch."""

        def __init__(self, loader: Any) -> None:
            self.loader, self.count = loader, 0

        def epoch(self, epoch: int) -> Any:
            for batch in self.loader.epoch(epoch):
                self.count += 1
                if self.count == 7:
                    signal.raise_signal(signal.SIGTERM)
                yield batch

        def close(self) -> None:
            self.loader.close()

    config = trained.config.override(val_data=[str(pairs_folder)], save_every=0, keep=0, out=tmp_path / "whole")
    config = config.override(retrieval_from=0.9, best="val_recall")  # it validates with the loss of its last step
    train(config)
    stopped = config.override(out=tmp_path / "stopped")
    made = build.make_val_loader
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "make_val_loader", lambda *arguments: Ends(made(*arguments)))
        result = train(stopped)
    assert result.stopped == "SIGTERM" and result.checkpoint is not None
    assert (result.checkpoint.name, len(lines(result.run / "epochs.jsonl"))) == ("step-00000010", 1)
    train(stopped.override(resume="auto"))
    assert exact(stopped.save.out) == exact(config.save.out)
    judged, others = (lines(run / "epochs.jsonl") for run in (stopped.save.out, config.save.out))
    assert [line["val_loss"] for line in judged] == [line["val_loss"] for line in others]
    for run in (stopped.save.out, config.save.out):
        assert (chosen_checkpoint(run, "best").name, [p.name for p in list_checkpoints(run)]) == (
            chosen_checkpoint(config.save.out, "best").name,
            [f"step-{step:08d}" for step in (5, 10, 15)],
        )
        assert all((path / "validation.json").is_file() for path in list_checkpoints(run))
    told = [[line["val_loss"] for line in lines(c.save.out / "epochs.jsonl")] for c in (stopped, config)]
    assert told[0] == told[1] and len(told[0]) == 3


def test_data_that_changed_between_two_runs_begin_the_epoch_anew(
    trained: Trained, pairs_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [f"{c}{t}" for c in (0, 2, 3) for t in range(8) if (pairs_folder / f"{c}{t}.png").is_file()]
    names = [name for name in names if name != "27"]

    def table(count: int) -> None:
        rows = [f"{pairs_folder}/{name}.png,{name}" for name in names[:count]]
        (tmp_path / "t.csv").write_text("\n".join(["filepath,title", *rows]) + "\n")

    table(16)
    config = trained.config.override(data=[str(tmp_path / "t.csv")], batch_size=4, epochs=1, out=tmp_path / "run")
    stop = At(3, lambda: signal.raise_signal(signal.SIGTERM))
    assert train(config, callbacks=[stop]).steps == 3
    table(12)
    assert train(config.override(resume="auto", accept_changed_data=True)).steps == 3 + 3
    assert "resumed with 12 pairs an epoch instead of 16: the epoch begins anew" in caplog.text


def test_an_unreadable_newest_checkpoint_does_not_push_out_good_ones(trained: Trained, tmp_path: Path) -> None:
    config = trained.config.override(out=tmp_path / "run", save_every=1, keep=1)
    train(config, callbacks=[At(4, lambda: signal.raise_signal(signal.SIGTERM))])
    shutil.copytree(tmp_path / "run" / "checkpoints" / "step-00000004", tmp_path / "four")
    train(config.override(resume="auto"), callbacks=[At(8, lambda: signal.raise_signal(signal.SIGTERM))])
    (newest,) = list_checkpoints(tmp_path / "run")
    (newest / "trainer.pt").write_bytes((newest / "trainer.pt").read_bytes()[:1000])
    (tmp_path / "four").rename(newest.with_name("step-00000004"))
    written: list[Path] = []

    class Kept(Callback):
        """Whether what was just written is there."""

        def on_checkpoint(self, path: Path) -> None:
            written.append(path)
            assert path.is_dir()

    train(config.override(resume="auto"), callbacks=[Kept(), At(6, lambda: signal.raise_signal(signal.SIGTERM))])
    assert [path.name for path in written] == ["step-00000005", "step-00000006"]
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000006"]
    assert (newest.with_name(f"unreadable-{newest.name}") / "model").is_dir()


def test_a_run_whose_last_step_is_not_finite_says_what_is_kept(
    trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = trained.config.override(out=tmp_path / "run", epochs=1, save_every=2)
    result = train(config, callbacks=[Poison(4, 100)])
    assert result.checkpoint == tmp_path / "run" / "checkpoints" / "step-00000004"
    said = f"the last step was not finite, after which nothing is saved: the newest checkpoint is {result.checkpoint}"
    assert caplog.messages[-1] == said
    config = config.override(out=tmp_path / "other", save_every=0)
    assert train(config, callbacks=[Poison(3, 100)]).checkpoint is None
    assert "the last 2 steps were not finite" in caplog.messages[-1] and "no checkpoint" in caplog.messages[-1]


def test_too_many_nonfinite_steps_end_the_run(trained: Trained, tmp_path: Path) -> None:
    config = trained.config.override(out=tmp_path / "run", max_nonfinite=3, keep=1)
    with pytest.raises(
        TrainingFailed, match=r"step 6: loss or gradient not finite for 3 steps in a row \(samples "
    ) as e:
        train(config, callbacks=[Poison(3, 100)])
    assert "\n" not in str(e.value) and "nonfinite-step-6.json" in str(e.value) and "step-00000002" in str(e.value)
    # What may be damaged is not saved: with keep=1 it would have replaced the good one.
    (kept,) = list_checkpoints(tmp_path / "run")
    assert kept.name == "step-00000002"
    assert torch.isfinite(weights(kept)["model.token_embedding.weight"]).all()


def test_bad_samples_stop_the_run_at_the_end_of_a_small_epoch(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"2 of 40 samples cannot be used, more than max_bad_fraction = 0\.04") as e:
        train(trained.config.override(out=tmp_path / "run", max_bad_fraction=0.04))
    assert "1 corrupt image (e.g. " in str(e.value) and "13" in str(e.value) and "\n" not in str(e.value)
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 5
    train(trained.config.override(out=tmp_path / "run2", max_bad_fraction=0.05, epochs=1))  # 2/40 is not more


def test_many_bad_samples_stop_the_run_at_once(trained: Trained, pairs_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    shutil.copytree(pairs_folder, folder)
    for path in sorted(folder.glob("*.png"))[:30]:
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"(2\d) of (2\d|3\d) samples cannot be used"):
        train(trained.config.override(data=[str(folder)], out=tmp_path / "run"))
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) < 5


def test_batches_without_two_samples_are_left_out(trained: Trained, pairs_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    shutil.copytree(pairs_folder, folder)
    for path in sorted(folder.glob("*.png"))[:30]:
        path.write_bytes(b"")
    config = trained.config.override(data=[str(folder)], out=tmp_path / "run", max_bad_fraction=1.0, batch_size=2)
    result = train(config.override(epochs=1, save_every=0))
    found = lines(result.run / "metrics.jsonl")
    left_out = [line for line in found if line.get("skipped") == "too few usable samples"]
    assert len(found) == 20 and left_out and all(line["loss"] is None for line in left_out)
    assert found[-1]["samples_seen"] == 2 * (20 - len(left_out))


def test_validation_init_and_several_sources(trained: Trained, pairs_folder: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held-out"
    held_out.mkdir()
    for n in range(5):
        Image.new("RGB", (32, 32), (50 * n, 100, 200)).save(held_out / f"{n}.png")
        (held_out / f"{n}.txt").write_text(f"shade {n}")
    config = trained.config.override(
        data=[str(pairs_folder), str(held_out)],
        val_data=[str(held_out)],
        init=str(trained.run),
        model=None,
        objective="clip",
        lr=1e-9,
        epochs=1,
        out=tmp_path / "run",
        tensorboard=True,
    )
    result = train(config)
    assert result.steps == 5 and lines(result.run / "metrics.jsonl")[-1]["samples_seen"] in (37, 38, 39, 40)
    assert (result.run / "tensorboard").is_dir()
    # The validation loss is the objective of all held-out pairs, by the towers in eval mode.
    encoder = load_model(str(trained.run))
    with torch.no_grad():
        images = encoder.encode_image(sorted(held_out.glob("*.png")))
        logits = images @ encoder.encode_text([f"shade {n}" for n in range(5)]).T / 0.07
    both = [torch.nn.functional.cross_entropy(table, torch.arange(5)) for table in (logits, logits.T)]
    assert lines(result.run / "epochs.jsonl")[0]["val_loss"] == pytest.approx(float(sum(both)) / 2, rel=1e-4)
    with pytest.raises(InputError, match=r"model is 'nano-vit', but init .* holds 'nano-dropout'"):
        train(config.override(model="nano-vit", out=tmp_path / "x"))
    with pytest.raises(InputError, match=r"image_size is 64, but init .* holds a model for 32 pixels"):
        train(config.override(image_size=64, out=tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_joined_sources_read_as_one(pairs_folder: Path) -> None:
    from cloob.data.open import open_source

    one = open_source(str(pairs_folder))
    both = MixedSource((one, one))
    assert len(both) == 2 * len(one) and sum(both.shard_sizes) == len(both)
    assert [both.read(i).key for i in (0, 39, 40, 79)] == [one.read(i).key for i in (0, 39, 0, 39)]


def test_loaders_callbacks_and_validation_do_not_move_the_training(
    trained: Trained, pairs_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cloob.data.loader import PairLoader

    def drawing(self: PairLoader, *arguments: Any, **more: Any) -> Any:
        torch.rand(3)
        for batch in epoch(self, *arguments, **more):
            np.random.rand(), torch.rand(1)  # noqa: NPY002
            yield batch

    epoch = PairLoader.epoch
    monkeypatch.setattr(PairLoader, "epoch", drawing)
    config = trained.config.override(out=tmp_path / "run", val_data=[str(pairs_folder)], keep=1)
    result = train(config, callbacks=[At(3, lambda: torch.rand(7))])
    assert exact(result.run) == exact(trained.run)
    assert all(line["val_loss"] is not None for line in lines(result.run / "epochs.jsonl"))


def test_retrieval_joins_where_it_is_told_to(base: TrainConfig, trained: Trained, tmp_path: Path) -> None:
    """Before, the losses are those of InfoLOOB bit for bit; from there on CLOOB's; a run that goes on is the same."""
    warm = base.override(retrieval_from=0.5, out=tmp_path / "warm", keep=0)
    plain = base.override(objective="infoloob", out=tmp_path / "plain")
    for config in (warm, plain):
        train(config)
    found, other = (lines(tmp_path / name / "metrics.jsonl") for name in ("warm", "plain"))
    assert [line["beta"] for line in found] == [None] * 8 + [8.0] * 7  # 15 steps: half of the run is over after 7.5
    assert [line["loss"] for line in found[:8]] == [line["loss"] for line in other[:8]]
    assert all(a["loss"] != b["loss"] for a, b in zip(found[8:], other[8:], strict=True))
    assert found[0]["loss"] != lines(trained.run / "metrics.jsonl")[0]["loss"]
    saved = [
        json.loads((c / "model" / "objective.json").read_text())["hopfield"]
        for c in list_checkpoints(tmp_path / "warm")
    ]
    assert saved == [False] * 4 + [True] * 4  # after 2, 4, 6, 8 and 10, 12, 14, 15 steps
    for step in (6, 10):
        again = tmp_path / f"again-{step}"
        shutil.copytree(tmp_path / "warm", again)
        for checkpoint in list_checkpoints(again):
            if int(checkpoint.name.removeprefix("step-")) > step:
                shutil.rmtree(checkpoint)
        train(warm.override(out=again, resume="auto"))
        assert [line["loss"] for line in lines(again / "metrics.jsonl")] == [line["loss"] for line in found]
