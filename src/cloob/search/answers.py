"""What an index can be asked; the work is in ``ask``, ``sort`` and ``show``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cloob.errors import InputError
from cloob.search.ask import find
from cloob.search.ask.find import Cutoff
from cloob.search.ask.query import Query, Vector
from cloob.search.records import Hit, IndexedModel, Results
from cloob.search.store import Ids, Store, Vectors
from cloob.search.where import Filter

if TYPE_CHECKING:  # torch: only where a model is needed
    from PIL.Image import Image

    from cloob.models.encoding import Encoder
    from cloob.search.ask.embedder import Embedder
    from cloob.search.ask.explain import Retrieved
    from cloob.search.show.layout import Method
    from cloob.search.sort.classify import LabelOptions, Labels

T = TypeVar("T")


class Answers(ABC):
    """What :class:`cloob.search.index.Index` answers with its store, its models and its pictures."""

    store: Store

    @abstractmethod
    def model(self, name: str | IndexedModel | None = None) -> IndexedModel:
        """A model by its name, or one that was found before; the default one for None."""

    @abstractmethod
    def encoder(self, name: str | IndexedModel | None = None) -> Encoder:
        """A model of the index, loaded once."""

    @abstractmethod
    def once(self, key: Hashable, work: Callable[[], T]) -> T:
        """What ``work`` returns, kept for later calls with an equal key."""

    @abstractmethod
    def embedder(self, name: str | IndexedModel | None = None) -> Embedder:
        """What embeds words and pictures of queries."""

    @abstractmethod
    def picture(self, id: int) -> bytes:
        """The bytes of a picture's file."""

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
