"""Which checkpoint is the best, that it outlives the others, and how it is loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from train_helpers import lines

from cloob import cli
from cloob.errors import InputError
from cloob.models.load import find_model_folder, load_model
from cloob.models.runs import chosen_checkpoint, list_checkpoints
from cloob.training.loop import train
from make import write_table
from support import refused


@pytest.fixture(scope="module")
def judged(trained, pairs_folder, tmp_path_factory):
    """A run that gets better, then learns too fast and gets worse; beside the best only the newest checkpoint stays."""
    config = trained.config.override(
        val_data=[str(pairs_folder)], save_every=100, keep=1, out=tmp_path_factory.mktemp("judged") / "run"
    )
    train(config.override(epochs=3))
    train(config.override(epochs=5, lr=0.5, schedule="constant", resume="auto"))
    return config


def test_the_best_outlives_the_others(judged):
    epochs = lines(judged.save.out / "epochs.jsonl")
    best = min(epochs, key=lambda line: line["val_loss"])
    assert best["epoch"] < 5, epochs  # else this shows nothing
    names = [path.name for path in list_checkpoints(judged.save.out)]
    assert names == [f"step-{best['step']:08d}", "step-00000025"]
    assert chosen_checkpoint(judged.save.out, "best").name == names[0]
    told = json.loads((chosen_checkpoint(judged.save.out, "best") / "validation.json").read_text())
    assert told.pop("batch_size") == judged.run.batch_size and told.pop("held_out")
    assert told == {"step": best["step"], "metric": "val_loss", **{k: best[k] for k in ("val_loss", "val_recall")}}


def test_the_average_of_the_weights_is_saved_and_judged(base, pairs_folder, tmp_path):
    """Running statistics included; it is another model folder, which everything else loads."""
    config = base.override(model="nano-resnet", ema=0.75, epochs=1, save_every=1, keep=0, out=tmp_path / "run")
    train(config.override(val_data=[str(pairs_folder)]))
    checkpoints, average = list_checkpoints(tmp_path / "run"), None
    assert len(checkpoints) == 5
    for checkpoint in checkpoints:
        state = load_model(checkpoint).state_dict()
        if average is None:  # it begins with the first step's weights
            average = {key: value.double() for key, value in state.items()}
        saved = load_model(checkpoint / "ema").state_dict()
        for key, value in state.items():
            average[key] = 0.75 * average[key] + 0.25 * value if value.is_floating_point() else value
            torch.testing.assert_close(saved[key], average[key].to(saved[key]), msg=key)
    assert not torch.equal(saved["model.visual.bn1.running_mean"], state["model.visual.bn1.running_mean"])
    (line,) = lines(tmp_path / "run" / "epochs.jsonl")
    validation = json.loads((checkpoints[-1] / "validation.json").read_text())
    assert line["ema_val_loss"] == validation["ema_val_loss"] != validation["val_loss"]


def test_a_run_out_of_patience_goes_on_with_other_held_out_pairs(trained, pairs_folder, pairs_as, tmp_path):
    config = trained.config.override(
        out=tmp_path / "run", val_data=[str(pairs_folder)], epochs=4, patience=1, lr=1e-30, warmup=0, save_every=0
    )
    assert train(config).epochs == 2
    again = train(config.override(resume="auto"))
    assert again.already_finished and again.out_of_patience
    went_on = train(config.override(resume="auto", val_data=[pairs_as["table"]]))
    assert not went_on.already_finished and went_on.epochs == 4  # epoch 3 is the best again, epoch 4 is not better


def test_held_out_pairs_that_cannot_be_used_are_named_and_counted(trained, pairs_folder, tmp_path):
    """Two of the folder's forty are bad: one in five is allowed, one in three is not."""
    config = trained.config.override(out=tmp_path / "run", val_data=[str(pairs_folder)], epochs=2)
    train(config)
    named = [line for line in lines(tmp_path / "run" / "skipped.jsonl") if line.get("held_out")]
    assert sorted(Path(line["key"]).stem for line in named) == ["13", "27"]  # once, not in each epoch
    for line in lines(tmp_path / "run" / "epochs.jsonl"):
        assert line["val_skipped"] == {line["reason"]: 1 for line in named} and line["val_recall"] is not None
    (tmp_path / "val.csv").write_text(
        "filepath,title\n" + "".join(f"{pairs_folder}/{name},x\n" for name in ("00.png", "01.png", "gone.png"))
    )
    with pytest.raises(InputError, match=r"val\.csv: 1 of 3 held-out pairs cannot be used, .*1 missing image \(e\.g\."):
        train(config.override(out=tmp_path / "other", val_data=[str(tmp_path / "val.csv")]))


def test_held_out_pairs_judge(trained, pairs_folder, tmp_path, capsys, monkeypatch):
    """`cloob eval RUN --held-out` has the recall that the training saw."""
    good = sorted(path for path in pairs_folder.glob("*.txt") if path.stem not in ("13", "27"))
    rows = [{"filepath": path.with_suffix(".png"), "title": path.read_text()} for path in good]
    table = write_table(tmp_path / "pairs.csv", rows)
    config = trained.config.override(data=[str(table)], val_split=0.3, out=tmp_path / "run", epochs=1, keep=1)
    train(config)
    words = ["eval", str(tmp_path / "run"), "--device", "cpu", "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--held-out", "--retrieval", str(table)]) == 0
    err = capsys.readouterr().err
    row = json.loads((tmp_path / "out" / "results.json").read_text())["rows"][0]
    held_out, all_pairs = row["retrieval"]["pairs.csv (held out)"], row["retrieval"]["pairs.csv"]
    n = held_out["n"]
    assert (n, all_pairs["n"]) == (11, len(rows))
    recalls = [held_out[f"{way}@{k}"] for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    seen = lines(tmp_path / "run" / "epochs.jsonl")[-1]["val_recall"]
    assert sum(recalls) / 6 == pytest.approx(seen, abs=1.01 / n / 6)  # a tie may fall either way
    assert f"cloob: {tmp_path}/run: was trained on {table}; --held-out judges by pairs that were not\n" in err
    # A run that goes on does not read all pairs again to hold some out: it keeps the rows.
    kept = json.loads((tmp_path / "run" / "checkpoints" / "held_out.json").read_text())
    assert [len(rows) for rows in kept["rows"]] == [11]
    with monkeypatch.context() as patch:
        patch.setattr("cloob.training.given.choose_held_out", None)
        assert train(config.override(resume="auto", epochs=2)).epochs == 2
    # Changed pairs are split otherwise.
    write_table(table, rows[3:])
    said = "its pairs have changed since the training, so nobody knows which were held out"
    assert refused(capsys, *words, "--held-out") == f"cloob: {tmp_path}/run: {said}\n"


def test_held_out_pairs_of_their_own_judge(judged, trained, pairs_folder, tmp_path, capsys):
    run, words = str(judged.save.out), ["--device", "cpu", "--out", str(tmp_path / "out"), "--held-out"]
    assert cli.main(["eval", run, f"{run}:last", *words]) == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [list(row["retrieval"]) for row in rows] == [[f"{pairs_folder.name} (held out)"]] * 2
    capsys.readouterr()
    other = str(trained.run)
    assert "held no pairs out of its training" in refused(capsys, "eval", other, *words)
    config = json.loads((judged.save.out / "config.json").read_text())
    config["pairs"]["val_data"] = [f"pipe:touch {tmp_path}/ran"]
    shutil.copytree(judged.save.out, tmp_path / "strange")
    (tmp_path / "strange" / "config.json").write_text(json.dumps(config))
    said = refused(capsys, "eval", str(tmp_path / "strange"), *words, "--retrieval", str(pairs_folder))
    assert "its held-out pairs are streamed" in said and not (tmp_path / "ran").exists()
    said = "--held-out: no model here is a run of `cloob train`; name one, or pairs by --retrieval"
    model = str(judged.save.out.parent / "model")
    shutil.copytree(find_model_folder(run) or run, model)
    assert refused(capsys, "eval", model, *words) == f"cloob: {said}\n"
