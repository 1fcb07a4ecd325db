"""From the bytes of an image file to upright RGB pixels: the one decoder of training, evaluation and ``encode_image``.

What the pixels are, whatever the file holds:

- Turned as the EXIF orientation says (1 to 8), as browsers and phones show the picture.
- Transparency is composited on white.
- Grey of 16 bits keeps its high byte. Grey of 32 bits or floating point says not what white is: the narrowest of the
  ranges 1 (floating point only), 2⁸, 2¹⁶ and 2³² that holds the brightest pixel counts.
- Of an animation the first frame. A CMYK JPEG holds its inks inverted, as Adobe writes them and browsers take them.
- Colour profiles (ICC) are not applied: open_clip's models were trained on pixels without.
- A JPEG above ``WHOLE_PIXELS`` is decoded at a half, a quarter or an eighth of its width and height. Of one that lacks
  its end, what is missing is grey: up to ``MAX_MISSING`` of its rows, else it is corrupt.

Needs Pillow and NumPy (the extra ``train``).
"""

from cloob.pictures.encoded import (
    MAX_IMAGE_BYTES,
    MAX_JPEG_PIXELS,
    MAX_PIXELS,
    Encoded,
    Fault,
    Unreadable,
    decode,
    read_file,
    upright,
)
from cloob.pictures.rgb import axes, middle

__all__ = [
    "MAX_IMAGE_BYTES",
    "MAX_JPEG_PIXELS",
    "MAX_PIXELS",
    "Encoded",
    "Fault",
    "Unreadable",
    "axes",
    "decode",
    "middle",
    "read_file",
    "upright",
]
