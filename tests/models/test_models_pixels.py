"""Pixels by Pillow alone and tokens are those of open_clip, also of the tokenizer in an ONNX folder."""

import copy
import json
import pickle
from pathlib import Path

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

# ``parts`` is what captions of the web are made of, and what each step of the cleaning looks for.
TEXTS = json.loads(Path(__file__).with_name("texts.json").read_text(encoding="utf-8"))
SAME, OTHER = TEXTS["same"], TEXTS["other"]
texts = st.one_of(
    st.lists(st.one_of(st.sampled_from(TEXTS["parts"]), st.just(" ")), max_size=50).map("".join),
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
    [(("<start_of_text>", "<end_of_text>"), "cut"), (("<|startoftext|>", "<|endoftext|>"), "kept")],
)
def test_read_back_the_tokens_are_the_models(tmp_path, specials, ending):
    pytest.importorskip("tokenizers")
    texts = [*SAME, *OTHER, "<|startoftext|> a <|endoftext|>"]
    own = clip_tokenizer(tmp_path, CLIP_VOCABULARY, LENGTH, specials, ending)
    settings_ = store_tokenizer(own, tmp_path, LENGTH)
    back = read_tokenizer(tmp_path / "onnx.json", json.loads(json.dumps(settings_)), LENGTH)
    assert torch.equal(back(texts), own(texts))
    assert ("lack" in tokenizer_note(settings_)) == (ending == "cut")
