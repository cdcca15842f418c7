"""Sizes of a model that nobody chooses: they follow from what the policy sees and from the robot's contract."""

from __future__ import annotations

from typing import Any

from vla_core.config import ConfigError
from vla_core.contract import RobotContract
from vla_core.observation.spec import ObservationSpec

MAP_COLUMNS = ("value",)


def columns(spec: ObservationSpec, contract: RobotContract) -> dict[str, tuple[str, ...]]:
    """The columns of every cloud, sequence and map, by stream: what their normalization is about."""
    named = {name: contract.stream(name).names for name in (*spec.clouds, *spec.sequences)}
    return {**named, **{name: MAP_COLUMNS for name in spec.maps}}


def classes_of(recipe: Any) -> dict[str, tuple[str, ...]]:
    """The words that a model's auxiliary heads tell, by what they are about."""
    return {name: head.classes for name, head in getattr(recipe, "auxiliary", {}).items()}


def model_sizes(spec: ObservationSpec, contract: RobotContract, vocab_size: int) -> dict[str, Any]:
    """Arguments of a recipe's ``config``; what single images, a state and an instruction do not have, only if it is
    there, so that models which do not know it need not name it."""
    sizes: dict[str, Any] = {
        "cameras": tuple(spec.images),
        "state_dim": sum(len(contract.stream(name).names) for name in spec.state),
        "action_dim": len(contract.action_names),
        "vocab_size": vocab_size,
    }
    more = {
        "history": spec.history if spec.history > 1 else None,
        "clouds": {name: contract.stream(name).names for name in spec.clouds},
        "sequences": {name: contract.stream(name).names for name in spec.sequences},
        "maps": spec.maps,
        "calibrated": tuple(spec.calibrations),
    }
    return {**sizes, **{name: value for name, value in more.items() if value}}


def check_sees(kind: str, sees: tuple[str, ...], spec: ObservationSpec) -> None:
    """Raise :class:`ConfigError` for what the observation has and a model of type ``kind`` does not take."""
    unseen = [place for place in spec.extras if place.split(".")[0] not in sees]
    if unseen:
        listed = " and ".join((", ".join(sees[:-1]), sees[-1]))
        raise ConfigError(f"{kind} sees {listed}, not {', '.join(unseen)}")


def check_images(config: Any, spec: ObservationSpec) -> None:
    """Raise :class:`ConfigError` where the vision encoder of a recipe or config takes images of another size."""
    expected = getattr(getattr(config, "vision", None), "size", None)
    for name, image in spec.images.items():
        if expected is not None and (image.height, image.width) != tuple(expected):
            raise ConfigError(f"observation.images.{name}: {image.height}x{image.width} pixels, "
                              f"model.vision.image_size is {expected[0]}x{expected[1]}; make them equal")  # fmt: skip


def check_rates(config: Any, contract: RobotContract) -> None:
    """Raise :class:`ConfigError` where an encoder counts time by another rate than that of its stream."""
    for name, encoder in getattr(config, "sensors", {}).items():
        rate_hz = getattr(encoder, "rate_hz", None)
        found_hz = contract.stream(name).rate_hz
        if rate_hz is not None and found_hz is not None and abs(rate_hz - found_hz) > 1e-3 * found_hz:
            raise ConfigError(f"model.sensors.{name}.rate_hz: {rate_hz:g}, but the stream {name} of {contract.name!r} "
                              f"comes at {found_hz:g} Hz; make them equal")  # fmt: skip
