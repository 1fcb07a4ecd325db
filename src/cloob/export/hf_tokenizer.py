"""A model's tokenizer as transformers' ``CLIPTokenizer``, and what that does otherwise with a text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloob.errors import require
from cloob.export.exported import Unsupported
from cloob.models.encoder import DualEncoder
from cloob.models.tokenizer import ClipTokenizer, clip_rules
from cloob.models.weights.tokens import FileTokenizer, NoTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
_PLAIN = ("a photo of a dog", "Two  red Hearts, 3 (three)!", "a cat's toy, it'll move", "", "naïve café 日本語")
_UNCLEANED = (
    "The tokenizer of transformers does not clean texts as open_clip's does: HTML (`&amp;`), typographic quotes (`’`), "
    "broken encodings (`Ã¶`), ligatures (`ﬁ`) and wide letters (`Ａ`) give other tokens. "
    "`html.unescape(ftfy.fix_text(text))` before it makes them equal."
)


@dataclass(frozen=True)
class Specials:
    """Numbers of the special tokens: what a text begins with and ends with, and what fills rows up."""

    start: int
    end: int
    pad: int


def write_tokenizer(encoder: DualEncoder, folder: Path) -> tuple[Specials, list[str]]:
    """Writes the tokenizer of an encoder as transformers reads it.

    Args:
        encoder: With CLIP's byte pairs, or a tokenizer of transformers.
        folder: Where the files go.

    Returns:
        Its special tokens, and sentences for the card: for which texts tokens differ.

    Raises:
        Unsupported: The encoder takes tokens alone, or cleans texts in a way that no tokenizer of transformers has.
    """
    tokenizer: Any = encoder.tokenizer
    if isinstance(tokenizer, NoTokenizer):
        raise Unsupported(f"{encoder.name}: it takes tokens, not texts, as it has no tokenizer; --to onnx takes it")
    cut = (
        f"transformers cuts a text to {encoder.context_length} tokens only when it is asked to (`truncation=True`); "
        "its `pipeline` passes the wish over and fails on a longer one (transformers 5.24). sentence-transformers "
        "always cuts."
    )
    if isinstance(tokenizer, ClipTokenizer):
        notes = [_UNCLEANED, cut]
        if (tokenizer.settings or {}).get("ending") == "cut":
            notes.append(
                "A text that is too long loses its end token in the original program; transformers keeps it, so that "
                "such texts have other embeddings."
            )
        return _write_clip(tokenizer, folder), notes
    if isinstance(tokenizer, FileTokenizer):
        tokenizer.save_pretrained(folder)
        return Specials(int(tokenizer(["a"])[0, 0]), int(tokenizer.end or 0), int(tokenizer.pad or 0)), [cut]
    theirs: Any = getattr(tokenizer, "tokenizer", None)
    if not hasattr(theirs, "save_pretrained") or getattr(tokenizer, "clean_fn", None) is None:
        kind = type(tokenizer).__name__
        raise Unsupported(f"{encoder.name}: its tokenizer ({kind}) is none that transformers has; --to onnx takes it")
    theirs.save_pretrained(folder)
    start = theirs.bos_token_id if theirs.bos_token_id is not None else theirs.cls_token_id
    end = theirs.eos_token_id
    specials = Specials(int(start if start is not None else end), int(end), int(theirs.pad_token_id))
    return specials, ["The tokenizer of transformers does not clean texts as open_clip does before it.", cut]


def _write_clip(tokenizer: ClipTokenizer, folder: Path) -> Specials:
    """``tokenizer.json``, and the older files of the same content, with the special words as Hugging Face has them."""
    library: Any = require("tokenizers", "export")
    prepare = library.normalizers
    spaces = prepare.Replace(library.Regex(r"\s+"), " ")
    rules = clip_rules(tokenizer, (START, END), [prepare.NFC(), spaces, prepare.Lowercase()], lower=False)
    (folder / "tokenizer.json").write_text(rules.to_str(pretty=True), encoding="utf-8")
    rules.model.save(str(folder))  # vocab.json and merges.txt
    words = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    _dump(folder / "special_tokens_map.json", words)
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.context_length, **words}
    config |= {"add_prefix_space": False, "do_lower_case": True, "errors": "replace"}
    _dump(folder / "tokenizer_config.json", config)
    return Specials(tokenizer.sot_token_id, tokenizer.eot_token_id, tokenizer.eot_token_id)


def check_tokens(encoder: DualEncoder, tokenizer: Any) -> None:
    """Raises Unsupported where ``AutoTokenizer`` makes other tokens of plain texts than the encoder's tokenizer."""
    for text in _PLAIN:
        own = encoder.tokenizer([text])[0].tolist()
        theirs = tokenizer(text, truncation=True, max_length=encoder.context_length)["input_ids"]
        if own[: len(theirs)] != theirs:
            raise Unsupported(f"{encoder.name}: transformers makes other tokens of {text!r}; --to onnx takes it")


def _dump(path: Path, content: object, indent: int | None = 2) -> None:
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
