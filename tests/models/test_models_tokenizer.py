from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import ftfy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

from cloob.data.open import open_source
from cloob.models.tokenizer import ClipTokenizer, is_open_clips
from cloob.models.towers import create_model

ORIGINAL = SimpleTokenizer()
FAST = ClipTokenizer.of(ORIGINAL)

# What captions of the web are made of, and what each step of the cleaning looks for.
PARTS = [
    *(
        "a",
        "the",
        "dogs",
        "Photo",
        "IPHONE",
        "x" * 40,
        "'s",
        "'LL",
        "’s",
        "don't",
        "42",
        "3.14",
        "½",
        "²",
        "...",
        "#tag",
    ),
    *("&", "&amp;", "&amp;amp;", "&lt;b&gt;", "<b>", "&#39;", "&#x1F600;", "&nbsp;", "&eacute", "&bogus;", "&#32;x"),
    *(
        "“quoted”",
        "‘a’",
        "ﬁsh",
        "ﬀ",
        "Ｆｕｌｌ",
        "é",
        "e\u0301",
        "ß",
        "İ",
        "ΟΔΟΣ",
        "Σ",
        "ſ",
        "'ſ",
        "K",
        "naïve",
        "Ã©",
        "â€™",
    ),
    *(
        "的是一个",
        "日本語の",
        "한국어",
        "ภาษาไทย",
        "हिन्दी",
        "العربية",
        "עברית",
        "😀",
        "👩‍👩‍👧",
        "🇩🇪",
        "e" + "\u0302" * 5,
    ),
    *(" ", "  ", "\t", "\n", "\r\n", "\x0b", "\x0c", "\x1c", "\x1f", "\x85", "\u00a0", "\u2028", "\u3000", "\u200b"),
    *("\x00", "\x07", "\x7f", "\x1b[31m", "\x1b", "\ufeff", "\u00ad", "\ud800", "\ufffd", "<|endoftext|>"),
    *("<start_of_text>", "<END_of_text>", "<end_of_text", "https://x.y/z?a=b&c=d", "user@mail.com", "IMG_0001.JPG"),
]
texts = st.one_of(
    st.lists(st.one_of(st.sampled_from(PARTS), st.just(" ")), max_size=50).map("".join),
    st.text(max_size=80),
    st.text(st.characters(max_codepoint=127), max_size=80),
)


@settings(max_examples=300)
@given(texts)
def test_every_text_has_open_clips_tokens(text: str) -> None:
    assert FAST.encode(text) == ORIGINAL.encode(text)
    assert torch.equal(FAST([text]), ORIGINAL([text]))


@settings(max_examples=100)
@given(st.lists(texts, max_size=4), st.integers(2, 12))
def test_rows_are_cut_and_filled_as_open_clips(some: list[str], length: int) -> None:
    ours = FAST(some, length)
    assert ours.dtype == torch.int64 and torch.equal(ours, ORIGINAL(some, length))
    assert torch.equal(FAST("one text", length), ORIGINAL("one text", length))


@settings(max_examples=200)
@given(st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E, exclude_characters="&")))
def test_ftfy_leaves_printable_ascii_without_ampersand_alone(text: str) -> None:
    """What the short cut rests on."""
    assert text.isascii() and text.isprintable()
    assert ftfy.fix_text(text) == text


def test_ten_thousand_real_captions(shared_data: Path) -> None:
    source = open_source(f"{shared_data}/pictograms/train/{{00000..00002}}.tar")
    captions = [source.read(i).caption for i in range(10_000)]
    assert len(set(captions)) > 5_000
    assert torch.equal(ClipTokenizer.of(ORIGINAL)(captions), ORIGINAL(captions))


def test_words_are_forgotten_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloob.models.tokenizer._MAX_WORDS", 3)
    tokenizer = ClipTokenizer.of(ORIGINAL)
    some = ["a b c d", "e a b", "zebra " + "y" * 50]
    assert torch.equal(tokenizer(some), ORIGINAL(some)) and torch.equal(tokenizer(some), ORIGINAL(some))
    assert 0 < len(tokenizer._words) <= 3 and "y" * 50 not in tokenizer._words


def test_it_travels_without_its_words_and_without_open_clip() -> None:
    FAST(["a cat"])
    stored = pickle.dumps(FAST)
    assert len(stored) < 2_000_000 and b"open_clip" not in stored  # a worker that loads it need not import that
    arrived = pickle.loads(stored)
    assert not arrived._words and arrived.encode("a cat &amp; a dog") == ORIGINAL.encode("a cat & a dog")


@pytest.mark.parametrize(
    "options", [{"clean": "whitespace"}, {"reduction_mask": "simple"}, {"additional_special_tokens": ["<x>"]}]
)
def test_other_tokenisers_stay_as_they_are(options: dict[str, Any]) -> None:
    assert is_open_clips(ORIGINAL) and not is_open_clips(FAST)
    assert not is_open_clips(SimpleTokenizer(**options)) and not is_open_clips(lambda texts: texts)


def test_a_model_has_it_with_the_models_context_length() -> None:
    encoder = create_model("tiny-vit", seed=0)
    assert isinstance(encoder.tokenizer, ClipTokenizer)
    assert encoder.tokenizer.context_length == encoder.context_length != 77
    expected = SimpleTokenizer(context_length=encoder.context_length)(["a red apple"])
    assert torch.equal(encoder.tokenizer(["a red apple"]), expected)
