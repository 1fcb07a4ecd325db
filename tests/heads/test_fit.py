"""The loop against a plain one; resumption, the best epoch, batches; what is chosen."""

import logging

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from views import pairs_of, views

from cloob.data.order import EpochOrder, ShardSizes
from cloob.errors import InputError, TrainingFailed
from cloob.heads.choose import choose, gain_by_halves
from cloob.heads.closed import fit_closed_form
from cloob.heads.columns import choose_columns
from cloob.heads.fit import fit
from cloob.heads.fitted import Rows, recalls
from cloob.heads.head import unit_rows
from cloob.heads.parts import fresh_heads
from cloob.heads.settings import HeadSettings
from support import raises, run_script

PLAIN = HeadSettings(
    "infoloob", inv_tau=10.0, embed_dim=16, epochs=4, batch_size=32, device="cpu"
)


class Killed(Exception):
    pass


def killed_after(epoch):
    def on_epoch(line):
        if line["epoch"] == epoch:
            raise Killed

    return on_epoch


def same(one, other):
    for x, y in zip(one.heads, other.heads, strict=True):
        expected = y.state_dict()
        for key, value in x.state_dict().items():
            if not torch.equal(value, expected[key]):
                return False
    return True


def numbers(fitted):
    """The lines of the epochs without what a clock says."""
    return [{**line, "seconds": None} for line in fitted.history]


def losses_of(fitted):
    return [line["loss"] for line in fitted.history]


def recall_of(fitted, pairs):
    """The mean of those by which epochs are judged."""
    return float(recalls(fitted.heads, Rows.of(pairs)).mean())


def split_pairs(share, n, widths=(12, 8), **options):
    """Those to train on, and those that are held out."""
    return pairs_of(*views(n, widths, **options)).split(share)


@pytest.mark.parametrize("objective", ["clip", "cloob"])
def test_a_fit_does_without_the_compiler(objective):
    """Whose import takes longer than most fits."""
    script = f"""if True:
        import sys, numpy as np, cloob
        a = np.random.default_rng(0).normal(size=(80, 4))
        settings = cloob.HeadSettings("{objective}", epochs=2, device="cpu")
        cloob.fit_heads(a, a**3, settings=settings)
        print({{"torch._dynamo", "torchvision"}} & set(sys.modules))
    """
    done = run_script(script)
    assert done.stdout == "set()\n", done.stderr


def test_it_is_a_plain_loop_of_torch():
    """Losses of every epoch by twenty lines from the formulas of AdamW, InfoLOOB and
    the learning rate.
    """
    labels = [f"{i // 2}" for i in range(150)]
    pairs = pairs_of(*views(150), labels=labels)
    settings = PLAIN.override(dropout=0.0, patience=0)
    heads = fresh_heads(pairs, settings, choose_columns(pairs, settings))
    weights = [p for head in heads for p in head.parameters()]
    matrices = [p for p in weights if p.ndim > 1]
    others = [p for p in weights if p.ndim == 1]
    decayed = {"params": matrices, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW([decayed, {"params": others, "weight_decay": 0.0}])
    cosines = np.cos(np.pi * np.arange(15) / 15)
    rates = [1e-3, *(5e-4 * (1 + cosines))]
    order = EpochOrder([ShardSizes((150,))], 0)
    expected = []
    for epoch in range(4):
        rows = order.epoch(epoch)(np.arange(128))
        losses = []
        for places in np.split(rows, 4):
            batch = pairs.batch(places)
            (a, b), ids = batch.parts, batch.ids
            x = F.normalize(heads[0](a), dim=1)
            y = F.normalize(heads[1](b), dim=1)
            logits = 10.0 * x @ y.T
            negative = ids[:, None] != ids
            loss = torch.zeros(())
            for side in (logits, logits.T):
                rest = side.masked_fill(~negative, -torch.inf).logsumexp(1)
                of_rows = rest - side.diagonal()
                loss = loss + of_rows.mean() / 10.0
            optimizer.zero_grad()
            loss.backward()
            rate = rates.pop(0)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            losses.append(loss.item())
        expected.append(np.mean(losses))
    found = losses_of(fit(pairs, None, settings))
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_killed_fit_goes_on_bit_for_bit(epoch, tmp_path):
    pairs, held_out = pairs_of(*views(200)).split(0.2)
    settings = PLAIN.override(objective="cloob", inv_tau=None)
    whole = fit(pairs, held_out, settings)
    torch.rand(3)  # whatever else draws numbers
    state = tmp_path / "state.pt"
    with pytest.raises(Killed):
        fit(pairs, held_out, settings, state=state, on_epoch=killed_after(epoch))
    again = fit(pairs, held_out, settings, state=state)
    assert same(whole, again)
    assert numbers(whole) == numbers(again)
    of_another_seed = settings.override(seed=1)
    other = fit(pairs, held_out, of_another_seed, state=state)
    assert same(other, fit(pairs, held_out, of_another_seed))
    state.write_bytes(state.read_bytes()[:1000])
    assert same(whole, fit(pairs, held_out, settings, state=state))


def test_the_state_of_other_columns_is_not_gone_on_from(tmp_path):
    """Both divide by one number, so that the weights of one would fit the other."""
    a, b = views(400, noise=0.5)
    plain = pairs_of(a, b)
    cubed = pairs_of(a, b**3)
    of_plain = fit_closed_form(plain, plain)
    assert of_plain.decisions["columns"] == [["plain", "one"], ["plain", "one"]]
    of_cubed = fit_closed_form(cubed, cubed)
    assert of_cubed.decisions["columns"] == [["plain", "one"], ["root", "one"]]
    settings = PLAIN.override(start="closed-form")
    state = tmp_path / "state.pt"
    begun = {"closed": of_plain, "state": state, "on_epoch": killed_after(2)}
    with pytest.raises(Killed):
        fit(cubed, None, settings, **begun)
    again = fit(cubed, None, settings, closed=of_cubed, state=state)
    assert same(again, fit(cubed, None, settings, closed=of_cubed))


def test_the_best_epoch_is_the_one_with_the_best_recall():
    pairs, held_out = split_pairs(0.3, 300, noise=1.5)
    fitted = fit(pairs, held_out, PLAIN.override(epochs=30, lr=0.03, patience=3))
    found = [line["val_recall"] for line in fitted.history]
    best = int(np.argmax(found))
    assert fitted.best_epoch == best + 1
    assert len(found) == best + 4
    assert len(found) < 30
    assert recall_of(fitted, held_out) == pytest.approx(found[best])


def test_a_fit_that_is_behind_ends_earlier():
    pairs, held_out = split_views(120)
    settings = AUTO.override(objective="infoloob", epochs=60, patience=5)
    plain = fit(pairs, held_out, settings, lead=0.0)
    assert len(plain.history) == plain.best_epoch + 5
    behind = fit(pairs, held_out, settings, lead=1.1)
    assert len(behind.history) == behind.best_epoch + 3
    losses = losses_of(behind)
    assert losses_of(plain)[: len(losses)] == losses


def test_what_does_not_go_is_one_line():
    pairs = pairs_of(*views(20))
    raises(InputError, "20 training pairs; batch_size is 32", fit, pairs, None, PLAIN)
    loud = PLAIN.override(batch_size=10, lr=1e30)
    raises(TrainingFailed, "the loss is not finite", fit, pairs, None, loud)
    raises(InputError, "without held-out pairs; give some", choose, pairs, None)
    said = "unknown key 'epoch'; did you mean epochs"
    raises(InputError, said, PLAIN.override, epoch=1)
    raises(InputError, "beta is 3.0; it must be left out", PLAIN.override, beta=3)
    raises(InputError, "lr is -1; it must be greater than 0", PLAIN.override, lr=-1)
    said = "epochs is 1.5; it must be a valid int"
    raises(InputError, said, PLAIN.override, epochs=1.5)


AUTO = HeadSettings(epochs=6, lr=1e-2, batch_size=50, device="cpu")


def split_views(n=500, seed=0):
    a, b = views(n, seed=seed, noise=0.5)
    return pairs_of(a, np.tanh(b)).split(0.1)


def test_both_starts_are_tried_and_what_finds_most_is_joined(caplog):
    caplog.set_level(logging.INFO, "cloob.heads")
    a, b = views(800, (60, 40), noise=2.0)
    pairs, held_out = pairs_of(a, np.tanh(b)).split(0.2)
    lines = []
    fitted = choose(pairs, held_out, AUTO, on_epoch=lines.append)
    trials = fitted.decisions["objective"]["trials"]
    objectives = [trial["objective"] for trial in trials]
    assert objectives == ["infoloob", "infoloob", "cca"]
    starts = [trial["start"] for trial in trials]
    assert starts == ["closed-form", "random", None]
    begun = [i for i, line in enumerate(lines) if line["epoch"] == 1]
    first, second = begun
    assert first == 0
    assert fitted.history in (lines[:second], lines[second:])
    recall = fitted.decisions["joined"]["recall"]
    best = max(line["val_recall"] for line in lines)
    assert fitted.recall == recall > best
    assert recall_of(fitted, held_out) == pytest.approx(recall)
    assert "joined: " in caplog.text


def test_a_fit_starts_from_the_closed_form():
    """Cosines at the start are the closed form's; so is the recall, of heads as wide as
    it is.
    """
    pairs, held_out = split_views()
    closed = fit_closed_form(pairs, held_out, HeadSettings("cca", standardise="one"))
    settings = AUTO.override(objective="clip", start="closed-form", standardise="one")
    still = settings.override(lr=1e-12, epochs=1)
    fitted = fit(pairs, held_out, still)
    given = fit(pairs, held_out, still, closed=closed)
    rows = Rows.of(held_out)
    for x, y, side in zip(closed.heads, fitted.heads, (rows.a, rows.b), strict=True):
        expected = unit_rows(x, side)
        width = x.options["embed_dim"]
        found = unit_rows(y, side)[:, :width]
        assert_close(found, expected, atol=1e-4, rtol=0)
    assert same(fitted, given)

    def size(fitted):
        with torch.no_grad():
            outputs = fitted.heads[0](rows.a)
        return float(outputs.square().mean())

    fresh = fit(pairs, held_out, still.override(start="random"))
    assert size(fresh) == pytest.approx(size(fitted), rel=0.2)
    first, *_ = fit(pairs, held_out, settings).history
    assert first["val_recall"] > 0.9


@pytest.mark.parametrize("objective", ["cca", "infoloob", "auto"])
def test_refit_sees_all_pairs_and_reports_what_was_before(objective):
    pairs, held_out = split_views(300)
    settings = AUTO.override(objective=objective)
    plain = choose(pairs, held_out, settings)
    again = choose(pairs, held_out, settings.override(refit=True))
    assert numbers(plain) == numbers(again)
    assert not same(plain, again)
    assert "300 pairs, 30 of them held out" in again.decisions["refit"]
    # they were trained on
    assert recall_of(again, held_out) >= recall_of(plain, held_out)


def test_a_side_of_equal_rows_is_told_and_no_other(caplog):
    a, b = views(80, (6, 5))
    once = PLAIN.override(epochs=1)
    fit(pairs_of(a, np.eye(80, 1)), None, once)
    assert "all rows of" not in caplog.text
    fit(pairs_of(np.ones((80, 6)), b), None, once)
    assert "all rows of a are equal" in caplog.text


def test_recalls_are_those_of_every_id():
    a, b = views(30, (6, 5))
    labels = [f"M{row // 2}" for row in range(30)]
    pairs = pairs_of(a, b, labels)
    fitted = fit(pairs, None, PLAIN.override(epochs=1, batch_size=8))
    found = recalls(fitted.heads, Rows.of(pairs))
    head_a, head_b = fitted.heads
    x = unit_rows(head_a, torch.from_numpy(a))
    y = unit_rows(head_b, torch.from_numpy(b))
    id_of = torch.arange(30) // 2
    expected = torch.zeros(15)
    for here, other in ((x, y), (y, x)):
        scores = here @ other[::2].T  # an id's first row
        own = scores.gather(1, id_of[:, None])
        ranks = (scores >= own).sum(1)
        for k in (1, 5, 10):
            hits = (ranks <= k).float().view(15, 2)
            expected += hits.mean(1) / 6
    order = pairs.ids[::2].argsort()
    assert_close(found.float(), expected[order])


def test_gains_are_those_of_ids_that_did_not_choose():
    """Two are better on a half of the ids each: what one half of them chooses gains
    nothing on the other, and what is better everywhere gains all of it.
    """
    even = torch.tensor([1.0, 0.0]).repeat(50)
    usual = torch.full((1, 100), 0.5)
    either = torch.cat([usual, even[None], 1 - even[None]])
    ids = torch.arange(100)
    lucky = gain_by_halves(either, ids)
    assert lucky.mean < 0
    assert lucky.low < lucky.mean < lucky.high
    better = torch.cat([usual, usual + 0.25])
    assert gain_by_halves(better, ids) == (0.25, 0.25, 0.25)
    worse = torch.cat([usual, usual - 0.25])
    assert gain_by_halves(worse, ids) == (0, 0, 0)
    groups = ids % 4  # each good for one
    of_four = gain_by_halves(either, groups)
    assert of_four.low == -0.5
    order = torch.randperm(100)
    again = gain_by_halves(either[:, order], groups[order])
    assert again == pytest.approx(of_four)


def test_all_stand_side_by_side_unless_another_way_clearly_finds_more():
    """Half of the ids of few pairs see no difference; where nothing but the closed form
    has learned anything, it is taken by itself.
    """
    few, held_out = split_pairs(0.1, 300, noise=0.7)
    fitted = choose(few, held_out, AUTO)
    joined = fitted.decisions["joined"]
    assert joined["joined"] == "infoloob 1 + kcca, hubs 0.5"
    assert joined["difference"][1] <= 0

    pairs, held_out = split_pairs(0.3, 900, (60, 40), noise=1.5)
    still = AUTO.override(epochs=1, lr=1e-9, start="random")
    fitted = choose(pairs, held_out, still)
    joined = fitted.decisions["joined"]
    assert joined["joined"].startswith("cca")
    assert joined["difference"][1] > 0
    assert recall_of(fitted, held_out) == pytest.approx(joined["recall"])
