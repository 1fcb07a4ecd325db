"""Lists of candidates, among which MassSpecGym ranks: read from a file, and their
numbers (:mod:`cloob.functional.protocols`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cloob.errors import InputError
from cloob.evaluation.results import Numbers
from cloob.functional import protocols
from cloob.functional.ids import id_digest

if TYPE_CHECKING:
    from cloob.data.vectors import VectorPairs  # it brings pyarrow
    from cloob.evaluation.embed import Encoder

MASS_SPEC_GYM = protocols.Table(recalls=(1, 5, 20), shares=(), choices=())


@dataclass(frozen=True)
class Candidates:
    """For pairs of vectors the rows of b that every row of a is ranked among."""

    listed: Tensor  # (P, 2) int64: a pair's place, a row of b
    right: Tensor  # (P,) whether the row of b has the pair's id

    @property
    def rows(self) -> Tensor:
        """The rows of b that are listed, each once, ascending."""
        rows: Tensor = torch.unique(self.listed[:, 1])
        return rows


def read_candidates(path: Path, pairs: VectorPairs, ids: Sequence[str]) -> Candidates:
    """The lists of a file of JSON lines, one for every row of a, in its order.

    A line is a list of ids of b (``ids``, of all its rows). The right one must be among
    them.
    """
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    if len(lines) != pairs.a.shape[0]:
        raise InputError(
            f"{path}: has {len(lines):,} lines, and a has {pairs.a.shape[0]:,} rows"
        )
    row_of_id: dict[str, int] = {}
    for row, name in enumerate(ids):
        row_of_id.setdefault(name, row)
    digests = np.array([id_digest(name) for name in ids], np.int64)
    listed, right = [], []
    for place, (row_of_a, _) in enumerate(pairs.rows.tolist()):
        rows = read_list(path, row_of_a, lines[row_of_a], row_of_id)
        is_right = digests[rows] == pairs.ids[place]
        if not is_right.any():
            raise InputError(
                f"{path}: line {row_of_a + 1} does not list the row's own partner"
            )
        listed += [(place, row) for row in rows]
        right += is_right.tolist()
    return Candidates(torch.tensor(listed), torch.tensor(right))


def read_list(path: Path, row: int, line: str, row_of_id: dict[str, int]) -> list[int]:
    """The rows of b that a line names."""
    where = f"{path}: line {row + 1}"
    try:
        names = json.loads(line)
    except json.JSONDecodeError:
        names = None
    if not isinstance(names, list) or not names:
        raise InputError(f'{where} is no list of candidates, as ["m3", "m17"]')
    for name in names:
        if str(name) not in row_of_id:
            raise InputError(f"{where} names {name!r}, which b has not")
    return [row_of_id[str(name)] for name in names]


def embed_listed(
    encoder: Encoder, pairs: VectorPairs, candidates: Candidates
) -> Tensor:
    """The unit rows of all rows of b that are listed, on the CPU."""
    from cloob.data.rows import as_numbers, gather
    from cloob.models.vectors import embed_rows, require_vectors

    b = pairs.encoded(require_vectors(encoder).encodings).b
    parts = [part.numpy() for part in torch.split(candidates.rows, 4096)]
    return torch.cat(
        [embed_rows(encoder, "b", as_numbers(gather(b, part))) for part in parts]
    )


def candidate_numbers(
    a: Tensor, rows_of_b: Tensor, candidates: Candidates, ids: Tensor, units: Tensor
) -> Numbers:
    """Hit rates and MRR among the listed candidates; ``rows_of_b`` are those of
    ``candidates.rows``.
    """
    place = torch.searchsorted(candidates.rows, candidates.listed[:, 1].contiguous())
    listed = torch.stack([candidates.listed[:, 0], place], dim=1)
    ranked = protocols.candidate_ranks(a, rows_of_b, listed, candidates.right)
    found = protocols.numbers("candidates", ranked, ids, MASS_SPEC_GYM, units=units)
    sizes = (ranked.n_right + ranked.n_wrong).double()
    numbers: Numbers = {"candidates_mean_number": float(sizes.mean())}
    for key, value in found.items():
        # chance differs from that among all ids
        numbers[key.replace("chance", "chance_candidates")] = value
    return numbers
