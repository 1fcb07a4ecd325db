"""Pixels by Pillow alone and tokens are those of open_clip, also of the tokenizer in an ONNX folder."""

import copy
import json
import pickle

import ftfy
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision.transforms import InterpolationMode

from cloob.errors import InputError
from cloob.models.pixels import EvalTransform
from cloob.models.tokenizer import (
    CLIP_VOCABULARY,
    ClipTokenizer,
    clip_tokenizer,
    read_tokenizer,
    store_tokenizer,
    tokenizer_note,
)
from cloob.models.towers import open_clip

SIZE = 24


def theirs(image, config):
    """open_clip's pixels; lanczos, which it does not have, by its bicubic transform with another filter."""
    lanczos = config["interpolation"] == "lanczos"
    known = config | ({"interpolation": "bicubic"} if lanczos else {})
    transform = image_transform_v2(PreprocessCfg(**known, mean=(0, 0, 0), std=(1, 1, 1)), is_train=False)
    if lanczos:
        transform.transforms[0].interpolation = InterpolationMode.LANCZOS
    return (transform(image) * 255).round().byte()


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
@settings(max_examples=40)
@given(width=st.integers(1, 60), height=st.integers(1, 60), seed=st.integers(0, 9))
def test_pixels_are_open_clips(mode, interpolation, width, height, seed):
    noise = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    image = Image.fromarray(noise.numpy())
    config = {"size": SIZE, "interpolation": interpolation, "resize_mode": mode}
    own = pickle.loads(pickle.dumps(EvalTransform(config)))(image)
    assert own.dtype == torch.uint8 and torch.equal(own, theirs(image, config))


def test_a_way_that_open_clip_does_not_have_is_one_line():
    with pytest.raises(InputError, match="resize_mode 'tall'"):
        EvalTransform({"size": SIZE, "resize_mode": "tall"})


ORIGINAL = SimpleTokenizer()
FAST = ClipTokenizer.of(ORIGINAL)

# What captions of the web are made of, and what each step of the cleaning looks for.
# fmt: off
PARTS = [
    "a", "the", "dogs", "Photo", "IPHONE", "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", "'s", "'LL", "’s", "don't",
    "42", "3.14", "½", "²", "...", "#tag", "&", "&amp;", "&amp;amp;", "&lt;b&gt;", "<b>", "&#39;", "&#x1F600;",
    "&nbsp;", "&eacute", "&bogus;", "&#32;x", "“quoted”", "‘a’", "ﬁsh", "ﬀ", "Ｆｕｌｌ", "é", "e\u0301", "ß", "İ",
    "ΟΔΟΣ", "Σ", "ſ", "'ſ", "K", "naïve", "Ã©", "â€™", "的是一个", "日本語の", "한국어", "ภาษาไทย", "हिन्दी", "العربية",
    "עברית", "😀", "👩\u200d👩\u200d👧", "🇩🇪", "e\u0302\u0302\u0302\u0302\u0302", " ", "  ", "\t", "\n", "\r\n", "\x0b",
    "\x0c", "\x1c", "\x1f", "\x85", "\xa0", "\u2028", "\u3000", "\u200b", "\x00", "\x07", "\x7f", "\x1b[31m", "\x1b",
    "\ufeff", "\xad", "\ud800", "\ufffd", "<|endoftext|>", "<start_of_text>", "<END_of_text>", "<end_of_text",
    "https://x.y/z?a=b&c=d", "user@mail.com", "IMG_0001.JPG",
]
# fmt: on
texts = st.one_of(
    st.lists(st.one_of(st.sampled_from(PARTS), st.just(" ")), max_size=50).map("".join),
    st.text(max_size=80),
    st.text(st.characters(max_codepoint=127), max_size=80),
)


@settings(max_examples=200)
@given(texts)
def test_every_text_has_open_clips_tokens(text):
    assert FAST.encode(text) == ORIGINAL.encode(text)
    assert torch.equal(FAST([text]), ORIGINAL([text]))


@settings(max_examples=100)
@given(st.lists(texts, max_size=4), st.integers(2, 12))
def test_rows_are_cut_and_filled_as_open_clips(some, length):
    short = copy.copy(FAST)
    short.context_length = length
    ours = short(some)
    assert ours.dtype == torch.int64 and torch.equal(ours, ORIGINAL(some, length))
    assert torch.equal(short("one text"), ORIGINAL("one text", length))


def test_it_travels_without_open_clip():
    FAST(["a cat"])
    stored = pickle.dumps(FAST)
    assert len(stored) < 2_000_000 and b"open_clip" not in stored  # a worker that loads it need not import that
    assert pickle.loads(stored).encode("a cat &amp; a dog") == ORIGINAL.encode("a cat & a dog")


# The tokenizer of an ONNX folder: read back it gives the model's tokens; alone, what the card says


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
def slow():
    return open_clip().tokenizer.SimpleTokenizer(context_length=LENGTH)


@pytest.fixture(scope="module")
def alone(slow, tmp_path_factory):
    """What the package ``tokenizers`` makes of the folder's file."""
    folder = tmp_path_factory.mktemp("words")
    store_tokenizer(ClipTokenizer.of(slow), folder, LENGTH)
    return pytest.importorskip("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_the_file_alone_gives_open_clips_tokens_but_where_the_card_says(alone, slow):
    differ = [text for text in (*SAME, *OTHER) if alone.encode(text).ids != slow(text)[0].tolist()]
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
def test_any_plain_text(alone, slow, text):
    assume(ftfy.fix_encoding(text) == text)  # what looks as if it was decoded wrongly is what differs
    assert alone.encode(text).ids == slow(text)[0].tolist()


@pytest.mark.parametrize(
    ("specials", "ending"),
    [
        (("<start_of_text>", "<end_of_text>"), "cut"),
        (("<|startoftext|>", "<|endoftext|>"), "kept"),
    ],
)
def test_read_back_the_tokens_are_the_models(tmp_path, specials, ending):
    pytest.importorskip("tokenizers")
    texts = [*SAME, *OTHER, "<|startoftext|> a <|endoftext|>"]
    own = clip_tokenizer(tmp_path, CLIP_VOCABULARY, LENGTH, specials, ending)
    settings_ = store_tokenizer(own, tmp_path, LENGTH)
    back = read_tokenizer(tmp_path / "onnx.json", json.loads(json.dumps(settings_)), LENGTH)
    assert torch.equal(back(texts), own(texts))
    assert ("lack" in tokenizer_note(settings_)) == (ending == "cut")
