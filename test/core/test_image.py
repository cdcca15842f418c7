"""Camera messages to RGB, against numpy and PIL."""

from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vla_core.observation.decode import decode
from vla_core.observation.image import encode_jpeg, raw_to_array, resize
from vla_core.observation.messages import MessageError, compressed_image, serialize

from .helpers import CONTRACT, IMAGE, raw_image, with_stream

COMPRESSED = with_stream("camera", type="sensor_msgs/msg/CompressedImage").stream("camera")
# encoding -> channels of the message, and where red, green and blue are among them
ORDERS = {"rgb8": (3, (0, 1, 2)), "bgr8": (3, (2, 1, 0)), "rgba8": (4, (0, 1, 2)), "bgra8": (4, (2, 1, 0)),
          "mono8": (1, (0, 0, 0))}  # fmt: skip
sizes = st.integers(1, 9)


@pytest.mark.parametrize("encoding", ORDERS)
@given(height=sizes, width=sizes, padding=st.integers(0, 5), surplus=st.integers(0, 3), seed=st.integers(0, 99))
def test_raw(encoding: str, height: int, width: int, padding: int, surplus: int, seed: int) -> None:
    channels, order = ORDERS[encoding]
    step = width * channels + padding
    data = np.random.default_rng(seed).integers(0, 256, step * height + surplus, dtype=np.uint8)
    fields = {"height": height, "width": width, "step": step, "encoding": encoding}
    expected = np.array([
        [[data[y * step + x * channels + c] for c in order] for x in range(width)] for y in range(height)
    ])  # fmt: skip
    found = decode(CONTRACT.stream("camera"), serialize(IMAGE, raw_image(data, **fields)))
    assert isinstance(found, np.ndarray) and found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("encoding", ["8UC3", "bayer_rggb16", "nv12", "32FC2", "", "RGB8"])
def test_an_unsupported_encoding_names_the_choices(encoding: str) -> None:
    message = raw_image(bytes(64), height=2, width=2, step=16, encoding=encoding)
    with pytest.raises(MessageError, match=rf"^cam/raw: .*'{encoding}'.*16UC1, 32FC1.*bgr8, bgra8, mono16, mono8"):
        decode(CONTRACT.stream("camera"), serialize(IMAGE, message))


@pytest.mark.parametrize(
    ("size", "fields"),
    [
        (23, {"height": 2, "width": 4, "step": 12}),
        (0, {"height": 2, "width": 4, "step": 12}),
        (24, {"height": 2, "width": 4, "step": 11}),
        (24, {"height": 2, "width": 4, "step": 0}),
        (24, {"height": 0, "width": 4, "step": 12}),
        (24, {"height": 2, "width": 0, "step": 12}),
    ],
)
def test_sizes_that_do_not_fit_are_refused(size: int, fields: dict[str, int]) -> None:
    with pytest.raises(MessageError, match=rf"{fields['width']}x{fields['height']} rgb8 .*found {size} bytes"):
        raw_to_array(raw_image(bytes(size), encoding="rgb8", **fields))


MAPS = {"8UC1": "B", "8SC1": "b", "mono16": "H", "16UC1": "H", "16SC1": "h", "32SC1": "i", "32FC1": "f", "64FC1": "d"}


@pytest.mark.parametrize("encoding", MAPS)
@given(height=sizes, width=sizes, padding=st.integers(0, 5), big=st.booleans(), seed=st.integers(0, 99))
def test_maps_keep_their_numbers(encoding: str, height: int, width: int, padding: int, big: bool, seed: int) -> None:
    """Depth and range-Doppler maps, cell by cell with struct."""
    one = struct.Struct((">" if big else "<") + MAPS[encoding])
    step = width * one.size + padding
    data = np.random.default_rng(seed).integers(0, 64, step * height, dtype=np.uint8)  # bytes below 64: no NaN
    fields = {"height": height, "width": width, "step": step, "encoding": encoding, "is_bigendian": int(big)}
    found = decode(CONTRACT.stream("camera"), serialize(IMAGE, raw_image(data, **fields)))
    assert isinstance(found, np.ndarray) and found.dtype == np.dtype(MAPS[encoding]) and found.dtype.isnative
    expected = [[one.unpack_from(data, y * step + x * one.size)[0] for x in range(width)] for y in range(height)]
    assert found.tolist() == expected


def test_a_depth_map_is_a_view_and_keeps_nan_and_infinity() -> None:
    """REP 118: NaN is no measurement, infinity is out of range; neither is for the decoder to decide."""
    depth = np.array([[1.5, np.nan], [np.inf, -np.inf]], np.float32)
    message = raw_image(depth.tobytes(), height=2, width=2, step=8, encoding="32FC1")
    found = raw_to_array(message)
    np.testing.assert_array_equal(found, depth)
    assert np.shares_memory(found, message.data)


@pytest.mark.parametrize("order", ["rggb", "bggr", "gbrg", "grbg"])
def test_bayer_patterns(order: str) -> None:
    """A wall of one colour, seen through the mosaic named by its first four pixels."""
    colour = {"r": 200, "g": 120, "b": 40}
    mosaic = np.tile(np.array([colour[c] for c in order], np.uint8).reshape(2, 2), (4, 5))
    message = raw_image(mosaic, height=8, width=10, step=10, encoding=f"bayer_{order}8")
    found = raw_to_array(message)
    assert found.shape == (8, 10, 3) and (found == [200, 120, 40]).all()


@pytest.mark.parametrize(("encoding", "order"), [("yuv422", "uyvy"), ("uyvy", "uyvy"), ("yuv422_yuy2", "yuyv"),
                                                 ("yuyv", "yuyv")])  # fmt: skip
def test_yuv422(encoding: str, order: str) -> None:
    """Against the equations of ITU-R BT.601 (studio range)."""
    y, u, v = 144, 100, 180
    red = 1.164 * (y - 16) + 1.596 * (v - 128)
    green = 1.164 * (y - 16) - 0.392 * (u - 128) - 0.813 * (v - 128)
    blue = 1.164 * (y - 16) + 2.017 * (u - 128)
    data = np.tile(np.array([{"y": y, "u": u, "v": v}[c] for c in order], np.uint8), 3 * 2)
    found = raw_to_array(raw_image(data, height=3, width=4, step=8, encoding=encoding))
    assert found.shape == (3, 4, 3) and np.abs(found - np.array([red, green, blue])).max() <= 1.5
    with pytest.raises(MessageError, match=r"3x1 .*even width"):
        raw_to_array(raw_image(data, height=1, width=3, step=8, encoding=encoding))


def smooth(height: int = 40, width: int = 56) -> np.ndarray:
    """A picture that JPEG keeps well, with no symmetry."""
    y, x = np.mgrid[:height, :width]
    return np.stack([4 * x, 6 * y, 90 + 40 * np.sin(x / 9) + y], -1).clip(0, 255).astype(np.uint8)


def file_bytes(picture: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)  # type: ignore[arg-type]
    return stream.getvalue()


def decoded(encoded: bytes, kind: str = "jpeg") -> np.ndarray:
    data = compressed_image(0, np.frombuffer(encoded, np.uint8), kind)
    return np.asarray(decode(COMPRESSED, data))


def test_png_is_exact() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (17, 23, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decoded(file_bytes(Image.fromarray(noise), "PNG"), "png"), noise)


def test_grey_and_palette_files_become_rgb() -> None:
    grey = Image.fromarray(smooth()[..., 0])
    np.testing.assert_array_equal(decoded(file_bytes(grey, "PNG")), np.asarray(grey.convert("RGB")))
    palette = Image.fromarray(smooth()).quantize(16)
    np.testing.assert_array_equal(decoded(file_bytes(palette, "PNG")), np.asarray(palette.convert("RGB")))


def test_a_png_of_depths_keeps_16_bits() -> None:
    depth = np.random.default_rng(3).integers(0, 65536, (9, 7), dtype=np.uint16)
    encoded = file_bytes(Image.fromarray(depth), "PNG")
    found = decoded(encoded, "16UC1; png compressed ")
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, depth)
    with pytest.raises(MessageError, match=r"^cam/raw: .*32FC1; png.* is uint16 of \(9, 7\)"):
        decoded(encoded, "32FC1; png compressed")
    with pytest.raises(MessageError, match=r"^cam/raw: .*compressedDepth.*send the raw"):
        decoded(encoded, "32FC1; compressedDepth png")


def test_jpeg_is_what_pil_sees() -> None:
    encoded = file_bytes(Image.fromarray(smooth()), "JPEG", quality=90)
    expected = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")).astype(int)
    difference = np.abs(decoded(encoded).astype(int) - expected)
    assert difference.max() <= 4, "two decoders may round differently, no more"


def test_our_jpeg_is_read_by_pil_in_the_right_colours_and_keeps_single_pixels() -> None:
    picture = smooth()
    picture[20, 30] = (255, 0, 0)
    seen = np.asarray(Image.open(io.BytesIO(encode_jpeg(picture).tobytes()))).astype(int)
    assert np.abs(seen - picture.astype(int)).mean() < 2
    red, green, blue = seen[20, 30]
    assert red - max(green, blue) > 120, "chroma at half resolution would wash a single red pixel out"


def test_pixels_are_as_stored_whatever_a_camera_writes_into_exif() -> None:
    """A rotation tag must not turn what the robot sees: raw and compressed streams of one camera agree."""
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees"
    encoded = file_bytes(Image.fromarray(smooth()), "JPEG", exif=exif)
    assert decoded(encoded).shape == smooth().shape


@pytest.mark.parametrize("encoded", [b"", b"\0" * 100, b"\x89PNG\r\n\x1a\n" + b"\0" * 50, b"\xff\xd8\xff"])
def test_what_is_no_picture_is_refused(encoded: bytes) -> None:
    with pytest.raises(MessageError, match=rf"^cam/raw: .*{len(encoded)} bytes.*'jpeg'"):
        decoded(encoded)


def test_a_header_that_claims_too_many_pixels_is_refused() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0))
    encoded = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    with pytest.raises(MessageError, match=r"^cam/raw: .*does not decode"):
        decoded(encoded, "png")


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.95])
def test_a_truncated_picture_is_refused_not_half_grey(kind: str, part: float) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    encoded = file_bytes(Image.fromarray(noise), kind)
    with pytest.raises(MessageError, match=r"^cam/raw: "):
        decoded(encoded[: int(len(encoded) * part)])


def test_resize_keeps_equal_sizes_and_averages_areas() -> None:
    noise = np.random.default_rng(2).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    assert resize(noise, 12, 20) is noise
    blocks = noise.reshape(6, 2, 5, 4, 3).astype(float).mean((1, 3))
    assert np.abs(resize(noise, 6, 5).astype(float) - blocks).max() <= 0.5 + 1e-9
    flat = np.full((4, 4, 3), 77, dtype=np.uint8)
    assert resize(flat, 9, 7).shape == (9, 7, 3) and (resize(flat, 9, 7) == 77).all()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(2, 6), st.integers(2, 6), st.integers(0, 99))
def test_halving_first_is_the_same_area_average(height: int, width: int, by_h: int, by_w: int, seed: int) -> None:
    """Noise against the mean of each box in float64, for boxes of an even number of pixels: two roundings of a half."""
    shape = (height * 2 * by_h, width * 2 * by_w, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    boxes = pixels.reshape(height, 2 * by_h, width, 2 * by_w, 3).astype(np.float64).mean(axis=(1, 3))
    assert np.abs(resize(pixels, height, width) - boxes).max() <= 1.0 + 1e-9


@given(st.integers(16, 60), st.integers(16, 60), st.floats(4.0, 12.0), st.integers(0, 99))
def test_halving_first_does_not_show_in_a_picture(height: int, width: int, factor: float, seed: int) -> None:
    """A picture (noise seen through a lens) against OpenCV's area average in one step."""
    shape = (2 * round(height * factor / 2) + 2, 2 * round(width * factor / 2) + 2, 3)
    noise = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    picture = cv2.GaussianBlur(noise, (0, 0), 1.5)
    once = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
    difference = np.abs(resize(picture, height, width).astype(int) - once)
    assert difference.mean() <= 1.0 and difference.max() <= 10
