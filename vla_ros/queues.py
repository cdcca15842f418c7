"""How deep the middleware's queues may be: a depth counts messages, memory counts bytes."""

from __future__ import annotations

from collections.abc import Sequence

from vla_core.errors import VlaError

MEGABYTE = 1_000_000
# What a large message is taken to have: a 1080p rgb8 image, a rich JPEG, 120,000 points of 32 bytes.
LARGE_BYTES = {
    "sensor_msgs/msg/Image": 6_300_000,
    "sensor_msgs/msg/CompressedImage": 1_000_000,
    "sensor_msgs/msg/PointCloud2": 4_000_000,
}
SMALL_BYTES = 2048
SMALL_DEPTH = 1000
LEAST_DEPTH = 4  # of large messages: what a reader that is held up for a tenth of a second needs at 30 Hz


def queue_depths(types: Sequence[str], budget: int) -> list[int]:
    """A depth per topic of ``types``, such that full queues hold ``budget`` bytes.

    Small messages get :data:`SMALL_DEPTH`; the topics of large ones share the rest equally.

    Raises:
        VlaError: the budget is too small for :data:`LEAST_DEPTH` of every large topic.
    """
    small = sum(SMALL_BYTES * SMALL_DEPTH for name in types if name not in LARGE_BYTES)
    large = [LARGE_BYTES[name] for name in types if name in LARGE_BYTES]
    share = (budget - small) // max(1, len(large))
    if share < max(large, default=0) * LEAST_DEPTH or small > budget:
        least = small + len(large) * max(large, default=0) * LEAST_DEPTH
        raise VlaError(
            f"{len(types)} topics, {len(large)} of them of images or points, need queues of {least / MEGABYTE:.0f} MB, "
            f"and there are {budget / MEGABYTE:.0f}; raise max_memory_mb or choose fewer topics"
        )
    return [min(SMALL_DEPTH, share // LARGE_BYTES[name]) if name in LARGE_BYTES else SMALL_DEPTH for name in types]
