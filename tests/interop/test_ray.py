"""Ray Data: the columns of an embedded batch; nightly the page's job of moments."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from numpy.testing import assert_allclose
from pyarrow import parquet

from cloob import ContrastiveHeads, load_model
from cloob.evaluation.embed import embed_texts
from cloob.interop.ray import Embed
from make import noise, tiny_model


def test_a_batch_keeps_its_columns_and_bad_pictures_their_rows(tmp_path):
    model = tiny_model(tmp_path / "model")
    pictures = [noise(0), b"no picture", noise(1)]
    captions = ["a", "b", "c"]
    batch = {"id": np.arange(3), "bytes": np.array(pictures, object)}
    batch["caption"] = np.array(captions, object)
    found = Embed(str(model), text="caption", device="cpu")(batch)
    assert list(found) == [*batch, "embedding", "error", "text_embedding"]
    assert list(found["id"]) == [0, 1, 2]
    assert list(map(bool, found["error"])) == [False, True, False]
    encoder = load_model(model, device="cpu")
    for i in (0, 2):
        (tmp_path / f"{i}.png").write_bytes(pictures[i])
        row = encoder.encode_image([tmp_path / f"{i}.png"])[0]
        assert_allclose(found["embedding"][i], row, atol=1e-6)
    assert np.isnan(found["embedding"][1]).all()
    rows = embed_texts(encoder, captions)
    assert_allclose(found["text_embedding"], rows, atol=1e-6)
    none = Embed(str(model), device="cpu")({"bytes": np.array([b"x"], object)})
    assert np.isnan(none["embedding"]).all()
    assert none["error"][0]


def test_a_missing_caption_is_no_word(tmp_path):
    model = tiny_model(tmp_path / "model")
    captions = np.array([None, float("nan"), "a cat", "  ", "None"], object)
    batch = {"bytes": np.array([noise(i) for i in range(5)], object), "text": captions}
    batch["bytes"][1] = b"no picture"
    found = Embed(str(model), text="text", device="cpu")(batch)
    rows = found["text_embedding"]
    assert np.isnan(rows).all(1).tolist() == [True, True, False, True, False]
    encoder = load_model(model, device="cpu")
    expected = embed_texts(encoder, ["a cat", "None"]).numpy()
    assert_allclose(rows[[2, 4]], expected, atol=1e-6)
    assert [text.count("missing caption") for text in found["error"]] == [1, 1, 0, 1, 0]
    assert "corrupt image" in found["error"][1]
    assert np.isfinite(found["embedding"][0]).all()
    batch = {"bytes": batch["bytes"][:1], "text": captions[:1]}
    alone = Embed(str(model), text="text", device="cpu")(batch)
    assert np.isnan(alone["text_embedding"]).all()


@pytest.mark.nightly
@pytest.mark.filterwarnings("default")
def test_the_moments_of_the_pages_job_are_those_of_all_pairs(tmp_path, monkeypatch):
    """Two workers, blocks of unequal length, an offset that float32 would round away:
    the heads of the page are those of one machine.
    """
    ray = pytest.importorskip("ray", reason="needs ray: pip install 'ray[data]'")
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    cause = rng.normal(size=(3000, 5))
    a = cause @ rng.normal(size=(5, 12)) + rng.normal(size=(3000, 12)) + 1e7
    b = np.tanh(cause @ rng.normal(size=(5, 7)))
    Path("pairs").mkdir()
    for file, rows in enumerate(np.split(np.arange(3000), [7, 900, 2000])):
        table = pa.table({"a": a[rows].tolist(), "b": b[rows].tolist()})
        parquet.write_table(table, f"pairs/{file}.parquet")
    page = Path(__file__).parents[2] / "docs" / "scale-out.md"
    (program,) = re.findall(
        r"```python\n(from pathlib.*?)```", page.read_text("utf-8"), re.DOTALL
    )
    assert "s3://bucket/pairs" in program
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        exec(program.replace("s3://bucket/pairs", str(tmp_path / "pairs")), {})
    finally:
        ray.shutdown()
    found = load_model("heads", device="cpu")
    one_machine = ContrastiveHeads("cca", standardise="one", validation_fraction=0)
    expected = one_machine.fit(a, b).transform(a, b)
    assert_allclose(found.encode_a(a), expected[0], atol=1e-4)
    assert_allclose(found.encode_b(b), expected[1], atol=1e-4)
    assert ContrastiveHeads.load("heads").score(a, b) == one_machine.score(a, b)
