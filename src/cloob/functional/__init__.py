"""Pure maths on tensors, torch alone: the objective, and what embeddings are judged by.

Read in this order: ``contrast`` and ``hopfield``, one equation each; ``reference``, which joins them to the objective
and is the oracle of all other paths; ``streamed``, the same without N×N matrices. Then ``geometry``, ``ranking`` and
``bootstrap``. ``checks`` is what all of them ask of their tensors.
"""

from cloob.functional.contrast import info_loob, info_nce, sigmoid_loss
from cloob.functional.hopfield import hopfield_retrieval
from cloob.functional.reference import cloob_reference

__all__ = ["cloob_reference", "hopfield_retrieval", "info_loob", "info_nce", "sigmoid_loss"]
