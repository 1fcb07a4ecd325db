from __future__ import annotations

from pathlib import Path

import pytest
import torch
from train_helpers import Recorder, Trained, exact, lines

from cloob.models.load import load_model
from cloob.models.towers import create_model
from cloob.training.callbacks import Callback, RunInfo
from cloob.training.loop import train
from cloob.training.optim import WeightAverage
from cloob.training.state.resume import find_checkpoint


def test_against_a_loop_over_numbers(nano_configs: Path) -> None:
    encoder = create_model("nano-vit", seed=0)
    encoder.register_buffer("counter", torch.tensor(0))
    encoder.register_buffer("running", torch.zeros(2))
    encoder.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    average = WeightAverage(encoder, 0.3)
    weight, expected, mean = encoder.model.visual.proj, None, None
    for n in range(6):
        with torch.no_grad():
            weight.add_(torch.randn(weight.shape))
            encoder.running.add_(n)  # type: ignore[operator]
            encoder.counter.add_(1)  # type: ignore[operator]
        average.update(encoder)
        decay = min(0.3, (1 + n) / (10 + n)) if n else 0.0
        expected = weight.detach().clone() if expected is None else decay * expected + (1 - decay) * weight.detach()
        mean = encoder.running.clone() if mean is None else decay * mean + (1 - decay) * encoder.running  # type: ignore
    state = average.encoder.state_dict()
    torch.testing.assert_close(state["model.visual.proj"], expected)
    torch.testing.assert_close(state["running"], mean)
    assert state["counter"] == 6 and average.updates == 6
    for name, buffer in encoder.named_buffers():
        assert name == "running" or torch.equal(average.encoder.get_buffer(name), buffer), name
    assert not average.encoder.training and not any(p.requires_grad for p in average.encoder.parameters())


class Keep(Callback):
    """The towers after each step."""

    def on_start(self, info: RunInfo) -> None:
        self.info, self.seen = info, []

    def on_step(self, metrics: object) -> None:
        self.seen.append(self.info.encoder.model.visual.proj.detach().clone())
        torch.rand(7)  # what a callback draws does not move the training


def test_the_average_is_validated_and_exported_and_the_training_is_as_without(
    trained: Trained, pairs_folder: Path, tmp_path: Path
) -> None:
    keep, recorder = Keep(), Recorder()
    config = trained.config.override(ema=0.9, val_data=[str(pairs_folder)], save_every=0, out=tmp_path / "run")
    result = train(config, callbacks=[keep, recorder])
    assert exact(result.run) == exact(trained.run)
    expected = keep.seen[0]
    for n, weight in enumerate(keep.seen[1:], 1):
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weight
    exported = load_model(result.run)
    torch.testing.assert_close(exported.model.visual.proj.detach(), expected)
    average = recorder.of("start")[0].average
    assert torch.equal(average.model.visual.proj, exported.model.visual.proj)
    # The raw weights are those of the run without an average, and are what is resumed.
    found = find_checkpoint(result.run, "auto")
    assert found is not None
    for name, value in load_model(trained.run).state_dict().items():
        if not name.endswith("logit_scale"):
            assert torch.equal(found.weights[name], value), name
    # What is validated is the average: training from the exported weights at a rate of zero finds the same loss.
    said = lines(result.run / "epochs.jsonl")[-1]
    again = train(
        config.override(init=str(result.run), model=None, ema=0.0, lr=1e-30, epochs=1, out=tmp_path / "judge", warmup=0)
    )
    judged = lines(again.run / "epochs.jsonl")[-1]
    assert judged["val_loss"] == pytest.approx(said["val_loss"], rel=1e-5)
    assert judged["val_recall"] == pytest.approx(said["val_recall"])


def test_switching_the_average_on_and_off_between_runs(trained: Trained, tmp_path: Path) -> None:
    start = trained.config.override(epochs=1, keep=1, save_every=0, out=tmp_path / "run")
    train(start)
    train(start.override(resume="auto", epochs=2, ema=0.9, schedule="constant"))
    found = find_checkpoint(tmp_path / "run", "auto")
    assert found is not None and found.state["average"] == {"updates": 5}
    raw = found.weights["model.visual.proj"]
    assert not torch.equal(found.encoder.model.visual.proj, raw)
    train(start.override(resume="auto", epochs=3, lr=1e-30, schedule="constant"))
    assert "average" not in find_checkpoint(tmp_path / "run", "auto").state  # type: ignore[union-attr]
    torch.testing.assert_close(load_model(tmp_path / "run").model.visual.proj.detach(), raw)
