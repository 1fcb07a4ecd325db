"""An index of pictures: search, labels, look-alikes, maps, export, and bringing it up to date."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from cloob.data.batch import BadSample
from cloob.errors import InputError
from cloob.models.runs import split_checkpoint
from cloob.search import find
from cloob.search.find import Cutoff, Retrieved, View, Where
from cloob.search.query import AnyQuery, Embedder, Query, Term, TorchEmbedder, Vector
from cloob.search.records import INDEX_FILE, Hit, IndexedModel, Item, Results
from cloob.search.sqlite import SqliteStore
from cloob.search.store import Ids, Store, Vectors
from cloob.search.trust import absolute, load_named, remember
from cloob.search.where import parse

if TYPE_CHECKING:  # torch, scikit-learn, pyarrow, Pillow: imported where they are needed
    import torch

    from cloob.models.encoder import DualEncoder
    from cloob.models.onnx import PlainEncoder
    from cloob.search.build import Summary
    from cloob.search.classify import LabelOptions, Labels
    from cloob.search.export import Method
    from cloob.search.scan.open import Pictures
    from cloob.search.scan.rows import Rows
    from cloob.search.update import Merged, UpdateOptions

T = TypeVar("T")
_MEMOIZED = 64


def is_database(address: str | Path) -> bool:
    return str(address).startswith(("postgresql://", "postgres://"))


def is_there(address: str | Path) -> bool:
    """Whether an address names an index; of a database only that it is one."""
    return is_database(address) or (Path(address) / INDEX_FILE).is_file()


def _open_store(address: str | Path, *, writable: bool = False, create: bool = False) -> Store:
    if is_database(address):
        home = importlib.import_module("cloob.search.postgres")  # psycopg is an extra
        store: Store = home.PostgresStore(str(address), writable=writable, create=create)
        return store
    return SqliteStore.create(Path(address)) if create else SqliteStore(Path(address), writable=writable)


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
        self._default = None if model is None else self.store.model(self._typed(model)).name
        self._encoders: dict[str, DualEncoder] = {}  # by fingerprint, as a name may come to stand for other weights
        self._plain: dict[str, PlainEncoder | None] = {}  # likewise
        self._loading = threading.RLock()
        self.memoized: dict[Hashable, Any] = {}  # by ``memoize``
        self._pictures: Pictures | None = None

    @classmethod
    def open(cls, address: str | Path, *, model: str | None = None, writable: bool = False) -> Self:
        """Opens an index.

        Args:
            address: Its folder, or ``postgresql://…``.
            model: The default model, by its name or by what it is loaded from; None: the first.
            writable: Whether it is going to be changed.
        """
        return cls(_open_store(address, writable=writable), model)

    @classmethod
    def create(cls, address: str | Path) -> Self:
        """Makes an empty index; one that is there is opened."""
        return cls(_open_store(address, create=True))

    def _typed(self, model: str) -> str:
        """The name of a model that was typed by its name, or by what it is loaded from."""
        spec = absolute(model)
        run = spec if split_checkpoint(model)[1] else split_checkpoint(spec)[0]
        named = [each for each in self.models if each.name == model]
        named += [each for each in self.models if each.spec == spec]
        named += [each for each in self.models if split_checkpoint(each.spec)[0] == run]  # by another checkpoint
        if named and named[0].spec == spec:
            remember(spec)
        return named[0].name if named else model

    def close(self) -> None:
        """Closes the database and forgets the models."""
        self.store.close()
        self._encoders.clear()
        self._plain.clear()

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
        return self.memoize(("columns", self.revision()), self.store.columns)

    def memoize(self, key: Hashable, compute: Callable[[], T]) -> T:
        """A small cache; two threads may compute the same value at once."""
        value: T | None = self.memoized.get(key)
        if value is None:
            value = compute()
            if len(self.memoized) >= _MEMOIZED:
                self.memoized.clear()
            self.memoized[key] = value
        return value

    @property
    def models(self) -> tuple[IndexedModel, ...]:
        """The models that the index has vectors of."""
        return self.store.models()

    def model(self, name: str | IndexedModel | None = None) -> IndexedModel:
        """A model by its name; the default one for None."""
        return self.store.model(name or self._default)

    def view(self, where: Where = None, model: str | IndexedModel | None = None) -> View:
        """The pictures that a filter lets through, as a model sees them."""
        condition = parse(where, self.columns()) if isinstance(where, str) else where
        return View(self, self.model(model), condition)

    def use(self, name: str | IndexedModel, encoder: DualEncoder, weights: str | None = None) -> None:
        """Hands in a loaded model for :meth:`encoder`, and the fingerprint of its weights if that is known."""
        from cloob.models.load import fingerprint  # torch

        model = self.model(name)
        model.check(weights or fingerprint(encoder), self.store.address)
        self._encoders[model.fingerprint], self._plain[model.fingerprint] = encoder, None

    def encoder(self, name: str | IndexedModel | None = None, device: str | torch.device = "auto") -> DualEncoder:
        """A model of the index, loaded once, and again if its name stands for other weights by now."""
        model = self.model(name)
        with self._loading:  # one at a time
            if model.fingerprint not in self._encoders:
                encoder, weights = load_named(model.spec, device)
                model.check(weights, self.store.address)
                self._encoders[model.fingerprint] = encoder
            return self._encoders[model.fingerprint]

    def embedder(self, name: str | IndexedModel | None = None, device: str = "auto") -> Embedder:
        """What embeds queries: :meth:`encoder`, or the graphs of an ONNX folder, without torch."""
        from cloob.models.onnx import PlainEncoder  # only where something has to be embedded

        model = self.model(name)
        with self._loading:
            if model.fingerprint not in (*self._encoders, *self._plain):
                plain = PlainEncoder.open(model.spec)
                if plain is not None:
                    model.check(plain.fingerprint, self.store.address)
                self._plain[model.fingerprint] = plain
            return self._plain.get(model.fingerprint) or TorchEmbedder(self.encoder(model, device))

    def items(self, ids: Sequence[int]) -> list[Item]:
        """Items in the order asked for; ids that the index does not have are left out."""
        return self.store.items(ids)

    def picture(self, id: int) -> bytes:
        """The bytes of a picture's file, read from its source."""
        return self._read(id, bytes)

    def thumbnail(self, id: int, size: int = 256) -> bytes:
        """A JPEG of a picture that fits into a square of ``size`` pixels, without the file's metadata."""
        from cloob.pictures import thumbnail  # Pillow

        return self._read(id, lambda data: thumbnail(data, size))

    def _read(self, id: int, make: Callable[[bytes], bytes]) -> bytes:
        from cloob.pictures import Unreadable  # Pillow
        from cloob.search.scan.open import Pictures  # pyarrow

        self._pictures = self._pictures or Pictures()
        for item in self.items([id]):
            try:
                return make(self._pictures.read(item.source, item.path, item.content))
            except (BadSample, Unreadable) as bad:
                raise InputError(f"{item.path}: {bad.reason} ({bad.detail})") from None
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
    ) -> Results:
        """The pictures nearest to a query, best first.

        Args:
            query: Words as they stand, the path of a picture (``Path``), an opened picture, a
                :class:`cloob.search.query.Query` of several with weights, or a (D,) row.
            top: How many at most.
            where: See above.
            model: See above.
            cutoff: Hits with a margin below it are left out (:mod:`cloob.search.background`); ``"auto"``: the default
                of the query's kind; None: no cutoff.
            row: The query's unit row (D,) if it is known: then nothing of the query is embedded.
        """
        return find.search(self.view(where, model), query, top, cutoff, row)

    def similar(self, id: int, *, top: int = 20, where: Where = None, model: str | None = None) -> Results:
        """The pictures nearest to one of the index, without itself and without a cutoff; loads no model."""
        return self.search(Query((Term(id, "item"),)), top=top, where=where, model=model, cutoff=None)

    def duplicates(
        self, threshold: float = find.DUPLICATE, *, exact: bool = False, where: Where = None, model: str | None = None
    ) -> list[tuple[Hit, ...]]:
        """Groups of pictures that look alike, the largest first; a score is the cosine with the first of the group.

        Each two of a group have at least the cosine ``threshold``, or equal bytes; with ``exact`` equal bytes alone
        count. The best comes first: most pixels, then most bytes, then the oldest date. A picture is in one group at
        most, and a file once, whatever links lead to it.
        """
        return find.duplicates(self.view(where, model), threshold, exact=exact)

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

    def map(
        self, sample: int | None = None, method: Method = "pca", *, where: Where = None, model: str | None = None
    ) -> tuple[Ids, Vectors]:
        """Ids of a sample of the pictures (None: of 5,000), and their (n, 2) places in [0, 1].

        ``"pca"``: the two directions of largest variance. ``"tsne"``: neighbours stay neighbours, distances between
        groups mean nothing.
        """
        from cloob.search.export import map_of  # scikit-learn

        return map_of(self.view(where, model), sample, method)

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

        return update(self, sources, options or UpdateOptions(), progress)
