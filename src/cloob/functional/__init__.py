"""Pure maths on tensors, torch alone: the objective, and what embeddings are judged by.

Read in this order: ``contrast``, one direction of each loss; ``reference``, retrieval and the objective, the oracle of
all other paths; ``streamed``, the same without N×N matrices. Then ``geometry``, ``ranking`` and ``bootstrap``.
``checks`` has what they require of their tensors.
"""

from cloob.functional.contrast import info_loob, info_nce, sigmoid_loss
from cloob.functional.reference import cloob_reference, hopfield_retrieval

__all__ = ["cloob_reference", "hopfield_retrieval", "info_loob", "info_nce", "sigmoid_loss"]
