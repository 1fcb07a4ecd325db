"""Pure maths on tensors, torch alone: the objective, and what embeddings are judged by.

Read in this order: ``reference``, the contrasts and retrieval, the oracle of all other
paths; ``scores``, a contrast of any matrix of scores, with soft targets; ``pairs``, the
objective that is made of them; ``streamed``, the same as the first without N×N
matrices. Then ``geometry``, ``ranking`` and ``bootstrap``; ``checks`` has the checks of
their tensors, ``private`` all undocumented names of torch.
"""

from cloob.functional.pairs import cloob_reference
from cloob.functional.reference import (
    hopfield_retrieval,
    info_loob,
    info_nce,
    sigmoid_loss,
)
from cloob.functional.scores import contrast_scores

__all__ = [
    "cloob_reference",
    "contrast_scores",
    "hopfield_retrieval",
    "info_loob",
    "info_nce",
    "sigmoid_loss",
]
