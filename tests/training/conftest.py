"""One tiny data set, one tiny model and one whole training, shared by the tests of this
folder.
"""

import json

import open_clip.factory  # for the fixture quick  # noqa: F401
import pytest
from train_helpers import Recorder, Trained, write_shards

from cloob.training.config import TrainConfig
from make import write_forty


@pytest.fixture(scope="session")
def pairs_folder(tmp_path_factory):
    """40 pairs of 40 pixels; one picture is no picture and one caption is empty."""
    folder = write_forty(tmp_path_factory.mktemp("pairs"))
    (folder / "13.png").write_bytes(b"this is no picture")
    (folder / "27.txt").write_text("  ")
    return folder


@pytest.fixture(scope="session")
def pairs_as(pairs_folder, tmp_path_factory):
    """The same pairs in three forms: a folder, two shards with sizes.json, a table as
    the CLOOB authors have it.
    """
    folder = tmp_path_factory.mktemp("forms")
    shards = write_shards(pairs_folder, folder / "shards")
    rows = [
        f"{path.with_suffix('.png')}\t{path.read_text()}"
        for path in sorted(pairs_folder.glob("*.txt"))
    ]
    (folder / "train.csv").write_text("\n".join(["filepath\ttitle", *rows]) + "\n")
    return {
        "folder": str(pairs_folder),
        "shards": shards,
        "table": str(folder / "train.csv"),
    }


@pytest.fixture(scope="session")
def nano_configs(tmp_path_factory):
    """open_clip configurations of towers that train in milliseconds; one of them draws
    random numbers as it trains.
    """
    from cloob.models.importing import open_clip

    folder = tmp_path_factory.mktemp("configs")
    vision = {
        "layers": 1,
        "width": 32,
        "head_width": 16,
        "patch_size": 8,
        "image_size": 32,
    }
    text = {
        "context_length": 8,
        "vocab_size": 49408,
        "width": 16,
        "heads": 1,
        "layers": 1,
    }
    others = {
        "nano-dropout": {"patch_dropout": 0.25},
        "nano-tanh": {"act_kwargs": {"approximate": "tanh"}},
    }
    for name, more in {"nano-vit": {}, **others}.items():
        config = {"embed_dim": 16, "vision_cfg": vision | more, "text_cfg": text}
        (folder / f"{name}.json").write_text(json.dumps(config))
    resnet = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "image_size": 32}
    (folder / "nano-resnet.json").write_text(
        json.dumps({"embed_dim": 16, "vision_cfg": resnet, "text_cfg": text})
    )
    (folder / "nano-wide.json").write_text(
        json.dumps({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text})
    )
    open_clip().add_model_config(folder)
    return folder


@pytest.fixture(scope="session")
def base(pairs_folder, nano_configs):
    """15 steps: 3 epochs of 5 batches of 8."""
    start = TrainConfig().override(
        data=[str(pairs_folder)], model="nano-dropout", lr=3e-3, warmup=3, epochs=3
    )
    start = start.override(batch_size=8, workers=0, max_bad_fraction=0.2, save_every=2)
    return start.override(device="cpu")


@pytest.fixture(scope="session")
def trained(base, tmp_path_factory):
    """The uninterrupted run that the others are compared with."""
    from cloob.training.loop import train

    recorder = Recorder()
    config = base.override(out=tmp_path_factory.mktemp("runs") / "whole", keep=0)
    result = train(config, callbacks=[recorder])
    return Trained(config, result.run, result, recorder)
