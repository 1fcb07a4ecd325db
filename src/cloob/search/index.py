"""An index of pictures: search, labels, look-alikes, export, and bringing it up to
date.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from cloob.errors import InputError
from cloob.search import find
from cloob.search.matrix import Vectors
from cloob.search.models import IndexWithModel
from cloob.search.query import AnyQuery, Query, Term
from cloob.search.records import Item, Progress, Results
from cloob.search.store import Store
from cloob.search.where import Filter, parse

# torch, scikit-learn, pyarrow, Pillow: imported where they are needed
if TYPE_CHECKING:
    from cloob.search.classify import LabelOptions, Labels
    from cloob.search.plan import Summary
    from cloob.search.update import UpdateOptions

Where = str | Filter | None


class Index(IndexWithModel, contextlib.AbstractContextManager["Index"]):
    """Pictures with their metadata and their vectors of one model, for several threads.

    A user's mistake raises ``InputError`` with one line. ``where`` is a filter over the
    metadata (:mod:`cloob.search.where`).

    Example:
        >>> from pathlib import Path
        >>> import cloob
        >>> from cloob.search.update import UpdateOptions
        >>> from PIL import Image
        >>> Path("pictures").mkdir()
        >>> for name in ("red", "blue"):
        ...     Image.new("RGB", (64, 64), name).save(f"pictures/{name}.png")
        >>> model = cloob.create_model("tiny-vit", seed=0)
        >>> with cloob.Index.create("pictures.idx") as index:
        ...     done = index.update(["pictures"], UpdateOptions(model=model))
        ...     items = index.items(index.store.ids())
        ...     print(done.added, len(index), [Path(item.path).name for item in items])
        2 2 ['blue.png', 'red.png']
    """

    @classmethod
    def open(cls, address: str | Path, *, writable: bool = False) -> Self:
        """Opens the index in a folder."""
        return cls(Store(Path(address), writable=writable))

    @classmethod
    def create(cls, address: str | Path) -> Self:
        """Makes an empty index; one that is there is opened."""
        return cls(Store(Path(address), create=True))

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __len__(self) -> int:
        return self.store.count()

    def filter(self, where: str, hidden: Sequence[str] = ()) -> Filter:
        """Checks a filter, which may name none of the ``hidden`` columns."""
        filter_ = parse(where, hidden)
        self.store.ids(filter_, limit=0)
        return filter_

    def condition(self, where: Where) -> Filter | None:
        return self.filter(where) if isinstance(where, str) else where

    def items(self, ids: Sequence[int]) -> list[Item]:
        """Items in the order of the ids; those that the index does not have are left
        out.
        """
        return self.store.items(ids)

    def pictures(self, where: Where = None) -> tuple[list[Item], Vectors]:
        """The pictures that a filter lets through, and their unit rows (n, D); refused
        if there are none.
        """
        return self.store.pictures(self.condition(where))

    def picture(self, id: int) -> bytes:
        """The bytes of a picture's file; InputError where they cannot be read, or are
        others by now.
        """
        from cloob.data.batch import BadSample, read_pair_file  # Pillow

        for item in self.store.items([id]):
            try:
                data = read_pair_file(item.path, item.path, "image")
            except BadSample as bad:
                raise InputError(str(bad)) from None
            if hashlib.sha256(data).hexdigest() == item.content:
                return data
            raise InputError(
                f"{item.path}: has changed since it was indexed; `cloob index` looks"
                " again"
            )
        raise InputError(f"{self.store.address}: has no item {id}")

    def thumbnail(self, id: int, size: int = 256) -> bytes:
        """A JPEG of a picture within a square of ``size`` pixels, without metadata."""
        from cloob.pictures import Unreadable, thumbnail

        try:
            return thumbnail(self.picture(id), size)
        except Unreadable as bad:
            raise InputError(f"picture {id}: {bad.reason} ({bad.detail})") from None

    def search(
        self,
        query: AnyQuery,
        *,
        top: int = 20,
        where: Where = None,
        cutoff: find.Cutoff = "auto",
    ) -> Results:
        """The ``top`` pictures that a query finds, best first.

        A query is words as they stand, the path of a picture (``Path``), an opened
        picture, a :class:`cloob.search.query.Query` of several with weights, or a (D,)
        row. Hits with a margin below ``cutoff`` are left out
        (:mod:`cloob.search.find`); ``"auto"``: the default of the query's kind.
        """
        return find.search(self, query, top, self.condition(where), cutoff)

    def similar(self, id: int, *, top: int = 20, where: Where = None) -> Results:
        """The pictures nearest to one of the index, without itself and a cutoff; loads
        no model.
        """
        query = Query((Term(id),))
        return self.search(query, top=top, where=where, cutoff=None)

    def classify(
        self,
        labels: Sequence[str],
        options: LabelOptions | None = None,
        *,
        where: Where = None,
    ) -> Labels:
        """Zero-shot labels of all pictures that match, see
        :mod:`cloob.search.classify`.
        """
        from cloob.search.classify import LabelOptions, classify_index  # torch

        condition = self.condition(where)
        return classify_index(self, labels, options or LabelOptions(), condition)

    def export(self, path: str | Path, *, where: Where = None) -> int:
        """Writes a Parquet table: path, caption, what else is known, and vector;
        returns the number of rows.
        """
        from cloob.search.export import export  # pyarrow

        items, rows = self.pictures(where)
        export(Path(path), items, rows, self.model())
        return len(items)

    def update(
        self,
        sources: Sequence[str | Path] = (),
        options: UpdateOptions | None = None,
        *,
        progress: Progress = None,
    ) -> Summary:
        """Adds what sources have, and removes what they do not have any more; without
        sources, of all that it has.

        Sources are folders of pictures, pictures, or tables. ``progress`` is called
        with the number of pictures opened so far, and in all.
        """
        from cloob.search.update import UpdateOptions, update  # torch

        with self.store.exclusive():
            return update(self, sources, options or UpdateOptions(), progress)
