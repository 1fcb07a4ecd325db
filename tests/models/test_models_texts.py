"""Short texts at their own length: the towers' own answer, its gradient, and the towers as they were."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cloob.models.encoder import DualEncoder, EncoderConfig
from cloob.models.towers import create_model, open_clip

TEXTS = ["a", "a photo of a cat.", "a picture of " + "very " * 12 + "small bird", "", "word " * 200]


@pytest.fixture(scope="module")
def encoder() -> DualEncoder:
    return create_model("tiny-vit", seed=0).eval()


@pytest.fixture(scope="module")
def custom_encoder() -> DualEncoder:
    """A model of which the text tower is a module of its own."""
    library = open_clip()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = library.create_model("tiny-vit", force_custom_text=True)
    tokenizer, config = library.get_tokenizer("tiny-vit"), library.get_model_config("tiny-vit")
    return DualEncoder("custom", model, tokenizer, EncoderConfig.open_clip(config)).eval()


@pytest.mark.parametrize("which", ["encoder", "custom_encoder"])
def test_the_padding_has_no_part_in_an_embedding_nor_in_a_gradient(which: str, request: pytest.FixtureRequest) -> None:
    encoder: DualEncoder = request.getfixturevalue(which)
    for texts in (TEXTS[:4], TEXTS):
        with torch.no_grad():
            short, padded = encoder.encode_text(texts), encoder.model.encode_text(encoder.tokenizer(texts))
        torch.testing.assert_close(short, F.normalize(padded, dim=1), rtol=0, atol=2e-6)
    weights = torch.randn(2, encoder.embed_dim, generator=torch.Generator().manual_seed(0))

    def gradients(rows: Tensor) -> dict[str, Tensor]:
        encoder.zero_grad()
        (rows * weights).sum().backward()
        return {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}

    padded = encoder.model.encode_text(encoder.tokenizer(TEXTS[:2]))
    cut, whole = gradients(encoder.encode_text(TEXTS[:2], grad=True)), gradients(F.normalize(padded, dim=1))
    encoder.zero_grad()
    assert cut.keys() == whole.keys() and any("positional" in name for name in cut)
    for name, gradient in whole.items():
        torch.testing.assert_close(cut[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_threads_that_share_a_model_leave_it_whole(encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second thread comes while the first one's positions are in; the first one ends before the second."""
    whole, second_came, first_ended = encoder.model.encode_text, threading.Event(), threading.Event()

    def encode_text(tokens: Tensor) -> Tensor:
        if tokens.shape[1] == 8:
            second_came.wait(0.3)
        else:
            second_came.set()
            assert first_ended.wait(30)
        return whole(tokens)

    monkeypatch.setattr(encoder.model, "encode_text", encode_text)
    expected = encoder.encode_text(["a cat"])
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(encoder.encode_text, ["a cat"])
        first.add_done_callback(lambda _: first_ended.set())
        time.sleep(0.05)
        second = pool.submit(encoder.encode_text, ["a " * 20])
        torch.testing.assert_close(first.result(), expected)
        second.result()
    assert len(encoder.model.positional_embedding) == encoder.context_length


def test_towers_that_look_at_the_padding_get_it() -> None:
    encoder = create_model("tiny-vit", seed=0).eval()
    model, mask = encoder.model, encoder.model.attn_mask
    model.attn_mask = torch.zeros_like(mask)  # every token sees every other
    assert encoder.trims_texts and not DualEncoder("all", model, encoder.tokenizer, encoder.config).trims_texts
    model.attn_mask = mask
    setattr(model, "text_pool_type" if hasattr(model, "text_pool_type") else "pool_type", "last")
    looking = DualEncoder("last", model, encoder.tokenizer, encoder.config).eval()
    assert looking.encode_text(["a"]).shape == (1, encoder.embed_dim)
    with pytest.raises(ValueError, match=r"\(1, 8\) found"):
        looking.encode_text(torch.zeros(1, 8, dtype=torch.int64))
