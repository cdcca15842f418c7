"""Pixels: decoding of raw and compressed camera messages, and the one resize that training and robot share."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from vla_core.errors import choices
from vla_core.observation.messages import MessageError

# REP-8bit encodings of sensor_msgs/image_encodings: channels, and the conversion to RGB (None when already RGB).
RAW_ENCODINGS: dict[str, tuple[int, int | None]] = {
    "rgb8": (3, None),
    "bgr8": (3, cv2.COLOR_BGR2RGB),
    "rgba8": (4, cv2.COLOR_RGBA2RGB),
    "bgra8": (4, cv2.COLOR_BGRA2RGB),
    "mono8": (1, cv2.COLOR_GRAY2RGB),
}


# Pixels as they are stored: an EXIF rotation would make the compressed stream differ from the raw one.
DECODE_FLAGS = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION


def raw_to_rgb(message: Any) -> np.ndarray:
    """``sensor_msgs/Image`` to (H, W, 3) uint8 RGB; a view without a copy when the message is unpadded rgb8."""
    if message.encoding not in RAW_ENCODINGS:
        raise MessageError(f"image encoding {message.encoding!r} is not supported; choices: {choices(RAW_ENCODINGS)}")
    channels, conversion = RAW_ENCODINGS[message.encoding]
    height, width, step = message.height, message.width, message.step
    if height == 0 or width == 0 or step < width * channels or len(message.data) < step * height:
        raise MessageError(
            f"image of {width}x{height} {message.encoding} with step {step} needs {step * height} bytes and a step "
            f"of at least {width * channels}, found {len(message.data)} bytes"
        )
    rows = np.asarray(message.data[: step * height]).reshape(height, step)
    pixels = rows[:, : width * channels].reshape(height, width, channels)
    return pixels if conversion is None else cv2.cvtColor(pixels, conversion)


def compressed_to_rgb(message: Any) -> np.ndarray:
    """``sensor_msgs/CompressedImage`` (JPEG or PNG) to (H, W, 3) uint8 RGB."""
    pixels = cv2.imdecode(message.data, DECODE_FLAGS) if len(message.data) else None
    if pixels is None:
        raise MessageError(f"compressed image of {len(message.data)} bytes, format {message.format!r}, does not decode")
    return pixels


def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8 to (height, width, 3) uint8, area-averaged when shrinking and bilinear when growing."""
    if pixels.shape[:2] == (height, width):
        return pixels
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
