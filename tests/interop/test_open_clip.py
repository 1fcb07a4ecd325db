"""open_clip_train, as it is installed, really trains with our objective."""

import contextlib
import logging
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from cloob import ContrastiveObjective, load_model
from cloob.errors import InputError
from cloob.functional import cloob_reference
from cloob.interop.open_clip import OpenClipLoss, Options, installed, run
from cloob.models.importing import open_clip
from cloob.models.towers import create_model
from support import seeded, torchrun

for package in ("open_clip", "pandas", "webdataset"):
    pytest.importorskip(
        package, reason='open_clip_train needs pip install -e ".[open-clip-train]"'
    )

N = 8
EPOCHS = 3
LR = 0.3
ANIMALS = ("cat", "dog", "horse", "snail")

# open_clip_train asks for pinned memory on machines without an accelerator, too.
pytestmark = pytest.mark.filterwarnings(
    "ignore:'pin_memory' argument is set as true:UserWarning"
)


def features(n=6, d=5):
    generator = seeded(0)
    rows = torch.randn(2, n, d, generator=generator)
    x, y = F.normalize(rows, dim=2)
    return x.requires_grad_(), y.requires_grad_()


def test_fixed_inv_tau_leaves_logit_scale_alone():
    x, y = features()
    log_scale = nn.Parameter(torch.tensor(1.0))
    bias = nn.Parameter(torch.tensor(-10.0))
    loss = OpenClipLoss(ContrastiveObjective.cloob(inv_tau=20.0))
    losses = loss(
        image_features=x,
        text_features=y,
        logit_scale=log_scale.exp(),
        logit_bias=bias,
        output_dict=True,
    )
    # open_clip 4 sums what ends in _loss.
    total = sum(value for key, value in losses.items() if key.endswith("_loss"))
    torch.testing.assert_close(total, cloob_reference(x, y, 20.0))
    total.backward()
    # there, as DDP asks, and zero
    assert float(log_scale.grad) == float(bias.grad) == 0.0
    assert torch.equal(loss(x, y, log_scale.exp()), losses["contrastive_loss"])


def test_an_objective_that_learns_its_temperature_is_refused():
    learned = ContrastiveObjective.cloob(learnable_inv_tau=True)
    with pytest.raises(ValueError, match="would not know the objective's parameters"):
        OpenClipLoss(learned)


def test_a_siglip_model_does_not_say_that_siglip_trained_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    create = open_clip().create_model_and_transforms
    main = SimpleNamespace(
        create_loss=None,
        train_one_epoch=None,
        create_model_and_transforms=create,
        parse_args=None,
    )
    with installed(main, Options()):
        model, *transforms = main.create_model_and_transforms(
            "tiny-vit", init_logit_bias=-10.0, output_dict=True
        )
    assert main.create_model_and_transforms is create
    assert len(transforms) == 2
    pixels = torch.zeros(1, 3, 64, 64)
    tokens = torch.zeros(1, 24, dtype=torch.int64)
    assert "logit_bias" not in model(pixels, tokens)
    file = tmp_path / "big" / "epoch_1.pt"
    file.parent.mkdir()
    torch.save({"epoch": 1, "name": "x", "state_dict": model.state_dict()}, file)
    for place in ("big/epoch_1.pt", file):
        encoder = load_model(f"tiny-vit/{place}", device="cpu")
        assert encoder.objective_config == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--", "--siglip"], "--siglip"),
        (["--", "--model", "coca_ViT-B-32"], "coca_ViT-B-32"),
        (
            ["--cloob-retrieval-from", "0.5", "--", "--epochs", "1"],
            "a share of --epochs 1, from 0, that leaves a whole epoch",
        ),
    ],
)
def test_what_would_train_another_loss_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        run(arguments)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """As many pairs as a global batch holds, so that an epoch is one step on all of
    them; the weights to begin with.
    """
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    encoder = create_model("tiny-vit", seed=0)
    rows = ["filepath\ttitle"]
    captions = []
    images = []
    for i in range(N):
        colours = rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)
        picture = Image.fromarray(colours).resize((64, 64), Image.Resampling.NEAREST)
        picture.save(folder / f"{i}.png")
        images.append(encoder.preprocess(picture))
        captions.append(f"picture number {i} of a {ANIMALS[i % 4]}")
        rows.append(f"{folder}/{i}.png\t{captions[i]}")
    csv = folder / "pairs.csv"
    start = folder / "tiny.pt"
    csv.write_text("\n".join(rows) + "\n")
    torch.save(create_model("tiny-vit", seed=1).model.state_dict(), start)
    mean = torch.tensor(encoder.mean).view(1, 3, 1, 1)
    std = torch.tensor(encoder.std).view(1, 3, 1, 1)
    pixels = (torch.stack(images) / 255 - mean) / std
    batch = (pixels, encoder.tokenizer(captions))
    return SimpleNamespace(csv=csv, start=start, batch=batch)


def plain_loop(world, loss):
    """The oracle: AdamW on the whole batch.

    Its large epsilon makes it follow the gradient's size, as SGD does.
    """
    model = create_model("tiny-vit", seed=0).model.train()
    model.load_state_dict(torch.load(world.start))
    model.logit_scale.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=(0.9, 0.98), eps=1.0, weight_decay=0.0
    )
    losses = []
    for _ in range(EPOCHS):
        x, y, scale = model(*world.batch)
        value = loss(x, y, scale)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def cloob_loss(x, y, scale):
    return cloob_reference(x, y, 25.0, 6.0) + 0.0 * scale


FIXED = (
    f"--dataset-type=csv --model=tiny-vit --name=run --epochs={EPOCHS} --lr={LR}"
    f" --save-frequency={EPOCHS} --eps=1 --wd=0 --warmup=0 --lr-scheduler=const"
    " --workers=0 --device=cpu --precision=fp32 --log-every-n-steps=1"
    " --aug-cfg scale=(1.0,1.0)"
)


def arguments(world, logs, *more):
    data = [f"--train-data={world.csv}", f"--pretrained={world.start}"]
    return [*data, f"--logs={logs}", *FIXED.split(), *more]


def outcome(logs):
    """The logged losses, and the parameters in the last checkpoint."""
    text = (logs / "run" / "out.log").read_text()
    found = re.findall(r"(?<!Avg )Contrastive_loss: (\S+) ", text)
    losses = [float(value) for value in found]
    checkpoint = torch.load(logs / "run" / "checkpoints" / f"epoch_{EPOCHS}.pt")
    state = checkpoint["state_dict"]
    return losses, {name.removeprefix("module."): state[name] for name in state}


def assert_same_training(found, expected, world):
    assert found[0] == pytest.approx(expected[0], rel=1e-4)  # five digits are logged
    assert max(found[0]) - min(found[0]) > 0.005
    begin = torch.load(world.start)
    for name, value in expected[1].items():
        if name != "logit_scale":
            step = value - begin[name]
            error = found[1][name] - value
            wanted = 1e-3 * float(step.norm()) + 1e-7
            assert float(error.norm()) < wanted, name


@contextlib.contextmanager
def own_logging():
    """open_clip_train adds handlers to the root logger and sets the level of every
    logger there is.
    """
    root = logging.getLogger()
    loggers = [root, *(logging.getLogger(name) for name in root.manager.loggerDict)]
    handlers = root.handlers[:]
    levels = [logger.level for logger in loggers]
    yield
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
        handler.close()
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("joins", "words"),
    [([True] * EPOCHS, []), ([False, False, True], ["--cloob-retrieval-from=0.5"])],
    ids=["cloob", "retrieval later"],
)
def test_accumulation_equals_the_whole_batch(joins, words, world, tmp_path):
    """Also where retrieval joins after 1.5 of 3 epochs, each of one step."""
    more = ["--accum-freq=2", f"--batch-size={N // 2}", f"--val-data={world.csv}"]
    theirs = arguments(world, tmp_path, *more)
    with own_logging():
        assert run(["--cloob-inv-tau=25", "--cloob-beta=6", *words, "--", *theirs]) == 0
    found = outcome(tmp_path)
    each = iter(joins)

    def expected(x, y, scale):
        return cloob_reference(x, y, 25.0, 6.0, hopfield=next(each)) + 0.0 * scale

    assert_same_training(found, plain_loop(world, expected), world)
    assert float(found[1]["logit_scale"]) == pytest.approx(math.log(25.0))
    log = (tmp_path / "run" / "out.log").read_text()
    assert "Logit Scale: 25.000" in log
    assert "clip_val_loss" in log
    assert "'beta': 6.0" in (tmp_path / "run" / "params.txt").read_text()


def launch(ours, theirs, processes):
    worker = Path(__file__).with_name("open_clip_worker.py")
    torchrun([worker, *ours, "--", *theirs, "--dist-backend=gloo"], processes)


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_a_training_that_is_resumed_equals_one_that_is_not(world, tmp_path):
    for epochs, more in (
        (EPOCHS - 1, "--save-frequency=1"),
        (EPOCHS, "--resume=latest"),
    ):
        words = [f"--batch-size={N}", f"--epochs={epochs}", more]
        theirs = arguments(world, tmp_path, *words)
        launch(["--cloob-inv-tau=25", "--cloob-beta=6"], theirs, 1)
    assert_same_training(outcome(tmp_path), plain_loop(world, cloob_loss), world)
    path = tmp_path / "run" / "checkpoints" / f"epoch_{EPOCHS}.pt"
    trained = load_model(path, device="cpu").make_objective()
    assert trained.name == "cloob"
    assert float(trained.inv_tau) == 25.0
    assert float(trained.beta) == 6.0


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_two_processes_that_accumulate_equal_one(world, tmp_path):
    ours = ["--cloob-inv-tau=25", "--cloob-beta=6"]
    theirs = arguments(world, tmp_path, "--accum-freq=2", f"--batch-size={N // 4}")
    launch(ours, theirs, 2)
    found = outcome(tmp_path)
    assert_same_training(found, plain_loop(world, cloob_loss), world)
    assert float(found[1]["logit_scale"]) == pytest.approx(math.log(25.0))
