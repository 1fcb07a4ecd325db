"""``tokenizer.json`` of unknown origin: one that blows texts up is refused, and what the library raises is one line."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from own_files import write_tokenizer

from cloob.errors import InputError
from cloob.models.onnx.reading import JsonTokenizer
from cloob.models.towers import translated
from cloob.models.weights.tokenizer_json import guarded, read_rules
from cloob.models.weights.tokens import HubTokenizer

pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

PADDING = {"strategy": {"Fixed": 77}, "direction": "Right", "pad_id": 39, "pad_type_id": 0, "pad_token": "?"}
PADDING |= {"pad_to_multiple_of": None}


def replace(old: str, new: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: old}, "content": new}


def charsmap(text: str) -> str:
    """A table of sentencepiece's with one text and no trie."""
    return base64.b64encode(bytes(4) + text.encode() + b"\0").decode()


def several(part: str, *steps: dict[str, Any]) -> dict[str, Any]:
    inner = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors"}[part]
    return {part: {"type": "Sequence", inner: list(steps)}}


A, B = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
LETTERS = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False}


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (several("normalizer", *[replace("a", "aa")] * 40), "normalizer may make 512 letters of one; 256 are the most"),
        ({"normalizer": replace("a", "b" * 300)}, "normalizer may make 300 letters of one"),
        ({"normalizer": replace("x*", "b" * 300, "Regex")}, "normalizer may make 301 letters of one"),
        (several("normalizer", *[replace(" ", "\ufdfa"), {"type": "NFKD"}] * 9), "may make 324 letters of one"),
        (several("normalizer", *[{"type": "Prepend", "prepend": "a a"}] * 9), "normalizer may make 1,024 letters"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap("b" * 300)}}, "may make 300 letters"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "?"}}, "has a step that is not known"),
        ({"normalizer": {"pattern": {"String": "a"}, "content": "aa"}}, "normalizer has a step that is not known"),
        ({"normalizer": replace("a", "aa") | {"type": "NFX"}}, "normalizer has a step that is not known"),
        (several("normalizer", *[{"type": "NFC"}] * 1025), "normalizer has 1,025 steps; 1,024 are the most"),
        (several("pre_tokenizer", *[LETTERS] * 20), "pre_tokenizer may make 1,024 letters of one"),
        (
            {"post_processor": {"type": "TemplateProcessing", "single": [A, A], "pair": [A, B], "special_tokens": {}}},
            "post_processor has a step that is not known",
        ),
        ({"model": None, "version": "1" * (64 << 20)}, "bytes are too many for a tokenizer"),
    ],
)
def test_a_tokenizer_that_blows_a_text_up_is_refused(tmp_path: Path, rules: dict[str, Any], said: str) -> None:
    write_tokenizer(tmp_path, lambda known: known.update(rules))
    with pytest.raises(InputError) as caught:
        HubTokenizer(tmp_path / "tokenizer.json", 77, 39, 39)
    line = str(caught.value)
    assert line.startswith(f"{tmp_path / 'tokenizer.json'}: ") and said in line and "\n" not in line and len(line) < 400


@pytest.mark.parametrize(
    "rules",
    [
        {"normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "lowercase": True}},
        several(  # ALBERT's
            "normalizer",
            *(replace("``", '"'), replace("''", '"'), {"type": "NFKD"}, {"type": "StripAccents"}),
            *({"type": "Lowercase"}, {"type": "Precompiled", "precompiled_charsmap": charsmap("\ufdfa")}),
            replace(" {2,}", " ", "Regex"),
        )
        | {"pre_tokenizer": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True}},
        several("normalizer", *[replace("\ufb01", "fi")] * 300),
    ],
)
def test_what_tokenizers_are_made_of_is_taken(tmp_path: Path, rules: dict[str, Any]) -> None:
    write_tokenizer(tmp_path, lambda known: known.update(rules))
    assert "normalizer" in read_rules(tmp_path / "tokenizer.json")


WORDS = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}
LOST = {"SpecialToken": {"id": "lost", "type_id": 0}}


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"model": WORDS}, "makes no tokens of a text (WordLevel error: Missing [UNK] token"),
        (
            {"model": {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]]}},
            "makes no tokens of a text (Encounter",
        ),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "makes no tokens of a text (chunk size"),
        (
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
            "not a tokenizer (Precompiled: Error",
        ),
        (
            {"post_processor": {"type": "TemplateProcessing", "single": [LOST], "pair": [A, B], "special_tokens": {}}},
            "makes no tokens of a text (no entry found",
        ),
    ],
)
def test_what_the_library_raises_is_one_line(tmp_path: Path, rules: dict[str, Any], said: str) -> None:
    """Its panics are no exceptions."""
    path = tmp_path / "tokenizer.json"
    write_tokenizer(tmp_path, lambda known: known.update(rules | {"padding": PADDING}))
    for read in (lambda: HubTokenizer(path, 77, 39, 39), lambda: JsonTokenizer(path, 77, None, None)):
        with pytest.raises(InputError) as caught:
            read()
        line = str(caught.value)
        assert line.startswith(f"{path}: {said}") and "\n" not in line and len(line) < 400, line
    with pytest.raises(InputError, match="model 'x': "), translated("model 'x'"):
        tokenizers.Tokenizer.from_str(path.read_text()).encode("b")


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interruption_passes(kind: type[BaseException]) -> None:
    for guard in (translated, guarded):
        with pytest.raises(kind), guard("model 'x'"):
            raise kind
