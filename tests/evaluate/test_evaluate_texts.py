"""Short texts at their own length: the towers' own answer, and the towers as they were."""

from __future__ import annotations

import pytest
import torch

from cloob.evaluate.embed import embed_texts
from cloob.evaluate.texts import _causal_tower, encode_texts
from cloob.models.encoder import DualEncoder
from cloob.models.towers import create_model

TEXTS = ["a", "a photo of a cat.", "a picture of " + "very " * 12 + "small bird", "", "word " * 200]


@pytest.fixture(scope="module")
def encoder() -> DualEncoder:
    return create_model("tiny-vit", seed=0).eval()


@pytest.mark.parametrize("texts", [TEXTS[:2], TEXTS[:4], TEXTS])
def test_the_padding_has_no_part_in_the_embedding(encoder: DualEncoder, texts: list[str]) -> None:
    with torch.no_grad():
        torch.testing.assert_close(encode_texts(encoder, texts), encoder.encode_text(texts), rtol=0, atol=2e-6)


def test_the_tower_sees_short_texts_short_and_stays_as_it_is(
    encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = []
    whole = encoder.model.encode_text
    monkeypatch.setattr(encoder.model, "encode_text", lambda tokens: lengths.append(tokens.shape[1]) or whole(tokens))
    before = {name: (value.data_ptr(), value.shape) for name, value in encoder.state_dict().items()}
    context = encoder.context_length
    embed_texts(encoder, ["a " * 20, "a cat", "b", "a dog", "a cat"], batch_size=2)
    # begin, 1 or 2 words, end; the long one goes with the longest of the short ones.
    assert lengths == [4, 22] and encoder.context_length == context
    assert {name: (value.data_ptr(), value.shape) for name, value in encoder.state_dict().items()} == before
    monkeypatch.setattr(encoder.model, "encode_text", lambda tokens: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encode_texts(encoder, ["a"])
    assert encoder.context_length == context and len(_causal_tower(encoder).positional_embedding) == context  # type: ignore[union-attr, arg-type]


def test_towers_that_look_at_the_padding_get_it() -> None:
    encoder = create_model("tiny-vit", seed=0).eval()
    tower = _causal_tower(encoder)
    assert tower is not None
    mask = tower.attn_mask
    tower.attn_mask = torch.zeros_like(mask)  # type: ignore[arg-type]
    assert _causal_tower(encoder) is None  # every token sees every other
    with torch.no_grad():
        assert torch.equal(encode_texts(encoder, TEXTS[:2]), encoder.encode_text(TEXTS[:2]))
    tower.attn_mask = mask
    name = "text_pool_type" if hasattr(tower, "text_pool_type") else "pool_type"
    setattr(tower, name, "last")
    assert _causal_tower(encoder) is None
    assert _causal_tower(object()) is None
