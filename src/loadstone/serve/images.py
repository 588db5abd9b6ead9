"""Images that strangers send: bounded before they are decoded, then plain RGB.

What costs memory is decided by the header: a file of a few kilobytes can claim a thousand megapixels. An image that
moves is refused rather than embedded by a frame that nobody chose, and so is one with a side of a single pixel (a
spacer or a tracking pixel, whose vector would match anything). Everything here blocks: call it on a thread.
"""

import base64
import binascii
import contextlib
import io
from dataclasses import dataclass

from PIL import Image, ImageOps, UnidentifiedImageError

from loadstone.core.refusals import BadAskError

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")
"""What browsers show. Pillow's other parsers are attack surface: EPS runs Ghostscript, TIFF has a history."""
_LEAST_SIDE_PX = 2
_MPO = "MPO"
"""A JPEG with further pictures behind it (a preview, a second lens), as cameras write: not a moving image."""


@dataclass(frozen=True)
class ImageBounds:
    """The largest image that is accepted."""

    max_bytes: int = 16 * 2**20
    """As sent, after base64."""
    max_megapixels: float = 50.0
    """Width × height; decoded, a megapixel takes 3 MB."""


def decode_base64(text: object, param: str | None, bounds: ImageBounds) -> bytes:
    """The bytes of an image given as base64, plain or as a ``data:`` URL.

    Raises BadAskError, naming ``param``, for what is not a string, not base64, empty or too large.
    """
    if not isinstance(text, str):
        raise BadAskError("the image must be a string of base64", param)
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise BadAskError("a data: URL must read data:image/TYPE;base64,DATA", param)
    _check_size(len(text) * 3 // 4 - text.count("=", -2), param, bounds)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadAskError(f"not base64: {error}; the standard alphabet, padded, without line breaks", param) from None


def _check_size(size: int, param: str | None, bounds: ImageBounds) -> None:
    """Raises BadAskError where an image of ``size`` bytes is empty or too large."""
    if size <= 0:
        raise BadAskError("the image is empty", param)
    if size > bounds.max_bytes:
        raise BadAskError(f"the image is larger than {bounds.max_bytes / 2**20:.3g} MiB", param)


def decode(data: bytes, bounds: ImageBounds, param: str | None = None) -> Image.Image:
    """Decode to mode RGB, upright as its EXIF says, transparency over white.

    Raises BadAskError, naming ``param``, for what is no image, broken, too large, animated or one pixel thin.
    """
    _check_size(len(data), param, bounds)
    try:
        with _open(data) as image:
            _check(image, param, bounds)
            image.load()
            with contextlib.suppress(Exception):  # a damaged EXIF block is common, and the picture beside it is sound
                ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image)
    except BadAskError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadAskError(_too_many_pixels(bounds), param) from None
    except UnidentifiedImageError:
        raise BadAskError("not an image: JPEG, PNG, WebP, GIF, BMP and AVIF are understood", param) from None
    except Exception as error:  # Pillow's parsers let through whatever struct, zlib and an index out of range raise
        raise BadAskError(f"the image is broken: {error}", param) from None


def _open(data: bytes) -> Image.Image:
    """Reads the header only."""
    return Image.open(io.BytesIO(data), formats=_FORMATS)


def _check(image: Image.Image, param: str | None, bounds: ImageBounds) -> None:
    width, height = image.size
    if width * height > bounds.max_megapixels * 1e6:
        raise BadAskError(f"{_too_many_pixels(bounds)}: {width} × {height}", param)
    if min(width, height) < _LEAST_SIDE_PX:
        raise BadAskError(
            f"the image is {width} × {height}: both sides must be at least {_LEAST_SIDE_PX} pixels", param
        )
    if getattr(image, "is_animated", False) and image.format != _MPO:
        raise BadAskError("the image is animated: send one still image", param)


def _too_many_pixels(bounds: ImageBounds) -> str:
    return f"the image has more than {bounds.max_megapixels:g} megapixels"


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return image.convert("I").point(lambda level: level / 256).convert("L").convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    seen = image.convert("RGBA")
    over_white = Image.new("RGB", seen.size, "white")
    over_white.paste(seen, mask=seen.getchannel("A"))
    return over_white
