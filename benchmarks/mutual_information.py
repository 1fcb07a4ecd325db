"""How well InfoNCE and InfoLOOB, with and without Hopfield retrieval, estimate a known mutual information.

``python benchmarks/mutual_information.py`` trains the critics, prints the tables of docs/mutual-information.md and
writes results.json and mutual_information.png to ``--out``.

Data. x ~ N(0, I_d), y = ρx + √(1 − ρ²)·ε, d = 20, so that I(X; Y) = −d/2 · ln(1 − ρ²); ρ is set for 10 and for 14 nats.
Data, batch and critic are Poole et al.'s (arXiv:1905.06922, their notebook): d = 20, batches of N = 64 fresh pairs, a
separable critic of two MLPs with two hidden layers of 256 ReLU units and 32 outputs, Adam with 5e-4. That the variance
is the one over batches of 64 pairs is from Cheng et al. (arXiv:2006.12013, their notebook; also d = 20), who take it
over the last 500 training steps; here the critic is frozen and the batches are new. 10 and 14 nats are CLOOB's.

Ours, because CLOOB has it so: both embeddings are divided by their length and the critic is f(x, y) = τ⁻¹ g(x)·h(y),
τ⁻¹ fixed. It has to be bounded: the InfoLOOB estimate of a critic whose scale can grow has no maximum (the positive
outruns the best negative in proportion to the scale), and Poole's unbounded critic is beyond 10⁶ nats in 1000 steps.

Estimates, in nats, of a batch: ``ln N − loss`` for InfoNCE, ``ln(N − 1) − loss`` for InfoLOOB; the loss is the mean of
both directions, ``cloob_reference(..., scale="unit")``. With retrieval, g(x) and h(y) of the batch are the memories, as
in Eq. 4 and 5: U_x against U_y, V_y against V_x. The i-th stored pattern is then the anchor itself, so the estimate of
a retrieved critic is not one of a function of x_i and y_i alone, and none of the bounds is proved for it.

Each (objective, β, τ⁻¹) is trained with its own loss, ``--seeds`` times, and judged on ``--batches`` new batches, which
are the same for all objectives of a seed. *Variance over batches* is the mean over the seeds of the variance within one
seed; *variance over seeds* is that of the seeds' means. InfoLOOB's mean and spread both grow with τ⁻¹, so a variance at
equal τ⁻¹ compares estimates of different size. The second table interpolates each seed to the τ⁻¹ at which its mean is
the truth and compares the variance over batches there. ``exact`` is ln p(y|x)/p(y) in place of a trained critic.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cloob.functional import cloob_reference, info_loob, info_nce

INFORMATION = (10.0, 14.0)
DIM, PAIRS, EMBED, HIDDEN, RATE = 20, 64, 32, 256, 5e-4
INV_TAU, BETA = 30.0, 8.0  # the paper's, on Conceptual Captions
# τ⁻¹ around the one at which InfoLOOB's mean is the truth, by β (0 is no retrieval).
INV_TAUS = {0.0: (20.0, 25.0, 30.0, 35.0), 8.0: (15.0, 20.0, 25.0, 30.0), 16.0: (15.0, 20.0, 25.0, 30.0)}


@dataclass(frozen=True)
class Case:
    """What is trained and judged: ``beta`` 0 is without retrieval, ``information`` in nats."""

    information: float
    contrast: str
    beta: float
    inv_tau: float
    seed: int
    steps: int
    batches: int


@dataclass(frozen=True)
class Estimates:
    """The estimates of one trained critic, in nats, summarised over new batches."""

    case: Case
    mean: float
    variance: float
    lowest: float
    highest: float


def sample(information: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch of (PAIRS, DIM) x and y with that many nats of mutual information."""
    rho = math.sqrt(1 - math.exp(-2 * information / DIM))
    x, noise = torch.randn(2, PAIRS, DIM, generator=generator)
    return x, rho * x + math.sqrt(1 - rho * rho) * noise


def tower() -> nn.Module:
    layers = (nn.Linear(DIM, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, EMBED))
    return nn.Sequential(*layers)


def estimate(case: Case, x: Tensor, y: Tensor) -> Tensor:
    options: dict[str, Any] = {"contrast": case.contrast, "hopfield": case.beta > 0, "scale": "unit"}
    loss = cloob_reference(x, y, case.inv_tau, case.beta or BETA, **options)
    return math.log(len(x) - (case.contrast == "infoloob")) - loss


def run(case: Case) -> Estimates:
    """Trains a critic by its own objective and judges it on new batches."""
    torch.manual_seed(case.seed)
    g, h = tower(), tower()
    optimizer = torch.optim.Adam([*g.parameters(), *h.parameters()], RATE, fused=True)
    generator = torch.Generator().manual_seed(1000 + case.seed)

    def batch() -> tuple[Tensor, Tensor]:
        x, y = sample(case.information, generator)
        return F.normalize(g(x), dim=1), F.normalize(h(y), dim=1)

    for _ in range(case.steps):
        optimizer.zero_grad()
        (-estimate(case, *batch())).backward()
        optimizer.step()
    generator.manual_seed(2000 + case.seed)
    with torch.no_grad():
        values = [estimate(case, *batch()).item() for _ in range(case.batches)]
    return Estimates(case, statistics.mean(values), statistics.variance(values), min(values), max(values))


def exact(information: float, batches: int) -> list[dict[str, Any]]:
    """InfoNCE and InfoLOOB of the true log density ratio, which is a scalar product of lifted x and y."""
    square = 1 - math.exp(-2 * information / DIM)  # ρ²
    generator = torch.Generator().manual_seed(0)
    values: dict[str, list[float]] = {"infonce": [], "infoloob": []}
    for _ in range(batches):
        x, y = sample(information, generator)
        own_x, own_y = (-square / (2 * (1 - square)) * z.square().sum(1, keepdim=True) for z in (x, y))
        a = torch.cat([math.sqrt(square) / (1 - square) * x, own_x, torch.ones_like(own_x)], 1)
        c = torch.cat([y, torch.ones_like(own_y), own_y], 1)
        values["infonce"].append(math.log(PAIRS) - info_nce(a, c, 1.0).item())
        values["infoloob"].append(math.log(PAIRS - 1) - info_loob(a, c, 1.0).item())
    return [
        {"information": information, "contrast": k, "mean": statistics.mean(v), "variance": statistics.variance(v)}
        for k, v in values.items()
    ]


def cases(seeds: int, steps: int, batches: int) -> list[Case]:
    """InfoNCE at the paper's τ⁻¹ and β; InfoLOOB at each β over its τ⁻¹."""
    grid = [("infonce", beta, INV_TAU) for beta in (0.0, BETA)]
    grid += [("infoloob", beta, inv_tau) for beta, inv_taus in INV_TAUS.items() for inv_tau in inv_taus]
    return [Case(i, *point, s, steps, batches) for i in INFORMATION for point in grid for s in range(seeds)]


def summarise(found: Sequence[Estimates]) -> list[dict[str, Any]]:
    """A row for each (information, contrast, β, τ⁻¹), over its seeds."""
    groups: dict[tuple[float, str, float, float], list[Estimates]] = {}
    for e in found:
        groups.setdefault((e.case.information, e.case.contrast, e.case.beta, e.case.inv_tau), []).append(e)
    rows = []
    for (information, contrast, beta, inv_tau), of in groups.items():
        means = [e.mean for e in of]
        row: dict[str, Any] = {"information": information, "contrast": contrast, "beta": beta, "inv_tau": inv_tau}
        row |= {"mean": statistics.mean(means), "bias": statistics.mean(means) - information}
        row |= {"variance_over_batches": statistics.mean(e.variance for e in of)}
        row |= {"variance_over_seeds": statistics.variance(means), "seeds": len(of)}
        rows.append(row | {"lowest": min(e.lowest for e in of), "highest": max(e.highest for e in of)})
    return rows


def crossing(points: Iterable[tuple[float, float, float]], truth: float) -> tuple[float, float]:
    """τ⁻¹ and standard deviation where the mean is the truth, linear between (τ⁻¹, mean, deviation) points.

    Raises:
        ValueError: No two neighbouring points have the truth between them.
    """
    points = sorted(points)
    for (tau0, mean0, sd0), (tau1, mean1, sd1) in itertools.pairwise(points):
        if mean0 <= truth <= mean1:
            part = (truth - mean0) / (mean1 - mean0)
            return tau0 + part * (tau1 - tau0), sd0 + part * (sd1 - sd0)
    raise ValueError(f"the means {[round(p[1], 2) for p in points]} do not enclose {truth} nats: widen INV_TAUS")


def at_truth(found: Sequence[Estimates]) -> list[dict[str, Any]]:
    """InfoLOOB's variance over batches where its mean is the truth, and its ratio to that without retrieval."""
    curves: dict[tuple[float, float], dict[int, list[tuple[float, float, float]]]] = {}
    for e in (e for e in found if e.case.contrast == "infoloob"):
        by_seed = curves.setdefault((e.case.information, e.case.beta), {})
        by_seed.setdefault(e.case.seed, []).append((e.case.inv_tau, e.mean, math.sqrt(e.variance)))
    rows: list[dict[str, Any]] = []
    plain: dict[tuple[float, int], float] = {}
    for (information, beta), by_seed in sorted(curves.items()):
        crossed = {seed: crossing(points, information) for seed, points in by_seed.items()}
        variances = {seed: sd * sd for seed, (_, sd) in crossed.items()}
        if beta == 0:
            plain |= {(information, seed): variance for seed, variance in variances.items()}
        ratios = [variance / plain[information, seed] for seed, variance in variances.items()]
        row: dict[str, Any] = {"information": information, "beta": beta}
        row |= {"inv_tau": statistics.mean(tau for tau, _ in crossed.values())}
        row |= {"variance_over_batches": statistics.mean(variances.values()), "ratio": statistics.mean(ratios)}
        rows.append(row | {"lowest_ratio": min(ratios), "highest_ratio": max(ratios)})
    return rows


def label(contrast: str, beta: float) -> str:
    name = {"infonce": "InfoNCE", "infoloob": "InfoLOOB"}[contrast]
    return f"{name}, retrieval β = {beta:g}" if beta else name


def markdown(results: dict[str, Any]) -> str:
    lines = [
        "| truth | objective, τ⁻¹ = 30 | mean | bias | variance over batches | variance over seeds | highest batch |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in (r for r in results["rows"] if r["inv_tau"] == INV_TAU):
        numbers = f"{row['mean']:.2f} | {row['bias']:+.2f} | {row['variance_over_batches']:.4f}"
        spread = f"{row['variance_over_seeds']:.5f} | {row['highest']:.2f}"
        lines.append(f"| {row['information']:g} | {label(row['contrast'], row['beta'])} | {numbers} | {spread} |")
    for row in results["exact"]:
        numbers = f"{row['mean']:.2f} | {row['mean'] - row['information']:+.2f} | {row['variance']:.4f} | – | –"
        lines.append(f"| {row['information']:g} | {label(row['contrast'], 0.0)}, exact critic | {numbers} |")
    lines += [
        "",
        "| truth | mean brought to the truth | τ⁻¹ | variance over batches | ratio to no retrieval (seeds) |",
        "|---|---|---|---|---|",
    ]
    for row in results["at_truth"]:
        numbers = f"{row['inv_tau']:.1f} | {row['variance_over_batches']:.4f} | {row['ratio']:.2f}"
        lines.append(
            f"| {row['information']:g} | {label('infoloob', row['beta'])} | {numbers} "
            f"({row['lowest_ratio']:.2f}–{row['highest_ratio']:.2f}) |"
        )
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, len(INFORMATION), figsize=(11, 7.6), layout="constrained")
    for column, truth in enumerate(INFORMATION):
        rows = [r for r in results["rows"] if r["information"] == truth]
        above, below = panels[0, column], panels[1, column]
        shown = [r for r in rows if r["inv_tau"] == INV_TAU]
        deviations = [math.sqrt(r["variance_over_batches"]) for r in shown]
        colours = ["C3" if r["contrast"] == "infonce" else "C0" for r in shown]
        above.bar(range(len(shown)), [r["mean"] for r in shown], yerr=deviations, color=colours, alpha=0.8, capsize=4)
        names = [label(r["contrast"], r["beta"]).replace(", retrieval", "\n") for r in shown]
        above.set_xticks(range(len(shown)), names, fontsize=8)
        above.axhline(truth, color="black", label="truth")
        above.axhline(math.log(PAIRS), color="C3", linestyle="--", label="ln N")
        above.set(title=f"{truth:g} nats, τ⁻¹ = {INV_TAU:g}", ylabel="mean ± sd over batches, nats")
        above.legend()
        for beta in INV_TAUS:
            curve = [r for r in rows if r["contrast"] == "infoloob" and r["beta"] == beta]
            deviations = [math.sqrt(r["variance_over_batches"]) for r in curve]
            below.plot([r["mean"] for r in curve], deviations, "o-", label=label("infoloob", beta))
        below.axvline(truth, color="black", linewidth=1)
        below.set(xlabel="mean estimate, nats (points: τ⁻¹)", ylabel="sd over batches, nats")
        below.grid(visible=True, alpha=0.3)
        below.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=400, help="of training; 1000 raise the means by 1–2 %%")
    parser.add_argument("--batches", type=int, default=200, help="new batches each critic is judged on")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "mutual_information")
    return parser.parse_args()


def main() -> None:
    args = parse()
    todo = cases(args.seeds, args.steps, args.batches)
    start = time.perf_counter()
    with ProcessPoolExecutor(args.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = list(pool.map(run, todo))
    results: dict[str, Any] = {
        "machine": {"cores": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__},
        "settings": {"dim": DIM, "pairs": PAIRS, "embed": EMBED, "hidden": HIDDEN, "rate": RATE}
        | {"seeds": args.seeds, "steps": args.steps, "batches": args.batches, "log_pairs": math.log(PAIRS)},
        "seconds": round(time.perf_counter() - start, 1),
        "rows": summarise(found),
        "at_truth": at_truth(found),
        "exact": [row for information in INFORMATION for row in exact(information, args.batches * args.seeds)],
        "critics": [asdict(e.case) | {k: v for k, v in asdict(e).items() if k != "case"} for e in found],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(results, args.out / "mutual_information.png")
    print(markdown(results))
    print(f"{len(todo)} critics in {results['seconds']} s; written: {args.out}/results.json, mutual_information.png")


if __name__ == "__main__":
    main()
