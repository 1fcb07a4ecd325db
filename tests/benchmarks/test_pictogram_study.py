"""The study's machinery: the same budget for all, one order of pairs for all, runs that can be stopped anywhere."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def tiny_data(n: int = 40) -> Any:
    from benchmarks.pictograms.cache import Data, Pairs

    random = np.random.default_rng(0)

    def pairs(count: int) -> Pairs:
        tokens = np.zeros((count, 24), np.int32)
        tokens[:, 0], tokens[:, 1], tokens[:, 2] = 49406, random.integers(1, 500, count), 49407
        images = random.integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
        return Pairs(images, tokens, np.arange(count), tuple(f"thing {i}" for i in range(count)))

    return Data({"train": pairs(n), "val": pairs(12)}, {}, {})


def tiny_cell(**changes: Any) -> Any:
    from benchmarks.pictograms.cells import DEFAULTS, search_cell

    cell = search_cell("cloob", dataclasses.replace(DEFAULTS["cloob"], batch_size=16, **changes), 2)
    return dataclasses.replace(cell, tower="tiny-convnext")


def comparable(record: dict[str, Any]) -> dict[str, Any]:
    curve = [{k: v for k, v in line.items() if not k.endswith("seconds")} for line in record["curve"]]
    return {k: v for k, v in record.items() if not k.endswith("seconds")} | {"curve": curve}


def test_every_method_gets_the_same_number_of_runs_and_only_validation_decides() -> None:
    from benchmarks.pictograms import cells

    scores: dict[str, float] = {}
    for _ in range(200):
        todo = [cell for cell in cells.search_cells(scores) if cell.id not in scores]
        if not todo:
            break
        scores[todo[0].id] = (len(todo[0].id) * 37 % 101) / 101
    rates = cells.RATES * (len(cells.TOWERS) - 1)
    assert len(scores) == len(cells.METHODS) * (cells.RUNS_A_METHOD + cells.FINALISTS + rates)
    for method in cells.METHODS:
        short = [cell for _, cell in cells.short_search(method, scores)]
        assert len({cell.id for cell in short}) == cells.RUNS_A_METHOD
        final = cells.long_search(method, scores)
        assert final[0].setting == cells.DEFAULTS[method]
        assert len({cell.id for cell in final}) == cells.FINALISTS
        best = max(final, key=lambda cell: scores[cell.id])
        assert cells.chosen_setting(method, scores) == (best.setting, "finalists")
        for tower in cells.TOWERS[1:]:
            tried = cells.rate_search(method, tower, scores)
            assert len({cell.setting.lr for cell in tried}) == cells.RATES
            assert {dataclasses.replace(cell.setting, lr=best.setting.lr) for cell in tried} == {best.setting}
            chosen = max(tried, key=lambda cell: scores[cell.id]).setting
            assert cells.chosen_setting(method, scores, tower) == (chosen, "finalists")


def test_attempts_change_the_chosen_settings_once_there_are_any() -> None:
    from benchmarks.pictograms import cells
    from benchmarks.pictograms.attempts import CHOSEN, attempts, planned

    first = attempts({})
    scores: dict[str, float] = {}
    while todo := [cell for cell in cells.search_cells(scores) if cell.id not in scores]:
        scores[todo[0].id] = (len(scores) * 37 % 101) / 101
    later = attempts(scores)
    assert later[: len(first)] == first
    assert len({cell.id for cell in later}) == len(later)
    assert {cell.method for cell in later[len(first) :]} == {method for method, *_ in CHOSEN}
    for cell in later[len(first) :]:
        chosen = cells.chosen_setting(cell.method, scores)[0]
        changed = {k for k, v in dataclasses.asdict(cell.setting).items() if v != getattr(chosen, k)}
        assert len(changed) == 1 and changed <= {"option", "start", "mask_duplicates"}
    for cell, baseline, why in planned(scores):
        assert baseline.stage == "search" and baseline.id in scores and why
        assert (cell.method, cell.tower, cell.epochs) == (baseline.method, baseline.tower, baseline.epochs)


def test_a_round_starts_from_the_best_of_the_one_before() -> None:
    from benchmarks.pictograms import cells

    first = [cell for _, cell in cells.short_search("clip", {})]
    assert [cell.setting for cell in first] == [cells.DEFAULTS["clip"]]
    scores = {first[0].id: 0.1}
    temperatures = [cell for name, cell in cells.short_search("clip", scores) if name == "temperature"]
    assert [(c.setting.inv_tau, c.setting.learnable_inv_tau) for c in temperatures] == [
        (t, False) for t in (10.0, 20.0, 30.0, 50.0)
    ]
    scores |= {cell.id: 0.2 if cell.setting.inv_tau == 20 else 0.05 for cell in temperatures}
    rates = [cell for name, cell in cells.short_search("clip", scores) if name == "learning rate"]
    assert [(c.setting.inv_tau, c.setting.lr) for c in rates] == [(20.0, 5e-4), (20.0, 2e-3)]


def test_cells_and_records_name_each_other() -> None:
    from benchmarks.pictograms import cells

    grid = cells.grid({})
    longer = len(cells.METHODS) + len(cells.CLAIMED) * len(cells.SEEDS)  # 36 epochs; seeds beside the first, 60
    whole = len(cells.METHODS) * len(cells.TOWERS) * len(cells.SEEDS)
    assert len({cell.id for cell in grid}) == len(grid) == whole + longer
    assert all(cells.Cell.from_config(cell.config()) == cell for cell in grid)
    assert cells.SEARCH_SEED not in cells.SEEDS


def test_a_stopped_run_ends_as_one_that_was_not(tmp_path: Path) -> None:
    from benchmarks.pictograms.running import Interrupted, Run

    data, cell = tiny_data(), tiny_cell()
    whole = Run(cell, data, tmp_path / "whole.pt", full=False).go(lambda: False)
    assert (whole["steps"], whole["pairs_seen"], len(whole["curve"])) == (4, 64, 2)
    state = tmp_path / "stopped.pt"
    for stop_after in (1, 2):  # in the middle of the first epoch, and of the second
        counter = itertools.count(1)
        with pytest.raises(Interrupted):
            Run(cell, data, state, full=False).go(lambda c=counter, n=stop_after: next(c) == n)  # type: ignore[misc]
    assert comparable(Run(cell, data, state, full=False).go(lambda: False)) == comparable(whole)


def test_two_builders_of_the_cache_do_not_write_into_each_others_files(tmp_path: Path) -> None:
    from benchmarks.pictograms.cache import _cached

    def build(value: int) -> Any:
        return {"images": np.full((64, 64), value, np.uint8)}, {"captions": [str(value)]}

    quick = []

    def slow() -> Any:
        quick.append(_cached(tmp_path, "train", ("images",), lambda: build(1)))  # another process was faster
        return build(2)

    _cached(tmp_path, "train", ("images",), slow)
    arrays, texts = quick[0]
    assert (arrays["images"] == 1).all()
    assert texts == {"captions": ["1"]}
    assert not list((tmp_path / "train").glob(".tmp-*"))


def test_all_methods_start_alike_and_see_the_same_pairs(tmp_path: Path) -> None:
    from benchmarks.pictograms.cache import Augmented
    from benchmarks.pictograms.cells import DEFAULTS
    from benchmarks.pictograms.running import Run

    data = tiny_data()
    runs = [
        Run(dataclasses.replace(tiny_cell(), method=m, setting=DEFAULTS[m]), data, tmp_path / m, full=False)
        for m in ("clip", "cloob")
    ]
    for a, b in zip(*(run.encoder.parameters() for run in runs), strict=True):
        assert torch.equal(a, b)
    indices = np.array([3, 0, 5])
    first, again = (Augmented(data.pairs["train"], 7).batch(1, indices) for _ in range(2))
    other = Augmented(data.pairs["train"], 7).batch(2, indices)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert first[2].tolist() == indices.tolist()


def test_a_centred_start_moves_the_mean_of_the_image_embeddings_alone(tmp_path: Path) -> None:
    from benchmarks.pictograms.running import Run

    data, cell = tiny_data(), dataclasses.replace(tiny_cell(), tower="tiny-resnet")
    centred = dataclasses.replace(cell, setting=dataclasses.replace(cell.setting, start="centred"))
    plain, moved = (Run(c, data, tmp_path / c.id, full=False) for c in (cell, centred))
    images, tokens, _ = plain.batches.batch(0, np.arange(40))
    with torch.no_grad():
        before, after = (run.encoder.train()(images, tokens) for run in (plain, moved))
    assert float(before[0].mean(0).norm()) > 0.5
    assert float(after[0].mean(0).norm()) < 0.1
    assert torch.equal(before[1], after[1])


def test_what_retrieval_sees_in_fresh_towers() -> None:
    from benchmarks.pictograms.cells import DEFAULTS
    from benchmarks.pictograms.fresh import measured

    setting = dataclasses.replace(DEFAULTS["cloob"], batch_size=40)
    before, after = (measured(tiny_data(), dataclasses.replace(setting, start=start)) for start in ("", "centred"))
    assert before[1] == after[1]  # texts
    assert all(-4 <= value <= 0 for value in before + after)
    assert after[0] < before[0] - 0.5  # images spread
    assert before[0] < before[2]  # retrieval narrows them
    assert after[2] < before[2] and after[3] < before[3]


def test_variants_meet_the_published_forms_at_their_ends() -> None:
    from benchmarks.pictograms.variants import Variant

    from cloob.objective import make_objective

    generator = torch.Generator().manual_seed(0)
    x, y = (torch.nn.functional.normalize(torch.randn(9, 5, generator=generator), dim=1) for _ in range(2))
    cloob, infoloob = (make_objective(name, inv_tau=20.0) for name in ("cloob", "infoloob"))
    plain, retrieved = float(infoloob(x, y)), float(cloob(x, y))
    for option, progress, expected in (
        ("warm", 0.49, plain),
        ("warm", 0.5, retrieved),
        ("early", 0.16, plain),
        ("early", 0.17, retrieved),
        ("ramp", 0.0, plain),
        ("ramp", 0.25, 0.75 * plain + 0.25 * retrieved),
        ("ramp", 1.0, retrieved),
        ("sum", 0.3, (plain + retrieved) / 2),
        ("grown-beta", 0.0, retrieved),
        ("grown-beta", 1.0, float(make_objective("cloob", inv_tau=20.0, beta=32.0)(x, y))),
    ):
        variant = Variant(cloob, option)
        variant.progress = progress
        assert float(variant(x, y)) == pytest.approx(expected, rel=1e-5), (option, progress)
    nce = Variant(make_objective("infonce-hopfield", inv_tau=20.0), "warm")
    assert float(nce(x, y)) == pytest.approx(
        float(make_objective("clip", inv_tau=20.0, learnable_inv_tau=False, scale="paper")(x, y)), rel=1e-5
    )
    shifted = [torch.nn.functional.normalize(rows - rows.mean(0), dim=1) for rows in (x, y)]
    assert float(Variant(cloob, "centring")(x, y)) == pytest.approx(float(cloob(*shifted)), rel=1e-5)


def test_a_queue_is_retrieved_from_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.pictograms import variants

    from cloob.objective import make_objective

    monkeypatch.setattr(variants, "QUEUE", 5)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.nn.functional.normalize(torch.randn(2, 4, 3, generator=generator), dim=2) for _ in range(3)]
    cloob = make_objective("cloob", inv_tau=20.0, beta=6.0)
    variant = variants.Variant(cloob, "queue")
    assert float(variant(*batches[0])) == pytest.approx(float(make_objective("infoloob", inv_tau=20.0)(*batches[0])))
    variant.progress = 0.5
    assert float(variant(*batches[0])) == pytest.approx(float(cloob(*batches[0])), rel=1e-5)  # nothing is kept yet
    variant(*batches[1])
    again = variants.Variant(cloob, "queue")
    again.load_state_dict(variant.state_dict())
    again.progress = 0.5

    # By loops: batch 2 in front of the whole of batch 1 and the first pair of batch 0.
    memories = [torch.cat([batches[2][side], batches[1][side], batches[0][side][:1]]) for side in (0, 1)]
    found = []
    for side, memory in enumerate(memories):
        rows = []
        for query in (batches[2][side], batches[2][1 - side]):  # the anchor's own kind first
            weights = [torch.softmax(torch.stack([6.0 * (q @ m) for m in memory]), 0) for q in query]
            rows.append([torch.nn.functional.normalize(w @ memory, dim=0) for w in weights])
        for i, anchor in enumerate(rows[0]):
            scores = [20.0 * float(anchor @ other) for other in rows[1]]
            found.append(np.log(sum(np.exp(s) for j, s in enumerate(scores) if j != i)) - scores[i])
    expected = sum(found) / 4 / 20.0
    assert float(variant(*batches[2])) == pytest.approx(expected, rel=1e-4)
    assert float(again(*batches[2])) == pytest.approx(expected, rel=1e-4)


def test_a_cell_ends_with_the_scores_of_the_librarys_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zero-shot top-1 by its definition, the labels beside the predictions, probe and curve; the tables take it."""
    from benchmarks.pictograms import records, selection, tables
    from benchmarks.pictograms.cache import Data, Labelled
    from benchmarks.pictograms.cells import DEFAULTS, PROBED, TOWERS, ZEROSHOT
    from benchmarks.pictograms.running import Run
    from benchmarks.pictograms.scoring import labels_to_keep

    random = np.random.default_rng(1)

    def labelled(n: int) -> Labelled:
        images = random.integers(0, 256, (n, 64, 64, 3), dtype=np.uint8)
        return Labelled(images, np.arange(n) % 3, ("dog", "cat", "cat"), ("a {c}", "one {c}."))

    plain = tiny_data()
    pairs = plain.pairs | {"tuxpaint-captions": plain.pairs["val"]}
    data = Data(pairs, {name: labelled(9) for name in ZEROSHOT}, {name: labelled(15) for name in PROBED})
    setting = dataclasses.replace(DEFAULTS["clip"], batch_size=16)
    cell = dataclasses.replace(tiny_cell(), stage="cells", method="clip", tower=TOWERS[2], seed=0, setting=setting)
    run = Run(cell, data, tmp_path / "state.pt")
    record = run.go(lambda: False)

    encoder = run.encoder.eval()
    tests = data.test["flags"]
    with torch.no_grad():
        prompts = [encoder.encode_text([f"a {name}", f"one {name}."]).mean(0) for name in tests.classnames]
        classes = torch.nn.functional.normalize(torch.stack(prompts).double(), dim=1)
        images = encoder.encode_image(torch.from_numpy(tests.images).permute(0, 3, 1, 2)).double()
    expected = (images @ classes.T)[:, :2].argmax(1).numpy()  # classes 1 and 2 have one name
    predictions = records.unpack(record["zeroshot"]["flags"]["predictions"])
    assert (np.minimum(predictions, 1) == expected).all()
    # Neither of two classes of one name is ever found.
    hits = (predictions == tests.labels).mean()
    assert hits == pytest.approx(((expected == 0) & (tests.labels == 0)).mean())
    assert record["zeroshot"]["flags"]["acc1"] == pytest.approx(hits, abs=1e-6)
    assert [("zeroshot" in line, 0 < line["train_saturation"] < 1) for line in record["curve"]] == [(True, True)] * 2
    assert set(record["probe"]) == set(PROBED)

    records.write(tmp_path / records.TEST_SETS, labels_to_keep(data))
    labels, n_classes = records.labels_by_set(tmp_path)["flags"]
    assert (labels.tolist(), n_classes) == (tests.labels.tolist(), 3)
    records.write(tmp_path / "cells" / f"{cell.id}.json", record)
    monkeypatch.setattr(selection, "CELL_EPOCHS", 2)
    monkeypatch.setitem(DEFAULTS, "clip", setting)
    assert f"| flags | {100 * hits:.1f} |" in tables.render(tmp_path)


def test_timing_takes_every_method_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.pictograms import timing
    from benchmarks.pictograms.cells import DEFAULTS
    from benchmarks.pictograms.running import Run

    methods = ("clip", "cloob-warm")
    monkeypatch.setattr(timing, "TOWERS", ("tiny-convnext",))
    monkeypatch.setattr(timing, "METHODS", methods)
    monkeypatch.setattr(timing, "ROUNDS", 2)
    for method in methods:
        monkeypatch.setitem(DEFAULTS, method, dataclasses.replace(DEFAULTS[method], batch_size=8))
    taken: list[tuple[str, bool]] = []
    train_on = Run.train_on

    def watched(self: Run, *arguments: Any) -> bool:
        taken.append((self.cell.method, self.step >= self.total / 2))
        return train_on(self, *arguments)

    monkeypatch.setattr(Run, "train_on", watched)
    found = timing.time_steps(tiny_data(), {}, lambda _: None)
    assert taken == [(method, late) for method in methods for late in (False, True)] * 3
    assert set(found["seconds"]["tiny-convnext"]) == set(methods)
    assert all(len(halves) == 2 for halves in found["seconds"]["tiny-convnext"].values())
    assert all(0 < value < 60 for halves in found["seconds"]["tiny-convnext"].values() for value in halves)


def test_settings_reach_the_objective() -> None:
    from benchmarks.pictograms.cells import DEFAULTS
    from benchmarks.pictograms.variants import Variant, build_objective

    from cloob.objective import make_objective

    for method, setting in DEFAULTS.items():
        built = build_objective(method, setting)
        assert isinstance(built, Variant) == (method == "cloob-warm")
        objective = built.objective if isinstance(built, Variant) else built
        assert objective.config() == make_objective(method.removesuffix("-warm")).config()
    learned = build_objective("cloob", dataclasses.replace(DEFAULTS["cloob"], option="learned-beta", beta=5.0))
    assert (learned.config()["learnable_beta"], float(learned.beta.detach())) == (True, pytest.approx(5.0))
    summed = build_objective("cloob", dataclasses.replace(DEFAULTS["cloob"], option="sum", inv_tau=12.0))
    assert isinstance(summed, Variant)
    assert float(summed.objective.inv_tau) == 12.0
    with pytest.raises(ValueError, match="option is 'summ'"):
        build_objective("cloob", dataclasses.replace(DEFAULTS["cloob"], option="summ"))


def test_beta_of_perplexity_retrieves_as_many_as_asked() -> None:
    from benchmarks.pictograms.variants import beta_of_perplexity

    generator = torch.Generator().manual_seed(1)
    rows = torch.nn.functional.normalize(torch.randn(60, 8, generator=generator), dim=1)
    beta = beta_of_perplexity(rows, 30, 4.0)
    scores = beta * rows[30:] @ rows[:30].T
    entropies = []
    for row in torch.cat([scores, scores.T]):
        p = [float(value) for value in torch.softmax(row, 0)]
        entropies.append(-sum(q * np.log(q) for q in p))
    assert np.exp(np.mean(entropies)) == pytest.approx(4.0, rel=0.02)


def test_a_claim_keeps_others_out_and_dies_with_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.pictograms import study

    monkeypatch.setattr(study, "WORK", tmp_path)
    cell = tiny_cell()
    with study.claimed(cell) as mine:
        assert mine
        with study.claimed(cell) as another:
            assert not another
    path = tmp_path / "claims" / f"{cell.stage}--{cell.id}"
    assert not path.exists()
    path.write_text("4194305")  # above the largest process number there can be
    with study.claimed(cell) as mine:
        assert mine


def test_no_cell_is_run_before_every_method_is_tuned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.pictograms import records, study

    monkeypatch.setattr(records.search_scores, "__defaults__", (tmp_path,))
    monkeypatch.setattr(study.Stage, "_run", lambda self, cell: pytest.fail("a cell was run"))
    study.Stage("cells", study.parse(["cells"]), lambda: False).go()
    assert (
        "the search is not complete for clip, infoloob, infonce-hopfield, cloob, cloob-warm" in capsys.readouterr().out
    )


def test_a_stage_does_what_is_open_once_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.pictograms import records, study

    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(records.read, "__defaults__", (tmp_path / "results",))
    monkeypatch.setattr(records.search_scores, "__defaults__", (tmp_path / "results",))
    monkeypatch.setattr(study, "WORK", tmp_path / "work")
    ran: list[str] = []

    def run(self: Any, cell: Any) -> bool:
        ran.append(cell.id)
        if cell.method == "infoloob":
            return False  # a run that fails is not tried again, and does not hold up the others
        records.write(tmp_path / "results" / "search" / f"{cell.id}.json", {"val": {"mean_recall": len(ran) / 1000}})
        return True

    monkeypatch.setattr(study.Stage, "_run", run)
    study.Stage("search", study.parse(["search"]), lambda: False).go()
    from benchmarks.pictograms import cells

    assert (
        len(ran)
        == len(set(ran))
        == (len(cells.METHODS) - 1) * (cells.RUNS_A_METHOD + cells.FINALISTS + cells.RATES * (len(cells.TOWERS) - 1))
        + 2
    )  # its published setting, short and long
