"""The kept graph of a text tower: the model's rows without torch, and when there is
none.
"""

import json

import numpy as np
import pytest
from PIL import Image

from cloob.models.folder import save_model
from cloob.models.importing import open_clip
from cloob.models.load import fingerprint, load_model
from cloob.models.text_graph import keep_text_graph, open_text_graph
from cloob.models.towers import create_model
from cloob.search.index import Index
from cloob.search.query import TorchEmbedder
from cloob.search.update import UpdateOptions
from support import run_script

TEXTS = ["", "a red bird", "A Red  Bird.", "naïve café ☕", "a very long story " * 60]
KINDS = {
    "plain": {},
    "quick": {"quick_gelu": True},
    "custom": {"custom_text": True},
}


def no_pictures(images):
    raise AssertionError("pictures are not embedded here")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model folder of each kind."""
    place = tmp_path_factory.mktemp("models")
    small = open_clip().get_model_config("tiny-vit")
    kinds = KINDS | {"bidirectional": {"custom_text": True, "no_causal_mask": True}}
    for kind, changes in kinds.items():
        config = json.loads(json.dumps(small | changes))
        if "no_causal_mask" in config:
            config["text_cfg"]["no_causal_mask"] = config.pop("no_causal_mask")
        file = place / f"graph-{kind}.json"
        file.write_text(json.dumps(config))
        open_clip().add_model_config(file)
        model = create_model(file.stem, seed=1)
        save_model(place / kind, model, {})
    return place


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLOOB_CACHE", str(tmp_path / "cache"))


def keep(folder):
    encoder = load_model(folder, device="cpu")
    texts = TorchEmbedder(encoder).texts
    weights = fingerprint(encoder)
    return keep_text_graph(str(folder), weights, encoder, texts), weights, texts


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_gives_the_model_s_rows(folders, kind):
    kept, fingerprint, texts = keep(folders / kind)
    graph = open_text_graph(str(folders / kind), fingerprint, no_pictures)
    assert kept
    for some in (TEXTS, TEXTS[::-1], TEXTS[1:2], TEXTS * 9):
        np.testing.assert_allclose(graph.texts(some), texts(some), atol=1e-5)


@pytest.mark.usefixtures("cache")
def test_a_tower_of_another_kind_has_no_graph(folders):
    kept, fingerprint, _ = keep(folders / "bidirectional")
    assert not kept
    assert (
        open_text_graph(str(folders / "bidirectional"), fingerprint, no_pictures)
        is None
    )


@pytest.mark.usefixtures("cache")
def test_a_graph_whose_rows_differ_from_the_model_s_is_not_kept(folders):
    encoder = load_model(folders / "plain", device="cpu")
    weights = fingerprint(encoder)

    def other_rows(texts):
        return -TorchEmbedder(encoder).texts(texts)

    assert not keep_text_graph(str(folders / "plain"), weights, encoder, other_rows)
    assert open_text_graph(str(folders / "plain"), weights, no_pictures) is None


@pytest.mark.usefixtures("cache")
def test_a_graph_of_weights_that_changed_is_not_used(folders, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (folders / "plain").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    kept, fingerprint, _ = keep(folder)
    assert kept
    weights = folder / "open_clip_model.safetensors"
    weights.write_bytes((folders / "quick" / weights.name).read_bytes())
    assert open_text_graph(str(folder), fingerprint, no_pictures) is None


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b'{"format": 1}', b"\xff"])
def test_damaged_notes_of_a_graph_leave_torch_to_answer(
    folders, tmp_path, monkeypatch, damage
):
    monkeypatch.setenv("CLOOB_CACHE", str(tmp_path))
    _, fingerprint, _ = keep(folders / "plain")
    [notes] = tmp_path.glob("texts/*/text.json")
    notes.write_bytes(damage)
    assert open_text_graph(str(folders / "plain"), fingerprint, no_pictures) is None


@pytest.mark.usefixtures("cache")
def test_a_graph_appears_whole_and_leaves_nothing_else(folders, tmp_path):
    """Of one whose file is gone torch answers; another process keeps it anew."""
    _, fingerprint, _ = keep(folders / "plain")
    texts = tmp_path / "cache" / "texts"
    assert [path.name for path in texts.iterdir()] == [fingerprint]
    (texts / fingerprint / "text.onnx").unlink()
    source = str(folders / "plain")
    assert open_text_graph(source, fingerprint, no_pictures) is None
    assert keep(folders / "plain")[0]
    assert open_text_graph(source, fingerprint, no_pictures) is not None
    assert [path.name for path in texts.iterdir()] == [fingerprint]


SEARCH = """
import sys
from cloob.cli import main
main(["search", sys.argv[1], "a red bird", "--cutoff", "none"])
print([name for name in ("torch", "open_clip", "torchvision") if name in sys.modules])
"""


def test_a_search_of_words_after_index_imports_no_torch(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("CLOOB_CACHE", str(tmp_path / "cache"))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for colour in ("red", "blue"):
        Image.new("RGB", (64, 64), colour).save(pictures / f"{colour}.png")
    index = tmp_path / "pictures.idx"
    with Index.create(index) as created:
        created.update([pictures], UpdateOptions(model=str(folders / "plain")))
    by_graph = run_script(SEARCH, str(index))
    monkeypatch.setenv("CLOOB_CACHE", str(tmp_path / "empty"))
    by_torch = run_script(SEARCH, str(index))
    *hits, imported = by_graph.stdout.splitlines()
    *hits_of_torch, imported_of_torch = by_torch.stdout.splitlines()
    assert hits == hits_of_torch and len(hits) == 2, by_graph.stderr
    assert imported == "[]"
    assert "torch" in imported_of_torch
