import json
import logging
import shutil

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from train_helpers import Poison, equal, exact, lines

from cloob.cli import main
from cloob.errors import InputError, TrainingFailed
from cloob.models.load import load_model
from cloob.models.runs import latest_checkpoint, list_checkpoints
from cloob.training.callbacks import Callback
from cloob.training.config import TrainConfig
from cloob.training.loop import train
from support import raises

RUN_FOLDER = {
    "config.json",
    "metrics.jsonl",
    "epochs.jsonl",
    "skipped.jsonl",
    "checkpoints",
}


def weights(checkpoint):
    return load_model(str(checkpoint)).state_dict()


def test_the_run_folder_and_what_callbacks_see(trained):
    assert {p.name for p in trained.run.iterdir()} == RUN_FOLDER
    # Every second step, never the last of an epoch twice, and the end.
    saved = list_checkpoints(trained.run)
    steps = (2, 4, 6, 8, 10, 12, 14, 15)
    assert [path.name for path in saved] == [f"step-{n:08d}" for n in steps]
    result, recorder = trained.result, trained.recorder
    assert (result.steps, result.epochs, result.stopped) == (15, 3, None)
    assert result.checkpoint == saved[-1] and result.seconds > 0
    assert recorder.of("step") == lines(trained.run / "metrics.jsonl")
    assert recorder.of("epoch") == lines(trained.run / "epochs.jsonl")
    assert recorder.of("checkpoint") == saved and recorder.of("end") == [result]
    (info,) = recorder.of("start")
    assert (info.total_steps, info.steps_per_epoch, info.start_step) == (15, 5, 0)
    kinds = [name for name, _ in recorder.events]
    assert kinds[:4] == ["start", "step", "step", "checkpoint"]
    assert kinds[-3:] == ["epoch", "checkpoint", "end"]


def test_the_log_lines(trained):
    found = lines(trained.run / "metrics.jsonl")
    assert [line["step"] for line in found] == list(range(1, 16))
    assert [line["epoch"] for line in found] == [1] * 5 + [2] * 5 + [3] * 5
    # 38 of the 40 pairs can be used, each once an epoch.
    assert [found[i]["samples_seen"] for i in (4, 9, 14)] == [38, 76, 114]
    assert [line["lr"] for line in found[:3]] == pytest.approx([1e-3, 2e-3, 3e-3])
    assert found[-1]["lr"] == pytest.approx(3e-3 * (1 + np.cos(np.pi * 11 / 12)) / 2)
    assert trained.result.loss == found[-1]["loss"]
    for line in found:
        assert line["inv_tau"] == pytest.approx(30) and line["beta"] == pytest.approx(8)
        assert line["grad_norm"] > 0 and line["images_per_second"] > 0
        assert 0 <= line["data_wait"] <= 1
    losses = [line["loss"] for line in found]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


def test_config_json_is_resolved_and_trains_the_same(trained, tmp_path):
    config = TrainConfig().merge_file(trained.run / "config.json")
    assert (config.inv_tau, config.beta) == (pytest.approx(30), pytest.approx(8))
    assert (config.learnable_inv_tau, config.scale) == (False, "paper")
    assert (config.model, config.image_size) == ("nano-dropout", 32)
    other = train(config.override(out=tmp_path / "again", save_every=0, keep=1))
    assert exact(other.run) == exact(trained.run)
    assert equal(weights(other.run), weights(trained.run))


def cut_back(trained, out, step):
    """The run as it would be had it been killed between the checkpoint of ``step`` and
    the next.
    """
    shutil.copytree(trained.run, out)
    for path in list_checkpoints(out):
        if path.name > f"step-{step:08d}":
            shutil.rmtree(path)
    return out


def test_a_finished_run_is_said_to_be_finished(trained, tmp_path, capsys):
    """Exit code 0, one line, and not a byte or a time of its files is changed; another
    model is no such run.
    """
    out = cut_back(trained, tmp_path / "run", 15)
    before = {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in out.rglob("*")
        if path.is_file()
    }
    command = [
        "train",
        "--config",
        str(trained.run / "config.json"),
        "--out",
        str(out),
        "--resume",
        "auto",
    ]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith(
        f"{out}: already finished (3 epochs, 15 steps)"
    )
    assert main([*command, "--model", "nano-wide"]) == 2
    assert (
        "was trained with model = 'nano-dropout', not 'nano-wide'"
        in capsys.readouterr().err
    )
    assert {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in out.rglob("*")
        if path.is_file()
    } == before


def test_more_epochs_continue_and_another_objective_does_not(trained, tmp_path, caplog):
    out = cut_back(trained, tmp_path / "run", 15)
    config = trained.config.override(out=out, resume="auto")
    other, hotter = config.override(objective="infoloob"), config.override(inv_tau=20)
    raises(
        InputError,
        r"was trained with objective = 'cloob', not 'infoloob'; resume with",
        train,
        other,
    )
    raises(InputError, r"trained with inv_tau = 30\.\d*, not 20", train, hotter)
    (out / "config.json").rename(out / "aside.json")  # then the checkpoint itself knows
    raises(
        InputError,
        r"step-00000015: was trained with other.*inv_tau was 20 and is 30",
        train,
        hotter,
    )
    (out / "aside.json").rename(out / "config.json")
    with caplog.at_level(logging.WARNING):
        result = train(config.override(epochs=4, lr=1e-4))
    assert result.steps == 20 and len(lines(out / "metrics.jsonl")) == 20
    assert (
        "another epochs: 4 instead of 3" in caplog.text and "another lr" in caplog.text
    )


def test_an_earlier_run_is_not_overwritten_unasked(trained, tmp_path):
    raises(
        InputError,
        "already holds a run; go on with --resume auto, or give --overwrite",
        train,
        trained.config,
    )
    out = cut_back(trained, tmp_path / "run", 15)
    (out / "notes.txt").write_text("mine")
    result = train(trained.config.override(out=out, overwrite=True, epochs=1))
    assert result.steps == 5 and len(list_checkpoints(out)) == 3
    assert {p.name for p in out.iterdir()} == RUN_FOLDER | {"notes.txt"}


def test_what_torchrun_starts_again_does_not_overwrite_its_run(
    trained, tmp_path, monkeypatch
):
    out = cut_back(trained, tmp_path / "run", 10)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    config = trained.config.override(out=out, overwrite=True, epochs=1)
    raises(
        InputError,
        r"run: holds the run that torchrun has started again.*--resume auto",
        train,
        config,
    )
    assert list_checkpoints(out)[-1].name == "step-00000010"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert train(config).steps == 5


class Evaluates(Callback):
    """Puts all of the towers into training mode."""

    def on_start(self, info):
        self.encoder, self.modes = info.encoder, []

    def on_step(self, metrics):
        self.modes.append([module.training for module in self.encoder.modules()])
        self.encoder.train()


def test_the_loop_switches_the_towers_back(trained, tmp_path):
    """Also where a frozen tower was in eval mode before, and a callback puts all of it
    into training mode.
    """
    config = trained.config.override(
        out=tmp_path / "run", epochs=1, freeze="image", model="nano-resnet"
    )
    callback = Evaluates()
    result = train(config, callbacks=[callback])
    assert (
        all(modes == callback.modes[0] for modes in callback.modes)
        and len(callback.modes) == 5
    )
    assert not callback.encoder.model.visual.bn1.training
    alone = train(config.override(out=tmp_path / "alone"))
    assert exact(result.run) == exact(alone.run) and equal(
        weights(result.run), weights(alone.run)
    )


def test_nonfinite_steps_are_skipped_and_written_down(trained, tmp_path):
    result = train(
        trained.config.override(out=tmp_path / "run", epochs=2),
        callbacks=[Poison(3, 5)],
    )
    found = lines(result.run / "metrics.jsonl")
    assert [line["step"] for line in found if line.get("skipped") == "not finite"] == [
        4,
        5,
    ]
    assert all((line["loss"] is None) == (line["step"] in (4, 5)) for line in found)
    assert exact(result.run)[:3] == exact(trained.run)[:3]
    named = [
        line
        for line in lines(result.run / "skipped.jsonl")
        if line["reason"] == "not finite"
    ]
    assert named[0]["epoch"] == 1 and named[0]["detail"].startswith("loss nan")
    assert {line["step"] for line in named} == {4, 5}
    # they are the rows of two batches: none of them the same
    assert len({line["key"] for line in named}) == len(named) >= 12
    assert found[-1]["samples_seen"] == 76 - len(named)
    assert lines(result.run / "epochs.jsonl")[0]["loss"] == pytest.approx(
        np.mean([x["loss"] for x in found[:3]])
    )


def test_too_many_nonfinite_steps_end_the_run(trained, tmp_path):
    config = trained.config.override(out=tmp_path / "run", keep=1)
    error = (
        r"step 13: loss or gradient not finite for 10 steps in a row \(samples"
        r" .*skipped.jsonl.*step-00000002"
    )
    raises(TrainingFailed, error, train, config, callbacks=[Poison(3, 100)])
    # What may be damaged is not saved: with keep=1 it would have replaced the good one.
    (kept,) = list_checkpoints(tmp_path / "run")
    assert kept.name == "step-00000002"
    assert torch.isfinite(weights(kept)["model.token_embedding.weight"]).all()


def test_bad_samples_stop_the_run_at_the_end_of_a_small_epoch(trained, tmp_path):
    error = (
        r"2 of 40 samples cannot be used, more than max_bad_fraction = 0\.04.*1 corrupt"
        r" image \(e\.g\. .*13"
    )
    raises(
        InputError,
        error,
        train,
        trained.config.override(out=tmp_path / "run", max_bad_fraction=0.04),
    )
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 5
    train(
        trained.config.override(out=tmp_path / "run2", max_bad_fraction=0.05, epochs=1)
    )  # 2/40 is not more


def test_validation_init_and_several_sources(trained, pairs_folder, tmp_path):
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
    assert result.steps == 5 and 37 <= result.samples_seen <= 40
    assert (result.run / "tensorboard").is_dir()
    # The validation loss is the objective of all held-out pairs, by the towers in eval
    # mode.
    encoder, right = load_model(str(trained.run)), torch.arange(5)
    with torch.no_grad():
        images = encoder.encode_image(sorted(held_out.glob("*.png")))
        logits = images @ encoder.encode_text([f"shade {n}" for n in range(5)]).T / 0.07
    both = F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)
    (epoch,) = lines(result.run / "epochs.jsonl")
    assert epoch["val_loss"] == pytest.approx(float(both) / 2, rel=1e-4)
    config = config.override(out=tmp_path / "x")
    for name, value in (("model", "nano-vit"), ("image_size", 64)):
        error = f"{name} is '?{value}'?; it must be left out with --init"
        raises(InputError, error, train, config.override(**{name: value}))
    assert not (tmp_path / "x").exists()


def test_retrieval_joins_where_it_is_told_to(base, trained, tmp_path):
    """Before, the losses are those of InfoLOOB bit for bit; from there on CLOOB's; a
    run that goes on is the same.
    """
    warm = base.override(retrieval_from=0.5, out=tmp_path / "warm", keep=0)
    plain = base.override(objective="infoloob", out=tmp_path / "plain")
    for config in (warm, plain):
        train(config)
    found, other = (
        lines(tmp_path / name / "metrics.jsonl") for name in ("warm", "plain")
    )
    assert [line["beta"] for line in found] == [None] * 8 + [
        8.0
    ] * 7  # 15 steps: half of the run is over after 7.5
    assert [line["loss"] for line in found[:8]] == [line["loss"] for line in other[:8]]
    assert all(
        a["loss"] != b["loss"] for a, b in zip(found[8:], other[8:], strict=True)
    )
    assert found[0]["loss"] != lines(trained.run / "metrics.jsonl")[0]["loss"]
    files = [
        path / "model" / "objective.json"
        for path in list_checkpoints(tmp_path / "warm")
    ]
    saved = [json.loads(file.read_text())["hopfield"] for file in files]
    assert (
        saved == [False] * 4 + [True] * 4
    )  # after 2, 4, 6, 8 and 10, 12, 14, 15 steps


def test_siglip_s_bias_goes_into_log_folder_and_another_run(base, tmp_path):
    run = train(base.override(objective="siglip", out=tmp_path / "run", epochs=1)).run
    found = lines(run / "metrics.jsonl")
    assert all(line["beta"] is None for line in found)
    config = TrainConfig().merge_file(run / "config.json")
    assert (config.bias, config.inv_tau, config.scale) == (-10.0, 10.0, "unit")
    trained, bias = load_model(run).make_objective(), found[-1]["bias"]
    assert trained.name == "siglip" and bias != -10.0
    assert trained.bias.item() == pytest.approx(bias, rel=1e-6)
    theirs = open_clip.create_model(f"local-dir:{latest_checkpoint(run) / 'model'}")
    assert theirs.logit_bias.item() == pytest.approx(bias, rel=1e-6)
    inv_tau = found[-1]["inv_tau"]
    assert theirs.logit_scale.exp().item() == pytest.approx(inv_tau, rel=1e-6)

    clip = base.override(objective="clip", model=None, init=str(run), steps=1)
    left = train(clip.override(out=tmp_path / "clip")).checkpoint
    model = open_clip.create_model(f"local-dir:{left}/model")
    assert model.logit_bias is None  # in a softmax it cancels


def test_a_longer_run_goes_on_with_the_next_epoch(base, pairs_folder, tmp_path):
    """Each length ends with a validation, and is then finished."""
    config = base.override(
        val_data=[str(pairs_folder)],
        save_every=0,
        keep=0,
        out=tmp_path / "run",
        resume="auto",
    )
    for value in (3, 7):
        result = train(config.override(steps=value))
        assert not result.already_finished
        assert (list_checkpoints(result.run)[-1] / "validation.json").is_file()
        again = train(config.override(steps=value))
        assert again.already_finished and not again.out_of_patience
        assert again.steps == result.steps
    epochs = lines(result.run / "epochs.jsonl")
    assert [line["step"] for line in epochs] == [3, 7]
    assert all(line["val_loss"] is not None for line in epochs)
    rates = [line["lr"] for line in lines(result.run / "metrics.jsonl")]
    whole = train(base.override(steps=7, out=tmp_path / "whole"))
    wanted = [line["lr"] for line in lines(whole.run / "metrics.jsonl")]
    assert rates[3:] == wanted[3:]


def test_patience_counts_the_looks_at_the_held_out_pairs(
    base, pairs_folder, tmp_path, capsys
):
    """With a learning rate of nearly nothing no look after the first finds a better
    recall.
    """
    config = base.override(
        val_data=[str(pairs_folder)],
        best="val_recall",
        lr=1e-12,
        warmup=0,
        save_every=0,
    )
    words = ["--epochs", "9", "--patience", "2", "--out", str(tmp_path / "run")]
    (tmp_path / "start.json").write_text(config.to_json())
    assert main(["train", "--config", str(tmp_path / "start.json"), *words]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{tmp_path / 'run'}: 15 steps, ")
    best = lines(tmp_path / "run" / "epochs.jsonl")[0]["val_recall"]
    assert said[1] == "stopped at epoch 3: no better for 2 epochs"
    assert said[2] == f"{tmp_path / 'run'}:best: val_recall {best:.4g} (step-00000005)"
    run = tmp_path / "run"
    command = [
        "train",
        "--config",
        str(run / "config.json"),
        "--resume",
        "auto",
        "--epochs",
        "12",
    ]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        f"{run}: already finished (3 epochs, 15 steps); the patience was used up"
    )
    assert main([*command, "--patience", "0", "--epochs", "4"]) == 0
    assert len(lines(run / "epochs.jsonl")) == 4


def test_a_long_warmup_is_named(base, tmp_path, caplog):
    config = base.override(steps=2, warmup=9, save_every=0)
    train(config.override(out=tmp_path / "run"))
    warning = (
        "a warm-up of 9 steps is longer than this run of 2: its learning rate ends at"
        " 0.00067, not 0.003"
    )
    assert caplog.messages.count(warning) == 1
