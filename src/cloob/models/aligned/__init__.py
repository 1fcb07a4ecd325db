"""Two frozen encoders of any origin with a projection head on each: what ``cloob train align`` makes."""

from cloob.models.aligned.heads import Head
from cloob.models.aligned.model import AlignedEncoder, aligned_encoder, fingerprint
from cloob.models.aligned.opening import open_image_encoder, open_text_encoder
from cloob.models.aligned.shared import encoder_facts, share_encoders

__all__ = [
    "AlignedEncoder",
    "Head",
    "aligned_encoder",
    "encoder_facts",
    "fingerprint",
    "open_image_encoder",
    "open_text_encoder",
    "share_encoders",
]
