"""Pure maths on tensors: retrieval, contrast, the objective, geometry and ranking. Imports torch only."""

from cloob.functional.contrast import info_loob, info_nce, sigmoid_loss
from cloob.functional.hopfield import hopfield_retrieval
from cloob.functional.reference import cloob_reference

__all__ = ["cloob_reference", "hopfield_retrieval", "info_loob", "info_nce", "sigmoid_loss"]
