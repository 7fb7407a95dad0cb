"""Smaller figures for the page: at most 256 colours where nobody can see the difference."""

from __future__ import annotations

import base64
import io

MOST_ERROR = 12  # of 255, in any channel of any pixel


def smaller(picture: str) -> str:
    """A base64 PNG as one that takes fewer bytes: a palette if no channel moves by more than ``MOST_ERROR``.

    A figure that needs more colours, or has transparency, is only compressed harder; one that does not get smaller
    is returned as it was.
    """
    from PIL import Image, ImageChops

    image = Image.open(io.BytesIO(base64.b64decode(picture)))
    if image.convert("RGBA").getchannel("A").getextrema() == (255, 255):
        image = image.convert("RGB")
        palette = image.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)
        error = ImageChops.difference(image, palette.convert("RGB"))
        if max(high for _, high in error.getextrema()) <= MOST_ERROR:
            image = palette
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    found = base64.b64encode(data.getvalue()).decode()
    return found if len(found) < len(picture) else picture
