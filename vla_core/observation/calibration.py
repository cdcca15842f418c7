"""Camera calibration: ``sensor_msgs/CameraInfo`` to matrices of the picture that the model sees."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_core.observation.messages import MessageError


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """A camera's geometry, in pixels whose centres have whole coordinates.

    ``intrinsics`` (3, 3) K of the raw picture, ``distortion`` (n,) D of ``model`` (plumb_bob, rational_polynomial,
    equidistant), ``rectification`` (3, 3) R and ``projection`` (3, 4) P of the rectified one; all float64. Points are
    in ``frame_id``, a camera's optical frame: x right, y down, z forward (REP 103).
    """

    intrinsics: np.ndarray
    distortion: np.ndarray
    rectification: np.ndarray
    projection: np.ndarray
    width: int
    height: int
    model: str
    frame_id: str

    def scaled(self, height: int, width: int) -> Calibration:
        """The calibration of the picture resized to ``height`` x ``width``; distortion knows no pixels and stays.

        A pixel at u covers [u - 1/2, u + 1/2], so u + 1/2 is what scales: as ``observation.image.resize`` does it.
        """
        x, y = width / self.width, height / self.height
        scale = np.array([[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2], [0, 0, 1]])
        return dataclasses.replace(
            self, intrinsics=scale @ self.intrinsics, projection=scale @ self.projection, width=width, height=height
        )


def blank_calibration(height: int, width: int) -> Calibration:
    """A camera of unit focal length, for warm-ups."""
    return Calibration(
        intrinsics=np.eye(3), distortion=np.zeros(5), rectification=np.eye(3), projection=np.eye(3, 4), width=width,
        height=height, model="plumb_bob", frame_id="",
    )  # fmt: skip


def camera_info(message: Any) -> Calibration:
    """``sensor_msgs/CameraInfo`` to the calibration of the picture as sent: region of interest and binning applied.

    Raises :class:`MessageError` for a camera that is not calibrated (K[0] is 0) or has no size.
    """
    roi, binning = message.roi, (max(int(message.binning_x), 1), max(int(message.binning_y), 1))
    width = (int(roi.width) or int(message.width)) // binning[0]
    height = (int(roi.height) or int(message.height)) // binning[1]
    if min(width, height) < 1:
        raise MessageError(f"camera info of a picture of {width}x{height} pixels")
    k, p = np.asarray(message.k).reshape(3, 3), np.asarray(message.p).reshape(3, 4)
    arrays = (k, np.asarray(message.d), np.asarray(message.r).reshape(3, 3), p)
    if not all(np.isfinite(array).all() for array in arrays):
        raise MessageError("camera info with numbers that are not finite")
    if k[0, 0] == 0:
        raise MessageError("the camera is not calibrated (k[0] is 0); calibrate it, or leave it out of calibrations")
    crop = np.array([[1, 0, -float(roi.x_offset)], [0, 1, -float(roi.y_offset)], [0, 0, 1]])
    whole = Calibration(
        intrinsics=crop @ k, distortion=np.array(message.d), rectification=arrays[2].copy(), projection=crop @ p,
        width=width * binning[0], height=height * binning[1], model=str(message.distortion_model),
        frame_id=str(message.header.frame_id),
    )  # fmt: skip
    return whole.scaled(height, width)
