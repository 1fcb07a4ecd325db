"""An ONNX folder without torch: the same rows and fingerprint, and a search that imports nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from cloob import cli, load_model
from cloob.errors import InputError
from cloob.models.encoder import DualEncoder
from cloob.models.load import fingerprint
from cloob.models.onnx import PlainEncoder
from cloob.search.index import Index
from cloob.search.update import UpdateOptions
from make import noise_image, picture
from support import run_script

TEXTS = ["a dog", "two cats & a bird", "long " * 100, "Tom &amp; Jerry", "naïve ☃", *(f"number {i}" for i in range(40))]


@pytest.fixture(scope="module")
def loaded(exported: Path) -> DualEncoder:
    return load_model(exported, device="cpu")


def indexed(tmp_path: Path, model: Path) -> Path:
    """An index of a red and a blue picture by a model."""
    for name in ("red", "blue"):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        (tmp_path / "pictures" / f"{name}.png").write_bytes(picture(name))
    with Index.create(tmp_path / "idx") as index:
        index.update([tmp_path / "pictures"], UpdateOptions(model=model))
    return tmp_path / "idx"


def test_rows_and_fingerprint_are_those_of_the_loaded_model(loaded: DualEncoder, exported: Path) -> None:
    plain = PlainEncoder.open(f"local-dir:{exported}")
    assert plain is not None and plain.fingerprint == fingerprint(loaded)
    np.testing.assert_allclose(plain.texts(TEXTS), loaded.encode_text(TEXTS).numpy(), atol=1e-6)
    images = [noise_image(seed, *size) for seed, size in enumerate(((64, 64), (131, 90), (3, 9)))]
    np.testing.assert_allclose(plain.pictures(images), loaded.encode_image(images).numpy(), atol=1e-6)
    assert plain.texts(TEXTS).dtype == np.float32


def test_the_graph_of_both_towers_gives_logits_by_name(loaded: DualEncoder, exported: Path) -> None:
    """As transformers.js asks ``model.onnx``: a row a picture, a column a text."""
    session = onnxruntime.InferenceSession(exported / "onnx" / "model.onnx")
    raw, tokens = np.stack([np.asarray(noise_image(seed, 64, 64)) for seed in (1, 2)]), loaded.tokenizer(TEXTS[:3])
    pixels = ((raw / 255 - loaded.mean) / loaded.std).astype(np.float32).transpose(0, 3, 1, 2)
    found = session.run(None, {"pixel_values": pixels, "input_ids": tokens.numpy()})
    named = dict(zip([output.name for output in session.get_outputs()], found, strict=True))
    images = loaded.encode_image(torch.from_numpy(raw).permute(0, 3, 1, 2)).numpy()
    texts, scale = loaded.encode_text(tokens).numpy(), float(loaded.model.logit_scale.exp())
    for name, rows in (
        ("image_embeds", images),
        ("text_embeds", texts),
        ("logits_per_image", scale * images @ texts.T),
    ):
        np.testing.assert_allclose(named[name], rows, atol=1e-5 * scale)


def test_a_search_by_words_and_pictures_imports_no_torch(exported: Path, tmp_path: Path) -> None:
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
    run = run_script(script, str(tmp_path / "idx"), str(tmp_path / "pictures" / "red.png"))
    words, shown, imported = run.stdout.splitlines()
    assert imported == "[]", run.stderr
    assert [hit["path"] for hit in json.loads(words)["hits"]] == [hit.item.path for hit in wanted.hits]
    assert json.loads(shown)["hits"][0]["path"].endswith("red.png")
    assert json.loads(shown)["hits"][0]["score"] == pytest.approx(1, abs=1e-5)


def test_another_model_at_the_same_place_is_refused(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    indexed(tmp_path, place := shutil.copytree(exported, tmp_path / "model"))
    content = json.loads((place / "onnx.json").read_text())
    (place / "onnx.json").write_text(json.dumps(content | {"logit_scale": 1.0}))
    with Index.open(tmp_path / "idx") as index, pytest.raises(InputError, match="other weights"):
        index.search("a dog")
    assert cli.main(["search", str(tmp_path / "idx"), "a dog"]) == 2
    assert "other weights" in capsys.readouterr().err
    with (place / "onnx" / "vision_model.onnx").open("ab") as graph:  # a swapped graph under the digest of the first
        graph.write(b"\x08\x0a")
    (place / "onnx.json").write_text(json.dumps(content))
    assert cli.main(["search", str(tmp_path / "idx"), "a dog"]) == 2
    assert "other graphs" in capsys.readouterr().err


def test_a_model_that_is_handed_in_goes_before_the_folder(exported: Path, loaded: DualEncoder, tmp_path: Path) -> None:
    with Index.open(indexed(tmp_path, exported)) as index:
        assert isinstance(index.embedder(), PlainEncoder)
        index.use(index.models[0].name, loaded)
        assert not isinstance(index.embedder(), PlainEncoder)
        assert torch.isfinite(torch.from_numpy(index.embedder().texts(["a dog"]))).all()
