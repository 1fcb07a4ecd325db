"""A tiny BERT with random weights and a vocabulary of its own, and data, shared by tests and their worker processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WORDS = ("red", "green", "blue", "round", "flat", "old", "new", "car", "tree", "house", "a", "the", "of", "there", "is")
THINGS = [f"{colour} {age} {thing}" for colour in WORDS[:3] for age in ("old", "new") for thing in ("car", "tree")]
PAIRS = {
    "anchor": [f"a {thing}" for thing in THINGS[:8]],
    "positive": [f"there is the {thing}" for thing in THINGS[:8]],
    "negative": [f"there is the {' '.join(reversed(thing.split()))} house" for thing in THINGS[:8]],
}


def build(folder: Path) -> None:
    """Writes the model, without dropout, as a sentence-transformers folder."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizer

    parts = folder / "parts"
    parts.mkdir(parents=True)
    (parts / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizer(str(parts / "vocab.txt")).save_pretrained(parts)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS) + 5,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(parts)
    model = SentenceTransformer(modules=[Transformer(str(parts)), Pooling(16)], device="cpu")
    model.save_pretrained(str(folder / "model"), create_model_card=False)


def load(folder: Path) -> Any:
    """The model that ``build`` wrote."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder / "model"), device="cpu")


def pictures() -> dict[str, list[Any]]:
    """Eight coloured pictures with their captions, for a ``CLIPModel``."""
    from PIL import Image

    images = [Image.new("RGB", (32, 32), (30 * i, 255 - 30 * i, i * i)) for i in range(8)]
    return {"image": images, "caption": PAIRS["anchor"]}


def fit(model: Any, loss: Any, columns: dict[str, list[Any]], out: Path, **arguments: Any) -> list[float]:
    """Trains; the losses of the steps."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

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
    args = SentenceTransformerTrainingArguments(output_dir=str(out), **{**defaults, **arguments})
    trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=Dataset.from_dict(columns), loss=loss)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
