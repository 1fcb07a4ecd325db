"""An index of pictures: what a user does with it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from cloob.data.batch import BadSample
from cloob.errors import InputError, nearest
from cloob.search.ask import find
from cloob.search.ask.find import Cutoff
from cloob.search.ask.query import Query, Vector
from cloob.search.identity import changed, weights_of
from cloob.search.open import open_store
from cloob.search.records import Hit, IndexedModel, Item, Results
from cloob.search.store import Ids, Store, Vectors
from cloob.search.trust import absolute, load_named, remember_model
from cloob.search.where import Filter

if TYPE_CHECKING:  # torch: only where a model is needed, as a search for what is like a picture of the index needs none
    from PIL.Image import Image

    from cloob.models.encoding import Encoder
    from cloob.models.onnx.plain import PlainEncoder
    from cloob.search.ask.embedder import Embedder
    from cloob.search.ask.explain import Retrieved
    from cloob.search.build import Summary
    from cloob.search.merge import Merged
    from cloob.search.scan.open import Pictures  # pyarrow
    from cloob.search.show.layout import Method
    from cloob.search.sort.classify import LabelOptions, Labels
    from cloob.search.update import UpdateOptions

T = TypeVar("T")
_KEPT = 64  # values of `once`


class Index:
    """Pictures with their metadata and their vectors of one model or several; may be used by several threads.

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
        """Wraps a store; see :meth:`open` and :meth:`create`.

        Args:
            store: What keeps it.
            model: The model that is asked when none is named, by name or by what it is loaded from; None: the first.
        """
        self.store = store
        self._default = None if model is None else self._typed(model)
        self._encoders: dict[str, Encoder] = {}  # by fingerprint, as a name may come to stand for other weights
        self._plain: dict[str, PlainEncoder | None] = {}  # likewise
        self._lock = threading.Lock()  # of the dictionaries; never held while a model is loaded
        self._loading = threading.Lock()
        self._once: OrderedDict[Hashable, Any] = OrderedDict()
        self._pictures: Pictures | None = None
        if self._default is not None:
            self.model(self._default)

    @classmethod
    def open(cls, address: str | Path, *, model: str | None = None, writable: bool = False) -> Self:
        """Opens an index that is there.

        Args:
            address: Its folder, or ``postgresql://…``.
            model: The model that is asked when none is named, by its name or by what it is loaded from, which is noted
                as typed on this machine; None: the first.
            writable: Whether it is going to be changed.

        Raises:
            InputError: There is none, it is damaged, or has no such model.
        """
        return cls(open_store(address, writable=writable), model)

    @classmethod
    def create(cls, address: str | Path) -> Self:
        """Makes an empty index.

        Raises:
            InputError: There is one already, or the folder cannot be written.
        """
        return cls(open_store(address, create=True))

    def _typed(self, model: str) -> str:
        """The name of a model that was typed by its name, or by what it is loaded from."""
        spec = absolute(model)
        named = [each for each in self.models if each.name == model] or [
            each for each in self.models if each.spec == spec
        ]
        if not named:
            return model
        if named[0].spec == spec:
            remember_model(spec)
        return named[0].name

    def close(self) -> None:
        """Lets go of the database and of the models."""
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
        """The metadata columns beside an item's own, and what they hold."""
        return self.once(("columns", self.store.revision()), self.store.columns)

    @property
    def models(self) -> tuple[IndexedModel, ...]:
        """The models that there are vectors of."""
        return self.store.models()

    def model(self, name: str | IndexedModel | None = None) -> IndexedModel:
        """A model by its name, or one that was found before; the default one for None.

        Raises:
            InputError: The index has no such model, none at all, or by now other weights under its name.
        """
        models = self.models
        if isinstance(name, IndexedModel):
            for model in models:
                if (model.name, model.fingerprint) == (name.name, name.fingerprint):
                    return model
            raise InputError(f"{self.store.address}: {name.name} was replaced or removed meanwhile; ask again")
        wanted = name if name is not None else self._default
        if not models:
            raise InputError(f"{self.store.address}: is empty; `cloob index` fills it")
        if wanted is None:
            return models[0]
        for model in models:
            if model.name == wanted:
                return model
        names = [model.name for model in models]
        raise InputError(f"{self.store.address}: has no vectors of a model {wanted!r}; {nearest(wanted, names)}")

    def once(self, key: Hashable, work: Callable[[], T]) -> T:
        """What ``work`` returns, kept for later calls with an equal key; of the keys used last, a few."""
        with self._lock:
            if key in self._once:
                self._once.move_to_end(key)
                value: T = self._once[key]
                return value
        value = work()  # twice where two threads ask for it at once: neither waits for a model with the lock held
        with self._lock:
            self._once[key] = value
            while len(self._once) > _KEPT:
                self._once.popitem(last=False)
        return value

    def use(self, name: str, encoder: Encoder) -> None:
        """Hands in a loaded model, so that :meth:`encoder` has not to load it.

        Raises:
            InputError: Its weights are others than those that the index has vectors of.
        """
        from cloob.models.fingerprint import fingerprint  # torch

        model = self.model(name)
        self._check(model, fingerprint(encoder))
        self._let_go()
        with self._lock:
            self._encoders[model.fingerprint] = encoder
            self._plain.pop(model.fingerprint, None)

    def encoder(self, name: str | IndexedModel | None = None, device: str = "auto") -> Encoder:
        """A model of the index, loaded once, and anew where its name stands for other weights by now.

        Raises:
            InputError: It cannot be loaded, or its weights are others than those that the index has vectors of.
        """
        loaded = self._encoders.get(self.model(name).fingerprint)
        if loaded is not None:
            return loaded
        with self._loading:  # one at a time
            model = self.model(name)  # another by now, where it was replaced during the wait
            loaded = self._encoders.get(model.fingerprint)
            if loaded is None:
                self._let_go()
                loaded, weights = load_named(model.spec, device)
                self._check(model, weights)
                with self._lock:
                    self._encoders[model.fingerprint] = loaded
            return loaded

    def embedder(self, name: str | IndexedModel | None = None, device: str = "auto") -> Embedder:
        """What embeds queries: :meth:`encoder`, or of an ONNX folder its graphs, without torch.

        Raises:
            InputError: As :meth:`encoder`.
        """
        from cloob.models.onnx.plain import PlainEncoder  # only where something has to be embedded

        model = self.model(name)
        if model.fingerprint not in self._encoders and model.fingerprint not in self._plain:
            with self._loading:
                model = self.model(name)
                if model.fingerprint not in self._encoders and model.fingerprint not in self._plain:
                    self._let_go()
                    plain = PlainEncoder.open(model.spec)
                    if plain is not None:
                        self._check(model, plain.fingerprint)
                    with self._lock:
                        self._plain[model.fingerprint] = plain
        if (plain := self._plain.get(model.fingerprint)) is not None:
            return plain
        from cloob.search.ask.by_torch import ByTorch  # torch

        return ByTorch(self.encoder(model, device))

    def _let_go(self) -> None:
        """Forgets loaded models whose vectors have gone."""
        there = {model.fingerprint for model in self.models}
        with self._lock:
            for loaded in (self._encoders, self._plain):
                for gone in loaded.keys() - there:
                    del loaded[gone]

    def _check(self, model: IndexedModel, weights: str) -> None:
        """Raises ModelChanged where a fingerprint is not that of the model that the index has vectors of."""
        if weights != weights_of(model.fingerprint):
            raise changed(model, self.store.address)

    def items(self, ids: Sequence[int]) -> list[Item]:
        """Items in the order asked for; ids that are not there are left out."""
        return self.store.items(ids)

    def picture(self, id: int) -> bytes:
        """The bytes of a picture's file, read again from where it lies.

        Raises:
            InputError: The index has no such item, its file is gone, or it holds something else by now.
        """
        from cloob.search.scan.open import Pictures  # pyarrow

        found = self.store.items([id])
        if not found:
            raise InputError(f"{self.store.address}: has no item {id}")
        (item,) = found
        with self._lock:
            self._pictures = self._pictures or Pictures()
        try:
            return self._pictures.read(item.source, item.path, item.content)
        except BadSample as bad:
            raise InputError(f"{item.path}: {bad.reason} ({bad.detail})") from None

    def search(
        self,
        query: Query | str | Path | Image | Vector,
        *,
        top: int = 20,
        where: str | Filter | None = None,
        model: str | IndexedModel | None = None,
        cutoff: Cutoff = "auto",
        row: Vector | None = None,
    ) -> Results:
        """The pictures nearest to a query, best first.

        Args:
            query: Words as they stand, the path of a picture (``Path``), an opened picture, a
                :class:`cloob.search.ask.query.Query` of several with weights, or a (D,) row.
            top: How many at most.
            where: A filter over the metadata, see :mod:`cloob.search.where`.
            model: The model or its name; None: the default one.
            cutoff: Hits whose margin is below it are left out (:mod:`cloob.search.ask.background`); ``"auto"``: what
                docs/find.md measures; None: none is.
            row: The query's unit row (D,) where it is known: then nothing of the query is embedded.

        Raises:
            InputError: The query, the filter, the model or a number is wrong; one line.
        """
        return find.search(self, query, top=top, where=where, model=model, cutoff=cutoff, row=row)

    def similar(
        self, id: int, *, top: int = 20, where: str | Filter | None = None, model: str | None = None
    ) -> Results:
        """The pictures nearest to one of the index, without itself and without a cutoff; loads no model."""
        return find.similar(self, id, top=top, where=where, model=model)

    def duplicates(
        self,
        threshold: float = find.DUPLICATE,
        *,
        exact: bool = False,
        where: str | Filter | None = None,
        model: str | None = None,
    ) -> list[tuple[Hit, ...]]:
        """Groups of pictures that look alike, the largest first.

        Each two of a group have at least this cosine, or equal bytes. The best comes first: most pixels, then most
        bytes, then the oldest date. A picture is in one group at most, and a file once, whatever links lead to it.

        Args:
            threshold: A cosine above 0, at most 1.
            exact: Groups of equal bytes alone; vectors are not compared.
            where: Only among these pictures.
            model: The model or its name; None: the default one.

        Returns:
            Hits whose score is the cosine with the first of the group.

        Raises:
            InputError: The filter, the model or the threshold is wrong.
        """
        return find.duplicates(self, threshold, where, model, exact=exact)

    def classify(
        self,
        labels: Sequence[str],
        options: LabelOptions | None = None,
        *,
        where: str | Filter | None = None,
        model: str | None = None,
    ) -> Labels:
        """Zero-shot labels for all pictures that match, see :mod:`cloob.search.sort.classify`."""
        from cloob.search.sort.label import label_index  # torch

        return label_index(self, labels, options, where=where, model=model)

    def explain(
        self,
        query: Query | str | Path | Image | Vector,
        *,
        beta: float | None = None,
        top: int = 20,
        where: str | Filter | None = None,
        model: str | IndexedModel | None = None,
        row: Vector | None = None,
    ) -> Retrieved:
        """What a query retrieves from the pictures as a Hopfield memory, see :mod:`cloob.search.ask.explain`."""
        return find.explain(self, query, beta=beta, top=top, where=where, model=model, row=row)

    def map(
        self,
        sample: int | None = None,
        method: Method = "pca",
        *,
        where: str | Filter | None = None,
        model: str | None = None,
    ) -> tuple[Ids, Vectors]:
        """Ids of a sample of the pictures, and their (n, 2) places in [0, 1], see :mod:`cloob.search.show.layout`."""
        from cloob.search.show.layout import map_of  # scikit-learn

        return map_of(self, sample, method, where, model)

    def thumbnail(self, id: int, size: int = 256) -> bytes:
        """A JPEG of a picture that fits into a square of ``size`` pixels, without the file's metadata.

        Raises:
            InputError: The picture is not in the index, or its file is gone, changed or unreadable.
        """
        from cloob.pictures import Unreadable  # Pillow
        from cloob.search.show.thumbnails import thumbnail  # Pillow

        try:
            return thumbnail(self.picture(id), size)
        except Unreadable as error:
            raise InputError(f"picture {id}: {error.reason} ({error.detail})") from None

    def merge(self, other: Index) -> Merged:
        """Takes in what another index has: items that are not here, and vectors of models that are not here.

        Raises:
            InputError: A name stands for other weights there than here, or a source lies in one of the other index.
        """
        from cloob.search.merge import merge  # torch

        return merge(self.store, other.store)

    def export(self, path: str | Path, *, model: str | None = None, where: Filter | None = None) -> int:
        """Writes a Parquet table: path, caption, what else is known, vector, and a place (x, y) on a map.

        Args:
            path: The file.
            model: Whose vectors; None: the default one's.
            where: Only items that match.

        Returns:
            The number of rows.

        Raises:
            InputError: The file cannot be written, or there is nothing to write.
        """
        from cloob.search.export import export  # pyarrow

        return export(self.store, self.model(model), Path(path), where)

    def update(
        self,
        sources: Sequence[str | Path] = (),
        options: UpdateOptions | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> Summary:
        """Adds what sources have, and removes what they have no more.

        Under ``torchrun`` each rank takes its part, and all ranks return the same summary.

        Args:
            sources: Folders of pictures, tables, shards, data sets; none: all that the index knows.
            options: Which model, and how; None: the index's only model.
            progress: Called with the pictures that were looked at so far, and in all.

        Raises:
            InputError: A source that is not there or lies in another one, or a model that cannot be loaded.
            ModelChanged: The model has other weights than those that the index has vectors of.
        """
        from cloob.search.update import update  # torch

        return update(self.store, sources, options, progress)
