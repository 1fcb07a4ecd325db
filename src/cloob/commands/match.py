"""``cloob match``: rank the rows of one file of vectors for every row of another."""

from __future__ import annotations

import csv
import itertools
import json
import mmap
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

from cloob.commands.console import check_out, say
from cloob.commands.options import Device, Range
from cloob.commands.protocols import print_numbers
from cloob.errors import InputError
from cloob.files import whole_file

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from cloob.data.table import Matrix, Table
    from cloob.heads.head import Side
    from cloob.models.vectors import VectorEncoder

N_QUERIES = 2048  # rows of a that are ranked together
N_BLOCK = 8192  # rows of b that are in memory
COLUMNS = ("a", "rank", "b", "score")


@dataclass(frozen=True)
class Options:
    """For every row of --a, the nearest rows of --b in the space of a run of `cloob
    train vectors`, or of saved ContrastiveHeads: all are compared, without an index.
    """

    model: Annotated[str, "MODEL"]
    """The run, or the folder of the heads."""
    a: str
    """Rows for head a, as --a of `cloob train vectors`."""
    b: str
    """Rows for head b."""
    top: Annotated[int, Range(1, 100_000)] = 10
    """Rows of b for every row of a."""
    a_ids: str | None = None
    """What to call the rows of a: a file of lines, or FILE.parquet:COLUMN; left out,
    their numbers from 0.
    """
    b_ids: str | None = None
    """What to call the rows of b."""
    out: Path | None = None
    """FILE.csv or FILE.parquet with the columns a, rank, b and score (a cosine); left
    out, lines on stdout.
    """
    overwrite: bool = False
    """Replace the file where it is there."""
    judge: bool = False
    """Print how well true partners are found: MRR, recall at 1, 5, 10 and of shares
    of b, "choose 1 of T", median rank. Rows of equal ids belong together, any of them
    is an answer; without ids row i belongs to row i. Hits then go to --out alone.
    """
    json: bool = False
    """With --judge: print one JSON object."""
    device: Device = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def run(options: Options) -> int:
    """Ranks, and writes or prints the hits."""
    check(options)
    from cloob.data.matrices import read_rows
    from cloob.models.load import load_model
    from cloob.models.vectors import require_vectors

    files = read_rows(options.a), read_rows(options.b)
    encoder = require_vectors(load_model(options.model, options.device))
    a = rows_of(encoder, "a", options.a, files[0], options.a_ids)
    b = rows_of(encoder, "b", options.b, files[1], options.b_ids)
    if options.judge:
        found = judge(a, b)
        print(json.dumps(found)) if options.json else print_numbers(found)
        if options.out is None:
            return 0
    write_hits(options.out, hits(a, b, options.top))
    n_hits = min(options.top, len(b.names))
    say(
        f"{len(a.names):,} rows of a, for each the nearest {n_hits:,} of"
        f" {len(b.names):,} rows of b"
    )
    return 0


def check(options: Options) -> None:
    """Raises InputError for options that do not fit, before torch is there."""
    if options.out is not None:
        check_out(
            "--out",
            options.out,
            (".csv", ".parquet"),
            [options.a, options.b, options.a_ids, options.b_ids],
            overwrite=options.overwrite,
        )
    elif options.overwrite:
        raise InputError("--overwrite needs --out")
    if options.json and not options.judge:
        raise InputError("--json needs --judge")
    if options.judge and (options.a_ids is None) != (options.b_ids is None):
        raise InputError("--judge needs --a-ids and --b-ids, or neither")


# --- the rows of both sides ---


@dataclass(frozen=True)
class Rows:
    """The rows of one side, and what to call them."""

    encoder: VectorEncoder
    side: Side
    spec: str
    numbers: Matrix
    names: Sequence[str] | range

    def embedded(self, size: int) -> Iterator[Tensor]:
        """Unit rows, ``size`` at a time."""
        import torch

        from cloob.models.vectors import embed_rows

        for start in range(0, len(self.names), size):
            part = self.numbers[start : start + size]
            block = embed_rows(self.encoder, self.side, part)
            release(self.numbers)
            finite = torch.isfinite(block).all(dim=1)
            if not finite.all():
                row = start + int(finite.byte().argmin())
                raise InputError(
                    f"{self.spec}: row {row} has numbers that are not finite"
                )
            yield block


def rows_of(
    encoder: VectorEncoder, side: Side, spec: str, rows: Matrix | Table, ids: str | None
) -> Rows:
    """The rows of a file for a head, called by ids or by their numbers."""
    from cloob.data.matrices import read_ids_of

    numbers = encoder.numbers(side, rows)
    n = numbers.shape[0]
    names = range(n) if ids is None else read_ids_of(ids, n, spec)
    return Rows(encoder, side, spec, numbers, names)


def release(rows: Matrix) -> None:
    """Gives back the memory of the pages of a mapped file that were read."""
    base: object = rows
    while hasattr(base, "base"):
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


# --- how well partners are found ---


def judge(a: Rows, b: Rows) -> dict[str, object]:
    """How well the rows of a find their partners among all rows of b, by key."""
    import torch

    from cloob.functional.protocols import Ranked, numbers
    from cloob.functional.ranking import ranks

    n_a, n_b = len(a.names), len(b.names)
    if isinstance(a.names, range) and n_a != n_b:
        raise InputError(
            f"{a.spec} has {n_a:,} rows, {b.spec} has {n_b:,}; --judge needs"
            " --a-ids and --b-ids to tell which belong together"
        )
    ids, pairs = true_pairs(a.names, b.names)
    if not len(pairs):
        raise InputError("--judge: no id of a is one of b")
    rows, query, n_right = torch.unique(
        pairs[:, 0], return_inverse=True, return_counts=True
    )
    if len(rows) < n_a:
        say(f"{n_a - len(rows):,} of {n_a:,} rows of a have no partner in b")
    x, y = (torch.cat([*side.embedded(N_BLOCK)]) for side in (a, b))
    found = ranks(x[rows], y, torch.stack([query, pairs[:, 1]], dim=1))
    query_ids = ids[rows]
    result = numbers("a_to_b", Ranked(found, n_right, n_b - n_right), query_ids)
    return {"n": len(rows), "n_ids": len(torch.unique(query_ids)), **result}


def true_pairs(
    names_a: Sequence[str] | range, names_b: Sequence[str] | range
) -> tuple[Tensor, Tensor]:
    """(n_a,) numbers of the ids of a, and (P, 2) rows of a and b of equal ids."""
    import torch

    number: dict[object, int] = {}
    ids = [number.setdefault(name, len(number)) for name in names_a]
    rows_of_b: defaultdict[object, list[int]] = defaultdict(list)
    for row, name in enumerate(names_b):
        rows_of_b[name].append(row)
    pairs = [
        (row, row_of_b)
        for row, name in enumerate(names_a)
        for row_of_b in rows_of_b[name]
    ]
    return torch.tensor(ids), torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


# --- the nearest rows ---


def hits(a: Rows, b: Rows, top: int) -> Iterator[pa.Table]:
    """A table of ``COLUMNS`` for some rows of a at a time."""
    import pyarrow as pa

    from cloob.evaluation.nearest import nearest

    start = 0
    for query in a.embedded(N_QUERIES):
        scores, rows = nearest(query, b.embedded(N_BLOCK), top)
        n, n_hits = rows.shape
        names = [a.names[start + row] for row in range(n) for _ in range(n_hits)]
        found = [b.names[row] for row in rows.ravel().tolist()]
        ranks = [*range(1, n_hits + 1)] * n
        yield pa.table([names, ranks, found, scores.ravel()], names=COLUMNS)
        start += n


def write_hits(out: Path | None, tables: Iterator[pa.Table]) -> None:
    """Writes hits on stdout, or into a file that appears when it is whole."""
    if out is None:
        write_lines(sys.stdout, tables, "\t")
        return
    with whole_file(out) as file:
        if out.suffix == ".csv":
            with file.open("w", encoding="utf-8", newline="") as lines:
                write_lines(lines, tables, ",")
        else:
            write_parquet(file, tables)


def write_lines(file: TextIO, tables: Iterator[pa.Table], separator: str) -> None:
    """Writes hits as lines of a CSV or TSV, below one header."""
    writer = csv.writer(file, delimiter=separator, lineterminator="\n")
    first = next(tables)  # a mistake in the rows leaves nothing on stdout
    writer.writerow(COLUMNS)
    for table in itertools.chain([first], tables):
        for *names, score in zip(*table.to_pydict().values(), strict=True):
            writer.writerow([*names, f"{score:.6f}"])


def write_parquet(path: Path, tables: Iterator[pa.Table]) -> None:
    """Writes hits as a Parquet file."""
    from pyarrow import parquet

    first = next(tables)
    with parquet.ParquetWriter(path, first.schema) as writer:
        for table in itertools.chain([first], tables):
            writer.write_table(table)
