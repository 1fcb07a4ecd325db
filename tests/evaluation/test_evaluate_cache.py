"""Embeddings on the disk: found again, never when weights or data differ, and whole whatever happens beside."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cloob.cache import Cache
from cloob.evaluation import embeddings as loaded
from cloob.evaluation.embed import EmbedOptions, Encoder
from cloob.evaluation.embeddings import Embeddings
from cloob.evaluation.suite import evaluate
from cloob.models.folder import save_model
from cloob.models.towers import create_model
from cloob.models.weights.tokens import FileTokenizer
from cloob.objective import make_objective
from evaluate_fakes import COLOURS, Labels, Pairs

NAMES = list(COLOURS)


def embeddings_in(folder: Path) -> list[Path]:
    return sorted((folder / "embeddings").iterdir())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", create_model("tiny-vit", seed=0), make_objective("cloob").config())
    return tmp_path / "model"


def no_model(*_: object, **__: object) -> Encoder:
    raise AssertionError("the model was loaded although everything is on the disk")


def test_a_finished_evaluation_needs_no_model(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = model.parent / "cache"
    data, train, pairs = Labels(NAMES, broken=[2]), Labels(NAMES * 5), Pairs(NAMES, broken=[1], missing=[3])

    def run() -> dict[str, object]:
        return evaluate(
            Embeddings({"m": model}, EmbedOptions(cache=Cache(cache)), tower=True),
            [data],
            [pairs],
            training={"solid": train},
        )

    first = run()
    assert first == evaluate(Embeddings({"m": model}, tower=True), [data], [pairs], training={"solid": train})
    stored = embeddings_in(cache)
    monkeypatch.setattr(loaded, "load_model", no_model)
    assert run() == first
    assert embeddings_in(cache) == stored
    assert first["rows"][0]["zeroshot"]["solid"]["unreadable"] == {"corrupt image": 1}  # type: ignore[index]
    # A run without probes finds what the run with them has left.
    without = evaluate(Embeddings({"m": model}, EmbedOptions(cache=Cache(cache))), [data], [pairs])
    assert without["rows"][0]["zeroshot"] == first["rows"][0]["zeroshot"]  # type: ignore[index]
    assert embeddings_in(cache) == stored


def test_other_weights_or_other_data_are_other_embeddings(model: Path) -> None:
    cache = model.parent / "cache"
    data = Labels(NAMES)

    def features(where: Path, what: Labels) -> torch.Tensor:
        return Embeddings({"m": where}, EmbedOptions(cache=Cache(cache))).labelled("m", what).images.features

    before = features(model, data)
    assert not torch.equal(features(model, Labels(NAMES[::-1])), before)
    save_model(model, create_model("tiny-vit", seed=1), make_objective("cloob").config())
    other = features(model, data)
    assert not torch.equal(other, before)
    assert torch.equal(other, Embeddings({"m": model}).labelled("m", data).images.features)


def test_texts_of_another_tokenizer_are_other_embeddings(tmp_path: Path) -> None:
    cache, data = Cache(tmp_path / "cache"), Labels(NAMES)

    def classes(words: dict[str, int]) -> torch.Tensor:
        encoder = create_model("tiny-vit", seed=0)
        library = pytest.importorskip("tokenizers")
        library.Tokenizer(library.models.WordLevel(words, "?")).save(str(tmp_path / "tokenizer.json"))
        encoder.tokenizer = FileTokenizer(tmp_path / "tokenizer.json", encoder.context_length, pad=0, end=1)
        return Embeddings({"m": encoder}, EmbedOptions(cache=cache)).labelled("m", data).classes

    texts = [template.replace("{c}", name) for name in NAMES for template in data.templates]
    words = {"?": 0, **{text: place for place, text in enumerate(texts, 2)}}
    first = classes(words)
    n_files = len(embeddings_in(tmp_path / "cache"))
    assert torch.equal(classes(words), first) and len(embeddings_in(tmp_path / "cache")) == n_files
    assert not torch.equal(classes({**words, texts[0]: 40, texts[1]: 41}), first)


def test_a_damaged_file_is_computed_anew(model: Path) -> None:
    cache, data = model.parent / "cache", Labels(NAMES)
    first = Embeddings({"m": model}, EmbedOptions(cache=Cache(cache))).labelled("m", data)
    files = embeddings_in(cache)
    assert len(files) == 2
    for path, content in zip(files, (b"", b"garbage" * 99), strict=True):
        path.write_bytes(content)
    again = Embeddings({"m": model}, EmbedOptions(cache=Cache(cache))).labelled("m", data)
    assert torch.equal(again.images.features, first.images.features) and torch.equal(again.classes, first.classes)
    assert all(path.stat().st_size > 700 for path in files)


def test_two_sets_of_one_name_are_two(model: Path) -> None:
    embeddings = Embeddings({"m": model})
    first, second = Labels(NAMES), Labels(NAMES[::-1])
    assert first.name == second.name
    one, other = (embeddings.labelled("m", data).images.features for data in (first, second))
    torch.testing.assert_close(other, one.flip(0))
    sources = [Pairs(NAMES), Pairs(NAMES[:4])]
    assert [len(embeddings.pairs("m", source).texts) for source in sources] == [len(NAMES), 4]


def test_a_run_that_goes_on_while_it_is_judged(model: Path, tmp_path: Path) -> None:
    """What is the newest checkpoint at first stays the model: else newer weights would be kept under its key."""
    run = tmp_path / "run"
    for step in (1, 2):
        place = run / "checkpoints" / f"step-{step:08d}"
        save_model(place / "model", create_model("tiny-vit", seed=step), make_objective("cloob").config())
    later = (run / "checkpoints" / "step-00000002").rename(tmp_path / "later")
    embeddings = Embeddings({"m": run}, EmbedOptions(cache=Cache(tmp_path / "cache")))
    embeddings.facts("m")
    embeddings = Embeddings({"m": run}, EmbedOptions(cache=Cache(tmp_path / "cache")))
    embeddings.facts("m")  # from the disk: nothing is loaded yet
    later.rename(run / "checkpoints" / "step-00000002")
    found = embeddings.labelled("m", Labels(NAMES)).images.features
    old = Embeddings({"m": run / "checkpoints" / "step-00000001"}).labelled("m", Labels(NAMES)).images.features
    assert torch.equal(found, old)
