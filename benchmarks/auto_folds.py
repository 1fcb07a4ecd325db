"""Whether folds of few training pairs choose a closed form better: `auto` by folds and
by held-out pairs in turn, on sixteen sets.

    python -m benchmarks.auto_folds make --sets DIR
    python -m benchmarks.auto_folds run --sets DIR [--out FILE]
    python -m benchmarks.auto_folds show [--out FILE]

`benchmarks/results/auto/folds.md` was written before the first run. A record is a line
of a file, so it may be stopped at any time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from benchmarks.tasks import folder_of, grams

RECORDS = Path(__file__).parent / "results" / "auto" / "folds.jsonl"
WAYS = ("held-out", "folds")
SEEDS, WRONG = (40, 41, 42), (0.0, 0.4)
N_MOST, N_TRAIN = 800, 480
Views = tuple[np.ndarray, np.ndarray]


def table(name: str) -> pd.DataFrame:
    """A table of pydataset."""
    with tarfile.open(folder_of("pydataset") / "resources.tar.gz") as tar:
        names = [m.name for m in tar.getmembers() if m.name.endswith(f"/{name}.csv")]
        return pd.read_csv(tar.extractfile(names[0]), index_col=0)


def halves(name: str, a: str, b: str) -> Views:
    """Two lists of columns of a table, of its whole rows."""
    names_a, names_b = a.split(), b.split()
    rows = table(name)[names_a + names_b].dropna().to_numpy(float)
    return rows[:, : len(names_a)], rows[:, len(names_a) :]


def players() -> Views:
    """A season and a career."""
    season = "atbat86 hits86 homer86 runs86 rbi86 walks86"
    career = "years atbat hits homeruns runs rbi walks"
    return halves("vcd/Baseball", season, career)


def nox() -> Views:
    """Air of a day, at every other of thirteen places."""
    rows = table("robustbase/ambientNOxCH").select_dtypes("number").dropna()
    return rows.to_numpy(float)[:, ::2], rows.to_numpy(float)[:, 1::2]


def soil() -> Views:
    return halves("MASS/gilgais", "pH00 pH30 pH80", "e00 e30 e80 c00 c30 c80")


def glass() -> Views:
    return halves("MASS/fgl", "RI Na Mg Al", "Si K Ca Ba Fe")


def heating() -> Views:
    """Costs of installing and of operating eight heatings of a house."""
    names = [str(name) for name in table("Ecdat/HC")]
    sides = ([x for x in names if x.startswith(start)] for start in ("ic", "oc"))
    return halves("Ecdat/HC", *map(" ".join, sides))


def travel() -> Views:
    """Costs and times of a commuter's four ways."""
    modes = ("car", "carpool", "bus", "rail")
    sides = ([f"{kind}.{mode}" for mode in modes] for kind in ("cost", "time"))
    return halves("Ecdat/Mode", *map(" ".join, sides))


def couples() -> Views:
    wife = "hoursw child6 child618 agew educw wagew educwm educwf experience"
    return halves("Ecdat/Mroz", wife, "hoursh ageh educh wageh income")


def liver() -> Views:
    """Enzymes before and after a treatment."""
    before, after = (f"ALP.{at} ALT.{at} AST.{at} TBL.{at}" for at in "BM")
    return halves("texmex/liver", before, after)


def fries() -> Views:
    """Ratings of two samples by one person."""
    values = ["potato", "buttery", "grassy", "rancid", "painty"]
    index = ["time", "treatment", "subject"]
    wide = table("reshape2/french_fries").pivot_table(
        index=index, columns="rep", values=values
    )
    first, second = (wide.dropna().xs(rep, axis=1, level="rep") for rep in (1, 2))
    return first.to_numpy(float), second.to_numpy(float)


def serum() -> Views:
    from sklearn.datasets import load_diabetes

    rows = load_diabetes(scaled=False).data
    return rows[:, :4], rows[:, 4:]


def alleles() -> Views:
    """Counts of an allele at every other place of a chromosome."""
    rows = table("gap/crohn").filter(regex="^loc").to_numpy(float)
    counts = (rows.reshape(len(rows), -1, 2) == 1).sum(2).astype(float)
    return counts[:, ::2], counts[:, 1::2]


def cirrhosis() -> Views:
    a = "age bili albumin protime stage edema"
    return halves("survival/pbc", a, "chol copper alk.phos ast trig platelet")


def currencies() -> Views:
    a = "usdbp usdeuro eurobp"
    return halves("Ecdat/Forward", a, "usdbp3 usdeuro3 eurobp3")


def places() -> Views:
    """Countries in Swedish and in Portuguese."""
    from babel import Locale

    swedish, portuguese = Locale("sv").territories, Locale("pt").territories
    codes = [code for code in swedish if code in portuguese and code.isalpha()]
    names = {swedish[code].lower(): portuguese[code].lower() for code in codes}
    return grams(names), grams(names.values())


def curve() -> Views:
    """Made: a surface, and functions of the place on it."""
    from sklearn.datasets import make_s_curve

    x, t = make_s_curve(700, noise=0.02, random_state=0)
    rng = np.random.default_rng(1)
    a = x @ rng.normal(size=(3, 10)) + 0.1 * rng.normal(size=(700, 10))
    b = np.stack([np.sin(t), np.cos(2 * t), x[:, 1], x[:, 1] ** 2, t], 1)
    return a, b + 0.1 * rng.normal(size=(700, 5))


def lowrank() -> Views:
    """Made: two parts of a matrix of low rank."""
    from sklearn.datasets import make_low_rank_matrix

    rows = make_low_rank_matrix(
        500, 200, effective_rank=12, tail_strength=0.3, random_state=0
    )
    return rows[:, :120], rows[:, 120:]


SETS: dict[str, Callable[[], Views]] = {
    views.__name__: views
    for views in (
        players,
        nox,
        soil,
        glass,
        heating,
        travel,
        couples,
        liver,
        fries,
        serum,
        alleles,
        cirrhosis,
        currencies,
        places,
        curve,
        lowrank,
    )
}


def make(folder: Path) -> None:
    """Writes the sets, without rows that a side has twice."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, views in SETS.items():
        a, b = views()
        repeats = pd.DataFrame(a).duplicated() | pd.DataFrame(b).duplicated()
        chosen = np.flatnonzero(~repeats)
        chosen = chosen[np.random.default_rng(0).permutation(len(chosen))][:N_MOST]
        np.savez(folder / f"{name}.npz", a=a[chosen], b=b[chosen])


def judged(views: Views, wrong: float, seed: int, ways: tuple[str, ...]) -> Any:
    """The record of one deal of a set."""
    from benchmarks.auto import recalls

    from cloob.heads import closed
    from cloob.heads.choose import choose
    from cloob.heads.matrix import pairs_of
    from cloob.heads.settings import HeadSettings

    rng = np.random.default_rng(seed)
    order = rng.permutation(len(views[0]))
    n = min(N_TRAIN, len(order) * 2 // 3)
    train, test = order[:n], order[n : n + 600]
    partners, n_wrong = train.copy(), round(wrong * n)
    partners[:n_wrong] = np.roll(train[:n_wrong], 1)
    mixed = rng.permutation(n)
    pairs = pairs_of(views[0][train[mixed]], views[1][partners[mixed]])
    training, held_out = pairs.split(0.1)
    record: dict[str, Any] = {"train": len(training), "test": len(test)}
    few = closed.FEW
    for way in ways:
        closed.FEW = few if way == "folds" else 0
        began = time.process_time()
        fitted = choose(training, held_out, HeadSettings(seed=seed))
        took = time.process_time() - began
        with torch.no_grad():
            sides = zip(fitted.heads, views, strict=True)
            a, b = (head(torch.as_tensor(side[test])) for head, side in sides)
        record[way] = {"recall": recalls(a, b), "cpu_seconds": round(took, 2)}
        record[way]["joined"] = fitted.decisions["joined"]["joined"]
    closed.FEW = few
    return record


def run(folder: Path, out: Path) -> None:
    """Adds the records that are not there; the ways in turn are the first."""
    os.nice(5)
    torch.set_num_threads(1)
    done = {(r["set"], r["wrong"], r["seed"]) for r in records_of(out)}
    rows = np.random.default_rng(0).normal(size=(200, 4))
    judged((rows, rows**3), 0.0, 0, WAYS)  # everything is imported
    cells = itertools.product(SEEDS, SETS, WRONG)
    for number, (seed, name, wrong) in enumerate(cells):
        if (name, wrong, seed) in done:
            continue
        with np.load(folder / f"{name}.npz") as file:
            views = file["a"], file["b"]
        ways = WAYS if number // 2 % 2 else WAYS[::-1]
        record = {"set": name, "wrong": wrong, "seed": seed}
        record |= judged(views, wrong, seed, ways)
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def records_of(out: Path) -> list[dict[str, Any]]:
    if not out.is_file():
        return []
    return [json.loads(line) for line in out.read_text("utf-8").splitlines()]


def show(out: Path) -> None:
    """Means of recall@1 in %, and CPU seconds, a set a line."""
    records = records_of(out)
    for name in (*SETS, "all"):
        line = f"{name:11}"
        own = [r for r in records if name in ("all", r["set"])]
        for wrong in WRONG:
            found = [r for r in own if r["wrong"] == wrong]
            for way in WAYS if found else ():
                mean = np.mean([r[way]["recall"][0] for r in found])
                line += f" {100 * mean:6.2f}"
        times = [sum(r[way]["cpu_seconds"] for r in own) for way in WAYS]
        print(line, *(f"{seconds:7.1f}" for seconds in times), len(own))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("make", "run", "show"))
    parser.add_argument("--sets", type=Path, help="where matrices are kept")
    parser.add_argument("--out", type=Path, default=RECORDS)
    options = parser.parse_args()
    if options.command == "make":
        make(options.sets)
    elif options.command == "run":
        run(options.sets, options.out)
    else:
        show(options.out)


if __name__ == "__main__":
    main()
