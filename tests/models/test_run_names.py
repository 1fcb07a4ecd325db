"""Names of models: runs, the hub and its cache, paths as people write them; and folders
from strangers.
"""

import functools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import cloob
from cloob.errors import InputError
from cloob.models.aligned.encoders import open_image_encoder, open_text_encoder
from cloob.models.load import load_model
from cloob.models.runs import CONFIG_FILE
from cloob.models.source import ModelSource
from cloob.models.towers import create_model
from make import tiny_model, web, write_classes
from support import fill_hub_cache, free_port, raises, read_json, run_cloob, use_hub

BEST = 60
LAST = 160


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for step in (BEST, LAST):
        tiny_model(folder / str(step), seed=step)
    return folder


@pytest.fixture
def runs(models, tmp_path, monkeypatch):
    """``runs/mine`` was better at step 60 than at the end, ``runs/plain`` held nothing
    out.
    """
    monkeypatch.chdir(tmp_path)
    for run, step, recall in (
        ("mine", BEST, 0.32),
        ("mine", LAST, 0.25),
        ("plain", BEST, None),
        ("plain", LAST, None),
    ):
        checkpoint = tmp_path / "runs" / run / "checkpoints" / f"step-{step:08d}"
        shutil.copytree(models / str(step), checkpoint / "model", copy_function=os.link)
        if recall is not None:
            values = {"metric": "val_recall", "val_loss": 1.0, "val_recall": recall}
            (checkpoint / "validation.json").write_text(json.dumps(values))
    write_classes(tmp_path / "pictures", {"red": (255, 0, 0), "blue": (0, 0, 255)}, 2)
    return tmp_path / "runs"


@functools.cache
def projection(seed):
    return create_model("tiny-vit", seed=seed).model.visual.proj


def step_of(model):
    """Of which checkpoint above a model is."""
    return next(
        seed
        for seed in (BEST, LAST)
        if torch.equal(projection(seed), model.model.visual.proj)
    )


def test_a_run_is_its_best_checkpoint(runs):
    names = {
        "runs/mine": BEST,
        "local-dir:runs/mine": BEST,
        "runs/mine:best": BEST,
        "runs/mine:last": LAST,
    }
    for name, step in (names | {"runs/plain": LAST}).items():
        assert step_of(cloob.load_model(name, device="cpu")) == step, name


def test_eval_and_export_take_the_best(runs, capsys):
    words = "runs/mine runs/mine:last runs/mine:best --zeroshot pictures"
    run_cloob(f"eval {words} --device cpu --out e")
    message = "runs/mine: its best checkpoint, step 60 (runs/mine:last is the last)\n"
    assert capsys.readouterr().err.count(message) == 1
    rows = read_json(Path("e/results.json"))["rows"]
    best, last, named = (row["fingerprint"] for row in rows)
    assert [row["model"] for row in rows] == ["mine", "mine:last", "mine:best"]
    assert best == named != last
    run_cloob("export runs/mine --to=cloob --out=converted")
    assert step_of(cloob.load_model("converted", device="cpu")) == BEST


def test_an_index_says_which_checkpoint_it_was_made_by(runs, capsys):
    index = "index --out i --device cpu --model"
    run_cloob(f"{index} runs/mine pictures")
    with cloob.Index.open("i") as opened:
        model = opened.model()
        assert model.name == "mine"
        assert model.spec == f"{runs}/mine:best"
        assert step_of(opened.torch_embedder().encoder) == BEST
    # without a cutoff no unrelated words are embedded
    search = "search i red --cutoff none"
    run_cloob(search)
    # By its whole name it is the same model; the last checkpoint is another one.
    run_cloob(f"{index} runs/mine:best")
    run_cloob(f"{index} runs/mine:last", code=2)
    assert "other weights" in capsys.readouterr().err
    # The run goes on and gets better: the index has vectors of another checkpoint.
    better = runs / "mine" / "checkpoints" / "step-00000200"
    tiny_model(better / "model", seed=3)
    values = {"metric": "val_recall", "val_loss": 1.0, "val_recall": 0.5}
    (better / "validation.json").write_text(json.dumps(values))
    run_cloob(search, code=2)
    assert "mine: has other weights" in capsys.readouterr().err


def test_what_is_of_a_fixed_list(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pkl").touch()
    names = [
        "ViT-B-32/openai",
        "crowsonkb/vit-b-16-laion400m-16:port",
        "ViT-B-32",
        "ViT-B-32/w.pkl",
        "hf-hub:a/b",
    ]
    public = [name for name in names if ModelSource.parse(name).is_public]
    assert public == names[:2]


def test_what_is_not_there_and_cannot_be_fetched_is_one_line(tmp_path, monkeypatch):
    address = f"http://127.0.0.1:{free_port()}"
    use_hub(monkeypatch, address, tmp_path)
    for offline, reason in (
        (False, f"{address} does not answer"),
        (True, "HF_HUB_OFFLINE is set"),
    ):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        for source in ("ViT-B-32/laion2b_s34b_b79k", "hf-hub:nobody/nothing"):
            said = (
                f"^{source}: not on this machine, and {reason}; a model folder on this"
            )
            raises(InputError, said, load_model, source)


def test_a_tokenizer_in_the_folder_asks_nobody(tower, bert, tmp_path, monkeypatch):
    folder = shutil.copytree(tower, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bert / name, folder / name)
    config = read_json(folder / CONFIG_FILE)
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "local"
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    with web() as hub:
        use_hub(monkeypatch, hub.url, tmp_path / "hub")
        assert load_model(folder).encode_text(["a red car"]).shape == (1, 256)
    assert hub.asked == []


def test_home_is_a_tilde(tower, tmp_path, monkeypatch):
    (tmp_path / "mine").symlink_to(tower)
    (tmp_path / "w.pt").write_bytes(b"none")
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in ("~/mine", "local-dir:~/mine"):
        assert load_model(source).name == "tiny-vit"
    raises(InputError, "cannot be read as weights", load_model, "~/w.pt")


# Folders from strangers: none of their Python runs, no path leaves them, what is no
# config is one line


AUTO_MAP = {
    "AutoTokenizer": ["evil.Words", None],
    "AutoConfig": "evil.Config",
    "AutoModel": "evil.Model",
}


def change(path, edit):
    content = read_json(path)
    edit(content)
    path.write_text(json.dumps(content))


def plant(folder, marker, name):
    """Puts Python that leaves a marker into a folder, and an ``auto_map`` that asks for
    it into one of its files.
    """
    (folder / "evil.py").write_text(
        f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nfrom transformers"
        " import BertConfig as Config, BertModel as Model, BertTokenizerFast as"
        " Words\n"
    )
    file = folder / name
    content = read_json(file) if file.is_file() else {}
    file.write_text(json.dumps(content | {"auto_map": AUTO_MAP}))
    return folder


def refused_folder(load, *parts):
    message = raises(InputError, ".", load)
    assert (
        all(part in message for part in parts)
        and "trust_remote_code=True" not in message
    ), message


def test_a_model_of_the_hub_runs_none_of_its_python(tower, bert, tmp_path, monkeypatch):
    monkeypatch.delattr("builtins.input")  # nobody is asked whether to run it
    hub = tmp_path / "hub"
    marker = tmp_path / "evil was here"
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", str(hub))
    fill_hub_cache(hub, "some/good", tower)
    assert load_model("hf-hub:some/good").embed_dim == 256
    hostile = shutil.copytree(tower, tmp_path / "hostile")  # whose tokeniser is Python
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bert / name, hostile / name)
    text = {
        "hf_tokenizer_name": "local",
        "tokenizer_kwargs": {"trust_remote_code": True},
    }
    change(
        hostile / CONFIG_FILE,
        lambda config: config["model_cfg"]["text_cfg"].update(text),
    )
    fill_hub_cache(hub, "some/hostile", plant(hostile, marker, "tokenizer_config.json"))
    refused_folder(lambda: load_model("hf-hub:some/hostile"), "asks for Python code")
    fill_hub_cache(
        hub,
        "some/bert",
        plant(shutil.copytree(bert, tmp_path / "bert"), marker, "config.json"),
    )
    refused_folder(
        lambda: open_text_encoder("hf:some/bert", load_model), "some--bert", "auto_map"
    )
    raises(
        InputError,
        "an image encoder is",
        open_image_encoder,
        "timm:hf-hub:some/good",
        load_model,
    )
    for key in (
        "hf_tokenizer_name",
        "hf_model_name",
    ):  # a good model that names a bad one
        other = shutil.copytree(tower, tmp_path / key)
        change(
            other / CONFIG_FILE,
            lambda c, key=key: c["model_cfg"]["text_cfg"].update({key: "some/bert"}),
        )
        fill_hub_cache(hub, f"by/{key}", other)
        refused_folder(lambda key=key: load_model(f"hf-hub:by/{key}"), "auto_map")
    refused_folder(lambda: load_model(tmp_path / "hf_model_name"), "auto_map")
    assert not marker.exists()
