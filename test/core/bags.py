"""Bags in every form in which rosbag2 stores them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml
from mcap.writer import CompressionType
from mcap.writer import Writer as McapWriter
from rosbags.rosbag2 import Reader, StoragePlugin, Writer
from rosbags.rosbag2.enums import CompressionFormat, CompressionMode

from vla_core.contract import RobotContract
from vla_core.data.bag import CONTRACT_KEY
from vla_core.observation.messages import Message, typestore

from .helpers import CONTRACT

_FORMS = {
    "mcap": (StoragePlugin.MCAP, CompressionMode.NONE),
    "mcap zstd chunks": (StoragePlugin.MCAP, CompressionMode.STORAGE),
    "mcap zstd messages": (StoragePlugin.MCAP, CompressionMode.MESSAGE),
    "mcap zstd file": (StoragePlugin.MCAP, CompressionMode.FILE),
    "sqlite3": (StoragePlugin.SQLITE3, CompressionMode.NONE),
    "sqlite3 zstd messages": (StoragePlugin.SQLITE3, CompressionMode.MESSAGE),
    "sqlite3 zstd file": (StoragePlugin.SQLITE3, CompressionMode.FILE),
}
KINDS = (*_FORMS, "mcap lz4 chunks")


def write_kind(
    path: Path, messages: Sequence[Message], kind: str, receipts: Sequence[int] | None = None,
    contract: RobotContract = CONTRACT,
) -> Path:  # fmt: skip
    """Messages in the given order, received at ``receipts`` or at their stamps."""
    receipts = receipts or [m.stamp_ns for m in messages]
    plugin, mode = _FORMS.get(kind, _FORMS["mcap"])
    writer = Writer(path, version=9, storage_plugin=plugin)
    if mode != CompressionMode.NONE:
        writer.set_compression(mode, CompressionFormat.ZSTD)
    writer.set_custom_data(CONTRACT_KEY, contract.to_yaml())
    with writer:
        connections = {}
        for receipt, message in zip(receipts, messages, strict=True):
            if message.topic not in connections:
                connections[message.topic] = writer.add_connection(message.topic, message.type, typestore=typestore())
            writer.write(connections[message.topic], receipt, message.data)
    if kind == "mcap lz4 chunks":
        _rewrite_lz4(path)
    return path


def _rewrite_lz4(path: Path) -> None:
    """The same MCAP with lz4 chunks and checksums, as other recorders write them."""
    (file,) = path.glob("*.mcap")
    with Reader(path) as reader:
        entries = [(c.topic, c.msgtype, receipt, data) for c, receipt, data in reader.messages()]
    with file.open("wb") as stream:
        writer = McapWriter(stream, compression=CompressionType.LZ4, chunk_size=4096)
        writer.start(profile="ros2")
        channels = {}
        for topic, kind in dict.fromkeys((topic, kind) for topic, kind, _, _ in entries):
            schema = writer.register_schema(kind, "ros2msg", b"")
            qos = yaml.safe_dump([])
            channels[topic] = writer.register_channel(topic, "cdr", schema, {"offered_qos_profiles": qos})
        for topic, _, receipt, data in entries:
            writer.add_message(channels[topic], receipt, data, receipt)
        writer.finish()
    metadata = path / "metadata.yaml"
    plain = yaml.safe_load(metadata.read_text())
    for topic in plain["rosbag2_bagfile_information"]["topics_with_message_count"]:
        topic["topic_metadata"]["offered_qos_profiles"] = []
    metadata.write_text(yaml.safe_dump(plain))
