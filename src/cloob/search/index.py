"""An index of pictures: what a user does with it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from cloob.errors import InputError, nearest
from cloob.models.encoding import Encoder
from cloob.models.fingerprint import fingerprint
from cloob.models.load import load_model
from cloob.search.build import Summary
from cloob.search.records import IndexedModel, Item
from cloob.search.sqlite.store import SqliteStore
from cloob.search.store import Store
from cloob.search.update import UpdateOptions, changed, update


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
            model: The name of the model that is asked when none is named; None: the first.
        """
        self.store = store
        self._default = model
        self._encoders: dict[str, Encoder] = {}
        self._lock = threading.RLock()
        if model is not None:
            self.model(model)

    @classmethod
    def open(cls, address: str | Path, *, model: str | None = None, writable: bool = False) -> Self:
        """Opens an index that is there.

        Args:
            address: Its folder.
            model: The name of the model that is asked when none is named; None: the first.
            writable: Whether it is going to be changed.

        Raises:
            InputError: There is none, it is damaged, or has no such model.
        """
        return cls(SqliteStore(Path(address), writable=writable), model)

    @classmethod
    def create(cls, address: str | Path) -> Self:
        """Makes an empty index.

        Raises:
            InputError: There is one already, or the folder cannot be written.
        """
        return cls(SqliteStore.create(Path(address)))

    def close(self) -> None:
        """Lets go of the database and of the models."""
        self.store.close()
        self._encoders.clear()

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
        """The metadata columns beside an item's own, and whether they hold ``text``, ``number`` or both (``mixed``)."""
        return self.store.columns()

    @property
    def models(self) -> tuple[IndexedModel, ...]:
        """The models that there are vectors of."""
        return self.store.models()

    def model(self, name: str | None = None) -> IndexedModel:
        """A model by its name; the default one for None.

        Raises:
            InputError: The index has no such model, or none at all.
        """
        models = self.models
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

    def use(self, name: str, encoder: Encoder) -> None:
        """Hands in a loaded model, so that :meth:`encoder` has not to load it.

        Raises:
            InputError: Its weights are others than those that the index has vectors of.
        """
        self._check(self.model(name), encoder)
        self._encoders[self.model(name).name] = encoder

    def encoder(self, name: str | None = None, device: str = "auto") -> Encoder:
        """A model of the index, loaded once.

        Raises:
            InputError: It cannot be loaded, or its weights are others than those that the index has vectors of.
        """
        with self._lock:
            model = self.model(name)
            if model.name not in self._encoders:
                encoder = load_model(model.spec, device=device)
                self._check(model, encoder)
                self._encoders[model.name] = encoder
            return self._encoders[model.name]

    def _check(self, model: IndexedModel, encoder: Encoder) -> None:
        if fingerprint(encoder) != model.fingerprint:
            raise changed(model, self.store.address)

    def items(self, ids: Sequence[int]) -> list[Item]:
        """Items in the order asked for; ids that are not there are left out."""
        return self.store.items(ids)

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
        return update(self.store, sources, options, progress)
