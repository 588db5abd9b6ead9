"""Images to measure with: each another one, so that no cache of results answers, and small enough that the network
is not what is measured."""

import base64
import random
import struct
import zlib
from dataclasses import dataclass

SIDE_PIXELS = 256
_TILES = 16
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TRUECOLOUR_8_BIT = bytes([8, 2, 0, 0, 0])


@dataclass(frozen=True)
class PictureTexts:
    """Images in base64 where a workload wants texts; an image has no length in tokens."""

    seed: int

    def text(self, level: int, position: int, tokens: int) -> str:
        """A PNG of 256 × 256 pixels, the same for the same ``level`` and ``position``."""
        return base64.b64encode(picture(f"{self.seed}/{level}/{position}")).decode("ascii")


def picture(name: str) -> bytes:
    """A PNG of 16 × 16 tiles in colours drawn by ``name``: some 2 kB.

    Written by hand, as the measuring side needs no image library: https://www.w3.org/TR/png-3/.
    """
    rng = random.Random(f"picture/{name}")
    tile = SIDE_PIXELS // _TILES
    rows = []
    for _ in range(_TILES):
        line = b"".join(rng.randbytes(3) * tile for _ in range(_TILES))
        rows.append((b"\x00" + line) * tile)
    header = struct.pack(">II", SIDE_PIXELS, SIDE_PIXELS) + _TRUECOLOUR_8_BIT
    pixels = zlib.compress(b"".join(rows), 1)
    return _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
