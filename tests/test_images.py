"""Images that strangers send: what is decoded, and what is refused by name before it costs memory."""

import base64
import contextlib
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from loadstone.core.refusals import BadAskError
from loadstone.serve.images import ImageBounds, decode, decode_base64

BOUNDS = ImageBounds()
WHITE = (255, 255, 255)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def plain(colour: tuple[int, int, int] = (200, 30, 40)) -> Image.Image:
    return Image.new("RGB", (20, 10), colour)


def several(kind: str) -> bytes:
    frames = [plain((level, 0, 0)) for level in (0, 80, 160)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


def refusal(data: bytes, bounds: ImageBounds = BOUNDS) -> str:
    with pytest.raises(BadAskError) as caught:
        decode(data, bounds, "image")
    assert caught.value.param == "image"
    return str(caught.value)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF"])
def test_what_browsers_show_is_decoded(kind: str) -> None:
    image = decode(encoded(plain(), kind), BOUNDS)
    assert (image.mode, image.size) == ("RGB", (20, 10))
    assert np.abs(np.asarray(image, int) - (200, 30, 40)).max() <= 3


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "AVIF"])
def test_a_moving_image_is_refused(kind: str) -> None:
    assert refusal(several(kind)) == "the image is animated: send one still image"


def test_a_jpeg_with_a_preview_behind_it_is_a_still_image() -> None:
    assert decode(several("MPO"), BOUNDS).size == (20, 10)


def test_other_formats_and_other_files_are_no_images() -> None:
    files = (encoded(plain(), "TIFF"), encoded(plain(), "EPS"), b"x" * 50, b"\xff\xd8", b"<svg/>")
    assert {refusal(data) for data in files} == {"not an image: JPEG, PNG, WebP, GIF, BMP and AVIF are understood"}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF"])
def test_half_an_image_is_broken(kind: str) -> None:
    noise = Image.effect_noise((200, 200), 80).convert("RGB")
    data = encoded(noise, kind)
    message = refusal(data[: len(data) // 2])
    assert message.startswith(("the image is broken: ", "not an image: "))
    assert "\n" not in message


@pytest.mark.parametrize(("width", "height"), [(8000, 8000), (10_000, 10_000), (60_000, 60_000)])
def test_a_decompression_bomb_is_refused_by_its_header(width: int, height: int) -> None:
    assert refusal(png_header(width, height)).startswith("the image has more than 50 megapixels")


def test_the_bound_on_pixels_is_the_one_given() -> None:
    data = encoded(plain(), "PNG")
    assert decode(data, ImageBounds(max_megapixels=0.0002), "image").size == (20, 10)
    assert refusal(data, ImageBounds(max_megapixels=0.000199)).endswith("megapixels: 20 × 10")


def test_the_bound_on_bytes() -> None:
    data = encoded(plain(), "PNG")
    assert decode(data, ImageBounds(max_bytes=len(data))).size == (20, 10)
    assert refusal(data, ImageBounds(max_bytes=len(data) - 1)).startswith("the image is larger than ")
    assert refusal(b"") == "the image is empty"


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1)])
def test_a_spacer_is_refused(size: tuple[int, int]) -> None:
    message = refusal(encoded(Image.new("RGB", size), "PNG"))
    assert message == f"the image is {size[0]} × {size[1]}: both sides must be at least 2 pixels"


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_over_white(mode: str) -> None:
    half = Image.new(mode, (4, 4), (0,) * (len(mode) - 1) + (128,))
    nothing = Image.new(mode, (4, 4), (0,) * len(mode))
    assert decode(encoded(half, "PNG"), BOUNDS).getpixel((0, 0)) == (127, 127, 127)
    assert decode(encoded(nothing, "PNG"), BOUNDS).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_palette_with_a_transparent_colour(kind: str) -> None:
    image = Image.new("P", (4, 4))
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putpixel((1, 0), 1)
    seen = decode(encoded(image, kind, transparency=0), BOUNDS)
    assert (seen.getpixel((0, 0)), seen.getpixel((1, 0))) == (WHITE, (255, 0, 0))


def test_cmyk_and_sixteen_bits() -> None:
    assert decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), BOUNDS).getpixel((0, 0)) == (255, 0, 0)
    grey = Image.fromarray(np.array([[0, 65535], [32768, 256]], np.uint16))
    levels = np.asarray(decode(encoded(grey, "PNG"), BOUNDS))[..., 0]
    assert levels.tolist() == [[0, 255], [128, 1]]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_orientation_is_applied(kind: str) -> None:
    image = plain((0, 0, 0))
    image.paste(WHITE, (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # what is on the left is shown on top
    upright = decode(encoded(image, kind, exif=exif), BOUNDS)
    assert upright.size == (10, 20)
    top, bottom = np.asarray(upright)[2].mean(), np.asarray(upright)[17].mean()
    assert top > 240 > 15 > bottom


def test_a_damaged_exif_block_does_not_spoil_the_picture() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(plain(), "JPEG", exif=exif)
    assert b"MM\0*" in data
    assert decode(data.replace(b"MM\0*", b"XX\0*"), BOUNDS).size == (20, 10)


@given(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF"]), st.data())
def test_mutilated_images_are_decoded_or_refused(kind: str, draw: st.DataObject) -> None:
    data = bytearray(encoded(plain(), kind))
    for _ in range(draw.draw(st.integers(1, 6))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    with contextlib.suppress(BadAskError):
        assert decode(bytes(data), ImageBounds(max_megapixels=1)).mode == "RGB"


# -- base64


def test_base64_plain_and_as_a_data_url() -> None:
    data = encoded(plain(), "PNG")
    text = base64.b64encode(data).decode()
    for given_text in (text, f"data:image/png;base64,{text}", f"data:;base64,{text}"):
        assert decode_base64(given_text, "image", BOUNDS) == data


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "must be a string of base64"),
        (["aGk="], "must be a string of base64"),
        ("", "the image is empty"),
        ("==", "the image is empty"),
        ("aGk", "not base64: "),
        ("aG\nk=", "not base64: "),
        ("a-_k", "not base64: "),
        ("图像图像", "not base64: "),
        ("\ud800aaa", "not base64: "),
        ("aGk=aGk=", "not base64: "),
        ("https://images.example/cat.png", "not base64: "),
        ("data:image/png,abc", "must read data:image/TYPE;base64,DATA"),
        ("data:image/png;base64", "must read data:image/TYPE;base64,DATA"),
        ("data:image/png;base64,", "the image is empty"),
    ],
)
def test_base64_that_is_not(text: object, says: str) -> None:
    with pytest.raises(BadAskError, match=says) as caught:
        decode_base64(text, "images[3]", BOUNDS)
    assert caught.value.param == "images[3]"


@pytest.mark.parametrize("size", [10, 11, 12])
def test_the_size_of_base64_is_known_before_it_is_decoded(size: int) -> None:
    text = base64.b64encode(bytes(size)).decode()
    assert len(decode_base64(text, None, ImageBounds(max_bytes=size))) == size
    with pytest.raises(BadAskError, match="the image is larger than"):
        decode_base64(text, None, ImageBounds(max_bytes=size - 1))
