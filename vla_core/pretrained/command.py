"""``vla import``: recorded drives to bags, published checkpoints to ours; one sub-command for each layout."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla_core.data.drives import command as drives
from vla_core.errors import VlaError

if TYPE_CHECKING:
    from vla_core.checkpoint import Checkpoint


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``import`` to a parser."""
    parser = commands.add_parser("import", help="recorded drives to bags, or a published policy to a checkpoint")
    kinds = parser.add_subparsers(metavar="layout", required=True)
    drives.add_kinds(kinds)

    openvla = kinds.add_parser("openvla", help="OpenVLA or OpenVLA-OFT, to a checkpoint")
    _add_common(openvla, "image streams in the order of training", state="of OpenVLA-OFT: vectors for its projector")
    openvla.add_argument("--unnorm-key", metavar="DATASET", help="by whose statistics the robot acts")
    openvla.add_argument("--horizon", type=int, help="of OpenVLA-OFT: rows of a chunk (LIBERO 8, ALOHA 25, Bridge 5)")
    openvla.add_argument("--center-crop", action="store_true", help="it was fine-tuned with random crops")
    openvla.add_argument("--bounds", choices=("quantile", "min_max"), default="quantile",
                         help="what OpenVLA-OFT normalized by (ALOHA: min_max)")  # fmt: skip
    openvla.add_argument(
        "--open-close", nargs="+", default=[], metavar="ENTRY", help="of the action: 0 closed to 1 open for the model, "
        "1 closed to -1 open for the robot (LIBERO: gripper)"
    )  # fmt: skip
    openvla.add_argument("--dtype", choices=("stored", "float32", "bfloat16"), default="stored", help="of the weights")
    openvla.set_defaults(run=_openvla)

    smolvla = kinds.add_parser("smolvla", help="SmolVLA in LeRobot's layout, to a checkpoint")
    _add_common(smolvla, "image streams, each with the policy's own key where it differs",
                state="vectors that make its state, in order")  # fmt: skip
    smolvla.add_argument("--statistics", metavar="GROUP|FILE", help="to run by, where the policy has none of its own: "
                         "a group's name, or meta/stats.json of a dataset")  # fmt: skip
    smolvla.add_argument("--vlm", help="hub name or folder of its vision-language model; default: the policy's")
    smolvla.add_argument("--ignore", nargs="+", default=[], metavar="KEY", help="unknown keys of its config.json that "
                         "change nothing")  # fmt: skip
    smolvla.set_defaults(run=_smolvla)


def _add_common(parser: argparse.ArgumentParser, cameras: str, state: str) -> None:
    parser.add_argument("source", help="a hub name, or a local folder in the published layout")
    parser.add_argument("--contract", required=True, help="the robot: a name in config/robots, or a file")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--cameras", nargs="+", default=[], metavar="NAME[=KEY]",
                        help=f"{cameras}; default: the only one")  # fmt: skip
    parser.add_argument("--state", nargs="+", default=[], metavar="STREAM", help=state)
    parser.add_argument("--instruction", metavar="STREAM", help="default: the only text stream")
    parser.add_argument(
        "--image-size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="pictures it is given; default: its own"
    )
    parser.add_argument("--revision", help="of the hub's repository: a branch, a tag or a commit")
    parser.add_argument("--no-self-check", action="store_true", help="do not ask whether it sees and listens")


def _openvla(parsed: argparse.Namespace) -> int:
    cameras = _cameras(parsed.cameras)
    keyed = [name for name, key in cameras.items() if key is not None]
    if keyed:
        raise VlaError(f"--cameras {keyed[0]}={cameras[keyed[0]]}: OpenVLA's cameras have no keys, only an order")

    def load(contract: Any) -> Checkpoint:
        from vla_core.pretrained import openvla

        return openvla.load(
            parsed.source, contract, unnorm_key=parsed.unnorm_key, cameras=tuple(cameras), state=parsed.state,
            instruction=parsed.instruction, revision=parsed.revision, horizon=parsed.horizon,
            center_crop=parsed.center_crop, bounds=parsed.bounds, open_close=parsed.open_close, dtype=parsed.dtype,
            image_size=_size(parsed.image_size),
        )  # fmt: skip

    return _import(parsed, load)


def _smolvla(parsed: argparse.Namespace) -> int:
    def load(contract: Any) -> Checkpoint:
        from vla_core.pretrained import smolvla

        return smolvla.load(
            parsed.source, contract, cameras=_cameras(parsed.cameras), state=parsed.state,
            instruction=parsed.instruction, statistics=parsed.statistics, image_size=_size(parsed.image_size),
            vlm=parsed.vlm, ignore=parsed.ignore, revision=parsed.revision,
        )  # fmt: skip

    return _import(parsed, load)


def _import(parsed: argparse.Namespace, load: Any) -> int:
    """Load strictly, check that it sees and listens, and only then write."""
    from vla_core.checkpoint import check_replaceable
    from vla_core.contract import RobotContract
    from vla_core.pretrained.self_check import self_check
    from vla_core.runtime.policy import CheckpointPolicy

    check_replaceable(parsed.out)
    checkpoint = load(RobotContract.load(parsed.contract))
    if not parsed.no_self_check:
        policy = CheckpointPolicy(checkpoint)
        policy.source = parsed.source
        print("\n".join(self_check(policy).lines()))
    checkpoint.save(parsed.out)
    print("\n".join(_told(checkpoint)))
    print(f"{parsed.out}: next: vla inspect, vla evaluate, vla train, or the policy node")
    return 0


def _told(checkpoint: Checkpoint) -> list[str]:
    """What was decided, so that a wrong choice is seen."""
    model, spec = checkpoint.config.model, checkpoint.config.observation
    sizes = ", ".join(f"{name} {size.height}x{size.width}" for name, size in spec.images.items())
    chosen = {"cameras": sizes, "state": ", ".join(spec.state) or "none", "chunk": f"{model.horizon} rows",
              **{key: value for key, value in checkpoint.config.provenance.items() if key != "source"}}  # fmt: skip
    if hasattr(model, "center_crop"):
        chosen["center crop"] = "on" if model.center_crop else "off (--center-crop, if it was trained with random ones)"
    return [f"{key}: {value}" for key, value in chosen.items()]


def _size(given: list[int] | None) -> tuple[int, int] | None:
    return (given[0], given[1]) if given else None


def _cameras(given: list[str]) -> dict[str, str | None]:
    """Streams and, where they are named, the policy's keys."""
    found: dict[str, str | None] = {}
    for text in given:
        name, equals, key = text.partition("=")
        if not name or (equals and not key) or name in found:
            raise VlaError(f"--cameras {text}: expected distinct names, NAME or NAME=KEY")
        found[name] = key or None
    return found
