"""Folders from strangers: none of their Python runs, no path leaves them, what is no config is one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import support
from cloob.errors import InputError, one_line
from cloob.models import untrusted
from cloob.models.aligned import open_image_encoder, open_text_encoder
from cloob.models.load import load_model
from cloob.models.runs import CONFIG_FILE, WEIGHTS_FILE
from cloob.models.untrusted import check_folder, read_json
from cloob.train.config import TrainConfig
from cloob.train.state.resume import read_checkpoint
from support import write_pairs

AUTO_MAP = {"AutoTokenizer": ["evil.Words", None], "AutoConfig": "evil.Config", "AutoModel": "evil.Model"}


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "evil was here"


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def plant(folder: Path, marker: Path, name: str) -> Path:
    """Puts Python that leaves a marker into a folder, and an ``auto_map`` that asks for it into one of its files."""
    (folder / "evil.py").write_text(
        f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
        "from transformers import BertConfig as Config, BertModel as Model, BertTokenizerFast as Words\n"
    )
    file = folder / name
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(content | {"auto_map": AUTO_MAP}))
    return folder


@pytest.fixture
def hostile(tower: Path, bert: Path, tmp_path: Path, marker: Path) -> Path:
    """A model folder of open_clip whose tokeniser is Python of its own."""
    folder = shutil.copytree(tower, tmp_path / "hostile")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bert / name, folder / name)
    text = {"hf_tokenizer_name": "local", "tokenizer_kwargs": {"trust_remote_code": True}}
    change(folder / CONFIG_FILE, lambda config: config["model_cfg"]["text_cfg"].update(text))
    return plant(folder, marker, "tokenizer_config.json")


def refused(load: Callable[[], object], *parts: str) -> None:
    with pytest.raises(InputError) as caught:
        load()
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert "trust_remote_code=True" not in str(caught.value)


def test_a_model_folder_runs_none_of_its_python(
    hostile: Path, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    never_asked(monkeypatch)
    said = f"{CONFIG_FILE}: trust_remote_code asks for Python code"
    for source in (hostile, f"local-dir:{hostile}"):
        refused(lambda source=source: load_model(source), said)
    for open_it in (open_image_encoder, open_text_encoder):
        refused(lambda open_it=open_it: open_it(str(hostile), load_model), said)
    change(hostile / CONFIG_FILE, lambda config: config["model_cfg"]["text_cfg"].pop("tokenizer_kwargs"))
    refused(lambda: load_model(hostile), "tokenizer_config.json: auto_map asks for Python code")
    assert not marker.exists()


def never_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(prompt: str = "") -> str:
        raise AssertionError("asked whether to run it")

    monkeypatch.setattr("builtins.input", ask)


def test_the_weights_are_not_looked_at_before(hostile: Path) -> None:
    (hostile / WEIGHTS_FILE).write_bytes(b"damaged")
    refused(lambda: load_model(hostile), "Python code of the model's own")


def test_commands_refuse_it_in_one_line(
    hostile: Path, marker: Path, tmp_path: Path, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--data", str(pairs), "--batch-size", "2", "--device", "cpu", "--workers", "0", "--out", str(tmp_path / "o")]
    encoders = ["--image-encoder", str(hostile), "--text-encoder", str(hostile)]
    for words in (
        ["eval", str(hostile), "--retrieval", str(pairs), "--out", str(tmp_path / "e"), "--workers", "0"],
        ["train", "--init", str(hostile), *run],
        ["train", *encoders, *run],
    ):
        assert "asks for Python code of the model's own" in support.refused(capsys, *words)
    assert not marker.exists()


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "pairs", {f"{i}": ((60 * i, 0, 0), f"shade {i}") for i in range(4)})


def test_a_tokenizer_of_another_model_stops_training_before_it_begins(
    tower: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tower, tmp_path / "few words")
    weights = load_file(folder / WEIGHTS_FILE)
    save_file(
        weights | {"token_embedding.weight": weights["token_embedding.weight"][:32].clone()}, folder / WEIGHTS_FILE
    )
    change(folder / CONFIG_FILE, lambda config: config["model_cfg"]["text_cfg"].update(vocab_size=32))
    run = ["--data", str(pairs), "--batch-size", "2", "--device", "cpu", "--workers", "0", "--out", str(tmp_path / "o")]
    words = ["train", "--init", str(folder), *run]
    assert "token 49407 found, and its text tower knows 0 to 31" in support.refused(capsys, *words)
    assert not (tmp_path / "o").exists()


def test_a_checkpoint_is_resumed_from_only_without_code(hostile: Path, tmp_path: Path, marker: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    shutil.copytree(hostile, checkpoint / "model")
    (checkpoint / "trainer.pt").write_bytes(b"not even read")
    refused(lambda: read_checkpoint(checkpoint), "Python code of the model's own")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_an_encoder_of_align_runs_none_of_its_python(
    name: str, bert: Path, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    never_asked(monkeypatch)
    folder = plant(shutil.copytree(bert, tmp_path / "bert"), marker, name)
    for spec in (str(folder), f"hf:{folder}"):
        refused(lambda spec=spec: open_text_encoder(spec, load_model), name, "auto_map")
    plant(folder, marker, "config.json")
    refused(lambda: open_image_encoder(f"timm:local-dir:{folder}", load_model), "auto_map")
    assert not marker.exists()


def cached(folder: Path, hub: Path, owner: str, name: str) -> None:
    """Puts a folder into a hub cache, as what was fetched before."""
    place = hub / f"models--{owner}--{name}"
    shutil.copytree(folder, place / "snapshots" / ("0" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hub"
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", str(folder))
    return folder


def test_a_model_of_the_hub_runs_none_of_its_python(
    hostile: Path,
    tower: Path,
    bert: Path,
    tmp_path: Path,
    marker: Path,
    hub_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    never_asked(monkeypatch)
    cached(tower, hub_cache, "some", "good")
    assert load_model("hf-hub:some/good").embed_dim == 256
    cached(hostile, hub_cache, "some", "hostile")
    refused(lambda: load_model("hf-hub:some/hostile"), "Python code of the model's own")
    cached(plant(shutil.copytree(bert, tmp_path / "bert"), marker, "config.json"), hub_cache, "some", "bert")
    refused(lambda: open_text_encoder("hf:some/bert", load_model), "some--bert", "auto_map")
    refused(lambda: open_image_encoder("timm:hf-hub:some/bert", load_model), "auto_map")
    good = hub_cache / "models--some--good"  # whose main is, and whose older revision is not
    shutil.copytree(tmp_path / "bert", good / "snapshots" / ("1" * 40))
    (good / "refs" / "old").write_text("1" * 40)
    refused(lambda: open_image_encoder("timm:hf-hub:some/good@old", load_model), "auto_map")
    for key in ("hf_tokenizer_name", "hf_model_name"):  # a good model that names a bad one
        other = shutil.copytree(tower, tmp_path / key)
        change(other / CONFIG_FILE, lambda c, key=key: c["model_cfg"]["text_cfg"].update({key: "some/bert"}))
        cached(other, hub_cache, "by", key)
        refused(lambda key=key: load_model(f"hf-hub:by/{key}"), "auto_map")
    refused(lambda: load_model(tmp_path / "hf_model_name"), "auto_map")
    assert not marker.exists()


def test_the_towers_of_the_hub_are_read_before_their_tokenizer(tower: Path, tmp_path: Path, hub_cache: Path) -> None:
    """Which takes the sizes in the configuration as they are."""
    folder = shutil.copytree(tower, tmp_path / "m")
    change(folder / CONFIG_FILE, lambda config: config.update(tokenizer={"kind": "hub", "pad": 0, "end": 1}))
    change(folder / CONFIG_FILE, lambda config: config["model_cfg"]["text_cfg"].update(vocab_size="many"))
    cached(folder, hub_cache, "some", "words")
    refused(lambda: load_model("hf-hub:some/words"), f"{CONFIG_FILE}: model_cfg.text_cfg.vocab_size is 'many'")


def test_a_tokenizer_in_another_file_is_refused_before_transformers_takes_it(
    bert: Path, tower: Path, tmp_path: Path, hub_cache: Path
) -> None:
    words = shutil.copytree(bert, tmp_path / "words")
    shutil.copy(words / "tokenizer.json", words / "tokenizer.4.0.0.json")
    others = {"tokenizer_class": "PreTrainedTokenizerFast", "fast_tokenizer_files": ["tokenizer.4.0.0.json"]}
    change(words / "tokenizer_config.json", lambda config: config.update(others))
    cached(words, hub_cache, "some", "words")
    towers = shutil.copytree(tower, tmp_path / "towers")
    change(towers / CONFIG_FILE, lambda c: c["model_cfg"]["text_cfg"].update(hf_tokenizer_name="some/words"))
    cached(towers, hub_cache, "some", "towers")
    said = "tokenizer_config.json: fast_tokenizer_files names other files than tokenizer.json"
    refused(lambda: load_model("hf-hub:some/towers"), said)
    for name in ("tokenizer.json", "tokenizer.4.0.0.json", "tokenizer_config.json"):
        shutil.copy(words / name, towers / name)
    refused(lambda: load_model(towers), said)
    for spec in (str(words), f"hf:{words}", "hf:some/words"):
        refused(lambda spec=spec: open_text_encoder(spec, load_model), said)


@pytest.mark.parametrize(
    "asks",
    [
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": "paged|evil/kernel@main:run"},
        {"_attn_implementation_internal": "evil/kernel"},
        {"attn_implementation": {"": "eager", "text_config": "evil/kernel"}},
        {"text_config": {"experts_implementation": "evil/kernel"}},
    ],
)
def test_a_kernel_of_the_hub_is_code(asks: dict[str, Any], bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "bert")
    change(folder / "config.json", lambda config: config.update(attn_implementation="sdpa"))
    open_text_encoder(f"hf:{folder}", load_model)
    change(folder / "config.json", lambda config: config.update(asks))
    refused(lambda: open_text_encoder(f"hf:{folder}", load_model), "_implementation", "asks for Python code of the")


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("text_cfg", "hf_tokenizer_name", "../words"),
        ("text_cfg", "hf_tokenizer_name", "/etc"),
        ("text_cfg", "hf_tokenizer_name", ["a"]),
        ("text_cfg", "hf_model_name", "~/model"),
        ("text_cfg", "hf_model_name", "..\\model"),
        ("text_cfg", "hf_model_name", "C:\\model"),
        ("vision_cfg", "timm_model_name", "local-dir:/tmp/x"),
        ("vision_cfg", "timm_model_name", "hf-hub:some/vit"),
        ("text_cfg", "tokenizer_kwargs", {"bpe_path": "/tmp/words.gz"}),
        ("text_cfg", "tokenizer_kwargs", {"clean": {"a": 1}}),
        ("text_cfg", "tokenizer_kwargs", ["clean"]),
    ],
)
def test_what_a_config_may_not_name(part: str, key: str, value: object, tower: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tower, tmp_path / "m")
    change(folder / CONFIG_FILE, lambda config: config["model_cfg"][part].update({key: value}))
    refused(lambda: load_model(folder), CONFIG_FILE, f"{part}.{key}")


def test_arguments_of_open_clip_s_own_configs_are_taken(tower: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tower, tmp_path / "m")
    arguments = {"tokenizer_kwargs": {"clean": "canonicalize"}}
    change(folder / CONFIG_FILE, lambda config: config["model_cfg"]["text_cfg"].update(arguments))
    tokens = load_model(folder).tokenizer(["A, cat", "a cat"])
    assert torch.equal(tokens[0], tokens[1])


@pytest.mark.parametrize("name", ["pytorch_model.bin.index.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("shard", ["../../weights.bin", "/etc/weights.bin", "..\\weights.bin"])
def test_an_index_of_shards_stays_in_its_folder(name: str, shard: str, bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "bert")
    (folder / name).write_text(json.dumps({"weight_map": {"a": "model-1.bin", "b": shard}}))
    refused(lambda: open_text_encoder(str(folder), load_model), name, "outside of its folder")


def test_a_vocabulary_outside_of_the_folder_is_not_read(bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "bert")
    secret = tmp_path / "secret"
    secret.write_text("word")
    change(folder / "tokenizer_config.json", lambda config: config.update(vocab_file=str(secret)))
    refused(lambda: open_text_encoder(str(folder), load_model), "vocab_file", "outside of its folder")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"model_cfg": {}, "model_cfg": {"embed_dim": 1}}', "the key 'model_cfg' is there twice"),
        ('{"inv_tau": NaN}', "NaN is no number of JSON"),
        ('{"inv_tau": -Infinity}', "-Infinity is no number of JSON"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "nested too deeply"),
        ("[" * 400 + "]" * 400, "nested too deeply"),
        ("[1, 2]", "a JSON object wanted, list found"),
        ('{"a": ' + "1" * 5000 + "}", "11… is a number of 5,000 digits"),
        ('{"inv_tau": ' + "9" * 400 + "}", "99… is a number of 400 digits"),
        ('{"inv_tau": 1e999}', "1e999 is beyond every floating-point number"),
        ('{"inv_tau": -1e999}', "-1e999 is beyond every floating-point number"),
        ("\ufeff{}", "not readable as JSON"),
        ('{"a": 1', "not readable as JSON"),
    ],
    ids=[
        "twice",
        "nan",
        "infinity",
        "deep",
        "deep list",
        "list",
        "long number",
        "400 digits",
        "large",
        "small",
        "bom",
        "cut",
    ],
)
def test_json_that_is_no_configuration(text: str, said: str, tower: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tower, tmp_path / "m")
    for name in (CONFIG_FILE, "objective.json"):
        before = (folder / name).read_text()
        (folder / name).write_text(text)
        refused(lambda: load_model(folder), name, said)
        (folder / name).write_text(before)
    (folder / CONFIG_FILE).write_bytes(b" " * (17 << 20))
    refused(lambda: read_json(folder / CONFIG_FILE), "too many for a configuration")


@pytest.mark.parametrize(
    "values", [{"inv_tau": "x"}, {"inv_tau": -1}, {"inv_tau": [1]}, {"beta": "z"}, {"beta": 0}, {"bias": "z"}]
)
def test_an_objective_without_its_numbers(values: dict[str, Any], tower: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tower, tmp_path / "m")
    settings = json.loads((folder / "objective.json").read_text())
    (folder / "objective.json").write_text(json.dumps(settings | values))
    refused(lambda: load_model(folder), "objective.json", f"{next(iter(values))} is")


@pytest.mark.parametrize(
    ("part", "values", "said"),
    [
        ("text_cfg", {"width": None}, "text_cfg.width is None; a whole number"),
        ("text_cfg", {"width": [8]}, "text_cfg.width is [8]; a whole number"),
        ("text_cfg", {"heads": None}, "text_cfg.heads is None; a whole number"),
        ("text_cfg", {"output_tokens": True}, "text_cfg.output_tokens is True; false is wanted"),
        ("vision_cfg", {"width": [8]}, "vision_cfg.width is [8]; a whole number"),
        ("vision_cfg", {"head_width": [4]}, "vision_cfg.head_width is [4]; a whole number"),
        ("vision_cfg", {"head_width": None}, "vision_cfg.head_width is None; a whole number"),
        ("vision_cfg", {"patch_size": None}, "vision_cfg.patch_size is None; a whole number"),
        ("vision_cfg", {"image_size": None}, "vision_cfg.image_size is None; a whole number"),
        ("vision_cfg", {"image_size": ["a", "b"]}, "vision_cfg.image_size is ['a', 'b']; a whole number"),
        ("vision_cfg", {"image_size": [8]}, "vision_cfg.image_size is [8]; a whole number"),
        ("vision_cfg", {"output_tokens": True}, "vision_cfg.output_tokens is True; false is wanted"),
        ("preprocess_cfg", {"mode": "L"}, "preprocess_cfg.mode is 'L'; 'RGB' is wanted"),
        ("preprocess_cfg", {"resize_mode": ["x"]}, "preprocess_cfg.resize_mode is ['x']; 'shortest'"),
        ("preprocess_cfg", {"fill_color": "x"}, "preprocess_cfg.fill_color is 'x'; a whole number"),
        ("preprocess_cfg", {"std": [1e-300, 1, 1]}, "preprocess_cfg.std is [1e-300, 1, 1]; three numbers from 1e-06"),
        ("preprocess_cfg", {"mean": [1e300, 1, 1]}, "preprocess_cfg.mean is [1e+300, 1, 1]; three numbers from"),
    ],
)
def test_a_field_of_another_kind_is_named(
    part: str, values: dict[str, object], said: str, tower: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tower, tmp_path / "m")
    change(folder / CONFIG_FILE, lambda all_: (all_ if part in all_ else all_["model_cfg"])[part].update(values))
    refused(lambda: load_model(folder), CONFIG_FILE, said)


class Counted(str):
    """A key that counts how often it is compared."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return str.__eq__(self, other)


def test_a_key_that_is_there_twice_is_found_without_comparing_all() -> None:
    keys = [*range(1000), 1000, 1000]
    with pytest.raises(ValueError, match="the key '1000' is there twice"):
        untrusted._no_key_twice([(Counted(key), None) for key in keys])
    assert Counted.compared < 10_000


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
@pytest.mark.parametrize("name", [CONFIG_FILE, "config.json", "special_tokens_map.json", "objective.json"])
def test_a_pipe_or_a_device_is_no_configuration(name: str, tower: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tower, tmp_path / "m")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(os.devnull)
    refused(lambda: read_json(folder / name), name, "a pipe or a device, not a file")
    refused(lambda: check_folder(folder), name, "a pipe or a device, not a file")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(lambda: check_folder(folder), name, "a pipe or a device, not a file")


def test_the_shared_hostile_folders(shared_data: Path) -> None:
    hostile = shared_data.parent / "weights" / "hostile"
    if not hostile.is_dir():
        pytest.skip("the hostile files are not beside the checkout")
    refused(lambda: check_folder(hostile / "hf_remote_code"), "config.json: auto_map")
    refused(lambda: check_folder(hostile / "hf_index_traversal"), "outside of its folder")
    for path in hostile.glob("config_d*.json"):
        refused(lambda path=path: read_json(path), path.name)


def test_heads_whose_encoder_is_their_own_folder(tower: Path, bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "loop"
    folder.mkdir()
    head = {"features": 4, "embed_dim": 4, "kind": "linear", "dropout": 0.0}
    content = {"format": 1, "image_encoder": str(folder), "text_encoder": str(bert), "image_size": 64}
    content |= {"image_fingerprint": "", "text_fingerprint": "", "heads": {"image": head, "text": head}}
    (folder / "aligned.json").write_text(json.dumps(content))
    (folder / "heads.safetensors").write_bytes(b"")
    refused(lambda: load_model(folder), "leads back to this folder")


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return os.mkdir, (self.path,)


def test_a_refused_pickle_is_not_said_to_be_safe_to_load(tower: Path, tmp_path: Path, marker: Path) -> None:
    """torch's own message advises ``weights_only=False``, which would run the file."""
    checkpoint = tmp_path / "step-00000001"
    shutil.copytree(tower, checkpoint / "model")
    torch.save({"format": 1, "optimizer": Bomb(marker)}, checkpoint / "trainer.pt")
    folder = shutil.copytree(tower, tmp_path / "m")
    (folder / WEIGHTS_FILE).unlink()
    torch.save({"state_dict": Bomb(marker)}, folder / "open_clip_pytorch_model.bin")
    for load, file in (
        (lambda: read_checkpoint(checkpoint), "trainer.pt"),
        (lambda: load_model(folder), "open_clip_pytorch_model.bin"),
    ):
        with pytest.raises(InputError) as caught:
            load()
        text = str(caught.value)
        assert file in text and "posix.mkdir" in text
        assert not any(word in text for word in ("weights_only", "succeed", "\n"))
    assert not marker.exists()


def test_advice_to_run_code_is_left_out() -> None:
    error = ValueError("x has code. Please pass the argument `trust_remote_code=True` to allow custom code to be run.")
    assert one_line(error) == "x has code."


def test_nothing_of_it_runs_in_a_process_of_its_own(hostile: Path, marker: Path) -> None:
    script = "import sys; from cloob import load_model; load_model(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", script, str(hostile)], input="y\n", capture_output=True, text=True)
    assert done.returncode and "Python code of the model's own" in done.stderr and not marker.exists()


@pytest.fixture
def nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any parameter that has memory of its own is an error; the skeleton's have none."""
    original = torch.nn.Parameter.__new__

    def without_memory(cls: type, data: torch.Tensor | None = None, requires_grad: bool = True) -> torch.nn.Parameter:
        assert data is None or data.is_meta, tuple(data.shape)
        return original(cls, data, requires_grad)

    monkeypatch.setattr(torch.nn.Parameter, "__new__", without_memory)


HUGE = 10**9
SIZES = {
    "layers": ({"vision_cfg": {"layers": HUGE}}, "layers is 1e+09"),
    "text layers": ({"text_cfg": {"layers": 200}}, "layers is 200"),
    "width": ({"text_cfg": {"width": HUGE}}, "width is 1e+09"),
    "vocabulary": ({"text_cfg": {"vocab_size": 1 << 24}}, "token_embedding.weight has shape"),
    "queries": (
        {"vision_cfg": {"attentional_pool": True, "attn_pooler_queries": HUGE}},
        "attn_pooler_queries is 1e+09",
    ),
    "ratio": ({"text_cfg": {"mlp_ratio": 1e5}}, "mlp.c_fc.weight has shape"),
    "table": ({"vision_cfg": {"pos_embed_type": "sin_cos_2d", "image_size": 65536, "patch_size": 1}}, "image_size is"),
    "decoder": ({"multimodal_cfg": {"layers": HUGE}}, "layers is 1e+09"),
    "timm": ({"vision_cfg": {"timm_model_name": "vit_giant_patch14_224"}}, "its weights do not fit"),
    "timm's head": ({"embed_dim": 60_000, "vision_cfg": {"timm_model_name": "resnet18"}}, "its weights do not fit"),
}


@pytest.mark.parametrize("case", SIZES)
def test_sizes_of_a_configuration_take_no_memory(
    tower: Path, tmp_path: Path, hub_cache: Path, nothing_is_built: None, case: str
) -> None:
    edit, said = SIZES[case]
    folder = shutil.copytree(tower, tmp_path / "m")

    def enlarge(config: dict[str, Any]) -> None:
        for part, values in edit.items():
            inner = config["model_cfg"].setdefault(part, {}) if isinstance(values, dict) else None
            config["model_cfg"].update({part: values}) if inner is None else inner.update(values)

    change(folder / CONFIG_FILE, enlarge)
    refused(lambda: load_model(folder), said)
    cached(folder, hub_cache, "some", "huge")
    refused(lambda: load_model("hf-hub:some/huge"), said)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_hidden_layers": HUGE}, "num_hidden_layers is 1e+09"),
        ({"vocab_size": HUGE}, "parameters, and its weights have"),
    ],
)
def test_sizes_of_a_text_encoder_take_no_memory(
    tower: Path, bert: Path, tmp_path: Path, hub_cache: Path, nothing_is_built: None, values: dict[str, int], said: str
) -> None:
    folder = shutil.copytree(bert, tmp_path / "bert")
    change(folder / "config.json", lambda config: config.update(values))
    cached(folder, hub_cache, "some", "huge")
    refused(lambda: open_text_encoder(str(folder), load_model), said)
    refused(lambda: open_text_encoder("hf:some/huge", load_model), said)
    named = shutil.copytree(tower, tmp_path / "m")
    change(named / CONFIG_FILE, lambda config: config["model_cfg"]["text_cfg"].update({"hf_model_name": "some/huge"}))
    refused(lambda: load_model(named), said if "layers" in said else "its weights do not fit")


@pytest.mark.parametrize(
    ("values", "said"),
    [({"depth": HUGE}, "depth is 1e+09"), ({"embed_dim": 64_000, "num_heads": 1}, "parameters, and its weights have")],
)
def test_sizes_of_an_image_encoder_take_no_memory(
    tmp_path: Path, hub_cache: Path, nothing_is_built: None, values: dict[str, int], said: str
) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    content = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": values, "pretrained_cfg": {}}
    (folder / "config.json").write_text(json.dumps(content))
    cached(folder, hub_cache, "some", "huge")
    refused(lambda: open_image_encoder(f"timm:local-dir:{folder}", load_model), said)
    refused(lambda: open_image_encoder("timm:hf-hub:some/huge", load_model), said)
    for spelled in (f"Local-Dir:{folder}", "hf_hub:some/huge", "HF-HUB:some/huge", "some/huge"):
        refused(lambda spelled=spelled: open_image_encoder(f"timm:{spelled}", load_model), f"timm:{spelled}: timm:NAME")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"run": {"seed": 1, "seed": 2}}', "the key 'seed' is there twice"),
        ('{"optim": {"lr": NaN}}', "NaN is no number"),
        ("[" * 5000 + "]" * 5000, "nested too deeply"),
    ],
)
def test_the_config_of_a_run_is_a_stranger_s_too(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "config.json").write_text(text)
    refused(lambda: TrainConfig.from_json(tmp_path / "config.json"), "config.json", said)
