"""A model folder as transformers' ``CLIPModel`` with its processor and tokenizer, and for sentence-transformers.

The map of names is that of :mod:`cloob.models.weights.hf_clip`, the other way round. What ``CLIPModel`` has no place
for is refused, and what was written is read by transformers and held against the model before it counts as done.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cloob.errors import one_line, require
from cloob.export.exported import Exported, Unsupported
from cloob.export.hf_config import clip_config, processor_config, write_json, write_sentence_transformers
from cloob.export.hf_tokenizer import token_notes, write_tokenizer
from cloob.export.pixels import pixel_note
from cloob.models.encoder import DualEncoder
from cloob.models.texts import causal_tower
from cloob.models.towers import translated
from cloob.models.weights.hf_clip import key_map
from cloob.models.weights.keymap import Part

TOLERANCE = 1e-5
"""Greatest difference of a feature, relative to the largest one where that is above 1."""
_PICTURES, _TEXTS = 2, 4
_USAGE = """\
```python
from transformers import pipeline

classify = pipeline("zero-shot-image-classification", "DIR")
print(classify("picture.jpg", candidate_labels=["a dog", "a cat"]))
```

`CLIPModel.from_pretrained("DIR")` and `CLIPProcessor.from_pretrained("DIR")` are its two parts. With
sentence-transformers (5.4 or later, on transformers 5), rows of length 1:

```python
from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("DIR")
texts = model.encode(["a dog", "a cat"])
pictures = model.encode([Image.open("picture.jpg")])
print(model.similarity(pictures, texts))
```
"""


def export_transformers(encoder: DualEncoder, folder: Path) -> Exported:
    """Writes the files of transformers and of sentence-transformers into a folder.

    Args:
        encoder: With open_clip's own ViT and causal text tower.
        folder: An empty folder.

    Raises:
        Unsupported: transformers has no such towers, the line names what to export to instead; or what it makes of the
            folder is not the model.
    """
    text = _text_tower(encoder)
    state = _state(encoder, text)
    specials = write_tokenizer(encoder, folder)
    if specials.end != text.token_embedding.num_embeddings - 1:
        raise Unsupported(f"{encoder.name}: texts do not end with the highest token; --to onnx takes it")
    write_json(folder / "config.json", clip_config(encoder, text, specials))
    write_json(folder / "preprocessor_config.json", processor_config(encoder))
    write_sentence_transformers(folder)
    _write_weights(folder / "model.safetensors", state)
    notes = _checked(encoder, folder)
    summary = "transformers and sentence-transformers read it"
    return Exported("transformers", summary, _USAGE, tuple(notes), ("transformers", "sentence-transformers", "clip"))


def _text_tower(encoder: DualEncoder) -> Any:
    """The module with the parts of the text tower.

    Raises:
        Unsupported: The towers are of a kind that ``CLIPModel`` has not.
    """
    other = "--to onnx takes it"
    if encoder.config.kind == "aligned":
        raise Unsupported(f"{encoder.name}: heads on frozen encoders, and transformers has no such model; {other}")
    if encoder.config.kind == "towers":
        family = encoder.config.settings.get("family", "another program")
        raise Unsupported(f"{encoder.name}: towers of {family}, which are not those of CLIPModel; {other}")
    if encoder.config.kind != "open_clip":
        raise Unsupported(f"{encoder.name}: graphs, not towers; export the model that they were made of")
    visual = encoder.model.visual
    if type(visual).__name__ != "VisionTransformer":
        kind = type(getattr(visual, "trunk", visual)).__name__
        raise Unsupported(
            f"{encoder.name}: its image tower is a {kind}, and CLIPModel has only CLIP's own ViT; {other}"
        )
    tower = causal_tower(encoder.model, encoder.context_length)
    if tower is None:
        raise Unsupported(f"{encoder.name}: its text tower is not CLIP's causal one, as CLIPModel's is; {other}")
    return encoder.model.get_submodule(tower)


def _state(encoder: DualEncoder, text: Any) -> dict[str, Tensor]:
    """The weights by Hugging Face's names, float32.

    Raises:
        Unsupported: There are others than ``CLIPModel`` has.
    """
    if encoder.objective_config.get("contrast") == "sigmoid":
        raise Unsupported(f"{encoder.name}: CLIPModel has no place for logit_bias; --to onnx takes it")
    weights = {key.removeprefix("text."): value for key, value in encoder.model.state_dict().items()}
    blocks = [len(tower.transformer.resblocks) for tower in (text, encoder.model.visual)]
    plan = key_map(*blocks)
    differ = sorted(plan.keys() ^ weights.keys(), key=_natural)
    if differ:
        more = f" and {len(differ) - 2} more" if len(differ) > 2 else ""
        have = "has no place for" if differ[0] in weights else "needs"
        named = ", ".join(differ[:2])
        raise Unsupported(f"{encoder.name}: CLIPModel {have} {named}{more}; --to onnx takes it")
    return {name: value for key, part in plan.items() for name, value in _parts(weights[key], part)}


def _write_weights(path: Path, state: dict[str, Tensor]) -> None:
    """A file of safetensors that others may read as they may its neighbours.

    Raises:
        OSError: It cannot be written.
    """
    safetensors: Any = require("safetensors.torch", "train")
    try:
        safetensors.save_file(state, path, metadata={"format": "pt"})
    except require("safetensors", "train").SafetensorError as error:  # a full disk is none of the system's errors here
        raise OSError(errno.EIO, one_line(error), str(path)) from error
    path.chmod((path.parent / "config.json").stat().st_mode & 0o777)


def _parts(weight: Tensor, part: Part) -> Iterator[tuple[str, Tensor]]:
    """What a file holds of one weight: ``Part.turned`` the other way round."""
    value = weight.detach().float().cpu()
    pieces = value.chunk(len(part.names)) if len(part.names) > 1 else (value,)
    for name, piece in zip(part.names, pieces, strict=True):
        yield name, (piece if part.permute is None else piece.permute(part.permute)).clone().contiguous()


def _natural(key: str) -> list[tuple[bool, int, str]]:
    return [(not piece.isdigit(), int(piece) if piece.isdigit() else 0, piece) for piece in re.split(r"(\d+)", key)]


def _checked(encoder: DualEncoder, folder: Path) -> list[str]:
    """Sentences for the card, from reading the folder with transformers.

    Raises:
        Unsupported: transformers cannot read it, or computes something else.
    """
    library: Any = require("transformers", "export")
    with quiet(library), translated(f"{encoder.name}: transformers cannot read the export"):
        model = library.CLIPModel.from_pretrained(folder).eval()
        tokenizer = library.AutoTokenizer.from_pretrained(folder)
        processor = library.AutoImageProcessor.from_pretrained(folder)
    for what, (own, theirs) in _features(encoder, model).items():
        apart = float((own - theirs).abs().max() / own.abs().max().clamp_min(1))
        if not apart <= TOLERANCE:
            raise Unsupported(
                f"{encoder.name}: CLIPModel computes another {what} ({apart:.1e} apart); --to onnx takes it"
            )
    note = pixel_note(encoder, processor)
    return [*token_notes(encoder, tokenizer), *([note] if note else [])]


@torch.no_grad()
def _features(encoder: DualEncoder, model: Any) -> Mapping[str, tuple[Tensor, Tensor]]:
    """What the encoder and ``CLIPModel`` compute for the same pixels and tokens, not normalised."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(_PICTURES, 3, encoder.image_size, encoder.image_size, generator=generator)
    end, length = model.config.text_config.eos_token_id, encoder.context_length
    tokens = torch.randint(1, end, (_TEXTS, length), generator=generator)
    for row, last in enumerate((length - 1, length // 2, 2, 1)):
        tokens[row, min(last, length - 1) :] = end
    was_training = encoder.training
    encoder.eval()
    try:
        own = encoder.model.encode_image(pixels), encoder.model.encode_text(tokens)
    finally:
        encoder.train(was_training)
    theirs = [_plain(model.get_image_features(pixels)), _plain(model.get_text_features(tokens))]
    return {"image feature": (own[0], theirs[0]), "text feature": (own[1], theirs[1])}


def _plain(features: Any) -> Tensor:
    """The features themselves; transformers 5 hands out an object that holds them."""
    tensor: Tensor = features if isinstance(features, Tensor) else features.pooler_output
    return tensor


@contextmanager
def quiet(library: Any) -> Iterator[None]:
    """Keeps transformers' progress bars and remarks off the terminal."""
    logging = library.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
