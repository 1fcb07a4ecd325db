"""``tokenizer.json`` of unknown origin: what the library raises is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from own_files import write_tokenizer

from cloob.errors import InputError
from cloob.models.tokenizer import guarded
from cloob.models.towers import translated
from cloob.models.weights.tokens import FileTokenizer

pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

PADDING = {"strategy": {"Fixed": 77}, "direction": "Right", "pad_id": 39, "pad_type_id": 0, "pad_token": "?"}
PADDING |= {"pad_to_multiple_of": None}


A, B = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
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
    for read in (lambda: FileTokenizer(path, 77, 39, 39), lambda: FileTokenizer(path, 77)):
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
