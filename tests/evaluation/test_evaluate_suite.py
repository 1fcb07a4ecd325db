"""Several models on several sets: results.json, comparisons, failures, geometry of
runs.
"""

import json
import shutil

import pytest
import torch

from cloob import cli
from cloob.errors import InputError
from cloob.evaluation.analysis import (
    example_queries,
    search_pictures,
)
from cloob.evaluation.embed import EmbedOptions, embed_images, embed_pairs
from cloob.evaluation.embeddings import Embeddings
from cloob.evaluation.measures import geometry
from cloob.evaluation.results import write_results
from cloob.evaluation.sets.pictures import open_captioned
from cloob.evaluation.suite import evaluate, paired_differences
from cloob.models.folder import save_model
from cloob.models.towers import create_model
from cloob.objective import make_objective
from evaluate_fakes import COLOURS, ColourModel, Labels, Pairs, picture
from make import tiny_model, write_pairs
from support import refused

NAMES = list(COLOURS)


@pytest.fixture
def models():
    found = {
        "bad": ColourModel("bad", confused=[("red", "blue")]),
        "good": ColourModel("good"),
    }
    for model, objective in zip(found.values(), ("clip", "cloob"), strict=True):
        model.objective_config = make_objective(objective).config()
    return found


def test_results_have_the_documented_form(models):
    zeroshot = [Labels(NAMES * 4, broken=[1]), Labels(["red", "blue"] * 3, name="two")]
    results = evaluate(models, zeroshot, [Pairs(NAMES)])
    bad, good = results["rows"]
    assert [row["model"] for row in results["rows"]] == ["bad", "good"]
    assert [row["objective"] for row in results["rows"]] == ["clip", "cloob"]
    assert good["settings"]["beta"] == 8.0
    solid = good["zeroshot"]["solid"]
    assert solid["acc1"] == solid["acc5"] == pytest.approx(23 / 24)
    assert solid["n"] == 24
    assert solid["per_class"]["green"] == 0.75
    assert solid["unreadable"] == {"corrupt image": 1}
    assert bad["zeroshot"]["two"]["acc1"] == 0.0
    assert "unreadable" not in bad["zeroshot"]["two"]
    assert good["retrieval"]["pairs"]["text_to_image@1"] == 1.0
    assert good["geometry"]["pairs"]["effective_eigenvalues_image"] == 3
    assert results["level"] == 0.95
    assert "failures" not in results


def test_differences_are_paired_and_averaged_over_shared_sets(models):
    zeroshot = [
        Labels(NAMES * 4),
        Labels(["red", "blue", "green", "cyan"], name="four"),
    ]
    entries = evaluate(models, zeroshot, [Pairs(NAMES)])["differences"]
    found = {(e["metric"], e["set"]): e for e in entries}
    both = [("image_to_text@1", "pairs"), ("text_to_image@1", "pairs")]
    assert list(found) == [("acc1", "solid"), ("acc1", "four"), ("acc1", None), *both]
    mean = found["acc1", None]
    assert (mean["model"], mean["baseline"]) == ("good", "bad")
    assert mean["difference"] == pytest.approx((8 / 24 + 2 / 4) / 2)
    assert 0 < mean["low"] < mean["difference"] < mean["high"] < 1


def test_differences_of_three_models_and_sets_that_one_lacks():
    """A model without a tokenizer has probes and no zero-shot accuracy, and takes no
    mean from the others.
    """
    hit, miss = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)
    both = {"a": hit, "b": miss}
    probes = {
        ("probe_acc1", "s"): {"a": hit, "mute": hit, "b": miss},
        ("probe_acc1", "t"): {"a": miss, "mute": hit},
    }
    entries = paired_differences({("acc1", "s"): both, ("acc1", "t"): both, **probes})
    keys = ("metric", "set", "model", "baseline", "difference")
    assert [tuple(entry[key] for key in keys) for entry in entries] == [
        ("acc1", "s", "b", "a", -1.0),
        ("acc1", "t", "b", "a", -1.0),
        ("acc1", None, "b", "a", -1.0),
        ("probe_acc1", "s", "mute", "a", 0.0),
        ("probe_acc1", "s", "b", "a", -1.0),
        ("probe_acc1", "s", "b", "mute", -1.0),
        ("probe_acc1", "t", "mute", "a", 1.0),
    ]


def test_a_set_that_fails_is_listed_and_the_rest_is_there(models):
    wrong = Labels(["red"], labels=[6], name="wrong")
    results = evaluate(
        models, [wrong, Labels(NAMES)], [Pairs(["red"] * 2, broken=[1], name="one")]
    )
    failed = [("bad", "wrong"), ("bad", "one"), ("good", "wrong"), ("good", "one")]
    assert [(f["model"], f["set"]) for f in results["failures"]] == failed
    assert (
        "image 0 has label 6, but there are 6 class names (labels 0 to 5)"
        in results["failures"][0]["error"]
    )
    assert "one: geometry needs at least 2 pairs" in results["failures"][1]["error"]
    assert [list(results["rows"][1][kind]) for kind in ("zeroshot", "retrieval")] == [
        ["solid"],
        ["one"],
    ]


def test_written_results_are_deterministic_json(tmp_path, models):
    for name in ("a.json", "b.json"):
        results = evaluate(models, [Labels(NAMES)], [Pairs(NAMES, broken=[0, 1, 2, 3])])
        write_results(tmp_path / "sub" / name, results)
    content = (tmp_path / "sub" / "a.json").read_bytes()
    assert content == (tmp_path / "sub" / "b.json").read_bytes()
    row = json.loads(content)["rows"][0]
    assert (
        row["retrieval"]["pairs"]["text_to_image_median_rank"] is None
    )  # infinite: four of six unreadable
    with pytest.raises(InputError, match=r"a\.json.x: results cannot be written"):
        write_results(tmp_path / "sub" / "a.json" / "x", {})


def test_a_picture_answers_each_of_its_captions(tmp_path):
    for stem, colour in (("r", "red"), ("b", "blue")):
        (tmp_path / f"{stem}.png").write_bytes(picture(colour))
    (tmp_path / "t.csv").write_text(
        "filepath,title\nr.png,red\nb.png,blue\nr.png,magenta\n"
    )
    embeddings = Embeddings({"m": ColourModel()})
    queries = example_queries(embeddings, open_captioned(tmp_path / "t.csv"), k=2)
    (query,) = (query for query in queries if query.query == "magenta")
    # Red is as near as blue but for the little that texts point to red; both are called
    # by their first caption.
    assert [(item.label, item.correct) for item in query.answers["m"]] == [
        ("red", True),
        ("blue", False),
    ]


def test_a_search_finds_what_a_loop_over_the_pictures_finds():
    model, texts = ColourModel(), ["something blue", "red heart"]
    colours = ["red", "blue", "green", "red", "cyan", "yellow", "magenta", "blue"]
    data = Labels(colours, broken=[3])
    found = search_pictures(Embeddings({"m": model}), data, texts, k=3, models=["m"])
    readable = [COLOURS[name] for i, name in enumerate(colours) if i != 3]
    with torch.no_grad():
        rows = model.encode_text(texts)
        pictures = model._embed(torch.tensor(readable, dtype=torch.float32))
    assert [search.query for search in found] == texts
    for search, row in zip(found, rows, strict=True):
        scores = sorted((float(row @ seen) for seen in pictures), reverse=True)
        shown = [each.score for each in search.answers["m"]]
        assert shown == pytest.approx(scores[:3], abs=1e-5)
    assert [each.label for each in found[0].answers["m"][:2]] == ["blue", "blue"]


def test_a_loaded_model_is_the_model_that_was_saved(tmp_path):
    encoder, data = create_model("tiny-vit", seed=0), Labels(NAMES, broken=[1])
    save_model(
        tmp_path / "saved", encoder, make_objective("infoloob", inv_tau=20.0).config()
    )
    seen = []
    models = {"fresh": encoder, "loaded": str(tmp_path / "saved")}
    embeddings = Embeddings(
        models,
        EmbedOptions(batch_size=4, workers=2),
        progress=lambda *call: seen.append(call),
    )
    results = evaluate(embeddings, [data], [Pairs(NAMES)])
    fresh, loaded = results["rows"]
    assert (fresh["objective"], loaded["objective"]) == (None, "infoloob")
    assert loaded["settings"]["inv_tau"] == pytest.approx(20.0)
    assert (
        fresh["zeroshot"] == loaded["zeroshot"]
        and fresh["retrieval"] == loaded["retrieval"]
    )
    assert ("fresh: solid", 6, 6) in seen and ("loaded: pairs", 6, 6) in seen
    assert str(tmp_path) not in json.dumps(results)
    queries = example_queries(embeddings, data, k=5)
    assert {query.query for query in queries} == set(NAMES) - {"green"}


def checkpoint(run, step):
    return run / "checkpoints" / f"step-{step:08d}" / "model"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three epochs of 5 steps with a checkpoint each: two untrained models,
    and a file that was cut.
    """
    folder = tmp_path_factory.mktemp("runs") / "mine"
    for seed, step in enumerate((10, 15)):
        tiny_model(checkpoint(folder, step), seed=seed, beta=6.0)
    cut = (
        shutil.copytree(checkpoint(folder, 10), checkpoint(folder, 5))
        / "open_clip_model.safetensors"
    )
    cut.write_bytes(cut.read_bytes()[:1000])
    lines = [
        json.dumps({"epoch": epoch, "step": 5 * epoch, "samples": 10})
        for epoch in (1, 2, 3)
    ]
    (folder / "epochs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_every_checkpoint_of_a_run_is_measured_and_a_damaged_one_named(
    run, tmp_path, capsys
):
    pairs = {str(i): (COLOURS[name], f"{name}\n") for i, name in enumerate(NAMES)}
    write_pairs(tmp_path / "pairs", pairs, (40, 40))
    out = tmp_path / "out"
    words = ["--retrieval", str(tmp_path / "pairs"), "--checkpoints", "--device", "cpu"]
    assert cli.main(["eval", str(run), *words, "--out", str(out)]) == 1
    assert "mine, step 5" in capsys.readouterr().err
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    failed = [failure["error"] for failure in results["failures"]]
    assert failed[0].startswith(f"{checkpoint(run, 5)}/") and len(failed) == 1
    found = results["checkpoints"]["models"]["mine"]
    assert [(each["step"], each["epoch"]) for each in found] == [(10, 2.0), (15, 3.0)]
    source = open_captioned(tmp_path / "pairs")
    for seed, each in enumerate(found):
        embedded = embed_pairs(create_model("tiny-vit", seed=seed), source)
        expected = geometry(embedded.images.features, embedded.texts, 30.0, 6.0)
        for key in ("ajne_image", "ajne_text", "effective_eigenvalues_image"):
            assert each[key] == pytest.approx(expected[key], rel=1e-4)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Effective eigenvalues during training" in page


def test_checkpoints_of_what_is_no_run(saved, tmp_path, capsys):
    words = ["--retrieval", "demo:val", "--checkpoints", "--out", str(tmp_path / "out")]
    line = refused(capsys, "eval", str(saved[0]), *words, "--device", "cpu")
    assert "no model here is a run" in line


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return [
        tiny_model(tmp_path_factory.mktemp("saved") / "m", seed=seed) for seed in (0, 1)
    ]


def test_two_sets_of_one_name_are_two():
    embeddings = Embeddings({"m": ColourModel()})
    one, other = (
        embeddings.labelled("m", Labels(names)).images.features
        for names in (NAMES, NAMES[::-1])
    )
    torch.testing.assert_close(other, one.flip(0))
    assert [
        len(embeddings.pairs("m", Pairs(names)).texts) for names in (NAMES, NAMES[:4])
    ] == [len(NAMES), 4]


def test_a_run_that_goes_on_while_it_is_judged(saved, tmp_path):
    """What is the newest checkpoint at first stays the model, also where it is loaded
    again.
    """
    shutil.copytree(saved[0], checkpoint(tmp_path / "run", 1))
    models = {"run": tmp_path / "run", "other": saved[1]}
    embeddings = Embeddings(models)
    embeddings.encoder("run")
    embeddings.encoder("other")
    shutil.copytree(saved[1], checkpoint(tmp_path / "run", 2))
    found = embeddings.labelled("run", Labels(NAMES)).images.features
    first = Embeddings({"m": saved[0]}).labelled("m", Labels(NAMES)).images.features
    assert torch.equal(found, first)


@pytest.mark.parametrize(("batch_size", "workers"), [(2, 0), (2, 3), (100, 3)])
def test_rows_are_the_single_images_in_order_and_unreadable_ones_nan(
    batch_size, workers
):
    data = Labels([*NAMES, "blue"], broken=[0, 5])
    features, keys, bad, *_ = embed_images(
        ColourModel(), data, EmbedOptions(batch_size=batch_size, workers=workers)
    )
    expected = (
        torch.tensor([COLOURS[colour] for colour in data.colours]).float() - 127.5
    )
    expected /= expected.norm(dim=1, keepdim=True)
    expected[[0, 5]] = torch.nan
    torch.testing.assert_close(features, expected, equal_nan=True)
    assert keys == tuple(f"s{i}" for i in range(7))
    assert [(skip.key, skip.reason) for skip in bad] == [
        ("s0", "corrupt image"),
        ("s5", "corrupt image"),
    ]


def test_pairs_are_read_once_and_unreadable_ones_are_nan(monkeypatch):
    source, reads, original = Pairs(NAMES, broken=[1], missing=[2]), [], Pairs.read
    monkeypatch.setattr(
        Pairs,
        "read",
        lambda self, index: (reads.append(index), original(self, index))[1],
    )
    pairs = embed_pairs(ColourModel(), source, EmbedOptions(batch_size=2))
    assert reads == list(range(6))
    assert torch.isnan(pairs.images.features).all(1).nonzero()[:, 0].tolist() == [1, 2]
    assert torch.isnan(pairs.texts).all(1).nonzero()[:, 0].tolist() == [2]
    assert pairs.captions == ("red", "green", "", "yellow", "cyan", "magenta")
    assert pairs.image_of_text.tolist() == list(range(6))
    assert pairs.unreadable == {"corrupt image": 1, "missing image": 1}
