"""Embeddings: in order, whatever the batches and workers, and what the cache keeps of them."""

import json
import pickle
import shutil

import pytest
import torch

from cloob.cache import Cache
from cloob.data.source import content_key
from cloob.evaluation.embed import EmbedOptions, embed_images, embed_pairs
from cloob.evaluation.embeddings import Embeddings
from cloob.evaluation.suite import evaluate
from cloob.models.load import load_model
from cloob.models.tokenizer import FileTokenizer
from cloob.models.towers import create_model
from evaluate_fakes import COLOURS, ColourModel, Labels, Pairs
from make import Code, tiny_model

NAMES = list(COLOURS)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return [tiny_model(tmp_path_factory.mktemp("models") / "m", seed=seed) for seed in (0, 1)]


def test_what_is_in_the_cache_is_not_embedded_again(models, tmp_path):
    data, train, pairs = Labels(NAMES, broken=[2]), Labels(NAMES * 5), Pairs(NAMES, broken=[1], missing=[3])
    embedded = []

    def run(model=models[0], data=data, *, probe=True):
        embedded.clear()
        options = EmbedOptions(cache=Cache(tmp_path))
        embeddings = Embeddings({"m": model}, options, progress=lambda *call: embedded.append(call[0]), tower=probe)
        training = {"solid": train} if probe else None
        return evaluate(embeddings, [data], [pairs], training=training)["rows"][0]

    first = run()
    assert set(embedded) == {"m: solid", "m: pairs", "m: pairs, texts"}
    assert first["zeroshot"]["solid"]["unreadable"] == {"corrupt image": 1}
    assert run() == first and not embedded
    assert run(probe=False)["zeroshot"] == first["zeroshot"] and not embedded
    ran = tmp_path / "ran"
    for number, path in enumerate((tmp_path / "embeddings").iterdir()):
        path.write_bytes(pickle.dumps(Code(ran), 2) if number % 2 else path.read_bytes()[:100])
    assert run() == first and len(set(embedded)) == 3 and not ran.exists()
    other = run(models[1], probe=False)
    assert other["retrieval"] != first["retrieval"] and other["fingerprint"] != first["fingerprint"] and embedded
    run(data=Labels(NAMES[::-1]), probe=False)
    assert set(embedded) == {"m: solid"}


def test_texts_of_another_tokenizer_are_other_embeddings(tmp_path):
    data, encoder = Labels(NAMES), create_model("tiny-vit", seed=0)
    library = pytest.importorskip("tokenizers")

    def classes(more):
        words = {"?": 0, **{text: place for place, text in enumerate(NAMES, 2)}, **more}
        library.Tokenizer(library.models.WordLevel(words, "?")).save(str(tmp_path / "tokenizer.json"))
        encoder.tokenizer = FileTokenizer(tmp_path / "tokenizer.json", encoder.context_length, {"pad": 0, "end": 1})
        return Embeddings({"m": encoder}, EmbedOptions(cache=Cache(tmp_path))).labelled("m", data).classes

    first = classes({})
    assert torch.equal(classes({}), first) and not torch.equal(classes({NAMES[0]: 40}), first)


def test_what_decides_over_a_result_is_in_its_name(models, tmp_path):
    """Of a folder the preprocessing, of a loaded model weights and objective, of a set prompts, captions, pictures."""

    def found(model, **changes):
        embeddings = Embeddings({"m": model}, EmbedOptions(cache=Cache(tmp_path)))
        labelled = embeddings.labelled("m", Labels(NAMES, **changes))
        return [labelled.images.features.tolist(), labelled.classes.tolist(), embeddings.facts("m").settings]

    other, loaded = shutil.copytree(models[0], tmp_path / "other"), load_model(models[0], device="cpu")
    config = json.loads((other / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["mean"] = [0.1, 0.2, 0.3]
    (other / "open_clip_config.json").write_text(json.dumps(config))
    first = found(models[0])
    assert found(other)[0] != first[0] and found(models[0], templates=["a {c} thing"])[1] != first[1]
    assert found(models[0], classnames=NAMES[::-1])[1] == first[1][::-1]
    assert found(loaded) == first
    loaded.objective_config = {"beta": 1.0}
    assert found(loaded)[2] == {"beta": 1.0}
    with torch.no_grad():
        loaded.model.visual.proj += 1
    assert found(loaded)[0] != first[0]
    one, *others = Pairs(NAMES), Pairs(NAMES, captions=NAMES[::-1]), Pairs(NAMES[::-1], captions=NAMES)
    assert len({content_key(pairs) for pairs in (one, *others)}) == 3 and content_key(Pairs(NAMES)) == content_key(one)


def test_two_sets_of_one_name_are_two():
    embeddings = Embeddings({"m": ColourModel()})
    one, other = (embeddings.labelled("m", Labels(names)).images.features for names in (NAMES, NAMES[::-1]))
    torch.testing.assert_close(other, one.flip(0))
    assert [len(embeddings.pairs("m", Pairs(names)).texts) for names in (NAMES, NAMES[:4])] == [len(NAMES), 4]


def test_a_run_that_goes_on_while_it_is_judged(models, tmp_path):
    """What is the newest checkpoint at first stays the model: else newer weights would be kept under its key."""
    options = EmbedOptions(cache=Cache(tmp_path / "cache"))

    def checkpoint(step, model):
        shutil.copytree(model, tmp_path / "run" / "checkpoints" / f"step-{step:08d}" / "model")

    checkpoint(1, models[0])
    Embeddings({"m": tmp_path / "run"}, options).facts("m")
    embeddings = Embeddings({"m": tmp_path / "run"}, options)
    embeddings.facts("m")  # from the cache: nothing is loaded yet
    checkpoint(2, models[1])
    found = embeddings.labelled("m", Labels(NAMES)).images.features
    assert torch.equal(found, Embeddings({"m": models[0]}).labelled("m", Labels(NAMES)).images.features)


@pytest.mark.parametrize(("batch_size", "workers"), [(2, 0), (2, 3), (100, 3)])
def test_rows_are_the_single_images_in_order_and_unreadable_ones_nan(batch_size, workers):
    data = Labels([*NAMES, "blue"], broken=[0, 5])
    features, keys, bad, *_ = embed_images(ColourModel(), data, EmbedOptions(batch_size=batch_size, workers=workers))
    expected = torch.tensor([COLOURS[colour] for colour in data.colours]).float() - 127.5
    expected /= expected.norm(dim=1, keepdim=True)
    expected[[0, 5]] = torch.nan
    torch.testing.assert_close(features, expected, equal_nan=True)
    assert keys == tuple(f"s{i}" for i in range(7))
    assert [(skip.key, skip.reason) for skip in bad] == [("s0", "corrupt image"), ("s5", "corrupt image")]


def test_pairs_are_read_once_and_unreadable_ones_are_nan(monkeypatch):
    source, reads, original = Pairs(NAMES, broken=[1], missing=[2]), [], Pairs.read
    monkeypatch.setattr(Pairs, "read", lambda self, index: (reads.append(index), original(self, index))[1])
    pairs = embed_pairs(ColourModel(), source, EmbedOptions(batch_size=2))
    assert reads == list(range(6))
    assert torch.isnan(pairs.images.features).all(1).nonzero()[:, 0].tolist() == [1, 2]
    assert torch.isnan(pairs.texts).all(1).nonzero()[:, 0].tolist() == [2]
    assert pairs.captions == ("red", "green", "", "yellow", "cyan", "magenta")
    assert pairs.image_of_text.tolist() == list(range(6))
    assert pairs.unreadable == {"corrupt image": 1, "missing image": 1}
