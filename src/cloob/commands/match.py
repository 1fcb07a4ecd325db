"""``cloob match``: rank the rows of one file of vectors for every row of another."""

from __future__ import annotations

import contextlib
import csv
import json
import mmap
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cloob.commands.console import (
    DeviceOptions,
    Positional,
    arg,
    check_out,
    check_range,
    progress,
    say,
)
from cloob.commands.protocols import print_numbers
from cloob.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from cloob.data.matrices import Matrix
    from cloob.heads.head import Side

N_QUERIES = 2048  # rows of a that are ranked together
N_BLOCK = 8192  # rows of b that are in memory
COLUMNS = ("a", "rank", "b", "score")


@dataclass(frozen=True)
class Options:
    """For every row of --a, the nearest rows of --b in the space of a run of `cloob
    train vectors`, or of saved ContrastiveHeads: all are compared, without an index.
    """

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """The run, or the folder of the heads."""
    a: str
    """Rows for head a, as --a of `cloob train vectors`."""
    b: str
    """Rows for head b."""
    top: int = 10
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
    machine: DeviceOptions = field(default_factory=DeviceOptions)


def run(options: Options) -> int:
    """Ranks, and writes or prints the hits."""
    check(options)
    from cloob.data.matrices import read_ids_of, read_rows
    from cloob.models.aligned.model import check_vectors
    from cloob.models.load import load_model

    side_a, side_b = read_rows(options.a), read_rows(options.b)
    encoder = check_vectors(load_model(options.model, options.machine.device))
    a, b = encoder.numbers("a", side_a), encoder.numbers("b", side_b)
    names_a = names_b = None
    if options.a_ids is not None:
        names_a = read_ids_of(options.a_ids, a.shape[0], options.a)
    if options.b_ids is not None:
        names_b = read_ids_of(options.b_ids, b.shape[0], options.b)
    if options.judge:
        found = judge(encoder, options, (a, b), (names_a, names_b))
        print(json.dumps(found)) if options.json else print_numbers(found)
        if options.out is None:
            return 0
    with progress() as update, open_writer(options.out) as write:
        for start, scores, rows in hits(encoder, options, a, b, update):
            write(
                [name_of(names_a, start + i) for i in range(len(rows))],
                [[name_of(names_b, row) for row in best] for best in rows.tolist()],
                scores.tolist(),
            )
    n_a, n_b = a.shape[0], b.shape[0]
    n_hits = min(options.top, n_b)
    say(f"{n_a:,} rows of a, for each the nearest {n_hits:,} of {n_b:,} rows of b")
    return 0


def check(options: Options) -> None:
    """Raises InputError for options that do not fit, before torch is there."""
    check_range("--top", options.top, 1, 100_000)
    if options.out is not None:
        inputs = [options.a, options.b, options.a_ids, options.b_ids]
        named = [spec for spec in inputs if spec is not None]
        check_out("--out", options.out, (".csv", ".parquet"), named)
        if options.out.exists() and not options.overwrite:
            raise InputError(f"{options.out}: exists; --overwrite replaces it")
    elif options.overwrite:
        raise InputError("--overwrite needs --out")
    if options.json and not options.judge:
        raise InputError("--json needs --judge")
    if options.judge and (options.a_ids is None) != (options.b_ids is None):
        raise InputError("--judge needs --a-ids and --b-ids, or neither")


def name_of(names: Sequence[str] | None, row: int) -> str | int:
    return row if names is None else names[row]


def judge(
    encoder: Any,
    options: Options,
    sides: tuple[Matrix, Matrix],
    names: tuple[Sequence[str] | None, Sequence[str] | None],
) -> dict[str, Any]:
    """How well the rows of a find their partners among all rows of b, by key."""
    import torch

    from cloob.functional.protocols import Ranked, numbers
    from cloob.functional.ranking import ranks

    n_a, n_b = (side.shape[0] for side in sides)
    if names[0] is None and n_a != n_b:
        raise InputError(
            f"{options.a} has {n_a:,} rows, {options.b} has {n_b:,}; --judge needs"
            " --a-ids and --b-ids to tell which belong together"
        )
    ids, pairs = true_pairs(names[0] or range(n_a), names[1] or range(n_b))
    if not len(pairs):
        raise InputError("--judge: no id of a is one of b")
    rows, query = torch.unique(pairs[:, 0], return_inverse=True)
    if len(rows) < n_a:
        say(f"{n_a - len(rows):,} of {n_a:,} rows of a have no partner in b")
    blocks_of_a = embedded(encoder, "a", options.a, sides[0], N_BLOCK)
    blocks_of_b = embedded(encoder, "b", options.b, sides[1], N_BLOCK)
    a = torch.cat([block for _, block in blocks_of_a])
    b = torch.cat([block for _, block in blocks_of_b])
    found = ranks(a[rows], b, torch.stack([query, pairs[:, 1]], dim=1))
    n_right = torch.bincount(query)
    of_queries = ids[rows]
    result = numbers("a_to_b", Ranked(found, n_right, n_b - n_right), of_queries)
    return {"n": len(rows), "n_ids": len(torch.unique(of_queries)), **result}


def true_pairs(
    names_a: Sequence[str | int], names_b: Sequence[str | int]
) -> tuple[Tensor, Tensor]:
    """(n_a,) numbers of the ids of a, and (P, 2) rows of a and b of equal ids."""
    import torch

    rows_of_b: dict[str | int, list[int]] = {}
    for row, name in enumerate(names_b):
        rows_of_b.setdefault(name, []).append(row)
    number = {name: place for place, name in enumerate(dict.fromkeys(names_a))}
    pairs = []
    for row, name in enumerate(names_a):
        pairs += [(row, other) for other in rows_of_b.get(name, ())]
    ids = torch.tensor([number[name] for name in names_a])
    return ids, torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


def hits(
    encoder: Any,
    options: Options,
    a: Matrix,
    b: Matrix,
    update: Callable[[str, int, int], None],
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For some rows of a at a time: the number of the first, and the scores and row
    numbers of their hits.
    """
    from cloob.evaluation.nearest import nearest

    total = a.shape[0] * b.shape[0]
    for start, query in embedded(encoder, "a", options.a, a, N_QUERIES):

        def blocks(start: int = start, n: int = len(query)) -> Iterator[Tensor]:
            for first, block in embedded(encoder, "b", options.b, b, N_BLOCK):
                update("rows compared", start * b.shape[0] + n * first, total)
                yield block

        scores, rows = nearest(query, blocks(), options.top)
        yield start, scores, rows
    update("rows compared", total, total)


def embedded(
    encoder: Any, side: Side, spec: str, rows: Matrix, size: int
) -> Iterator[tuple[int, Tensor]]:
    """Unit rows of one side, ``size`` at a time, with the number of the first."""
    import torch

    from cloob.models.aligned.model import embed_rows

    for start in range(0, rows.shape[0], size):
        block = embed_rows(encoder, side, rows[start : start + size])
        release(rows)
        finite = torch.isfinite(block).all(dim=1)
        if not finite.all():
            row = start + int((~finite).nonzero()[0])
            raise InputError(f"{spec}: row {row} has numbers that are not finite")
        yield start, block


def release(rows: Matrix) -> None:
    """Gives back the memory of the pages of a mapped file that were read."""
    base: Any = rows
    while hasattr(base, "base"):
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


Writer = Any
"""Takes names of rows of a, of their hits, and the scores of these."""


@contextlib.contextmanager
def open_writer(out: Path | None) -> Iterator[Writer]:
    """A function that writes hits, on stdout or to a file that appears when it is
    whole.
    """
    if out is None:
        yield table_writer(sys.stdout, "\t")
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=out.parent) as folder:
            file = Path(folder) / out.name
            if out.suffix == ".csv":
                with file.open("w", encoding="utf-8", newline="") as table:
                    yield table_writer(table, ",")
            else:
                with parquet_writer(file) as write:
                    yield write
            file.replace(out)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{out}: cannot be written ({reason})") from error


def table_writer(file: Any, separator: str) -> Writer:
    """What writes hits as lines of a CSV or TSV, below one header."""
    writer = csv.writer(file, delimiter=separator, lineterminator="\n")
    headed = False

    def write(names: list[Any], found: list[list[Any]], scores: list[Any]) -> None:
        nonlocal headed
        if not headed:  # a mistake in the rows leaves nothing on stdout
            writer.writerow(COLUMNS)
            headed = True
        for line in lines(names, found, scores):
            writer.writerow([*line[:3], f"{line[3]:.6f}"])

    return write


@contextlib.contextmanager
def parquet_writer(path: Path) -> Iterator[Writer]:
    """What writes hits into a Parquet file, which is complete when the context ends."""
    import pyarrow as pa
    from pyarrow import parquet

    opened: list[Any] = []  # the types of the names are known with the first hits

    def write(names: list[Any], found: list[list[Any]], scores: list[Any]) -> None:
        columns = zip(*lines(names, found, scores), strict=True)
        table = pa.table(dict(zip(COLUMNS, map(list, columns), strict=True)))
        if not opened:
            opened.append(parquet.ParquetWriter(path, table.schema))
        opened[0].write_table(table)

    try:
        yield write
    finally:
        for writer in opened:
            writer.close()


def lines(
    names: list[Any], found: list[list[Any]], scores: list[Any]
) -> Iterator[tuple[Any, int, Any, float]]:
    """The columns of every hit."""
    for name, partners, of_name in zip(names, found, scores, strict=True):
        pairs = zip(partners, of_name, strict=True)
        for rank, (other, score) in enumerate(pairs, 1):
            yield name, rank, other, score
