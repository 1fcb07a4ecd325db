"""An ONNX folder by ``load_model`` and without torch: the model's rows, what it cannot
do, the example of its page.
"""

import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from PIL import Image
from torch.testing import assert_close

from cloob import load_model
from cloob.errors import InputError
from cloob.models.folder import save_model
from cloob.models.importing import open_clip
from cloob.models.load import fingerprint
from cloob.models.onnx import PlainEncoder
from cloob.models.runs import ONNX_FILE
from cloob.search.index import Index
from cloob.search.update import UpdateOptions
from make import noise_image, picture
from support import made_once, raises, read_json, refused, run_cloob, run_script, seeded


@pytest.fixture(scope="session")
def model(lively, tmp_path_factory):
    config = open_clip().get_model_config("tiny-resnet")
    config["vision_cfg"]["layers"], config["text_cfg"]["layers"] = (
        [1, 1, 1, 1],
        1,
    )  # a graph that is soon traced
    place = tmp_path_factory.mktemp("configs") / "small-resnet.json"
    place.write_text(json.dumps(config))
    open_clip().add_model_config(place)
    encoder = lively(place.stem)
    encoder.objective_config = {
        "contrast": "infoloob",
        "hopfield": True,
        "inv_tau": 30.0,
        "beta": 8.0,
    }
    return encoder


@pytest.fixture(scope="session")
def exported(model, tmp_path_factory):
    """``model`` as ``cloob export --to onnx`` writes it."""

    def work(folder):
        save_model(folder / "model", model, model.objective_config)
        run_cloob(
            [
                "export",
                str(folder / "model"),
                f"--out={folder / 'onnx'}",
                "--to=onnx",
            ]
        )

    return made_once(tmp_path_factory, "onnx-exported", work) / "onnx"


TEXTS = [
    "a dog",
    "",
    "two cats & a bird",
    "long " * 100,
    "Tom &amp; naïve ☃",
    *(f"number {i}" for i in range(40)),
]


@pytest.fixture(scope="module")
def loaded(exported):
    return load_model(exported, device="cpu")


@pytest.mark.parametrize("n", [0, 1, 7, 45])
def test_rows_are_the_models(model, loaded, n):
    generator = seeded(n)
    shape = n, 3, 64, 64
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    for images in (pixels, pixels.float() / 255):
        found, wanted = (each.encode_image(images) for each in (loaded, model))
        assert_close(found, wanted, rtol=0, atol=5e-5)
    for texts in (TEXTS[:n], TEXTS[::-1][:n]):
        found, wanted = (each.encode_text(texts) for each in (loaded, model))
        assert_close(found, wanted, rtol=0, atol=5e-5)


def test_what_else_it_says_is_the_models(model, loaded, exported):
    for kind in ("vision_model", "text_model"):
        assert (exported / "onnx" / f"{kind}.onnx").is_file()
    for name in ("name", "embed_dim", "context_length", "preprocess_cfg"):
        assert getattr(loaded, name) == getattr(model, name)
    copy = pickle.loads(pickle.dumps(loaded))
    assert torch.equal(copy.encode_text(TEXTS[:3]), loaded.encode_text(TEXTS[:3]))
    objective = loaded.make_objective()
    assert float(objective.inv_tau) == pytest.approx(30)
    assert float(objective.beta) == pytest.approx(8)


def test_graphs_that_are_not_there_or_are_others_are_one_line(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "m")
    content = read_json(folder / ONNX_FILE)
    (folder / ONNX_FILE).write_text(
        json.dumps(content | {"format": 0}), encoding="utf-8"
    )
    raises(InputError, r"onnx\.json: damaged", load_model, folder)
    (folder / ONNX_FILE).write_text(json.dumps(content), encoding="utf-8")
    (folder / "onnx" / "text_model.onnx").unlink()
    encoder = load_model(folder)
    raises(InputError, r"text_model\.onnx", encoder.encode_text, ["a"])


def test_commands_that_need_weights_say_so(exported, tmp_path, capsys):
    for words in (
        "train --data demo:val --steps 1 --device cpu --init",
        "export --to cloob",
        "export --to onnx",
    ):
        line = refused(capsys, f"{words} {exported} --out {tmp_path}/out")
        assert "an ONNX export embeds" in line
        assert not list(tmp_path.glob("out/*"))


def test_nothing_of_open_clip_is_imported_and_onnxruntime_is_asked_for(exported):
    script = """
import sys
from PIL import Image
from cloob import load_model
model = load_model(sys.argv[1])
model.encode_text(["a dog"]); model.encode_image([Image.new("RGB", (80, 70))])
print([name for name in ("open_clip", "torchvision", "timm", "transformers", "onnx") if name in sys.modules])
sys.modules["onnxruntime"] = None
try:
    load_model(sys.argv[1]).encode_text(["a"])
except Exception as error:
    print(error)
"""
    run = run_script(script, str(exported))
    imported, said = run.stdout.splitlines()
    assert (
        imported == "[]"
        and "onnxruntime is not installed" in said
        and "[train]" in said
    ), run.stderr


def test_no_path_of_this_machine_is_in_the_graphs(exported):
    for path in (exported / "onnx").glob("*.onnx"):
        content = path.read_bytes()
        assert b"site-packages" not in content
        assert str(Path.home()).encode() + b"/" not in content
        assert b"stack_trace" not in content


def test_the_example_without_torch_and_cloob(model, exported, tmp_path):
    (code,) = re.findall(
        r"```py\n(.*?)```",
        (exported / "README.md").read_text(encoding="utf-8"),
        re.DOTALL,
    )
    code = code.replace("dog.jpg", "dog.png")
    pictures = ("cat.jpg", "dog.png")
    for number, (name, size, channels) in enumerate(
        zip(pictures, ((90, 131), (200, 67)), (3, 4), strict=True)
    ):
        noise = np.random.default_rng(number).integers(
            0, 256, (5, 7, channels), dtype=np.uint8
        )
        Image.fromarray(noise).resize(size).save(tmp_path / name, quality=95)
    script = (
        "import sys\nsys.modules['torch'] = sys.modules['cloob'] ="
        " sys.modules['open_clip'] = None\n"
        + code.replace(f'Path("{exported.name}")', "Path(sys.argv[1])")
        + "\nimport json; print(json.dumps((images @ run('onnx/text_model.onnx',"
        " np.array(tokens)).T).tolist()))"
    )
    run = run_script(script, str(exported), cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    found = torch.tensor(json.loads(run.stdout.splitlines()[-1]))
    texts = ["a photo of a cat", "a photo of a dog"]
    wanted = (
        model.encode_image([tmp_path / name for name in pictures])
        @ model.encode_text(texts).T
    )
    assert_close(found, wanted, rtol=0, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-4


def indexed(tmp_path, model):
    """An index of a red and a blue picture by a model."""
    for name in ("red", "blue"):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        (tmp_path / "pictures" / f"{name}.png").write_bytes(picture(name))
    with Index.create(tmp_path / "idx") as index:
        index.update([tmp_path / "pictures"], UpdateOptions(model=model))
    return tmp_path / "idx"


def test_rows_and_fingerprint_are_those_of_the_loaded_model(loaded, exported):
    plain = PlainEncoder.open(f"local-dir:{exported}")
    assert plain is not None
    assert plain.fingerprint == fingerprint(loaded)
    assert_allclose(plain.texts(TEXTS), loaded.encode_text(TEXTS).numpy(), atol=1e-6)
    images = [
        noise_image(seed, *size)
        for seed, size in enumerate(((64, 64), (131, 90), (3, 9)))
    ]
    assert_allclose(
        plain.pictures(images), loaded.encode_image(images).numpy(), atol=1e-6
    )
    assert plain.texts(TEXTS).dtype == np.float32


def test_a_search_by_words_and_pictures_imports_no_torch(exported, tmp_path):
    with Index.open(indexed(tmp_path, exported)) as index:
        wanted = index.search("a dog", cutoff=None)
    script = """
import json, sys
from cloob import cli
index, picture = sys.argv[1:]
assert cli.main(["search", index, "a dog", "--cutoff", "none", "--json"]) == 0
assert cli.main(["search", index, picture, "--cutoff", "none", "--json"]) == 0
heavy = ("torch", "open_clip", "torchvision", "transformers", "timm", "onnx", "pyarrow", "sklearn", "scipy", "ftfy")
print([name for name in heavy if name in sys.modules])
"""
    run = run_script(
        script, str(tmp_path / "idx"), str(tmp_path / "pictures" / "red.png")
    )
    words, shown, imported = run.stdout.splitlines()
    assert imported == "[]", run.stderr
    found = [hit["path"] for hit in json.loads(words)["hits"]]
    assert found == [hit.item.path for hit in wanted.hits]
    assert json.loads(shown)["hits"][0]["path"].endswith("red.png")
    assert json.loads(shown)["hits"][0]["score"] == pytest.approx(1, abs=1e-5)


def test_another_model_at_the_same_place_is_refused(exported, tmp_path, capsys):
    indexed(tmp_path, place := shutil.copytree(exported, tmp_path / "model"))
    content = read_json(place / "onnx.json")
    (place / "onnx.json").write_text(json.dumps(content | {"logit_scale": 1.0}))
    with (
        Index.open(tmp_path / "idx") as index,
        pytest.raises(InputError, match="other weights"),
    ):
        index.search("a dog")
    run_cloob(f"search {tmp_path}/idx 'a dog'", code=2)
    assert "other weights" in capsys.readouterr().err
