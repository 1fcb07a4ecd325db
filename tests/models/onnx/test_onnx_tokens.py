"""The tokenizer of an ONNX folder: read back it gives the model's tokens; alone, what the card says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ftfy
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cloob.models.tokenizer import (
    CLIP_VOCABULARY,
    ClipTokenizer,
    clip_tokenizer,
    read_tokenizer,
    store_tokenizer,
    tokenizer_note,
)
from cloob.models.towers import open_clip

tokenizers = pytest.importorskip("tokenizers")
LENGTH = 24
SAME = [
    "a photo of a dog",
    "",
    "  two   spaces\tand\nlines ",
    "It's we'll I'd you've THEY'RE DON'T",
    "ÜMLÄUT Straße naïve café İstanbul",
    "日本語のテキスト 한국어 عربى हिन्दी ひらがな",
    "🙂👩‍👩‍👧 flags 🇩🇪",
    "x" * 500,
    "word " * 100,
    "<start_of_text> a <end_of_text> b <END_OF_TEXT>",
    "‘single’ “double”",
    "e\u0301 é",
    "1 2,3.4 ½ ² Ⅷ ① ...!!!??? a_b-c/d",
]
OTHER = ["Tom &amp; Jerry", "schÃ¶n", "\x1b[31mred\x1b[0m", "ﬁne", "ＦＵＬＬ ｗｉｄｔｈ ｶﾞ", "ΟΔΥΣΣΕΥΣ"]


@pytest.fixture(scope="module")
def theirs() -> Any:
    return open_clip().tokenizer.SimpleTokenizer(context_length=LENGTH)


@pytest.fixture(scope="module")
def alone(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the package ``tokenizers`` makes of the folder's file."""
    folder = tmp_path_factory.mktemp("words")
    store_tokenizer(ClipTokenizer.of(theirs), folder, LENGTH)
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_the_file_alone_gives_open_clips_tokens_but_where_the_card_says(alone: Any, theirs: Any) -> None:
    differ = [text for text in (*SAME, *OTHER) if alone.encode(text).ids != theirs(text)[0].tolist()]
    assert differ == OTHER


# Latin, Cyrillic, punctuation and kana, without what begins an entity of HTML.
LETTERS = st.sampled_from(
    [
        chr(code)
        for block in ((32, 127), (0x410, 0x450), (0x2010, 0x2050), (0x3041, 0x3097))
        for code in range(*block)
        if chr(code) != "&"
    ]
)


@given(st.text(LETTERS, max_size=40))
@settings(max_examples=200)
def test_any_plain_text(alone: Any, theirs: Any, text: str) -> None:
    assume(ftfy.fix_encoding(text) == text)  # what looks as if it was decoded wrongly is what differs
    assert alone.encode(text).ids == theirs(text)[0].tolist()


@pytest.mark.parametrize(
    ("specials", "ending"),
    [
        (("<start_of_text>", "<end_of_text>"), "cut"),
        (("<|startoftext|>", "<|endoftext|>"), "kept"),
    ],
)
def test_read_back_the_tokens_are_the_models(tmp_path: Path, specials: tuple[str, str], ending: Any) -> None:
    texts = [*SAME, *OTHER, "<|startoftext|> a <|endoftext|>"]
    own = clip_tokenizer(tmp_path, CLIP_VOCABULARY, LENGTH, specials, ending)
    settings_ = store_tokenizer(own, tmp_path, LENGTH)
    back = read_tokenizer(tmp_path / "onnx.json", json.loads(json.dumps(settings_)), LENGTH)
    assert torch.equal(back(texts), own(texts))
    assert ("lack" in tokenizer_note(settings_)) == (ending == "cut")
