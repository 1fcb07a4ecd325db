"""A model is replaced by another process while an index is open: rows of old weights never meet vectors of new ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from index_fakes import SIDE, FakeEncoder, noise, options, write_noise
from torch import Tensor
from torch.nn.functional import normalize

from cloob.errors import InputError
from cloob.models import fingerprint as fingerprints
from cloob.search.ask import background
from cloob.search.ask.by_torch import ByTorch
from cloob.search.index import Index

N = 30


class Encoder(FakeEncoder):
    """Texts go through the weights as well."""

    def encode_text(self, texts: Sequence[str], /) -> Tensor:
        generators = [torch.Generator().manual_seed(sum(map(ord, text))) for text in texts]
        pixels = torch.stack([torch.rand(3 * SIDE * SIDE, generator=each) for each in generators])
        return normalize((pixels - 0.4) @ self.weight.T, dim=1)


OLD, NEW = Encoder("m", 0), Encoder("m", 1)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """Open since before the replacement; its model loads as the new one."""
    for seed in range(N):
        write_noise(tmp_path / "pictures" / f"{seed}.png", seed)
    with Index.create(tmp_path / "index") as other:
        other.update([tmp_path / "pictures"], options(OLD))
        with Index.open(tmp_path / "index") as opened:
            opened.use("m", OLD)
            assert opened.search(noise(3), cutoff=None).hits[0].score == pytest.approx(1)
            replaced = replace(options(NEW), replace_model=True)
            assert other.update([tmp_path / "pictures"], replaced).embedded == N
            loaded = (NEW, fingerprints.fingerprint(NEW))
            monkeypatch.setattr(fingerprints, "load_with_fingerprint", lambda *_: loaded)
            yield opened


def test_the_next_query_is_embedded_by_the_new_one(index: Index) -> None:
    assert index.encoder() is NEW
    hit = index.search(noise(3), top=1, cutoff=None).hits[0]
    assert Path(hit.item.path).name == "3.png" and hit.score == pytest.approx(1)
    assert list(index._encoders.values()) == [NEW]  # the old one's memory is free


def test_what_the_cutoff_compares_with_is_of_the_new_one(index: Index) -> None:
    index.search("a red bird")

    def unavailable() -> ByTorch:
        raise AssertionError("not kept")

    kept = background.background_rows(unavailable, index.model().fingerprint)
    np.testing.assert_allclose(kept, ByTorch(NEW).texts(background.background_texts()), atol=1e-5)


def test_a_query_on_its_way_is_asked_again(tmp_path: Path) -> None:
    """Its row is of the old one, and the vectors are of the new one when it is looked for."""
    write_noise(tmp_path / "pictures" / "a.png", 0)
    with Index.create(tmp_path / "index") as index:
        index.update([tmp_path / "pictures"], options(OLD))
        index.use("m", OLD)
        before = index.model()
        row = ByTorch(OLD).texts(["a red bird"])[0]
        index.update([tmp_path / "pictures"], replace(options(NEW), replace_model=True))
        asks = (index.encoder, index.embedder, lambda model: index.search("a red bird", row=row, model=model))
        for ask in asks:
            with pytest.raises(InputError, match="m was replaced or removed meanwhile; ask again"):
                ask(before)


def test_while_a_model_is_loaded_all_else_is_answered(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *_ = index.store.ids().tolist()
    loads: list[str] = []

    with ThreadPoolExecutor(3) as pool:

        def load(spec: str, _: str) -> tuple[Encoder, str]:
            loads.append(spec)
            assert pool.submit(index.once, "key", lambda: 1).result(5) == 1  # every search asks for it
            assert pool.submit(index.picture, first).result(5)
            return NEW, fingerprints.fingerprint(NEW)

        monkeypatch.setattr(fingerprints, "load_with_fingerprint", load)
        assert list(pool.map(lambda _: index.encoder(), range(2))) == [NEW, NEW] and len(loads) == 1


@pytest.mark.parametrize("new", [NEW, Encoder("m", 1, 24)], ids=["as wide", "wider"])
def test_a_search_during_which_the_model_is_replaced_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new: Encoder
) -> None:
    write_noise(tmp_path / "pictures" / "a.png", 0)
    with Index.create(tmp_path / "index") as index:
        index.update([tmp_path / "pictures"], options(OLD))
        nearest = index.store.nearest

        def late(*given: object) -> object:
            index.update([tmp_path / "pictures"], replace(options(new), replace_model=True))
            return nearest(*given)  # type: ignore[arg-type]

        monkeypatch.setattr(index.store, "nearest", late)
        with pytest.raises(InputError, match="m was replaced"):
            index.search(ByTorch(OLD).texts(["a red bird"])[0])
