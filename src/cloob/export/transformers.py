"""A model folder as transformers' ``CLIPModel`` with its processor and tokenizer, and for sentence-transformers.

The map of names is that of :mod:`cloob.models.weights.hf_clip`, the other way round. What ``CLIPModel`` has no place
for is refused, and what was written is read by transformers and compared with the model before it counts as done.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cloob.errors import one_line, require
from cloob.export.exported import Exported, Unsupported, quiet
from cloob.export.hf_config import clip_config, processor_config, write_json, write_sentence_transformers
from cloob.export.hf_tokenizer import check_tokens, write_tokenizer
from cloob.models.encoder import DualEncoder
from cloob.models.encoding import evaluating
from cloob.models.texts import causal_tower
from cloob.models.towers import translated
from cloob.models.weights.hf_clip import key_map
from cloob.models.weights.keymap import Part

TOLERANCE = 1e-5
"""Greatest difference of a feature, relative to the largest one where that is above 1."""
_PICTURES, _TEXTS = 2, 4
_OTHER = "--to onnx takes it"
_CROPPED = (
    "transformers crops pictures of one size in four that is not square one row or column away from where open_clip "
    "does, as the two round half a row differently; elsewhere pixels are up to one grey level apart. torchvision's "
    "`Resize({size}, BICUBIC)` and `CenterCrop({size})` before the processor give the pixels of training."
)
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
    specials, notes = write_tokenizer(encoder, folder)
    if specials.end != text.token_embedding.num_embeddings - 1:
        raise Unsupported(f"{encoder.name}: texts do not end with the highest token; --to onnx takes it")
    write_json(folder / "config.json", clip_config(encoder, text, specials))
    write_json(folder / "preprocessor_config.json", processor_config(encoder))
    write_sentence_transformers(folder)
    _write_weights(folder / "model.safetensors", state)
    _check(encoder, folder)
    if encoder.preprocess_cfg.get("resize_mode") != "squash":
        notes.append(_CROPPED.format(size=encoder.image_size))
    summary = "transformers and sentence-transformers read it"
    return Exported("transformers", summary, _USAGE, tuple(notes), ("transformers", "sentence-transformers", "clip"))


def _text_tower(encoder: DualEncoder) -> Any:
    """The module with the parts of the text tower.

    Raises:
        Unsupported: The towers are of a kind that ``CLIPModel`` has not.
    """
    encoder.check_weights()
    if encoder.config.kind == "aligned":
        raise Unsupported(f"{encoder.name}: heads on frozen encoders, and transformers has no such model; {_OTHER}")
    visual, tower = encoder.model.visual, causal_tower(encoder.model, encoder.context_length)
    if encoder.config.kind != "open_clip" or type(visual).__name__ != "VisionTransformer":
        kind = type(getattr(visual, "trunk", visual)).__name__
        raise Unsupported(
            f"{encoder.name}: its image tower is a {kind}, and CLIPModel has only CLIP's own ViT; {_OTHER}"
        )
    if tower is None:
        raise Unsupported(f"{encoder.name}: its text tower is not CLIP's causal one, as CLIPModel's is; {_OTHER}")
    return encoder.model.get_submodule(tower)


def _state(encoder: DualEncoder, text: Any) -> dict[str, Tensor]:
    """The weights by Hugging Face's names, float32.

    Raises:
        Unsupported: There are others than ``CLIPModel`` has.
    """
    if encoder.objective_config.get("contrast") == "sigmoid":
        raise Unsupported(f"{encoder.name}: CLIPModel has no place for logit_bias; {_OTHER}")
    weights = {key.removeprefix("text."): value for key, value in encoder.model.state_dict().items()}
    blocks = [len(tower.transformer.resblocks) for tower in (text, encoder.model.visual)]
    plan = key_map(*blocks)
    for differ, have in ((weights.keys() - plan.keys(), "has no place for"), (plan.keys() - weights.keys(), "needs")):
        if differ:
            raise Unsupported(f"{encoder.name}: CLIPModel {have} {', '.join(sorted(differ)[:2])}; {_OTHER}")
    return {name: value for key, part in plan.items() for name, value in _parts(weights[key], part)}


def _write_weights(path: Path, state: dict[str, Tensor]) -> None:
    """A file of safetensors that others may read as they may its neighbours."""
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


def _check(encoder: DualEncoder, folder: Path) -> None:
    """Reads the folder with transformers and compares features and tokens.

    Raises:
        Unsupported: transformers cannot read it, or computes something else.
    """
    library: Any = require("transformers", "export")
    with quiet(), translated(f"{encoder.name}: transformers cannot read the export"):
        model = library.CLIPModel.from_pretrained(folder).eval()
        tokenizer = library.AutoTokenizer.from_pretrained(folder)
    for what, (own, theirs) in _features(encoder, model).items():
        apart = float((own - theirs).abs().max() / own.abs().max().clamp_min(1))
        if not apart <= TOLERANCE:
            raise Unsupported(f"{encoder.name}: CLIPModel computes another {what} ({apart:.1e} apart); {_OTHER}")
    check_tokens(encoder, tokenizer)


@torch.no_grad()
def _features(encoder: DualEncoder, model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """What the encoder and ``CLIPModel`` compute for the same pixels and tokens, not normalised."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(_PICTURES, 3, encoder.image_size, encoder.image_size, generator=generator)
    end, length = model.config.text_config.eos_token_id, encoder.context_length
    tokens = torch.randint(1, end, (_TEXTS, length), generator=generator)
    for row, last in enumerate((length - 1, length // 2, 2, 1)):
        tokens[row, min(last, length - 1) :] = end
    with evaluating(encoder):
        own = encoder.model.encode_image(pixels), encoder.model.encode_text(tokens)
    theirs = [model.get_image_features(pixels), model.get_text_features(tokens)]
    theirs = [getattr(value, "pooler_output", value) for value in theirs]  # of transformers 5
    return {"image feature": (own[0], theirs[0]), "text feature": (own[1], theirs[1])}
