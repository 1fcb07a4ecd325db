"""Embeddings on the disk: found again, never when weights or data differ, and whole whatever happens beside."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cloob.cache import Cache
from cloob.data.content import content_key
from cloob.errors import InputError
from cloob.evaluate import loaded
from cloob.evaluate.cache import Stored, fingerprint, load, module_key, save
from cloob.evaluate.embed import EmbedOptions, Encoder
from cloob.evaluate.embeddings import Embeddings
from cloob.evaluate.suite import evaluate
from cloob.models.folder import save_model
from cloob.models.tokenizer import describe
from cloob.models.towers import create_model
from cloob.models.weights.tokens import FileTokenizer
from cloob.objective import make_objective
from evaluate_fakes import COLOURS, ColourModel, Labels, Pairs

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


def test_content_keys_tell_what_an_embedding_depends_on_and_no_more() -> None:
    key = content_key(Labels(NAMES))
    assert key == content_key(Labels(NAMES, labels=[0] * 6, name="other"))
    for other in (Labels(NAMES[:5]), Labels(NAMES[::-1]), Labels(NAMES, broken=[1])):
        assert content_key(other) != key
    pairs = content_key(Pairs(NAMES))
    assert pairs != content_key(Pairs(NAMES, captions=["red"] * 6)) != content_key(Pairs(NAMES, missing=[2]))
    assert fingerprint("ab", "c") != fingerprint("a", "bc")


def test_module_keys_see_each_weight_and_buffer() -> None:
    module = torch.nn.BatchNorm1d(3)
    key = module_key(module, {"a": 1}, "cpu")
    assert key == module_key(torch.nn.BatchNorm1d(3), {"a": 1}, "cpu")
    assert key != module_key(module, {"a": 2}, "cpu") and key != module_key(module, {"a": 1}, "cuda:1")
    module.running_mean[1] += 1e-7
    assert key != module_key(module, {"a": 1}, "cpu")


def test_models_in_memory(tmp_path: Path) -> None:
    encoder, data = create_model("tiny-vit", seed=0), Labels(NAMES)
    options = EmbedOptions(cache=Cache(tmp_path / "cache"))
    a = Embeddings({"m": encoder}, options).labelled("m", data)
    b = Embeddings({"m": create_model("tiny-vit", seed=0)}, options).labelled("m", data)
    assert torch.equal(a.images.features, b.images.features) and len(embeddings_in(tmp_path / "cache")) == 2
    Embeddings({"m": ColourModel()}, EmbedOptions(cache=Cache(tmp_path / "none"))).labelled(
        "m", data
    )  # weights that nobody can see
    assert not (tmp_path / "none").exists()


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


class HubWords:
    """As open_clip wraps a tokenizer of transformers; each call leaves its padding and truncation in it."""

    def __init__(self, words: dict[str, int]) -> None:
        library = pytest.importorskip("tokenizers")
        self.tokenizer = SimpleNamespace(backend_tokenizer=library.Tokenizer(library.models.WordLevel(words, "?")))

    def __call__(self, texts: list[str]) -> list[list[int]]:
        backend = self.tokenizer.backend_tokenizer
        backend.enable_padding(length=8)
        backend.enable_truncation(8)
        return [found.ids for found in backend.encode_batch(texts)]


def test_a_tokenizer_is_described_alike_before_and_after_its_use() -> None:
    used = HubWords({"?": 0, "red": 1, "blue": 2})
    used(["red"])
    assert describe(used) == describe(used) == describe(HubWords({"?": 0, "red": 1, "blue": 2}))
    assert describe(used) != describe(HubWords({"?": 0, "red": 2, "blue": 1}))


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


def test_concurrent_writers_leave_one_whole_file(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    values = [torch.full((200, 50), float(i)) for i in range(4)]
    wrong: list[object] = []

    def write(value: torch.Tensor) -> None:
        for _ in range(25):
            save(cache, "m", "images", "d", Stored({"x": value}, {"keys": ["ä"]}))
            found = load(cache, "m", "images", "d")
            if found is None or len(found.tensors["x"].unique()) != 1 or found.facts != {"keys": ["ä"]}:
                wrong.append(found)

    threads = [threading.Thread(target=write, args=(value,)) for value in values]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    (file,) = embeddings_in(tmp_path / "cache")
    assert file.name.endswith("-m_images-d.safetensors")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot keep embeddings \(Not a directory\); choose another --cache-dir"):
        save(Cache(tmp_path / "file" / "cache"), "m", "k", "d", Stored({"x": torch.zeros(1)}, {}))


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


_RUN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from evaluate_fakes import COLOURS, Labels, Pairs
from cloob.cache import Cache
from cloob.evaluate.embed import EmbedOptions
from cloob.evaluate.embeddings import Embeddings
from cloob.evaluate.suite import evaluate, write_results
folder, out = Path(sys.argv[2]), Path(sys.argv[3])
names = list(COLOURS)
sets = [Labels(names * 3, name="a"), Labels(names[::-1] * 2, name="b")]
sys.stdin.readline()  # both have their imports behind them
embeddings = Embeddings({"m": folder / "model"}, EmbedOptions(cache=Cache(folder / "cache")), tower=True)
results = evaluate(embeddings, sets, [Pairs(names)])
write_results(out, results)
"""


@pytest.mark.nightly
def test_runs_at_the_same_time_share_a_folder(model: Path) -> None:
    folder = model.parent
    outs = [folder / f"{i}.json" for i in range(2)]
    command = [sys.executable, "-c", _RUN, str(Path(__file__).parents[1]), str(folder)]
    # The smallest folder of all: each storing also looks for what may go, while the other run stores and reads.
    environment = {**os.environ, "CLOOB_CACHE_BYTES": "1"}
    runs = [
        subprocess.Popen(
            [*command, str(out)], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        for out in outs
    ]
    for run in runs:
        assert run.stdin is not None
        run.stdin.write("go\n")
        run.stdin.flush()
    said = [run.communicate()[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    contents = [out.read_bytes() for out in outs]
    assert contents[0] == contents[1]
    files = embeddings_in(folder / "cache")
    assert len(files) == 5 and not [path for path in files if path.name.startswith(".")]
    again = Embeddings({"m": model}, EmbedOptions(cache=Cache(folder / "cache")), tower=True)
    assert torch.isfinite(again.labelled("m", Labels(list(COLOURS) * 3, name="a")).images.features).all()
