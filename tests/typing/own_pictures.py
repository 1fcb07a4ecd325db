"""Training, loading and judging: what needs the extra ``train``."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import cloob
from cloob import (
    HeadsConfig,
    Index,
    TrainConfig,
    create_model,
    evaluate,
    get_recipe,
    load_model,
    open_source,
    train,
    train_heads,
)
from cloob.data.batch import RawSample
from cloob.evaluation.results import Results
from cloob.models.encoder import DualEncoder


def fit(data: str) -> Path:
    config = get_recipe("finetune").override(data=(data,), epochs=3)
    assert_type(config, TrainConfig)
    result = train(config)
    assert_type(result.run, Path)
    return result.run


def fit_heads(data: str) -> Path:
    config = get_recipe("align").override(data=(data,), epochs=3)
    assert_type(config, HeadsConfig)
    return train_heads(config).run


def judge(run: Path, held_out: str) -> Results:
    source = open_source(held_out)
    assert_type(source.read(0), RawSample)
    results = evaluate({"mine": run}, retrieval=[source])
    assert_type(results, Results)
    return results


def find(run: Path, query: str, pictures: list[Path]) -> int:
    model = load_model(run, device="cpu")
    assert_type(model, DualEncoder)
    assert_type(model.encode_image(pictures), Tensor)
    similarity = model.encode_text([query]) @ model.encode_image(pictures).T
    return int(similarity.argmax())


def opened(path: Path) -> int:
    with Index.open(path) as index:
        assert_type(index, Index)
        return len(index)


def start() -> DualEncoder:
    assert_type(cloob.__version__, str)
    return create_model("RN50").to(torch.device("cpu"))


def heads(a: Tensor, b: Tensor) -> float:
    """A head of one's own, and the estimator over two matrices."""
    assert_type(cloob.Head(4, 2).forward(a), Tensor)
    settings = cloob.HeadSettings("infoloob", epochs=2)
    assert_type(cloob.fit_heads(a, b, settings=settings).best_epoch, int)
    fitted = cloob.ContrastiveHeads(epochs=2).fit(a, b)
    assert_type(cloob.example_pairs().images, npt.NDArray[np.float32])
    assert_type(fitted, cloob.ContrastiveHeads)
    return fitted.score(a, b)


def mistakes(run: Path) -> None:
    """What a type checker has to refuse; an ignore that is not needed is an error
    too.
    """
    train("align")  # type: ignore[arg-type]
    evaluate([run])  # type: ignore[arg-type]
    load_model(3)  # type: ignore[call-overload]
    print(cloob.objektive)  # type: ignore[attr-defined]
