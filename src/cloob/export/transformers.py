"""A model folder as transformers' ``CLIPModel`` with its processor and tokenizer, and for sentence-transformers.

The map of names is that of :mod:`cloob.models.weights.hf_clip`, the other way round. What ``CLIPModel`` has no place
for is refused, and what was written is read by transformers and compared with the model before it counts as done.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cloob.errors import require
from cloob.export.exported import Exported, Unsupported, quiet
from cloob.export.hf_files import write_configs, write_sentence_transformers, write_tokenizer
from cloob.models.encoder import DualEncoder
from cloob.models.encoding import evaluating
from cloob.models.texts import causal_tower
from cloob.models.towers import translated
from cloob.models.weights.containers import write_safetensors
from cloob.models.weights.hf_clip import key_map
from cloob.models.weights.tokens import NoTokenizer

TOLERANCE = 1e-5
"""Greatest difference of a feature, relative to the largest one where that is above 1."""
_PLAIN = ("a photo of a dog", "Two  red Hearts, 3 (three)!", "a cat's toy, it'll move", "", "naïve café 日本語")
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
sentence-transformers (tried from 3.4.1 to 6.2.0; 3.4 takes only texts within the context), rows of length 1:

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
    """Writes the files of transformers and of sentence-transformers into an empty folder.

    Unsupported where transformers has no such towers, or makes another model of the folder.
    """
    text = _text_tower(encoder)
    state = _state(encoder, text)
    specials, notes = write_tokenizer(encoder, folder)
    if specials.end != text.token_embedding.num_embeddings - 1:
        raise Unsupported(f"{encoder.name}: texts do not end with the highest token; {_OTHER}")
    write_configs(encoder, text, specials, folder)
    write_sentence_transformers(folder)
    write_safetensors(folder / "model.safetensors", state)
    _check(encoder, folder)
    if encoder.preprocess_cfg.get("resize_mode") != "squash":
        notes.append(_CROPPED.format(size=encoder.image_size))
    summary = "transformers and sentence-transformers read it"
    return Exported("transformers", summary, _USAGE, tuple(notes), ("transformers", "sentence-transformers", "clip"))


def _text_tower(encoder: DualEncoder) -> Any:
    """The module with the parts of the text tower; Unsupported for towers of a kind that ``CLIPModel`` has not."""
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
    if isinstance(encoder.tokenizer, NoTokenizer):
        raise Unsupported(f"{encoder.name}: it takes tokens, not texts, as it has no tokenizer; {_OTHER}")
    return encoder.model.get_submodule(tower)


def _state(encoder: DualEncoder, text: Any) -> dict[str, Tensor]:
    """The weights by Hugging Face's names, float32; Unsupported where there are others than ``CLIPModel`` has."""
    if encoder.objective_config.get("contrast") == "sigmoid":
        raise Unsupported(f"{encoder.name}: CLIPModel has no place for logit_bias; {_OTHER}")
    weights = {key.removeprefix("text."): value for key, value in encoder.model.state_dict().items()}
    plan = key_map(*(len(tower.transformer.resblocks) for tower in (text, encoder.model.visual)))
    for differ, have in ((weights.keys() - plan.keys(), "has no place for"), (plan.keys() - weights.keys(), "needs")):
        if differ:
            raise Unsupported(f"{encoder.name}: CLIPModel {have} {', '.join(sorted(differ)[:2])}; {_OTHER}")
    state: dict[str, Tensor] = {}
    for key, part in plan.items():  # as fill reads them, the other way round
        value = weights[key].detach().float().cpu()
        pieces = value.chunk(len(part.names)) if len(part.names) > 1 else (value,)
        for name, piece in zip(part.names, pieces, strict=True):
            piece = piece if part.permute is None else piece.permute(part.permute)
            state[name] = piece.clone(memory_format=torch.contiguous_format)
    return state


def _check(encoder: DualEncoder, folder: Path) -> None:
    """Reads the folder with transformers; Unsupported where it cannot, or features or tokens are not the model's."""
    library: Any = require("transformers", "export")
    with quiet(), translated(f"{encoder.name}: transformers cannot read the export"):
        model = library.CLIPModel.from_pretrained(folder).eval()
        tokenizer = library.AutoTokenizer.from_pretrained(folder)
    for what, own, theirs in _features(encoder, model):
        apart = float((own - theirs).abs().max() / own.abs().max().clamp_min(1))
        if not apart <= TOLERANCE:
            raise Unsupported(
                f"{encoder.name}: CLIPModel computes another {what} feature ({apart:.1e} apart); {_OTHER}"
            )
    for text in _PLAIN:
        tokens = encoder.tokenizer([text])[0].tolist()
        others = tokenizer(text, truncation=True, max_length=encoder.context_length)["input_ids"]
        if tokens[: len(others)] != others:
            raise Unsupported(f"{encoder.name}: transformers makes other tokens of {text!r}; {_OTHER}")


@torch.no_grad()
def _features(encoder: DualEncoder, model: Any) -> list[tuple[str, Tensor, Tensor]]:
    """What the encoder and ``CLIPModel`` compute for the same pixels and tokens, not normalised."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, encoder.image_size, encoder.image_size, generator=generator)
    end, length = model.config.text_config.eos_token_id, encoder.context_length
    tokens = torch.randint(1, end, (4, length), generator=generator)
    for row, last in enumerate((length - 1, length // 2, 2, 1)):
        tokens[row, min(last, length - 1) :] = end
    with evaluating(encoder):
        own = encoder.model.encode_image(pixels), encoder.model.encode_text(tokens)
    theirs = [model.get_image_features(pixels), model.get_text_features(tokens)]
    theirs = [getattr(value, "pooler_output", value) for value in theirs]  # of transformers 5
    return list(zip(("image", "text"), own, theirs, strict=True))
