"""``vla bench policy``: its arguments and what it prints."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vla_core.cli import positive

EPISODES = 20


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``bench`` to a parser."""
    bench = commands.add_parser("bench", help="how fast and how large a policy is, in every way that it can run")
    kinds = bench.add_subparsers(metavar="what", required=True)
    policy = kinds.add_parser("policy", help="eager, compiled, TorchScript, ONNX and quantized, side by side")
    policy.add_argument("policy", nargs="?", default="tiny", help="a checkpoint, or a preset such as tiny (default)")
    policy.add_argument("--way", nargs="+", metavar="NAME", help="some of them, such as eager onnx 'onnx int8'")
    policy.add_argument("--rounds", type=positive, default=10, help="in which all take turns")
    policy.add_argument("--calls", type=positive, default=20, help="of each in a round")
    policy.add_argument("--threads", type=positive, default=1)
    policy.add_argument("--task", help="a simulated world, such as push-v3: success of checkpoint and graphs")
    policy.add_argument("--episodes", type=positive, default=EPISODES, help=f"of --task, default {EPISODES}")
    policy.add_argument("--json", type=Path, metavar="FILE", help="the figures as data")
    policy.set_defaults(run=_bench)


def _bench(parsed: argparse.Namespace) -> int:
    from vla_core.evaluation.policy_bench import WAYS, BenchOptions, bench, find_policy, table
    from vla_core.evaluation.results import check_writable

    options = BenchOptions(ways=tuple(parsed.way or WAYS), rounds=parsed.rounds, calls=parsed.calls,
                           threads=parsed.threads)  # fmt: skip
    if parsed.json is not None:
        check_writable(parsed.json)
    record = bench(find_policy(parsed.policy), options, parsed.policy, parsed.task, parsed.episodes)
    print("\n".join(table(record)))
    if parsed.json is not None:
        parsed.json.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return 0
