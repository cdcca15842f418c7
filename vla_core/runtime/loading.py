"""A policy by the place where it is."""

from __future__ import annotations

import re
from pathlib import Path

from vla_core import hub
from vla_core.errors import VlaError
from vla_core.planning.place import find_setup
from vla_core.runtime.policy import CheckpointPolicy, Policy

_URL = re.compile(r"(wss?):/+(.+)")  # a Path has made one slash of two


def is_server(place: Path | str) -> bool:
    """Whether a place is the address of a policy server, or a YAML file that describes one."""
    described = str(place).endswith((".yaml", ".yml")) and find_setup(place) is None
    return described or _URL.fullmatch(str(place)) is not None


def load_policy(
    place: Path | str, seed: int = 0, dataset: str | None = None, device: str = "cpu"
) -> Policy:  # fmt: skip
    """The policy of a checkpoint folder or of the hub's repository ``user/name``; of a server; or a planner.

    A planner is a YAML file of the type ``planner``, or a folder with a ``planner.yaml`` (:mod:`.planning.policy`).
    A server is ``ws://HOST:PORT``, ``wss://…``, or a YAML file that describes one (docs/serving.md). ``seed`` is that
    of the sampling noise, of a server its own; ``dataset`` as :meth:`Checkpoint.load` takes it. ``device`` is where a
    checkpoint's model runs; the others cannot choose.
    """
    planner = find_setup(place)
    if planner is not None:
        _on_cpu(device, place, "a planner, which runs on the CPU")
        from vla_core.planning.policy import PlannerPolicy, load_setup

        return PlannerPolicy.load(load_setup(planner), seed, dataset, source=str(place))
    if is_server(place):
        from vla_core.serving.remote_policy import Remote, RemotePolicy

        _on_cpu(device, place, "a server; tell it: vla serve --device")
        if dataset is not None:
            raise VlaError(f"dataset {dataset!r}: {place} is a server; tell it which: vla serve --dataset")
        url = _URL.fullmatch(str(place))
        return RemotePolicy(Remote(server="{}://{}".format(*url.groups())) if url else Remote.load(place))
    folder = hub.local_folder(place)
    if (folder / "export.json").is_file():
        from vla_core.export.policy import ExportedPolicy

        _on_cpu(device, place, "an exported policy, which runs where it was exported for")
        if dataset is not None:
            raise VlaError(f"dataset {dataset!r}: {place} is an exported policy, with its statistics in its graph; "
                           "export the checkpoint with --dataset")  # fmt: skip
        return ExportedPolicy.load(folder, seed, source=str(place))
    return CheckpointPolicy.load(folder, seed, dataset, source=str(place), device=device)


def _on_cpu(device: str, place: Path | str, what: str) -> None:
    if device != "cpu":
        raise VlaError(f"device {device!r}: {place} is {what}")
