"""How vectors are made is part of what an index knows a model by; and decoders rest while a CPU runs the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cloob.search.build import Effort
from cloob.search.build.forward import Forward, draft_reduction
from hypothesis import given
from hypothesis import strategies as st
from index_fakes import FakeEncoder, write_noise
from PIL import Image

from cloob.errors import InputError
from cloob.pictures import Encoded
from cloob.search.identity import Making, ModelChanged, weights_of
from cloob.search.index import Index
from cloob.search.update import UpdateOptions

MAKINGS = st.builds(Making, st.sampled_from(["fp32", "bf16"]), st.booleans())


@given(MAKINGS, MAKINGS)
def test_marks_are_read_back_and_tell_apart(one: Making, other: Making) -> None:
    assert Making.of(one.mark("f" * 32)) == one and weights_of(one.mark("f" * 32)) == "f" * 32
    assert (one.mark("f" * 32) == other.mark("f" * 32)) == (one == other)


def update(index: Index, folder: Path, **options: object) -> int:
    asked = {"model": FakeEncoder(), "effort": Effort(workers=0)} | options
    return index.update([folder], UpdateOptions(**asked)).embedded  # type: ignore[arg-type]


def test_an_index_goes_on_as_it_was_begun(tmp_path: Path) -> None:
    write_noise(tmp_path / "p" / "a.png", 0)
    with Index.create(tmp_path / "idx") as index:
        update(index, tmp_path / "p", precision="bf16", draft=True)
        write_noise(tmp_path / "p" / "b.png", 1)
        assert update(index, tmp_path / "p") == 1
        assert Making.of(index.models[0].fingerprint) == Making("bf16", True)
        index.use("fake", FakeEncoder())  # queries ask for the weights alone
        for other in ({"precision": "fp32"}, {"draft": False}):
            with pytest.raises(ModelChanged):
                update(index, tmp_path / "p", **other)
            with pytest.raises(InputError, match="another way"):
                update(index, tmp_path / "p", model=None, **other)
        assert update(index, tmp_path / "p", precision="fp32", name="exact") == 2
        assert [model.name for model in index.models] == ["fake", "exact"]
        assert update(index, tmp_path / "p", precision="fp32", draft=False, replace_model=True) == 2
        assert Making.of(index.model("fake").fingerprint) == Making()


@given(st.integers(1, 9000), st.integers(1, 9000), st.sampled_from([8, 224, 336]))
def test_a_draft_leaves_twice_the_models_input(width: int, height: int, side: int) -> None:
    reduction = draft_reduction((width, height), side)
    fitting = [factor for factor in (1, 2, 4, 8) if min(width, height) / factor >= 2 * side]
    assert reduction == max(fitting, default=1)
    assert draft_reduction((width, height), None) == 1


def test_a_draft_is_nearly_the_picture(tmp_path: Path) -> None:
    smooth = np.kron(np.random.default_rng(0).integers(0, 256, (8, 8, 3)), np.ones((32, 32, 1))).astype(np.uint8)
    Image.fromarray(smooth).save(path := tmp_path / "a.jpg", quality=95)
    encoder = FakeEncoder()
    encoder.image_size = 8  # type: ignore[assignment]
    whole, draft = (
        Forward(lambda: encoder, Making(draft=draft)).pixels(Encoded(path.read_bytes())) for draft in (False, True)
    )
    assert whole.shape == draft.shape and not torch.equal(whole, draft)
    assert (whole.int() - draft.int()).abs().max() <= 8
