"""Reads an export with sentence-transformers and a pipeline of transformers, and prints what it sees as JSON.

A process of its own: sentence-transformers imports for long, and warnings are errors here too.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

from PIL import Image

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of what the libraries import
    from sentence_transformers import SentenceTransformer
    from transformers import pipeline

import numpy as np
import torch

import cloob

exported, original, snippets = sys.argv[1:]
encoder = cloob.load_model(original, device="cpu")
model = SentenceTransformer(exported, device="cpu")
texts = ["a dog", "a red heart", "long " * 60]
picture = Image.effect_noise((32, 32), 90).convert("RGB")
text_rows, picture_rows = model.encode(texts), model.encode([picture])
model.save_pretrained("again", create_model_card=False)
again = SentenceTransformer("again", device="cpu").encode(texts)
classify = pipeline("zero-shot-image-classification", exported, device="cpu")
answers = classify(picture, candidate_labels=["a dog", "a cat"], hypothesis_template="{}")
scores = {answer["label"]: answer["score"] for answer in answers}
unit = encoder.encode_image([picture]) @ encoder.encode_text(sorted(scores)).T
logits = float(encoder.model.logit_scale.exp()) * unit
expected = torch.softmax(logits, 1)[0].tolist()
# The pages' code, in the folder and with the picture that it names; what it made is looked at here.
names: dict[str, Any] = {}
picture.resize((50, 67)).save("picture.jpg")
for code in json.loads(snippets):
    exec(code, names)
if "crop" in names:
    rows = torch.nn.functional.normalize(names["features"], dim=1)
    cropped = float((rows - encoder.encode_image(["picture.jpg"])).abs().max())
    alike = model.similarity(names["pictures"], names["texts"]).shape == (1, 2)
else:
    cropped, alike = 0.0, True
print(
    json.dumps(
        {
            "texts": float(np.abs(text_rows - encoder.encode_text(texts).numpy()).max()),
            "pictures": float(np.abs(picture_rows - encoder.encode_image([picture]).numpy()).max()),
            "saved again": float(np.abs(again - text_rows).max()),
            "lengths": [float(np.linalg.norm(row)) for row in (*text_rows, *picture_rows)],
            "cropped": cropped,
            "alike": alike,
            "longest": model.max_seq_length,
            "labels": sorted(scores),
            "scores": [scores[label] for label in sorted(scores)],
            "scores apart": max(abs(a - scores[label]) for a, label in zip(expected, sorted(scores), strict=True)),
        }
    )
)
