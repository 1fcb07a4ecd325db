"""Run where mteb is installed: one labelled set, held in memory, through its own
evaluation.
"""

import json
import sys
from pathlib import Path

import mteb
import torch
from datasets import Dataset
from datasets import Image as ImageColumn
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.abstasks.zeroshot_classification import AbsTaskZeroShotClassification
from PIL import Image

import cloob.interop.mteb as adapter
from cloob.evaluation.sets.pictures import open_labelled


def about(name):
    facts = {
        "name": name,
        "description": name,
        "reference": None,
        "type": "ZeroShotClassification",
        "category": "i2t",
    }
    empty = dict.fromkeys(
        (
            "date",
            "domains",
            "license",
            "annotations_creators",
            "dialect",
            "sample_creation",
        )
    )
    where = {
        "dataset": {"path": "memory/only", "revision": "1"},
        "eval_splits": ["test"],
        "eval_langs": ["eng-Latn"],
    }
    more = {
        "main_score": "accuracy",
        "task_subtypes": None,
        "bibtex_citation": None,
        "modalities": ["text", "image"],
    }
    return TaskMetadata(**facts, **empty, **where, **more)


def tasks(folder):
    data = open_labelled(folder)
    prompts = [data.templates[0].replace("{c}", name) for name in data.classnames]

    class Pictograms(AbsTaskZeroShotClassification):
        metadata = about("Pictograms")

        def load_data(self, **_):
            images = [
                {"bytes": data.read(i)[1], "path": None} for i in range(len(data))
            ]
            table = Dataset.from_dict(
                {"image": images, "label": [int(label) for label in data.labels]}
            )
            self.dataset = {"test": table.cast_column("image", ImageColumn())}
            self.data_loaded = True

        def get_candidate_labels(self):
            return prompts

    return [Pictograms()]


def main(model, data, out):
    torch.set_num_threads(1)
    name = f"cloob/{model}"
    meta = mteb.get_model_meta(name)
    encoder = mteb.get_model(name, device="cpu")
    results = mteb.evaluate(
        encoder,
        tasks(data),
        cache=None,
        encode_kwargs={"batch_size": 32},
        co2_tracker=False,
    )
    cat = [{"text": ["a cat"], "image": [Image.new("L", (9, 9), 99)]}]
    found = {
        "scores": {
            result.task_name: result.scores["test"][0]
            for result in results.task_results
        },
        "model_name": results.model_name,
        "revision": meta.revision,
        "embed_dim": meta.embed_dim,
        "known": [name in adapter._Registry({}), len(mteb.get_model_metas()) > 100],
        "norms": encoder.encode(cat).norm(dim=1).tolist(),
    }
    Path(out).write_text(json.dumps(found, default=str))


main(*sys.argv[1:])
