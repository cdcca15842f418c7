"""What is in a bag, a dataset or a checkpoint, as text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vla_core.checkpoint import Checkpoint, fingerprint
from vla_core.contract import NANOSECONDS
from vla_core.data import bag as bags
from vla_core.data import dataset as datasets
from vla_core.errors import VlaError


def describe(path: Path) -> str:
    """Describe whatever ``path`` is; raises when it is none of the three."""
    if not path.exists():
        raise VlaError(f"{path}: no such file or folder")
    if (path / "config.json").is_file() or (path / "model.safetensors").is_file():
        return describe_checkpoint(path)
    if (path / "dataset.json").is_file():
        return describe_dataset(path)
    if path.is_dir():
        found = bags.find_bags([path])
        return "\n\n".join(describe_bag(bag) for bag in found)
    raise VlaError(f"{path}: neither a bag, a dataset nor a checkpoint (all of these are folders)")


def describe_bag(path: Path) -> str:
    """Topics, counts, rates, and whether the bag is whole."""
    summary = bags.info(path)
    seconds = (summary.end_ns - summary.start_ns) / NANOSECONDS
    lines = [f"bag {path}: {sum(summary.counts.values())} messages, {seconds:.2f} s, {summary.bytes / 1e6:.2f} MB"]
    if not summary.whole:
        lines.append(f"  NOT WHOLE: {summary.note}")
    for topic in sorted(summary.topics):
        count = summary.counts[topic]
        rate = f"{(count - 1) / seconds:8.2f} Hz" if count > 1 and seconds > 0 else " " * 11
        lines.append(f"  {topic:<34} {summary.topics[topic]:<34} {count:>7} {rate}")
    for key, value in summary.metadata.items():
        if key != bags.CONTRACT_KEY:
            lines.append(f"  {key}: {value}")
    if bags.CONTRACT_KEY in summary.metadata:
        lines.append(f"  contract: {summary.contract.name}, {summary.contract.rate_hz:g} Hz")
    return "\n".join(lines)


def describe_dataset(path: Path) -> str:
    """Episodes, features and statistics."""
    dataset = datasets.load(path)
    lengths = [len(episode) for episode in dataset.episodes]
    lines = [
        f"dataset {path}: {len(lengths)} episodes, {dataset.frames} ticks ({min(lengths)} to {max(lengths)} each), "
        f"contract {dataset.contract.name} at {dataset.contract.rate_hz:g} Hz"
    ]
    for name, size in dataset.spec.images.items():
        lines.append(f"  image {name}: {size.width}x{size.height} RGB")
    statistics = dataset.statistics()
    names = {
        "state": [n for stream in dataset.spec.state for n in dataset.contract.stream(stream).names],
        "action": list(dataset.contract.action_names),
    }
    for feature, entries in names.items():
        for i, name in enumerate(entries):
            values = {key: statistics[feature][key][i] for key in ("min", "mean", "max", "std")}
            text = "  ".join(f"{key} {value:9.4f}" for key, value in values.items())
            still = "  (never moves)" if values["std"] < 1e-9 else ""
            lines.append(f"  {feature:<6} {name:<22} {text}{still}")
    for instruction in sorted({episode.instruction for episode in dataset.episodes}):
        lines.append(f"  instruction: {instruction!r}")
    return "\n".join(lines)


def describe_checkpoint(path: Path) -> str:
    """Model, inputs, contract and provenance."""
    checkpoint = Checkpoint.load(path)
    config, contract = checkpoint.config, checkpoint.contract
    parameters = sum(p.numel() for p in checkpoint.model.parameters())
    lines = [
        f"checkpoint {path}: {config.model.type}, {parameters:,} parameters, weights {fingerprint(path)}",
        f"  contract: {contract.name}, {contract.rate_hz:g} Hz",
        f"  sees: {', '.join(config.observation.names)}",
        f"  acts: {', '.join(f'{n} [{u}]' for n, u in zip(contract.action_names, contract.action_units, strict=True))}",
        f"  chunk: {config.model.horizon} steps of {1000 / contract.rate_hz:g} ms, {config.execution.steps} executed",
        f"  head: {config.model.head.type}",
        f"  parts: {', '.join(_parts(checkpoint))}",
    ]
    lines += [f"  {key}: {value}" for key, value in config.provenance.items()]
    return "\n".join(lines)


def _parts(checkpoint: Checkpoint) -> Iterator[str]:
    """Each part of the model with its number of parameters, and how many of them are trained if not all."""
    for name, part in checkpoint.model.named_children():
        total = sum(p.numel() for p in part.parameters())
        trained = sum(p.numel() for p in part.parameters() if p.requires_grad)
        yield f"{name} {total:,}" + ("" if trained == total else f" ({trained:,} trained)")
