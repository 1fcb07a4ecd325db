"""Two frozen encoders of any origin with a projection head on each: what ``cloob train align`` makes."""

from cloob.models.aligned.encoders import FeatureMemory, row_keys
from cloob.models.aligned.heads import Head
from cloob.models.aligned.model import AlignedEncoder, aligned_encoder
from cloob.models.aligned.opening import open_image_encoder, open_text_encoder
from cloob.models.aligned.vectors import VectorEncoder

__all__ = [
    "AlignedEncoder",
    "FeatureMemory",
    "Head",
    "VectorEncoder",
    "aligned_encoder",
    "open_image_encoder",
    "open_text_encoder",
    "row_keys",
]
