"""An index of pictures: search, labels, look-alikes, export, and bringing it up to date."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from cloob.errors import InputError
from cloob.search import find
from cloob.search.address import open_store
from cloob.search.find import Cutoff, Retrieved
from cloob.search.models import Models
from cloob.search.query import AnyQuery, Embedder, Query, Term, Vector
from cloob.search.records import By, Hit, IndexedModel, Item, Results
from cloob.search.store import Store
from cloob.search.view import Memo, View, Where
from cloob.search.where import Filter, parse

if TYPE_CHECKING:  # torch, scikit-learn, pyarrow, Pillow: imported where they are needed
    import torch

    from cloob.models.encoder import DualEncoder
    from cloob.search.build import Summary
    from cloob.search.classify import LabelOptions, Labels
    from cloob.search.scan.open import Pictures
    from cloob.search.scan.rows import Rows
    from cloob.search.update import Merged, UpdateOptions

_MADE = 256  # thumbnails after which there is a look whether the cache has room


class Index:
    """Pictures with their metadata and their vectors of one model or several; may be used by several threads.

    Whatever a user can get wrong (an address, a query, a filter, a model, a file) raises ``InputError`` with one line.
    Of all methods, ``where`` is a filter over the metadata (:mod:`cloob.search.where`), and ``model`` the name of a
    model of the index; None is the default one.

    Example:
        >>> from pathlib import Path
        >>> import cloob
        >>> from cloob.search.update import UpdateOptions
        >>> from PIL import Image
        >>> folder = Path("pictures")
        >>> folder.mkdir()
        >>> for name in ("red", "blue"):
        ...     Image.new("RGB", (64, 64), name).save(folder / f"{name}.png")
        >>> model = cloob.create_model("tiny-vit", seed=0)
        >>> with cloob.Index.create("pictures.idx") as index:
        ...     done = index.update([folder], UpdateOptions(model=model))
        ...     print(done.added, len(index), [Path(item.path).name for item in index.items(index.store.ids())])
        2 2 ['blue.png', 'red.png']
    """

    def __init__(self, store: Store, model: str | None = None) -> None:
        """Wraps a store; see :meth:`open` and :meth:`create`."""
        self.store = store
        self._models = Models(store, model)
        self.memo = Memo()
        self._columns: dict[str, str] = {}
        self._pictures: Pictures | None = None
        self._made = 0  # thumbnails

    @classmethod
    def open(cls, address: str | Path, *, model: str | None = None, writable: bool = False) -> Self:
        """Opens an index.

        Args:
            address: Its folder, or ``postgresql://…``.
            model: The default model, by its name or by what it is loaded from; None: the first.
            writable: Whether it is going to be changed.
        """
        return cls(open_store(address, writable=writable), model)

    @classmethod
    def create(cls, address: str | Path) -> Self:
        """Makes an empty index; one that is there is opened."""
        return cls(open_store(address, create=True))

    def close(self) -> None:
        """Closes the database and forgets the models."""
        self.store.close()
        self._models.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __len__(self) -> int:
        return self.store.count()

    def revision(self) -> int:
        """Grows with each change."""
        return self.store.revision()

    def columns(self) -> dict[str, str]:
        """The metadata columns of the sources, and what they hold."""
        return self.memo.of(("columns", self.revision()), self.store.columns)

    @property
    def models(self) -> tuple[IndexedModel, ...]:
        """The models that the index has vectors of."""
        return self.store.models()

    def model(self, name: str | IndexedModel | None = None) -> IndexedModel:
        """A model by its name; the default one for None."""
        return self._models.model(name)

    def view(self, where: Where = None, model: str | IndexedModel | None = None) -> View:
        """The pictures that a filter lets through, as a model sees them."""
        condition = self.filter(where) if isinstance(where, str) else where
        return View(self.store, self._models, self.memo, self.model(model), condition)

    def filter(self, where: str, hidden: Sequence[str] = ()) -> Filter:
        """Parses a filter, which may name none of the ``hidden`` columns."""
        try:  # columns of an earlier revision do, where it names none but these: reading them reads all items
            return parse(where, self._columns, hidden)
        except InputError:
            self._columns = self.columns()
            return parse(where, self._columns, hidden)

    def use(self, name: str | IndexedModel, encoder: DualEncoder, weights: str | None = None) -> None:
        """Hands in a loaded model for :meth:`encoder`, and the fingerprint of its weights if that is known."""
        from cloob.models.load import fingerprint  # torch

        self._models.use(self.model(name), encoder, weights or fingerprint(encoder))

    def encoder(self, name: str | IndexedModel | None = None, device: str | torch.device = "auto") -> DualEncoder:
        """A model of the index, loaded once."""
        return self._models.encoder(name, device)

    def embedder(self, name: str | IndexedModel | None = None, device: str = "auto") -> Embedder:
        """What embeds queries: :meth:`encoder`, or the graphs of an ONNX folder, without torch."""
        return self._models.embedder(name, device)

    def items(self, ids: Sequence[int]) -> list[Item]:
        """Items in the order asked for; ids that the index does not have are left out."""
        return self.store.items(ids)

    def picture(self, id: int) -> bytes:
        """The bytes of a picture's file, read from its source."""
        return self._read(id, bytes)

    def thumbnail(self, id: int, size: int = 256) -> bytes:
        """A JPEG of a picture that fits into a square of ``size`` pixels, without the file's metadata.

        It is kept in the cache, and given from there as long as the file is there unchanged.
        """
        from cloob.cache import Cache
        from cloob.pictures import thumbnail  # Pillow
        from cloob.search.alike import file_of

        cache, names = Cache(), [f"{item.content} {size}" for item in self.items([id]) if file_of(item)]
        for kept in filter(None, (cache.find("thumbnails", name) for name in names)):
            with contextlib.suppress(OSError):  # removed meanwhile
                return kept.read_bytes()
        made = self._read(id, lambda data: thumbnail(data, size))
        self._made += 1
        for name in names:
            with contextlib.suppress(InputError):  # a cache that cannot be written
                cache.put("thumbnails", name, made, evict=self._made % _MADE == 0)
        return made

    def _read(self, id: int, make: Callable[[bytes], bytes]) -> bytes:
        from cloob.search.scan.open import Pictures  # pyarrow

        self._pictures = self._pictures or Pictures()
        for item in self.items([id]):
            return self._pictures.make(item, make)
        raise InputError(f"{self.store.address}: has no item {id}")

    def search(
        self,
        query: AnyQuery,
        *,
        top: int = 20,
        where: Where = None,
        model: str | IndexedModel | None = None,
        cutoff: Cutoff = "auto",
        row: Vector | None = None,
        by: By = "both",
    ) -> Results:
        """The pictures that a query finds, best first.

        Args:
            query: Words as they stand, the path of a picture (``Path``), an opened picture, a
                :class:`cloob.search.query.Query` of several with weights, or a (D,) row.
            top: How many at most.
            where: See above.
            model: See above.
            cutoff: Hits with a margin below it are left out (:mod:`cloob.search.background`); ``"auto"``: the default
                of the query's kind; None: no cutoff.
            row: The query's unit row (D,) if it is known: then nothing of the query is embedded.
            by: ``"meaning"``: by the vectors. ``"words"``: pictures that have all words of the query in their name,
                caption or text columns; the model is not asked. ``"both"``: these two lists, joined by reciprocal rank.
        """
        return find.search(self.view(where, model), query, top, cutoff, row, by)

    def similar(self, id: int, *, top: int = 20, where: Where = None, model: str | None = None) -> Results:
        """The pictures nearest to one of the index, without itself and without a cutoff; loads no model."""
        return self.search(Query((Term(id, "item"),)), top=top, where=where, model=model, cutoff=None)

    def duplicates(
        self, threshold: float = 0.97, *, exact: bool = False, where: Where = None, model: str | None = None
    ) -> list[tuple[Hit, ...]]:
        """Groups of pictures that look alike, the largest first; a score is the cosine with the first of the group.

        Any two of a group have at least the cosine ``threshold``, or equal bytes; with ``exact`` equal bytes alone
        count. The best comes first: RAW, then most pixels, then with EXIF, then most bytes, then the oldest date. A
        picture is in one group at most, and a file once, whatever links lead to it. Files that are gone or have
        changed are left out, and so are groups of one shot (RAW and JPEG of one stem).
        """
        from cloob.search.alike import duplicates  # Pillow

        return duplicates(self.view(where, model), threshold, exact=exact).groups

    def classify(
        self,
        labels: Sequence[str],
        options: LabelOptions | None = None,
        *,
        where: Where = None,
        model: str | None = None,
    ) -> Labels:
        """Zero-shot labels of all pictures that match, see :mod:`cloob.search.classify`."""
        from cloob.search.classify import LabelOptions, label_index  # torch

        return label_index(self.view(where, model), labels, options or LabelOptions())

    def explain(
        self,
        query: AnyQuery,
        *,
        beta: float | None = None,
        top: int = 20,
        where: Where = None,
        model: str | IndexedModel | None = None,
        row: Vector | None = None,
    ) -> Retrieved:
        """What a query retrieves from the pictures as a Hopfield memory, see :func:`cloob.search.find.explain`.

        ``beta`` is β; None: the model's own, else 8. ``query`` and ``row`` are as for :meth:`search`.
        """
        return find.explain(self.view(where, model), query, beta, top, row)

    def merge(self, other: Index) -> Merged:
        """Adds what another index has: items, and vectors of other models."""
        from cloob.search.update import merge  # torch

        return merge(self.store, other.store)

    def export(self, path: str | Path, *, model: str | None = None, where: Where = None) -> int:
        """Writes a Parquet table: path, caption, what else is known, and vector; returns the number of rows."""
        from cloob.search.export import export  # pyarrow

        return export(self.view(where, model), Path(path))

    def update(
        self,
        sources: Sequence[str | Path] | Rows = (),
        options: UpdateOptions | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> Summary:
        """Adds what sources have, and removes what they do not have any more.

        Args:
            sources: Folders of pictures, tables, shards, data sets; none: all that the index knows. Or one
                :class:`cloob.search.scan.rows.Rows`: vectors with labels.
            options: Which model, and how; None: the index's only model.
            progress: Called with the number of pictures opened so far, and in all.
        """
        from cloob.search.update import UpdateOptions, update  # torch

        return update(self.store, self._models, sources, options or UpdateOptions(), progress)
