"""Several models on several sets: results.json, comparisons, failures, geometry of
runs.
"""

import json
import os
import shutil

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from cloob.errors import InputError
from cloob.evaluation.analysis import (
    example_queries,
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
from support import read_json, run_cloob

NAMES = list(COLOURS)


@pytest.fixture
def models():
    found = {
        "bad": ColourModel("bad", confused=[("red", "blue")]),
        "good": ColourModel("good"),
    }
    found["bad"].objective_config = make_objective("clip").config()
    found["good"].objective_config = make_objective("cloob").config()
    return found


def test_results_have_the_documented_form(models):
    zeroshot = [Labels(NAMES * 4, broken=[1]), Labels(["red", "blue"] * 3, name="two")]
    results = evaluate(models, zeroshot, [Pairs(NAMES)])
    bad, good = results["rows"]
    assert bad["model"] == "bad"
    assert bad["objective"] == "clip"
    assert good["model"] == "good"
    assert good["objective"] == "cloob"
    assert good["settings"]["beta"] == 8.0
    solid = good["zeroshot"]["solid"]
    assert solid["acc1"] == solid["acc5"] == pytest.approx(23 / 24)
    assert solid["n"] == 24
    assert solid["per_class"]["green"] == 0.75
    assert solid["unreadable"] == {"corrupt image": 1}
    two = bad["zeroshot"]["two"]
    assert two["acc1"] == 0.0
    assert "unreadable" not in two
    assert good["retrieval"]["pairs"]["text_to_image@1"] == 1.0
    assert good["geometry"]["pairs"]["effective_eigenvalues_image"] == 3
    assert results["level"] == 0.95
    assert "failures" not in results


def test_differences_are_paired_and_averaged_over_shared_sets(models):
    four = Labels(["red", "blue", "green", "cyan"], name="four")
    results = evaluate(models, [Labels(NAMES * 4), four], [Pairs(NAMES)])
    found = {(e["metric"], e["set"]): e for e in results["differences"]}
    both = [("image_to_text@1", "pairs"), ("text_to_image@1", "pairs")]
    expected = [("acc1", "solid"), ("acc1", "four"), ("acc1", None), *both]
    assert list(found) == expected
    mean = found["acc1", None]
    assert mean["model"] == "good"
    assert mean["baseline"] == "bad"
    wanted = (8 / 24 + 2 / 4) / 2
    assert mean["difference"] == pytest.approx(wanted)
    assert 0 < mean["low"] < mean["difference"] < mean["high"] < 1


def test_differences_of_three_models_and_sets_that_one_lacks():
    """A model that has probes alone takes no mean from the others."""
    hit = torch.ones(4, dtype=torch.bool)
    miss = ~hit
    hits = {("acc1", of): {"a": hit, "b": miss} for of in "st"}
    hits["probe_acc1", "s"] = {"a": hit, "mute": hit, "b": miss}
    hits["probe_acc1", "t"] = {"a": miss, "mute": hit}
    found = []
    for entry in paired_differences(hits):
        pair = f"{entry['model']} − {entry['baseline']}"
        found.append(f"{entry['metric']} {entry['set']}: {pair} {entry['difference']}")
    assert found == [
        "acc1 s: b − a -1.0",
        "acc1 t: b − a -1.0",
        "acc1 None: b − a -1.0",
        "probe_acc1 s: mute − a 0.0",
        "probe_acc1 s: b − a -1.0",
        "probe_acc1 s: b − mute -1.0",
        "probe_acc1 t: mute − a 1.0",
    ]


def test_a_set_that_fails_is_listed_and_the_rest_is_there(models):
    wrong = Labels(["red"], labels=[6], name="wrong")
    one = Pairs(["red"] * 2, broken=[1], name="one")
    results = evaluate(models, [wrong, Labels(NAMES)], [one])
    failures = results["failures"]
    failed = [(failure["model"], failure["set"]) for failure in failures]
    expected = [(model, of) for model in models for of in ("wrong", "one")]
    assert failed == expected
    label = "image 0 has label 6, but there are 6 class names (labels 0 to 5)"
    assert label in failures[0]["error"]
    assert "one: geometry needs at least 2 pairs" in failures[1]["error"]
    good = results["rows"][1]
    assert list(good["zeroshot"]) == ["solid"]
    assert list(good["retrieval"]) == ["one"]


def test_classes_that_differ_from_those_of_the_training_images_are_refused(models):
    train = Labels(NAMES, classnames=NAMES[::-1])
    results = evaluate(models, [Labels(NAMES)], training={"solid": train})
    assert "but 'magenta' to train" in results["failures"][0]["error"]


def test_written_results_are_deterministic_json(tmp_path, models):
    one = tmp_path / "sub" / "a.json"
    other = tmp_path / "b.json"
    for path in (one, other):
        pairs = Pairs(NAMES, broken=[0, 1, 2, 3])
        write_results(path, evaluate(models, [Labels(NAMES)], [pairs]))
    assert one.read_bytes() == other.read_bytes()
    row = json.loads(one.read_bytes())["rows"][0]
    # infinite: four of six unreadable
    assert row["retrieval"]["pairs"]["text_to_image_median_rank"] is None
    with pytest.raises(InputError, match=r"b\.json.x: results cannot be written"):
        write_results(other / "x", {})


def test_a_picture_answers_each_of_its_captions(tmp_path):
    for stem, colour in (("r", "red"), ("b", "blue")):
        (tmp_path / f"{stem}.png").write_bytes(picture(colour))
    table = tmp_path / "t.csv"
    table.write_text("filepath,title\nr.png,red\nb.png,blue\nr.png,magenta\n")
    embeddings = Embeddings({"m": ColourModel()})
    queries = example_queries(embeddings, open_captioned(table), k=2)
    answers = {query.query: query.answers["m"] for query in queries}
    # Red is as near as blue but for the little that texts point to red; both are called
    # by their first caption.
    found = [(shown.label, shown.correct) for shown in answers["magenta"]]
    assert found == [("red", True), ("blue", False)]


def test_a_loaded_model_is_the_model_that_was_saved(tmp_path):
    encoder = create_model("tiny-vit", seed=0)
    data = Labels(NAMES, broken=[1])
    settings = make_objective("infoloob", inv_tau=20.0).config()
    save_model(tmp_path / "saved", encoder, settings)
    seen = []
    embeddings = Embeddings(
        {"fresh": encoder, "loaded": str(tmp_path / "saved")},
        EmbedOptions(batch_size=4, workers=2),
        progress=lambda *call: seen.append(call),
    )
    results = evaluate(embeddings, [data], [Pairs(NAMES)])
    fresh, loaded = results["rows"]
    assert fresh["objective"] is None
    assert loaded["objective"] == "infoloob"
    assert loaded["settings"]["inv_tau"] == pytest.approx(20.0)
    for section in ("zeroshot", "retrieval"):
        assert fresh[section] == loaded[section]
    assert {("fresh: solid", 6, 6), ("loaded: pairs", 6, 6)} <= {*seen}
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
    cut = shutil.copytree(checkpoint(folder, 10), checkpoint(folder, 5))
    os.truncate(cut / "open_clip_model.safetensors", 1000)
    lines = [{"epoch": n, "step": 5 * n, "samples": 10} for n in (1, 2, 3)]
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (folder / "epochs.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_every_checkpoint_of_a_run_is_measured_and_a_damaged_one_named(
    run, tmp_path, capsys
):
    pairs = {str(i): (COLOURS[name], f"{name}\n") for i, name in enumerate(NAMES)}
    write_pairs(tmp_path / "pairs", pairs, (40, 40))
    out = tmp_path / "out"
    words = f"--retrieval {tmp_path}/pairs --checkpoints --device cpu"
    run_cloob(f"eval {run} {words} --out {out}", code=1)
    assert "mine, step 5" in capsys.readouterr().err
    results = read_json(out / "results.json")
    (failure,) = results["failures"]
    assert failure["error"].startswith(f"{checkpoint(run, 5)}/")
    found = results["checkpoints"]["models"]["mine"]
    assert [(each["step"], each["epoch"]) for each in found] == [(10, 2.0), (15, 3.0)]
    source = open_captioned(tmp_path / "pairs")
    for seed, each in enumerate(found):
        embedded = embed_pairs(create_model("tiny-vit", seed=seed), source)
        expected = geometry(embedded.images.features, embedded.texts, 30.0, 6.0)
        for key in each.keys() - {"step", "epoch"}:
            assert each[key] == pytest.approx(expected[key], rel=1e-4)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Effective eigenvalues during training" in page


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return [
        tiny_model(tmp_path_factory.mktemp("saved") / "m", seed=seed) for seed in (0, 1)
    ]


def test_two_sets_of_one_name_are_two():
    embeddings = Embeddings({"m": ColourModel()})
    one = embeddings.labelled("m", Labels(NAMES)).images.features
    other = embeddings.labelled("m", Labels(NAMES[::-1])).images.features
    assert_close(other, one.flip(0))
    assert len(embeddings.pairs("m", Pairs(NAMES)).texts) == len(NAMES)
    assert len(embeddings.pairs("m", Pairs(NAMES[:4])).texts) == 4


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
    options = EmbedOptions(batch_size=batch_size, workers=workers)
    features, keys, bad, *_ = embed_images(ColourModel(), data, options)
    colours = torch.tensor([COLOURS[colour] for colour in data.colours])
    expected = F.normalize(colours - 127.5, dim=1)
    expected[[0, 5]] = torch.nan
    assert_close(features, expected, equal_nan=True)
    wanted = tuple(f"s{i}" for i in range(7))
    assert keys == wanted
    assert [skip.key for skip in bad] == ["s0", "s5"]
    assert {skip.reason for skip in bad} == {"corrupt image"}


def test_pairs_are_read_once_and_unreadable_ones_are_nan(monkeypatch):
    source = Pairs(NAMES, broken=[1], missing=[2])
    reads = []
    original = Pairs.read

    def read(self, index):
        reads.append(index)
        return original(self, index)

    monkeypatch.setattr(Pairs, "read", read)
    pairs = embed_pairs(ColourModel(), source, EmbedOptions(batch_size=2))
    assert reads == list(range(6))
    images = torch.isnan(pairs.images.features).all(1)
    assert images.tolist() == [False, True, True, False, False, False]
    texts = torch.isnan(pairs.texts).all(1)
    assert texts.tolist() == [False, False, True, False, False, False]
    assert pairs.captions == ("red", "green", "", "yellow", "cyan", "magenta")
    assert pairs.image_of_text.tolist() == list(range(6))
    assert pairs.unreadable == {"corrupt image": 1, "missing image": 1}
