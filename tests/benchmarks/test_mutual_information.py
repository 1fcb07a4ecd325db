"""The mutual-information study: its arithmetic, its two findings on a small version, and the tables in the docs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import functional as F

ROOT = Path(__file__).parents[2]
STEPS, BATCHES = 160, 80
LOG_N = math.log(64)


@pytest.fixture(scope="module")
def study() -> Any:
    """The script as a module, on one thread; its results are those of one seed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        from benchmarks import mutual_information

        yield mutual_information
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(study: ModuleType) -> dict[tuple[str, float, float], Any]:
    """Critics for 14 nats by (contrast, β, τ⁻¹): around the truth for the second finding, at τ⁻¹ = 30 for the rest."""
    points = [("infonce", 0.0, 30.0), ("infonce", 8.0, 30.0), ("infoloob", 0.0, 30.0), ("infoloob", 8.0, 30.0)]
    points += [("infoloob", 0.0, 35.0), ("infoloob", 16.0, 20.0), ("infoloob", 16.0, 25.0)]
    return {point: study.run(study.Case(14.0, *point, 0, STEPS, BATCHES)) for point in points}


def results_file() -> Path:
    return ROOT / "benchmarks" / "results" / "mutual_information" / "results.json"


def test_infonce_is_capped_by_log_n_and_infoloob_is_not(study: ModuleType, trained: dict[Any, Any]) -> None:
    for beta in (0.0, 8.0):
        assert LOG_N - 0.2 < trained["infonce", beta, 30.0].mean < LOG_N  # 10 nats below the truth, and saturated
        assert trained["infonce", beta, 30.0].highest <= LOG_N + 1e-5
        assert trained["infoloob", beta, 30.0].lowest > LOG_N + 6
    ceiling = {row["contrast"]: row["mean"] for row in study.exact(14.0, 20)}
    assert LOG_N - 0.01 < ceiling["infonce"] <= LOG_N  # not the critic's fault: the true density ratio does no better
    assert ceiling["infoloob"] > 14 + 5  # an upper bound, and a loose one


def test_retrieval_lowers_the_variance_of_infoloob_where_both_tell_the_truth(
    study: ModuleType, trained: dict[Any, Any]
) -> None:
    curves: dict[float, list[tuple[float, float, float]]] = {0.0: [], 16.0: []}
    for (contrast, beta, inv_tau), found in trained.items():
        if contrast == "infoloob" and beta in curves:
            curves[beta].append((inv_tau, found.mean, math.sqrt(found.variance)))
    sd = {beta: study.crossing(points, 14.0)[1] for beta, points in curves.items()}
    assert (sd[16.0] / sd[0.0]) ** 2 < 0.8  # 0.6 in the full study


def test_retrieval_raises_the_variance_at_the_papers_scales(trained: dict[Any, Any]) -> None:
    """What the paper's finding looks like at equal τ⁻¹ = 30 and β = 8: the other way round, with the mean."""
    plain, retrieved = trained["infoloob", 0.0, 30.0], trained["infoloob", 8.0, 30.0]
    assert retrieved.variance > 1.2 * plain.variance
    assert retrieved.mean > plain.mean + 1.5


def test_an_unbounded_critic_runs_away(study: ModuleType) -> None:
    torch.manual_seed(0)
    g, h, generator = study.tower(), study.tower(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam([*g.parameters(), *h.parameters()], study.RATE)
    for _ in range(250):
        x, y = study.sample(10.0, generator)
        optimizer.zero_grad()
        loss = study.info_loob(g(x), h(y), 1.0)
        loss.backward()
        optimizer.step()
    assert math.log(63) - loss.item() > 50


@pytest.mark.parametrize("contrast", ["infonce", "infoloob"])
@pytest.mark.parametrize("beta", [0.0, 3.0])
def test_the_estimate_is_the_formula_written_as_a_loop(study: ModuleType, contrast: str, beta: float) -> None:
    torch.manual_seed(1)
    x, y = (F.normalize(torch.randn(5, 3, dtype=torch.float64), dim=1) for _ in range(2))
    n, inv_tau = 5, 4.0

    def retrieve(state: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
        if not beta:
            return state
        rows = []
        for s in state:
            weights = [math.exp(beta * float(s @ m)) for m in stored]
            row = sum(w * m for w, m in zip(weights, stored, strict=True))
            rows.append(row / row.norm())
        return torch.stack(rows)

    total = 0.0
    memory_x, memory_y = (x, y) if beta else (y, x)  # without retrieval the memory does not matter
    for anchors, candidates in (
        (retrieve(x, memory_x), retrieve(y, memory_x)),
        (retrieve(y, memory_y), retrieve(x, memory_y)),
    ):
        for i in range(n):
            scores = [math.exp(inv_tau * float(anchors[i] @ candidates[j])) for j in range(n)]
            rest = scores if contrast == "infonce" else scores[:i] + scores[i + 1 :]
            total += math.log(scores[i] / (sum(rest) / len(rest))) / (2 * n)
    case = study.Case(10.0, contrast, beta, inv_tau, 0, 0, 0)
    assert study.estimate(case, x, y).item() == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("information", [10.0, 14.0])
def test_the_data_hold_the_information_they_claim(study: ModuleType, information: float) -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.cat(parts) for parts in zip(*(study.sample(information, generator) for _ in range(300)), strict=True))
    rho = torch.stack([torch.corrcoef(torch.stack([x[:, k], y[:, k]]))[0, 1] for k in range(20)])
    assert -0.5 * (1 - rho.square()).log().sum().item() == pytest.approx(information, abs=0.25)
    assert abs(torch.corrcoef(torch.stack([x[:, 0], y[:, 1]]))[0, 1].item()) < 0.03
    assert y.std().item() == pytest.approx(1, abs=0.01)


def test_summaries_by_hand(study: ModuleType) -> None:
    def found(beta: float, inv_tau: float, seed: int, mean: float, variance: float) -> Any:
        case = study.Case(10.0, "infoloob", beta, inv_tau, seed, 1, 1)
        return study.Estimates(case, mean, variance, mean - 1, mean + 1)

    of = [found(0.0, 20.0, 0, 8.0, 1.0), found(0.0, 30.0, 0, 12.0, 9.0)]  # at 10: τ⁻¹ 25, sd 2, variance 4
    of += [found(0.0, 20.0, 1, 9.0, 1.0), found(0.0, 30.0, 1, 11.0, 9.0)]
    of += [found(8.0, 20.0, 0, 10.0, 1.0), found(8.0, 30.0, 0, 15.0, 4.0)]  # variance 1: ratio 1/4
    of += [found(8.0, 20.0, 1, 9.0, 4.0), found(8.0, 30.0, 1, 13.0, 4.0)]  # at τ⁻¹ 22.5, variance 4: ratio 1
    plain, retrieved = study.at_truth(of)
    assert plain == {
        "information": 10.0, "beta": 0.0, "inv_tau": 25.0, "variance_over_batches": 4.0, "ratio": 1.0,
        "lowest_ratio": 1.0, "highest_ratio": 1.0,
    }  # fmt: skip
    assert retrieved["inv_tau"] == pytest.approx(21.25)
    assert retrieved["variance_over_batches"] == pytest.approx(2.5)
    assert (retrieved["lowest_ratio"], retrieved["ratio"], retrieved["highest_ratio"]) == (0.25, 0.625, 1.0)
    first = study.summarise(of)[0]
    assert (first["mean"], first["bias"], first["variance_over_batches"]) == (8.5, -1.5, 1.0)
    assert (first["variance_over_seeds"], first["lowest"], first["highest"]) == (0.5, 7.0, 10.0)


def test_a_truth_outside_the_grid_is_an_error(study: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"do not enclose 10.0 nats: widen INV_TAUS"):
        study.crossing([(20.0, 5.0, 1.0), (30.0, 9.0, 1.0)], 10.0)


def test_the_tables_in_the_docs_are_those_of_the_committed_results(study: ModuleType) -> None:
    results = json.loads(results_file().read_text())
    text = (ROOT / "docs" / "mutual-information.md").read_text(encoding="utf-8")
    begin, end = "<!-- tables:begin -->\n", "<!-- tables:end -->"
    assert text.split(begin)[1].split(end)[0] == study.markdown(results)
