"""open_clip_train, as it is installed, really trains with our objective."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from cloob import ContrastiveObjective, load_model
from cloob.errors import InputError
from cloob.functional import cloob_reference, info_nce
from cloob.interop.open_clip import OpenClipLoss, Options, installed, run

for package in ("open_clip", "pandas", "webdataset"):
    pytest.importorskip(package, reason='open_clip_train needs pip install -e ".[open-clip-train]"')

MAIN = os.environ.get("OPEN_CLIP_MAIN", "")
versions = pytest.mark.parametrize(
    "source",
    [
        pytest.param("", id="installed"),
        pytest.param(
            MAIN,
            id="main",
            marks=pytest.mark.skipif(not MAIN, reason="OPEN_CLIP_MAIN is to name src/ of a clone of open_clip's main"),
        ),
    ],
)
N, EPOCHS, LR = 8, 3, 0.3
ANIMALS = ("cat", "dog", "horse", "snail")
State = dict[str, Tensor]

# open_clip_train asks for pinned memory on machines without an accelerator, too.
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")


def features(n: int = 6, d: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (F.normalize(torch.randn(n, d, generator=generator), dim=1) for _ in range(2))
    return x.requires_grad_(), y.requires_grad_()


# The loss by itself


def test_fixed_inv_tau_leaves_logit_scale_alone() -> None:
    x, y = features()
    log_scale, bias = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(-10.0))
    loss = OpenClipLoss(ContrastiveObjective.cloob(inv_tau=20.0))
    model_out = {"image_features": x, "text_features": y, "logit_scale": log_scale.exp(), "logit_bias": bias}
    losses = loss(**model_out, output_dict=True)
    # open_clip 4 sums what ends in _loss.
    total = sum(value for key, value in losses.items() if key.endswith("_loss"))
    torch.testing.assert_close(total, cloob_reference(x, y, 20.0))
    total.backward()
    assert float(log_scale.grad) == float(bias.grad) == 0.0  # there, as DDP asks, and zero
    assert torch.equal(loss(x, y, log_scale.exp()), losses["contrastive_loss"])


@pytest.mark.parametrize("k", [3])
def test_learned_inv_tau_is_exact_under_accumulation(k: int) -> None:
    x, y = (side.detach() for side in features())
    log_scale = nn.Parameter(torch.tensor(2.0))
    loss = OpenClipLoss(ContrastiveObjective.cloob(scale="unit"), learn_inv_tau=True, evaluations=k)
    live = [side.clone().requires_grad_() for side in (x, y)]
    parts = [side.chunk(k) for side in live]
    for j in range(k):  # what open_clip_train does: all features, the graph of the j-th batch
        inputs = [torch.cat([part if i == j else part.detach() for i, part in enumerate(side)]) for side in parts]
        loss(*inputs, log_scale.exp(), output_dict=True)["contrastive_loss"].backward(retain_graph=True)
    expected_scale = nn.Parameter(torch.tensor(2.0))
    expected = [side.clone().requires_grad_() for side in (x, y)]
    cloob_reference(*expected, expected_scale.exp(), scale="unit").backward()
    torch.testing.assert_close(log_scale.grad, expected_scale.grad)
    for side, right in zip(live, expected, strict=True):
        torch.testing.assert_close(side.grad, right.grad)


def test_a_siglip_model_does_not_say_that_siglip_trained_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cloob.models.towers import open_clip

    monkeypatch.chdir(tmp_path)
    create = open_clip().create_model_and_transforms
    main = SimpleNamespace(create_loss=None, train_one_epoch=None, create_model_and_transforms=create, parse_args=None)
    with installed(main, Options()):
        model, *transforms = main.create_model_and_transforms("tiny-vit", init_logit_bias=-10.0, output_dict=True)
    assert main.create_model_and_transforms is create and len(transforms) == 2
    assert "logit_bias" not in model(torch.zeros(1, 3, 64, 64), torch.zeros(1, 24, dtype=torch.int64))
    torch.save({"epoch": 1, "name": "x", "state_dict": model.state_dict()}, "epoch_1.pt")
    assert load_model("tiny-vit/epoch_1.pt", device="cpu").objective_config == {}


# The launcher's options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--", "--siglip"], "--siglip"),
        (["--", "--model", "coca_ViT-B-32"], "coca_ViT-B-32"),
        (["--cloob-retrieval-from", "0.5", "--", "--epochs", "1"], "--epochs 1 leaves no whole epoch that retrieves"),
    ],
)
def test_what_would_train_another_loss_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(arguments)


# Training


@pytest.fixture(scope="module")
def csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many pairs as a global batch holds: an epoch is one step on all of them, in whatever order."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    rows = ["filepath\ttitle"]
    for i in range(N):
        pixels = np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((16, 16, 1)))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
        rows.append(f"{folder}/{i}.png	picture number {i} of a {ANIMALS[i % 4]}")
    path = folder / "pairs.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that all trainings begin with."""
    from cloob.models.towers import create_model

    path = tmp_path_factory.mktemp("start") / "tiny.pt"
    torch.save(create_model("tiny-vit", seed=1).model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def pixels_and_tokens(csv: Path) -> tuple[Tensor, Tensor]:
    from cloob.models.towers import create_model

    encoder = create_model("tiny-vit", seed=0)
    rows = [line.split("\t") for line in csv.read_text().splitlines()[1:]]
    images = torch.stack([encoder.preprocess(Image.open(path)) for path, _ in rows])
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (encoder.mean, encoder.std))
    return (images / 255 - mean) / std, encoder.tokenizer([caption for _, caption in rows])


def plain_loop(start: Path, batch: tuple[Tensor, Tensor], loss: Any) -> tuple[list[float], State]:
    """The oracle: AdamW on the whole batch. Its large epsilon makes it follow the gradient's size, as SGD does."""
    from cloob.models.towers import create_model

    model = create_model("tiny-vit", seed=0).model.train()
    model.load_state_dict(torch.load(start))
    model.logit_scale.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), eps=1.0, weight_decay=0.0)
    losses = []
    for _ in range(EPOCHS):
        x, y, scale = model(*batch)
        value = loss(x, y, scale)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def cloob_loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    return cloob_reference(x, y, 25.0, 6.0) + 0.0 * scale


def clip_loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    return (info_nce(x, y, scale) + info_nce(y, x, scale)) / 2


def arguments(csv: Path, start: Path, logs: Path, *more: str) -> list[str]:
    values = {
        "train-data": csv,
        "dataset-type": "csv",
        "model": "tiny-vit",
        "pretrained": start,
        "logs": logs,
        "name": "run",
        "epochs": EPOCHS,
        "save-frequency": EPOCHS,
        "lr": LR,
        "eps": 1.0,
        "wd": 0.0,
        "warmup": 0,
        "lr-scheduler": "const",
        "workers": 0,
        "device": "cpu",
        "precision": "fp32",
        "log-every-n-steps": 1,
    }
    return [*(f"--{key}={value}" for key, value in values.items()), "--aug-cfg", "scale=(1.0,1.0)", *more]


def outcome(logs: Path, epochs: int = EPOCHS) -> tuple[list[float], State]:
    """The logged losses, and the parameters in the last checkpoint."""
    text = (logs / "run" / "out.log").read_text()
    losses = [float(value) for value in re.findall(r"(?<!Avg )Contrastive_loss: (\S+) ", text)]
    checkpoint = torch.load(logs / "run" / "checkpoints" / f"epoch_{epochs}.pt")
    return losses, {name.removeprefix("module."): value for name, value in checkpoint["state_dict"].items()}


def assert_same_training(
    found: tuple[list[float], State], expected: tuple[list[float], State], start: Path, moves: float = 0.02
) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-4)  # five digits are logged
    assert max(found[0]) - min(found[0]) > moves
    begin = torch.load(start)
    for name, value in expected[1].items():
        if name != "logit_scale":
            step, error = value - begin[name], found[1][name] - value
            assert float(error.norm()) < 1e-3 * float(step.norm()) + 1e-7, name


@contextlib.contextmanager
def own_logging() -> Iterator[None]:
    """open_clip_train adds handlers to the root logger and sets the level of every logger there is."""
    root = logging.getLogger()
    loggers = [root, *(logging.getLogger(name) for name in root.manager.loggerDict)]
    handlers, levels = root.handlers[:], [logger.level for logger in loggers]
    yield
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
        handler.close()
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.mark.nightly
def test_accumulation_equals_the_whole_batch(
    csv: Path, start: Path, pixels_and_tokens: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    ours = ["--cloob-objective=cloob", "--cloob-inv-tau=25", "--cloob-beta=6", "--"]
    theirs = arguments(csv, start, tmp_path, "--accum-freq=2", f"--batch-size={N // 2}", f"--val-data={csv}")
    with own_logging():
        assert run([*ours, *theirs]) == 0
    found = outcome(tmp_path)
    assert_same_training(found, plain_loop(start, pixels_and_tokens, cloob_loss), start)
    assert float(found[1]["logit_scale"]) == pytest.approx(math.log(25.0))
    log = (tmp_path / "run" / "out.log").read_text()
    assert "Logit Scale: 25.000" in log and "clip_val_loss" in log
    assert "'beta': 6.0" in (tmp_path / "run" / "params.txt").read_text()


@pytest.mark.nightly
def test_retrieval_joins_in_the_epoch_that_was_asked_for(
    csv: Path, start: Path, pixels_and_tokens: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    joins = iter([False, False, True])  # 1.5 of 3 epochs, each of one step

    def expected(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return cloob_reference(x, y, 25.0, 6.0, hopfield=next(joins)) + 0.0 * scale

    ours = ["--cloob-inv-tau=25", "--cloob-beta=6", "--cloob-retrieval-from=0.5", "--"]
    with own_logging():
        assert run([*ours, *arguments(csv, start, tmp_path, f"--batch-size={N}")]) == 0
    assert_same_training(outcome(tmp_path), plain_loop(start, pixels_and_tokens, expected), start, moves=0.005)


@pytest.mark.nightly
def test_clip_equals_open_clip_trains_own_loss(
    csv: Path, start: Path, pixels_and_tokens: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    from open_clip_train.main import main

    with own_logging():
        main(arguments(csv, start, tmp_path / "theirs", f"--batch-size={N}"))
    with own_logging():
        assert (
            run(["--cloob-objective=clip", "--", *arguments(csv, start, tmp_path / "ours", f"--batch-size={N}")]) == 0
        )
    found, expected = outcome(tmp_path / "ours"), outcome(tmp_path / "theirs")
    assert_same_training(found, expected, start)
    torch.testing.assert_close(found[1]["logit_scale"], expected[1]["logit_scale"])
    assert float(found[1]["logit_scale"]) != float(torch.load(start)["logit_scale"])
    assert_same_training(found, plain_loop(start, pixels_and_tokens, clip_loss), start)


def launch(ours: Sequence[str], theirs: Sequence[str], source: str, processes: int) -> None:
    """One process, or several under torchrun, by open_clip_train of a folder or as it is installed."""
    command = [sys.executable, "-m", "cloob.interop.open_clip"]
    if processes > 1:
        command[2:] = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += [str(Path(__file__).with_name("open_clip_worker.py"))]
    command += [*ours, "--", *theirs, "--dist-backend=gloo"]
    path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@versions
def test_a_training_that_is_resumed_equals_one_that_is_not(
    source: str, csv: Path, start: Path, pixels_and_tokens: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    for epochs, more in ((EPOCHS - 1, ["--save-frequency=1"]), (EPOCHS, ["--resume=latest"])):
        theirs = arguments(csv, start, tmp_path, f"--batch-size={N}", f"--epochs={epochs}", *more)
        launch(["--cloob-inv-tau=25", "--cloob-beta=6"], theirs, source, 1)
    assert_same_training(outcome(tmp_path), plain_loop(start, pixels_and_tokens, cloob_loss), start)
    trained = load_model(tmp_path / "run" / "checkpoints" / f"epoch_{EPOCHS}.pt", device="cpu").make_objective()
    assert (trained.name, float(trained.inv_tau), float(trained.beta)) == ("cloob", 25.0, 6.0)


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@versions
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_two_processes_that_accumulate_equal_one(
    learned: bool, source: str, csv: Path, start: Path, pixels_and_tokens: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    if learned:
        ours, loss = (
            ["--cloob-beta=6", "--cloob-temperature=learned"],
            lambda x, y, scale: cloob_reference(x, y, scale, 6.0, scale="unit"),
        )
    else:
        ours, loss = ["--cloob-inv-tau=25", "--cloob-beta=6"], cloob_loss
    launch(ours, arguments(csv, start, tmp_path, "--accum-freq=2", f"--batch-size={N // 4}"), source, 2)
    found, expected = outcome(tmp_path), plain_loop(start, pixels_and_tokens, loss)
    assert_same_training(found, expected, start)
    if learned:
        torch.testing.assert_close(found[1]["logit_scale"], expected[1]["logit_scale"], rtol=1e-4, atol=0.0)
        assert abs(float(found[1]["logit_scale"]) - math.log(1 / 0.07)) > 1e-3
    else:
        assert float(found[1]["logit_scale"]) == pytest.approx(math.log(25.0))
