"""``python -m test.benchmarks.driving_memory``: one line of JSON with the MB that driving takes."""

from __future__ import annotations

import json

import torch

from test.benchmarks.framework import peak_mb


def main() -> None:
    """Drive by the messages of a drive that is made here."""
    from test.benchmarks.driving import Watch, drive
    from test.benchmarks.driving_tick import record, untrained
    from vla_core.runtime.core import PolicyCore

    torch.set_num_threads(1)
    recorded = record(20)
    core = PolicyCore(untrained(recorded))
    core.warm_up()
    for _ in range(3):
        drive(core, recorded, Watch(), lambda stages: None)
    print(json.dumps({"peak": peak_mb()}))


if __name__ == "__main__":
    main()
