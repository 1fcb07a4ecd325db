"""Real pairs that come with the package, for a first look without a network."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cloob.data.open import DEMO

Rows = npt.NDArray[np.float32]

_FILE = DEMO / "pairs.npz"
_N_TRAIN = 1600


class ExamplePairs(NamedTuple):
    """Rows of drawings and of their names, in the order of ``train_test_split``."""

    images: Rows
    test_images: Rows
    texts: Rows
    test_texts: Rows


def example_pairs() -> ExamplePairs:
    """Vectors of drawings and of their names.

    Drawings of the demo set went through a frozen EfficientNet-Lite0, their names
    through a frozen MiniLM; of each the 96 main directions are kept. Every drawing and
    every name occurs once, and no test name is among the others. The licences of the
    drawings stand in the demo set's ``NOTICE``.

    Returns:
        ``images`` (1600, 96), ``test_images`` (500, 96), ``texts`` (1600, 96) and
        ``test_texts`` (500, 96), float32. Row i of ``texts`` names row i of ``images``.

    Example:
        >>> from cloob import example_pairs
        >>> [rows.shape for rows in example_pairs()]
        [(1600, 96), (500, 96), (1600, 96), (500, 96)]
    """
    with np.load(_FILE, allow_pickle=False) as stored:
        images = stored["images"].astype(np.float32)
        texts = stored["texts"].astype(np.float32)
    return ExamplePairs(
        images[:_N_TRAIN], images[_N_TRAIN:], texts[:_N_TRAIN], texts[_N_TRAIN:]
    )
