"""A whole run: its folder, log, callbacks, faults, and what goes on in the folder."""

import shutil

import numpy as np
import open_clip
import pytest
import torch
from train_helpers import Poison, equal, exact

from cloob.errors import InputError, TrainingFailed
from cloob.models.load import load_model
from cloob.models.runs import latest_checkpoint, list_checkpoints
from cloob.training.callbacks import Callback
from cloob.training.config import TrainConfig
from cloob.training.loop import train
from support import raises, read_json, read_lines, run_cloob

RUN_FOLDER = {
    "config.json",
    "metrics.jsonl",
    "epochs.jsonl",
    "skipped.jsonl",
    "checkpoints",
}


def weights(checkpoint):
    return load_model(str(checkpoint)).state_dict()


def column(run, key, log="metrics"):
    return [line.get(key) for line in read_lines(run / f"{log}.jsonl")]


@pytest.fixture
def config(trained, tmp_path):
    """Of the shared run, in a folder of its own."""
    return trained.config.override(out=tmp_path / "run")


@pytest.fixture
def copied(trained, config):
    """A copy of the shared run with its last checkpoint alone."""
    shutil.copytree(trained.run, config.out)
    for path in list_checkpoints(config.out)[:-1]:
        shutil.rmtree(path)
    return config.out


def test_the_run_folder_and_what_callbacks_see(trained):
    assert {p.name for p in trained.run.iterdir()} == RUN_FOLDER
    # Every second step, never the last of an epoch twice, and the end.
    saved = list_checkpoints(trained.run)
    steps = (2, 4, 6, 8, 10, 12, 14, 15)
    expected = [f"step-{n:08d}" for n in steps]
    assert [path.name for path in saved] == expected
    result = trained.result
    recorder = trained.recorder
    assert result.steps == 15
    assert result.epochs == 3
    assert result.stopped is None
    assert result.checkpoint == saved[-1]
    assert result.seconds > 0
    assert recorder.of("step") == read_lines(trained.run / "metrics.jsonl")
    assert recorder.of("epoch") == read_lines(trained.run / "epochs.jsonl")
    assert recorder.of("checkpoint") == saved
    assert recorder.of("end") == [result]
    (info,) = recorder.of("start")
    assert info.total_steps == 15
    assert info.steps_per_epoch == 5
    assert info.start_step == 0
    kinds = [name for name, _ in recorder.events]
    assert kinds[:4] == ["start", "step", "step", "checkpoint"]
    assert kinds[-3:] == ["epoch", "checkpoint", "end"]


def test_the_log_lines(trained):
    found = read_lines(trained.run / "metrics.jsonl")
    assert [line["step"] for line in found] == list(range(1, 16))
    expected = [1] * 5 + [2] * 5 + [3] * 5
    assert [line["epoch"] for line in found] == expected
    # 38 of the 40 pairs can be used, each once an epoch.
    assert [found[i]["samples_seen"] for i in (4, 9, 14)] == [38, 76, 114]
    rates = [line["lr"] for line in found]
    assert rates[:3] == pytest.approx([1e-3, 2e-3, 3e-3])
    wanted = 3e-3 * (1 + np.cos(np.pi * 11 / 12)) / 2
    assert rates[-1] == pytest.approx(wanted)
    assert trained.result.loss == found[-1]["loss"]
    for line in found:
        assert line["inv_tau"] == pytest.approx(30)
        assert line["beta"] == pytest.approx(8)
        assert line["grad_norm"] > 0
        assert line["images_per_second"] > 0
        assert 0 <= line["data_wait"] <= 1
    losses = [line["loss"] for line in found]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


def test_config_json_is_resolved_and_trains_the_same(trained, tmp_path):
    config = TrainConfig().merge_file(trained.run / "config.json")
    assert config.inv_tau == pytest.approx(30)
    assert config.beta == pytest.approx(8)
    assert config.learnable_inv_tau is False
    assert config.scale == "paper"
    assert config.model == "nano-dropout"
    assert config.image_size == 32
    other = train(config.override(out=tmp_path / "again", save_every=0, keep=1))
    assert exact(other.run) == exact(trained.run)
    assert equal(weights(other.run), weights(trained.run))


def files_of(out):
    files = [path for path in out.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_a_finished_run_is_said_to_be_finished(trained, copied, capsys):
    """Exit code 0, one line, and not a byte or a time of its files is changed; another
    model is no such run.
    """
    before = files_of(copied)
    command = f"train --config {trained.run}/config.json --out {copied} --resume auto"
    run_cloob(command)
    said = capsys.readouterr().out
    assert said.startswith(f"{copied}: already finished (3 epochs, 15 steps)")
    run_cloob(f"{command} --model nano-wide", code=2)
    other = "was trained with model = 'nano-dropout', not 'nano-wide'"
    assert other in capsys.readouterr().err
    assert files_of(copied) == before


def test_more_epochs_continue_and_another_objective_does_not(config, copied, caplog):
    config = config.override(resume="auto")
    other = config.override(objective="infoloob")
    hotter = config.override(inv_tau=20)
    match = r"was trained with objective = 'cloob', not 'infoloob'; resume with"
    raises(InputError, match, train, other)
    raises(InputError, r"trained with inv_tau = 30\.\d*, not 20", train, hotter)
    (copied / "config.json").rename(copied / "aside.json")  # then the checkpoint knows
    match = r"step-00000015: was trained with other.*inv_tau was 20 and is 30"
    raises(InputError, match, train, hotter)
    (copied / "aside.json").rename(copied / "config.json")
    assert train(config.override(epochs=4, lr=1e-4)).steps == 20
    changes = "resumed with lr 0.0001 instead of 0.003, epochs 4 instead of 3"
    assert caplog.messages.count(changes) == 1
    assert column(copied, "step") == list(range(1, 21))


def test_an_earlier_run_is_not_overwritten_unasked(config, copied, monkeypatch):
    match = "already holds a run; go on with --resume auto, or give --overwrite"
    raises(InputError, match, train, config)
    (copied / "notes.txt").write_text("mine")
    config = config.override(overwrite=True, epochs=1)
    # torchrun starts a run again whose rank died: its checkpoints stay
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    match = r"run: holds the run that torchrun has started again.*--resume auto"
    raises(InputError, match, train, config)
    assert list_checkpoints(copied)[-1].name == "step-00000015"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert train(config).steps == 5
    assert len(list_checkpoints(copied)) == 3
    assert {p.name for p in copied.iterdir()} == RUN_FOLDER | {"notes.txt"}


class Evaluates(Callback):
    """Puts all of the towers into training mode."""

    def on_start(self, info):
        self.encoder = info.encoder
        self.modes = []

    def on_step(self, metrics):
        self.modes.append([module.training for module in self.encoder.modules()])
        self.encoder.train()


def test_the_loop_switches_the_towers_back(config, tmp_path):
    """Also where a frozen tower was in eval mode before, and a callback puts all of it
    into training mode.
    """
    config = config.override(epochs=1, freeze="image", model="nano-resnet")
    callback = Evaluates()
    result = train(config, callbacks=[callback])
    assert callback.modes == 5 * callback.modes[:1]
    assert not callback.encoder.model.visual.bn1.training
    alone = train(config.override(out=tmp_path / "alone"))
    assert exact(result.run) == exact(alone.run)
    assert equal(weights(result.run), weights(alone.run))


def test_nonfinite_steps_are_skipped_and_written_down(trained, config):
    run = train(config.override(epochs=2), callbacks=[Poison(3, 5)]).run
    found = read_lines(run / "metrics.jsonl")
    skipped = [line["step"] for line in found if line.get("skipped") == "not finite"]
    assert skipped == [4, 5]
    assert all((line["loss"] is None) == (line["step"] in skipped) for line in found)
    assert exact(run)[:3] == exact(trained.run)[:3]
    log = read_lines(run / "skipped.jsonl")
    named = [line for line in log if line["reason"] == "not finite"]
    assert named[0]["epoch"] == 1
    assert named[0]["detail"].startswith("loss nan")
    assert {line["step"] for line in named} == {4, 5}
    # they are the rows of two batches: none of them the same
    assert len({line["key"] for line in named}) == len(named) >= 12
    assert found[-1]["samples_seen"] == 76 - len(named)
    mean = np.mean([line["loss"] for line in found[:3]])
    assert column(run, "loss", "epochs")[0] == pytest.approx(mean)


def test_too_many_nonfinite_steps_end_the_run(config):
    config = config.override(keep=1)
    error = (
        r"step 13: loss or gradient not finite for 10 steps in a row \(samples"
        r" .*skipped.jsonl.*step-00000002"
    )
    raises(TrainingFailed, error, train, config, callbacks=[Poison(3, 100)])
    # What may be damaged is not saved: with keep=1 it would have replaced the good one.
    (kept,) = list_checkpoints(config.out)
    assert kept.name == "step-00000002"
    assert torch.isfinite(weights(kept)["model.token_embedding.weight"]).all()


def test_bad_samples_stop_the_run_at_the_end_of_a_small_epoch(config, tmp_path):
    error = (
        r"2 of 40 samples cannot be used, more than max_bad_fraction = 0\.04.*1 corrupt"
        r" image \(e\.g\. .*13"
    )
    raises(InputError, error, train, config.override(max_bad_fraction=0.04))
    assert len(read_lines(config.out / "metrics.jsonl")) == 5
    # 2/40 is not more
    config = config.override(max_bad_fraction=0.05, out=tmp_path / "allowed")
    train(config.override(epochs=1))


def test_retrieval_joins_where_it_is_told_to(base, trained, tmp_path):
    """Before, the losses are those of InfoLOOB bit for bit; from there on CLOOB's."""
    warm = base.override(retrieval_from=0.5, out=tmp_path / "warm", keep=0)
    plain = base.override(objective="infoloob", out=tmp_path / "plain")
    train(warm)
    train(plain)
    # 15 steps: half of the run is over after 7.5
    expected = [None] * 8 + [8.0] * 7
    assert column(warm.out, "beta") == expected
    found = column(warm.out, "loss")
    other = column(plain.out, "loss")
    assert [a == b for a, b in zip(found, other, strict=True)] == [True] * 8 + [
        False
    ] * 7
    assert found[0] != column(trained.run, "loss")[0]
    saved = [
        read_json(path / "model" / "objective.json")["hopfield"]
        for path in list_checkpoints(warm.out)
    ]
    # after 2, 4, 6, 8 and 10, 12, 14, 15 steps
    assert saved == [False] * 4 + [True] * 4


def test_siglip_s_bias_goes_into_log_folder_and_another_run(base, tmp_path):
    run = train(base.override(objective="siglip", out=tmp_path / "run", epochs=1)).run
    found = read_lines(run / "metrics.jsonl")
    for line in found:
        assert line["beta"] is None
    config = TrainConfig().merge_file(run / "config.json")
    assert config.bias == -10.0
    assert config.inv_tau == 10.0
    assert config.scale == "unit"
    trained = load_model(run).make_objective()
    bias = found[-1]["bias"]
    assert trained.name == "siglip"
    assert bias != -10.0
    assert trained.bias.item() == pytest.approx(bias, rel=1e-6)
    theirs = open_clip.create_model(f"local-dir:{latest_checkpoint(run) / 'model'}")
    assert theirs.logit_bias.item() == pytest.approx(bias, rel=1e-6)
    inv_tau = found[-1]["inv_tau"]
    assert theirs.logit_scale.exp().item() == pytest.approx(inv_tau, rel=1e-6)

    clip = base.override(objective="clip", model=None, init=str(run), steps=1)
    left = train(clip.override(out=tmp_path / "clip")).checkpoint
    model = open_clip.create_model(f"local-dir:{left}/model")
    assert model.logit_bias is None  # in a softmax it cancels


def test_a_longer_run_goes_on_with_the_next_epoch(config, pairs_folder, tmp_path):
    """Each length ends with a validation, and is then finished."""
    judged = config.override(val_data=[str(pairs_folder)], save_every=0, resume="auto")
    for value in (3, 7):
        result = train(judged.override(steps=value))
        assert not result.already_finished
        assert (list_checkpoints(result.run)[-1] / "validation.json").is_file()
        again = train(judged.override(steps=value))
        assert again.already_finished
        assert not again.out_of_patience
        assert again.steps == result.steps
    assert column(result.run, "step", "epochs") == [3, 7]
    assert None not in column(result.run, "val_loss", "epochs")
    whole = train(config.override(steps=7, out=tmp_path / "whole"))
    expected = column(whole.run, "lr")[3:]
    assert column(result.run, "lr")[3:] == expected


def test_patience_counts_the_looks_at_the_held_out_pairs(
    base, pairs_folder, tmp_path, capsys
):
    """With a learning rate of nearly nothing no look after the first finds a better
    recall.
    """
    run = tmp_path / "run"
    config = base.override(val_data=[str(pairs_folder)], best="val_recall", lr=1e-12)
    config = config.override(warmup=0, save_every=0, epochs=9, patience=2, out=run)
    (tmp_path / "start.json").write_text(config.to_json())

    def said(file, words=""):
        run_cloob(f"train --config {file} {words}")
        return capsys.readouterr().out.splitlines()

    summary, stopped, best, *_ = said(tmp_path / "start.json")
    assert summary.startswith(f"{run}: 15 steps, ")
    assert stopped == "stopped at epoch 3: no better for 2 epochs"
    recall = column(run, "val_recall", "epochs")[0]
    assert best == f"{run}:best: val_recall {recall:.4g} (step-00000005)"
    again = run / "config.json"
    (finished, *_) = said(again, "--resume auto --epochs 12")
    finished_for = "already finished (3 epochs, 15 steps); the patience was used up"
    assert finished.startswith(f"{run}: {finished_for}")
    said(again, "--resume auto --epochs 4 --patience 0")
    assert column(run, "epoch", "epochs") == [1, 2, 3, 4]


def test_a_long_warmup_is_named(config, caplog):
    train(config.override(steps=2, warmup=9, save_every=0))
    warning = (
        "a warm-up of 9 steps is longer than this run of 2: its learning rate ends at"
        " 0.00067, not 0.003"
    )
    assert caplog.messages.count(warning) == 1
