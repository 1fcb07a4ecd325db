"""Torch files that are no zip, shards, weights that name no program, and public files
that are fetched.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from cloob import load_model
from cloob.errors import InputError
from cloob.models import source as hub
from cloob.models.importing import open_clip
from cloob.models.source import PUBLIC, PublicFile, PublicModel
from make import noise_image, web
from support import fork, originals, raises, read_json, seeded

CLIP = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 40,
        "width": 64,
        "heads": 1,
        "layers": 2,
    },
}


def drawn(model):
    """A model with random weights, biases and norms too."""
    for parameter in model.parameters():
        if parameter.ndim:
            nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
    return model


def write_transformers_clip(folder, text_act, image_act):
    """A folder of transformers' without an image processor; returns its
    ``CLIPModel``.
    """
    import transformers

    tower = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    special = {
        "vocab_size": 40,
        "max_position_embeddings": 77,
        "eos_token_id": 39,
        "bos_token_id": 38,
    }
    config = transformers.CLIPConfig(
        text_config=tower | special | {"hidden_act": text_act},
        vision_config=tower
        | {
            "image_size": 32,
            "patch_size": 16,
            "hidden_act": image_act,
        },
        projection_dim=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = drawn(transformers.CLIPModel(config).eval())
    model.save_pretrained(folder)
    return model


def open_clip_towers():
    """open_clip's own module of ``CLIP`` with random weights, biases and norms too."""
    from open_clip import CLIP as Clip  # slow to import

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = drawn(Clip(**CLIP))
    model.logit_scale.requires_grad_(False)
    return model.eval()


def mljku_state(model):
    """The towers under ml-jku's names, as its training over several GPUs writes
    them.
    """
    state = {}
    for key, value in model.state_dict().items():
        own = (
            key
            if key.startswith("visual.") or key == "logit_scale"
            else f"transformer.{key}"
        )
        state[f"module.{'logit_inv_tau' if key == 'logit_scale' else own}"] = value
    state["module.logit_scale_hopfield"] = torch.tensor(8.0).log()
    return state


def inputs():
    """Pictures, and tokens with their end at different places; the end is the last
    word.
    """
    source = seeded(5)
    images = torch.randn(6, 3, 32, 32, generator=source)
    tokens = torch.randint(5, 38, (6, 77), generator=source)
    for row, length in zip(tokens, (3, 9, 20, 76, 40, 12), strict=True):
        row[length] = 39
        row[length + 1 :] = 0
    return images, tokens


def test_mljku_in_a_file_that_is_no_zip(tmp_path):
    model, (images, tokens) = open_clip_towers(), inputs()
    content = {"epoch": 28, "name": "x", "state_dict": mljku_state(model)}
    torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    encoder = load_model(tmp_path / "m.pt")
    assert encoder.objective_config["beta"] == pytest.approx(8.0)
    inv_tau = float(model.logit_scale.exp())
    assert encoder.objective_config["inv_tau"] == pytest.approx(inv_tau, rel=1e-6)
    close = partial(assert_close, rtol=1e-4, atol=1e-5)
    close(encoder.model.encode_image(images), model.encode_image(images))
    close(encoder.model.encode_text(tokens), model.encode_text(tokens))


@pytest.mark.parametrize("config", ["epoch_2.json", "tiny-RN.json", ""])
def test_mljku_finds_its_configuration_by_its_own_name_and_the_stored_one(
    tmp_path, config
):
    source = originals("mljku/rn/published_like.pt")
    content = torch.load(
        source, map_location="cpu"
    )  # named tiny-RN; its heads are 8 wide
    torch.save(
        {key: content[key] for key in ("epoch", "name", "state_dict")},
        tmp_path / "epoch_2.pt",
    )
    if not config:
        raises(
            InputError,
            r"number of heads .* next to it as epoch_2\.json",
            load_model,
            tmp_path / "epoch_2.pt",
        )
        return
    shutil.copy(source.parent / "tiny-RN.json", tmp_path / config)
    tokens = torch.from_numpy(np.load(source.parent / "inputs.npz")["tokens"])
    with torch.no_grad():
        rows = [
            load_model(path).encode_text(tokens)
            for path in (source, tmp_path / "epoch_2.pt")
        ]
    assert_close(rows[0], rows[1])


def rewritten(target, change, compression=zipfile.ZIP_STORED):
    """The micro ml-jku model in another zip; ``change`` gives each record's bytes by
    its name.
    """
    base = Path(__file__).parents[2] / "corpus" / "hostile" / "base"
    shutil.copy(base / "micro.json", target)
    with (
        zipfile.ZipFile(base / "mljku_micro.pt") as good,
        zipfile.ZipFile(target / "m.pt", "w", compression) as archive,
    ):
        for name in good.namelist():
            archive.writestr(name, change(name, good.read(name)))
    return target / "m.pt"


def test_torch_zips_whose_records_are_not_as_torch_writes_them(tmp_path):
    load_model(rewritten(tmp_path, lambda _, content: content))
    for short in ("data/7", "data/3"):
        path = rewritten(
            tmp_path,
            lambda name, content, of=short: content[: -2 * name.endswith(of) or None],
        )
        raises(
            InputError,
            r"m\.pt: cannot be read as weights: record .*\d+ bytes",
            load_model,
            path,
        )
    with pytest.raises(InputError, match="tensors are compressed"):
        load_model(
            rewritten(tmp_path, lambda _, content: content, zipfile.ZIP_DEFLATED)
        )


def test_a_renamed_weight_is_named_as_it_is_there(tmp_path):
    state = mljku_state(open_clip_towers())
    state["module.visual.ln_pre.bias_"] = state.pop("module.visual.ln_pre.bias")
    torch.save({"state_dict": state}, tmp_path / "m.pt")
    with pytest.raises(
        InputError,
        match=(
            r"visual\.ln_pre\.bias is missing; module\.visual\.ln_pre\.bias_ is unknown"
        ),
    ):
        load_model(tmp_path / "m.pt")


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory by /proc")
@pytest.mark.parametrize("form", ["open_clip_model.safetensors", "m.pt"])
def test_loading_takes_little_more_memory_than_the_weights(tmp_path, form):
    """Some 80 MB; a file that stays mapped while it is copied counts twice."""
    config = CLIP | {
        "text_cfg": CLIP["text_cfg"] | {"width": 256, "heads": 4, "layers": 24}
    }
    with torch.device("meta"):
        shapes = open_clip().CLIP(**config).state_dict()
    state = {key: torch.ones(value.shape) for key, value in shapes.items()}
    if form == "m.pt":
        module = SimpleNamespace(state_dict=lambda: state)
        torch.save({"state_dict": mljku_state(module)}, tmp_path / form)
    else:
        save_file(state, tmp_path / form)
        (tmp_path / "open_clip_config.json").write_text(
            json.dumps({"model_cfg": config, "preprocess_cfg": {}})
        )

    def action():
        def kilobytes(key):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(key))

        load_model(originals("openai/vit/vit-jit.pt"))  # imports what loading takes
        Path("/proc/self/clear_refs").write_text("5")
        before = kilobytes("VmRSS")
        encoder = load_model(
            tmp_path if form != "m.pt" else tmp_path / form, device="cpu"
        )
        size = sum(value.nbytes for value in encoder.state_dict().values()) / 1024
        assert size > 70_000
        assert kilobytes("VmHWM") - before < 1.6 * size

    ranks = fork(tmp_path / "fork", 1, action)
    assert ranks.wait() == [0], ranks.told()


def as_openai(state):
    """Halved as OpenAI's ``convert_weights`` does it."""
    return {
        key: value.half() if value.ndim > 1 else value for key, value in state.items()
    }


@pytest.mark.parametrize("change", [dict, as_openai])
def test_what_may_be_another_programs_is_taken_for_openais_with_a_warning(
    tmp_path, caplog, change
):
    torch.save(change(open_clip_towers().state_dict()), tmp_path / "m.pt")
    assert load_model(tmp_path / "m.pt").config.settings["quick_gelu"]
    assert len(
        [message for message in caplog.messages if "taken for OpenAI's" in message]
    ) == (change is dict)


CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with web() as running:
        running.pages["/x"] = CONTENT
        yield running


@pytest.mark.parametrize(
    ("path", "sha256", "said"),
    [("x", "0" * 64, "published is 0000"), ("missing", None, "no such file")],
)
def test_lies_are_refused_in_one_line(server, tmp_path, path, sha256, said):
    raises(
        InputError,
        said,
        hub.fetch_public,
        PublicFile(f"{server.url}/{path}", "x.bin", sha256),
        tmp_path,
    )
    assert not list(tmp_path.glob("x.bin*"))


def test_two_processes_fetch_once(server, tmp_path):
    code = (
        "import sys; from pathlib import Path; from cloob.models.source import"
        " PublicFile, fetch_public\nprint(fetch_public(PublicFile(sys.argv[1], 'x.bin',"
        " sys.argv[2]), Path(sys.argv[3])).stat().st_size)"
    )
    words = [sys.executable, "-c", code, f"{server.url}/x", SHA256, str(tmp_path)]
    both = [
        subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    found = [process.communicate()[0].strip() for process in both]
    assert found == [str(len(CONTENT))] * 2
    assert server.asked == ["/x"]


def test_a_model_by_name(server, tmp_path, monkeypatch):
    source = originals("crowsonkb/full_vocab/slim.pkl")
    server.pages["/slim.pkl"] = source.read_bytes()
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    config = read_json(source.parent / "config.json")
    file = {"url": f"{server.url}/slim.pkl", "name": "slim.pkl", "sha256": digest}
    model = PublicModel([file], config)
    monkeypatch.setitem(PUBLIC, "crowsonkb/tiny", model)
    monkeypatch.setenv("CLOOB_CACHE", str(tmp_path))
    images = torch.zeros(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(
            load_model("crowsonkb/tiny").encode_image(images),
            load_model(source).encode_image(images),
        )


# Folders of transformers' CLIPModel


SIDE = 32
SQUARE = {"height": SIDE, "width": SIDE}
PROCESSOR = dict.fromkeys(
    ["do_convert_rgb", "do_resize", "do_center_crop", "do_rescale", "do_normalize"],
    True,
) | {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": SIDE},
    "resample": 3,
    "crop_size": SQUARE,
    "rescale_factor": 1 / 255,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
OTHER = {"resample": 2, "image_mean": [0.1, 0.5, 0.9], "image_std": [0.5, 0.4, 0.3]}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder, whose processor each test writes, and its ``CLIPModel``."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    return folder, write_transformers_clip(folder, "gelu", "gelu")


def processed(folder, processor, name="preprocessor_config.json"):
    """The folder with this processor and no other."""
    for old in ("preprocessor_config.json", "processor_config.json"):
        (folder / old).unlink(missing_ok=True)
    (folder / name).write_text(json.dumps(processor))
    return folder


def without(*keys):
    return {key: value for key, value in PROCESSOR.items() if key not in keys}


def picture():
    """Twice as wide as high, so that squashed and cropped pictures are others."""
    return noise_image(0, 8, 8).resize((180, 90), Image.Resampling.BICUBIC)


def theirs(folder, model):
    """The unit row of the picture by transformers' own processor and towers."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        row = model.get_image_features(
            torch.as_tensor(processor(picture(), return_tensors="pt")["pixel_values"])
        )
    return nn.functional.normalize(getattr(row, "pooler_output", row), dim=-1)


@pytest.mark.parametrize(
    ("processor", "mode"),
    [
        (PROCESSOR, "shortest"),
        (PROCESSOR | OTHER, "shortest"),
        (PROCESSOR | {"size": SQUARE, "do_center_crop": False}, "squash"),
        (
            without("resample", "do_rescale", "rescale_factor", "image_processor_type"),
            "shortest",
        ),
    ],
    ids=["shortest", "other colours", "squash", "few fields"],
)
def test_pictures_are_prepared_as_transformers_does(clip, processor, mode):
    folder, model = clip
    encoder = load_model(processed(folder, processor), device="cpu")
    pixels = encoder.preprocess_cfg
    assert pixels["resize_mode"] == mode
    names = {2: "bilinear", 3: "bicubic"}
    assert pixels["interpolation"] == names[processor.get("resample", 3)]
    assert list(encoder.mean) == processor["image_mean"]
    assert list(encoder.std) == processor["image_std"]
    # transformers of today asks for the type
    processed(folder, {"image_processor_type": "CLIPImageProcessor"} | processor)
    row = encoder.encode_image([picture()])
    assert float((row * theirs(folder, model)).sum()) > 0.999


def test_the_processor_that_transformers_5_writes(clip):
    folder, _ = clip
    wanted = load_model(
        processed(folder, PROCESSOR | OTHER), device="cpu"
    ).preprocess_cfg
    whole = {"processor_class": "CLIPProcessor", "image_processor": PROCESSOR | OTHER}
    processed(folder, whole, "processor_config.json")
    (folder / "preprocessor_config.json").write_text(
        json.dumps(PROCESSOR)
    )  # which transformers passes over then
    assert load_model(folder, device="cpu").preprocess_cfg == wanted


@pytest.mark.parametrize(
    ("processor", "said"),
    [
        (PROCESSOR | {"size": 48}, "size is 48"),
        (without("crop_size"), "crop_size is 224; 32 or"),
        (PROCESSOR | {"do_rescale": False}, "do_rescale is False"),
        (
            PROCESSOR | {"image_processor_type": "ViTImageProcessor"},
            "image_processor_type",
        ),
    ],
)
def test_other_pictures_are_refused(clip, processor, said):
    raises(
        InputError,
        f"preprocessor_config.json: {said}",
        load_model,
        processed(clip[0], processor),
    )


def test_each_tower_has_its_own_activation(tmp_path):
    pytest.importorskip("transformers")
    mixed = tmp_path / "mixed"
    write_transformers_clip(mixed, "quick_gelu", "gelu")
    config = (mixed / "config.json").read_text()
    (mixed / "config.json").write_text(config.replace('"quick_gelu"', '"mish"'))
    raises(InputError, "hidden_act is 'mish'; gelu, quick_gelu", load_model, mixed)
    # as editors on Windows do
    (mixed / "config.json").write_text(f"\ufeff{config}", encoding="utf-8")
    raises(InputError, "hidden_act quick_gelu and gelu", load_model, mixed)
    clip = tmp_path / "clip"
    model = write_transformers_clip(clip, "gelu", "gelu_pytorch_tanh")
    encoder, (pixels, tokens) = load_model(clip, device="cpu"), inputs()
    with torch.no_grad():
        found = model(input_ids=tokens, pixel_values=pixels)
        rows = encoder.encode_image(pixels), encoder.encode_text(tokens)
    wanted = found.image_embeds, found.text_embeds
    assert_close(rows, wanted, rtol=0, atol=2e-6)
