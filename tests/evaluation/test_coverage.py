"""How often the intervals of `eval`, `auto` and the estimator hold the truth: the mean
of what fresh sets of the same size come to.

Nominal is 95 %. `pytest -m nightly -s tests/evaluation/test_coverage.py` prints all.
"""

import functools
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from cloob import ContrastiveHeads
from cloob.functional.bootstrap import bootstrap_interval, group_means
from cloob.functional.protocols import WAYS, pair_numbers
from cloob.functional.ranking import mutual_ranks_of_ids
from cloob.heads.choose import log_trial
from cloob.heads.fitted import recalls_of_ids
from support import seeded

pytestmark = pytest.mark.nightly
N_SETS = 400
N_FRESH = 4000
GROUPS = torch.arange(20).repeat_interleave(10)
UNEQUAL = torch.arange(20).repeat_interleave(torch.tensor([5, 15] * 10))
RECALLS = [f"{way}@{k}" for way in WAYS for k in (1, 5, 10)]
OTHERS = ["a_to_b_mrr", "a_to_b_median_rank"]


def pairs_of(latent, generator, noise=0.8):
    """Unit rows of two noisy views of what is common."""
    views = []
    for _ in range(2):
        rows = latent + noise * torch.randn(latent.shape, generator=generator)
        views.append(F.normalize(rows, dim=1))
    return views


def plain(generator):
    a, b = pairs_of(torch.randn(200, 8, generator=generator), generator)
    return a, b, torch.arange(200)


def repeated(generator):
    """One to four rows an id, which differ by half of the noise alone."""
    counts = torch.randint(1, 5, (120,), generator=generator)
    ids = torch.arange(120).repeat_interleave(counts)
    latent = torch.randn(120, 8, generator=generator)[ids]
    a, b = pairs_of(latent, generator)
    return a, b, ids


def grouped(generator, groups=GROUPS):
    """Twenty groups of ten rows, which are alike within one, as samples of a patient;
    how noisy a group is differs.
    """
    centres = torch.randn(20, 8, generator=generator)[groups]
    latent = 0.7 * centres + 0.7 * torch.randn(200, 8, generator=generator)
    noise = (0.3 + torch.rand(20, generator=generator))[groups, None]
    a, b = pairs_of(latent, generator, noise)
    return a, b, torch.arange(200)


def unequal(generator):
    """The same groups, of five and of fifteen rows."""
    return grouped(generator, UNEQUAL)


def hits_of(a, b, ids):
    """By number, (ids,) values whose mean it is."""
    found = {}
    directions = zip(WAYS, mutual_ranks_of_ids(a, b, ids), strict=True)
    for way, ranks in directions:
        for k in (1, 5, 10):
            found[f"{way}@{k}"] = group_means(ranks < k, ids)
        found[f"{way}_mrr"] = group_means(1 / (ranks + 1.0), ids)
        found[f"{way}_median_rank"] = group_means(ranks, ids) + 1
    return found


@functools.cache
def truth(draw):
    """Means over fresh sets; of medians their median."""
    generator = seeded(1)
    fresh = {}
    for _ in range(N_FRESH):
        for key, values in hits_of(*draw(generator)).items():
            fresh.setdefault(key, []).append(centre_of(key, values))
    found = {}
    for key, values in fresh.items():
        found[key] = float(centre_of(key, torch.stack(values)))
    found["auto"] = sum(found[key] for key in RECALLS) / len(RECALLS)
    found["estimator"] = (found["a_to_b@1"] + found["b_to_a@1"]) / 2
    return found


def centre_of(key, values):
    return values.median() if "median" in key else values.mean()


def coverage(draw, intervals_of):
    """The share of sets whose interval holds the truth, in percent, by number."""
    generator = seeded(2)
    inside = Counter()
    for _ in range(N_SETS):
        for key, (low, high) in intervals_of(*draw(generator)).items():
            inside[key] += low <= truth(draw)[key] <= high
    found = {key: 100 * n / N_SETS for key, n in inside.items()}
    print(f"{intervals_of.__name__} on {draw.__name__}: {found}")
    return found


def of_eval(a, b, ids):
    numbers = pair_numbers(mutual_ranks_of_ids(a, b, ids), ids)
    return {key: numbers[f"{key}_interval"] for key in RECALLS + OTHERS}


def of_heads(a, b, ids):
    """What `auto` logs of its trials, and `score_interval`: means of two ways."""
    found = recalls_of_ids(a, b, ids)
    of_ones = found[[0, len(found) // 2]].mean(0)
    return {
        "auto": log_trial("clip", None, found.mean(0), torch.unique(ids)).interval,
        "estimator": bootstrap_interval(of_ones),
    }


def over_groups(a, b, ids):
    """What `eval` says of a run with groups, and `auto` of its trials."""
    ranks = mutual_ranks_of_ids(a, b, ids)
    numbers = pair_numbers(ranks, ids, units=GROUPS)
    trial = log_trial("clip", None, recalls_of_ids(a, b, ids).mean(0), GROUPS)
    found = {key: numbers[f"{key}_interval"] for key in [*RECALLS, "a_to_b_mrr"]}
    return found | {"auto": trial.interval}


@pytest.mark.parametrize("intervals_of", [of_eval, of_heads])
@pytest.mark.parametrize("draw", [plain, repeated])
def test_intervals_over_ids_cover(draw, intervals_of):
    found = coverage(draw, intervals_of)
    for share in found.values():
        assert 90 <= share <= 98


def test_rows_of_a_group_need_the_bootstrap_of_groups():
    """Intervals over ids know nothing of groups, and are too narrow there."""
    by_ids = coverage(grouped, of_eval)
    by_groups = coverage(grouped, over_groups)
    for share in by_groups.values():
        assert 88 <= share <= 98
    for key in RECALLS:
        assert by_ids[key] < 80


@pytest.mark.parametrize(("draw", "groups"), [(grouped, GROUPS), (unequal, UNEQUAL)])
def test_a_score_of_groups_covers(draw, groups):
    generator = seeded(3)
    a, b, _ = draw(generator)
    heads = ContrastiveHeads("cca", validation_fraction=0, device="cpu").fit(a, b)
    scores = [heads.score(*draw(generator)[:2]) for _ in range(1000)]
    mean = sum(scores) / len(scores)
    inside = {"ids": 0, "groups": 0}
    for _ in range(N_SETS):
        a, b, _ = draw(generator)
        for name, given in (("ids", None), ("groups", groups)):
            _, low, high = heads.score_interval(a, b, groups=given)
            inside[name] += low <= mean <= high
    found = {name: 100 * n / N_SETS for name, n in inside.items()}
    print(f"score_interval on {draw.__name__}: {found}")
    assert 88 <= found["groups"] <= 98
    assert found["ids"] < 80
