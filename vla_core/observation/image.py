"""Pixels: decoding of raw and compressed camera messages, and the one resize that training and robot share."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from vla_core.errors import choices
from vla_core.observation.messages import MessageError

# Encodings of sensor_msgs/image_encodings that are pictures, 8 bits a channel: channels, and the conversion to RGB
# (None when already RGB). Bayer names tell the first two rows, as OpenCV's newer names do. yuv422 is UYVY.
RAW_ENCODINGS: dict[str, tuple[int, int | None]] = {
    "rgb8": (3, None),
    "bgr8": (3, cv2.COLOR_BGR2RGB),
    "rgba8": (4, cv2.COLOR_RGBA2RGB),
    "bgra8": (4, cv2.COLOR_BGRA2RGB),
    "mono8": (1, cv2.COLOR_GRAY2RGB),
    "bayer_rggb8": (1, cv2.COLOR_BayerRGGB2RGB),
    "bayer_bggr8": (1, cv2.COLOR_BayerBGGR2RGB),
    "bayer_gbrg8": (1, cv2.COLOR_BayerGBRG2RGB),
    "bayer_grbg8": (1, cv2.COLOR_BayerGRBG2RGB),
    "yuv422": (2, cv2.COLOR_YUV2RGB_UYVY),
    "uyvy": (2, cv2.COLOR_YUV2RGB_UYVY),
    "yuv422_yuy2": (2, cv2.COLOR_YUV2RGB_YUY2),
    "yuyv": (2, cv2.COLOR_YUV2RGB_YUY2),
}
# Encodings that are maps of one number a cell: depth, heat, range-Doppler.
MAP_ENCODINGS: dict[str, str] = {
    "mono16": "u2", "8UC1": "u1", "8SC1": "i1", "16UC1": "u2", "16SC1": "i2", "32SC1": "i4", "32FC1": "f4",
    "64FC1": "f8",
}  # fmt: skip


# Pixels as they are stored: an EXIF rotation would make the compressed stream differ from the raw one.
DECODE_FLAGS = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION


def raw_to_array(message: Any) -> np.ndarray:
    """``sensor_msgs/Image`` to a picture (H, W, 3) uint8 RGB, or to a map (H, W) of the encoding's own type.

    A view without a copy when the message is an unpadded rgb8, or a map in native byte order. Maps keep what they
    hold: 16UC1 depth is in mm with 0 for no return, 32FC1 depth in m with NaN and infinity (REP 118).
    """
    if message.encoding in MAP_ENCODINGS:
        return _raw_map(message)
    if message.encoding not in RAW_ENCODINGS:
        known = choices([*RAW_ENCODINGS, *MAP_ENCODINGS])
        raise MessageError(f"image encoding {message.encoding!r} is not supported; choices: {known}")
    channels, conversion = RAW_ENCODINGS[message.encoding]
    _check_size(message, channels)
    height, width, step = message.height, message.width, message.step
    if channels == 2 and width % 2:
        raise MessageError(f"image of {width}x{height} {message.encoding}: two pixels share a colour, expected an "
                           "even width")  # fmt: skip
    rows = np.asarray(message.data[: step * height]).reshape(height, step)
    pixels = rows[:, : width * channels].reshape(height, width, channels)
    return pixels if conversion is None else cv2.cvtColor(pixels, conversion)


def _raw_map(message: Any) -> np.ndarray:
    dtype = np.dtype(MAP_ENCODINGS[message.encoding]).newbyteorder(">" if message.is_bigendian else "<")
    _check_size(message, dtype.itemsize)
    cells = np.ndarray((message.height, message.width), dtype, buffer=message.data,
                       strides=(message.step, dtype.itemsize))  # fmt: skip
    return cells if dtype.isnative else cells.astype(dtype.newbyteorder("="))


def _check_size(message: Any, pixel_bytes: int) -> None:
    height, width, step = message.height, message.width, message.step
    if height == 0 or width == 0 or step < width * pixel_bytes or len(message.data) < step * height:
        raise MessageError(
            f"image of {width}x{height} {message.encoding} with step {step} needs {step * height} bytes and a step "
            f"of at least {width * pixel_bytes}, found {len(message.data)} bytes"
        )


def compressed_to_array(message: Any) -> np.ndarray:
    """``sensor_msgs/CompressedImage`` (JPEG or PNG) to a picture (H, W, 3) uint8 RGB.

    A PNG whose format names a map's encoding ("16UC1; png compressed") becomes that map (H, W).
    """
    encoding = str(message.format).split(";")[0].strip()
    if "compressedDepth" in str(message.format):
        raise MessageError(f"compressed image of format {message.format!r}: its depths are quantized by a transport of "
                           "its own; send the raw or the png compressed image")  # fmt: skip
    flags = cv2.IMREAD_UNCHANGED if encoding in MAP_ENCODINGS else DECODE_FLAGS
    try:
        pixels = cv2.imdecode(message.data, flags) if len(message.data) else None
    except cv2.error:  # of a header that claims more than 2^30 pixels
        pixels = None
    if pixels is None:
        raise MessageError(f"compressed image of {len(message.data)} bytes, format {message.format!r}, does not decode")
    if encoding in MAP_ENCODINGS and (pixels.ndim != 2 or pixels.dtype != np.dtype(MAP_ENCODINGS[encoding])):
        raise MessageError(f"compressed image of format {message.format!r} is {pixels.dtype} of {pixels.shape}")
    return pixels


def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8 to (height, width, 3) uint8, area-averaged when shrinking and bilinear when growing."""
    if pixels.shape[:2] == (height, width):
        return pixels
    rows, columns = pixels.shape[:2]
    if rows % 2 == columns % 2 == 0 and rows >= 4 * height and columns >= 4 * width:
        # OpenCV averages 2 x 2 pixels several times faster than any other box. Where a box of the target ends between
        # the two pixels of a pair, both count half: of four and more pixels a side that does not show.
        pixels = cv2.resize(pixels, (columns // 2, rows // 2), interpolation=cv2.INTER_AREA)
    shrinking = height * width < pixels.shape[0] * pixels.shape[1]
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR)


def encode_jpeg(pixels: np.ndarray, quality: int = 95) -> np.ndarray:
    """(H, W, 3) uint8 RGB to JPEG bytes (N,) uint8, chroma kept at full resolution: small objects are a few pixels."""
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
               cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]  # fmt: skip
    ok, encoded = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)
    if not ok:
        raise MessageError(f"an image of shape {pixels.shape} could not be encoded as JPEG")
    return encoded
