"""Reads an export with sentence-transformers and a pipeline of transformers, and runs
the page's code on it.

A process of its own: sentence-transformers imports for long, and warnings are errors
here too."""

import json
import sys
import warnings

from PIL import Image

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of what the libraries import
    from sentence_transformers import SentenceTransformer
    from transformers import pipeline

import torch

import cloob


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(
        torch.as_tensor(found), torch.as_tensor(expected), rtol=0, atol=tolerance
    )


exported, original, snippets = sys.argv[1:]
encoder = cloob.load_model(original, device="cpu")
model = SentenceTransformer(exported, device="cpu")
texts = ["a dog", "a red heart", "long " * 60]
picture = Image.effect_noise((32, 32), 90).convert("RGB")
rows = model.encode(texts)
close(rows, encoder.encode_text(texts))
close(model.encode([picture]), encoder.encode_image([picture]))
assert model.max_seq_length == 16
model.save_pretrained("again", create_model_card=False)
close(SentenceTransformer("again", device="cpu").encode(texts), rows)
classify = pipeline("zero-shot-image-classification", exported, device="cpu")
answers = classify(
    picture, candidate_labels=["a dog", "a cat"], hypothesis_template="{}"
)
scores = {answer["label"]: answer["score"] for answer in answers}
unit = encoder.encode_image([picture]) @ encoder.encode_text(["a cat", "a dog"]).T
logits = float(encoder.model.logit_scale.exp()) * unit
close([scores["a cat"], scores["a dog"]], torch.softmax(logits, 1)[0], 1e-4)
# The pages' code, in the folder and with the picture that it names; what it made is
# looked at here.
names = {}
picture.resize((50, 67)).save("picture.jpg")
for code in json.loads(snippets):
    exec(code, names)
if "crop" in names:
    close(
        torch.nn.functional.normalize(names["features"], dim=1),
        encoder.encode_image(["picture.jpg"]),
    )
    assert model.similarity(names["pictures"], names["texts"]).shape == (1, 2)
