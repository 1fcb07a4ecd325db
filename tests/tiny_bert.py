"""A tiny BERT with random weights and a vocabulary of its own, and data, shared by
tests and their worker processes.
"""

COLOURS = ("red", "green", "blue")
AGES = ("old", "new")
KINDS = ("car", "tree")
THINGS = [
    f"{colour} {age} {kind}" for colour in COLOURS for age in AGES for kind in KINDS
]
EIGHT = THINGS[:8]
TURNED = [" ".join(reversed(thing.split())) for thing in EIGHT]
PAIRS = {
    "anchor": [f"a {thing}" for thing in EIGHT],
    "positive": [f"there is the {thing}" for thing in EIGHT],
    "negative": [f"there is the {turned} house" for turned in TURNED],
}


def build(folder):
    """Writes the model, without dropout, as a sentence-transformers folder."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    from make import write_bert

    parts = str(
        write_bert(
            folder / "parts", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
    )
    model = SentenceTransformer(modules=[Transformer(parts), Pooling(16)], device="cpu")
    model.save_pretrained(str(folder / "model"), create_model_card=False)


def load(folder):
    """The model that ``build`` wrote."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder / "model"), device="cpu")


def pictures():
    """Eight coloured pictures with their captions, for a ``CLIPModel``."""
    from PIL import Image

    images = [
        Image.new("RGB", (32, 32), (30 * i, 255 - 30 * i, i * i)) for i in range(8)
    ]
    return {"image": images, "caption": PAIRS["anchor"]}


def fit(model, loss, columns, out, callbacks=None, **arguments):
    """Trains; the losses of the steps."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )

    defaults = {
        "per_device_train_batch_size": 8,
        "num_train_epochs": 4,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    args = SentenceTransformerTrainingArguments(
        output_dir=str(out), **{**defaults, **arguments}
    )
    data = Dataset.from_dict(columns)
    trainer = SentenceTransformerTrainer(
        model=model, args=args, train_dataset=data, loss=loss, callbacks=callbacks
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
