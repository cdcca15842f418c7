"""A checkpoint: a folder that is enough to run.

``config.json`` (model, observation, normalization, execution), ``model.safetensors``, ``statistics.json``,
``tokenizer.json`` and ``contract.yaml``; ``dataset_statistics.json`` as well where it was trained on a mixture. It is
written beside its place and moved there whole; nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vla_core import hub
from vla_core.config import ConfigError, from_dict, to_dict
from vla_core.contract import RobotContract
from vla_core.errors import VlaError, choices
from vla_core.model.vla import MODEL_REGISTRY, build_model
from vla_core.model.vla.sizes import check_images, check_rates, check_sees, columns, model_sizes
from vla_core.model.vlm.text_encoder import HubTokenizer, WordTokenizer, tokenizer_from_dict
from vla_core.observation.builder import ObservationSpec
from vla_core.observation.normalizer import Normalization, Normalizer, Statistics, entry_names
from vla_core.runtime.execution import Execution

T = TypeVar("T")
FORMAT = "vla_ros_checkpoint_v1"
FILES = hub.CHECKPOINT_FILES
MIXTURE_FILE = "dataset_statistics.json"


class CheckpointError(VlaError):
    """A checkpoint that cannot be trusted to run, and what it lacks."""


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """``config.json``: all that is needed beside weights, statistics, tokenizer and contract."""

    format: str = FORMAT
    model: Annotated[Any, MODEL_REGISTRY]
    observation: ObservationSpec
    normalization: Normalization = field(default_factory=Normalization)
    execution: Execution = field(default_factory=Execution)
    provenance: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.execution.check(self.model.horizon, self.model.head)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A policy in memory.

    ``dataset_statistics`` are those of every dataset of the mixture that it was trained on, by name; the normalizer
    has those of the one that it is deployed for.
    """

    config: PolicyConfig
    model: Any
    normalizer: Normalizer
    tokenizer: WordTokenizer | HubTokenizer
    contract: RobotContract
    dataset_statistics: dict[str, Statistics] = field(default_factory=dict)

    def save(self, path: Path | str) -> None:
        """Write the folder; an existing checkpoint at ``path`` is replaced once the new one is whole."""
        path = Path(path)
        check_replaceable(path)
        with whole_folder(path) as partial:
            # What the model has become since, such as one with adapters.
            write_json(partial / "config.json", to_dict(dataclasses.replace(self.config, model=self.model.config)))
            write_json(partial / "statistics.json", self.normalizer.statistics)
            if self.dataset_statistics:
                write_json(partial / MIXTURE_FILE, self.dataset_statistics)
            write_json(partial / "tokenizer.json", self.tokenizer.to_dict())
            (partial / "contract.yaml").write_text(self.contract.to_yaml(), encoding="utf-8")
            weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.model.state_dict().items()}
            save_file(weights, partial / "model.safetensors")

    @classmethod
    def load(cls, path: Path | str, *, dataset: str | None = None, **parts: Any) -> Checkpoint:
        """Read a folder strictly; raises :class:`CheckpointError` naming what is missing or does not fit.

        ``dataset`` names the dataset of a mixture by whose statistics the policy is to run; None takes those that it
        was deployed with. ``parts`` are modules of the caller's own that the model was built with, as
        ``sensor_encoders`` of a ``MultiSensorVLA``; their weights are in the checkpoint.
        """
        path = Path(path)
        config = read_config(path, PolicyConfig, FORMAT, FILES, "checkpoint")
        contract = RobotContract.load(path / "contract.yaml")
        mixture = _mixture(path)
        statistics = _chosen(path, dataset, mixture)
        tokenizer = tokenizer_from_dict(read_json(path / "tokenizer.json"))
        _check_sizes(path, config, contract, statistics, tokenizer)
        model = build_model(config.model, weights=False, **parts)
        load_weights(model, path / "model.safetensors")
        return cls(
            config=config,
            model=model.eval(),
            normalizer=Normalizer(config.normalization, statistics, columns(config.observation, contract),
                                  entry_names(config.observation, contract)),
            tokenizer=tokenizer,
            contract=contract,
            dataset_statistics=mixture,
        )  # fmt: skip

    @classmethod
    def from_pretrained(
        cls, name: Path | str, *, revision: str | None = None, dataset: str | None = None, **parts: Any
    ) -> Checkpoint:
        """:meth:`load` of a local folder, or of the hub's repository ``user/name`` or ``user/name@revision``."""
        return cls.load(hub.local_folder(name, revision=revision), dataset=dataset, **parts)

    def push_to_hub(
        self, repo_id: str, *, private: bool = False, message: str = "", evaluation: Path | None = None
    ) -> str:
        """Upload with a model card; ``evaluation`` is a file of ``vla evaluate``. Returns the page's address."""
        with tempfile.TemporaryDirectory() as place:
            self.save(Path(place) / "checkpoint")
            return hub.push(Path(place) / "checkpoint", repo_id, private=private, message=message,
                            evaluation=evaluation)  # fmt: skip


def check_replaceable(path: Path) -> None:
    """Raise unless a checkpoint can be written at ``path``: nothing is there, or an older checkpoint."""
    if not path.name or (path.exists() and not (path / "model.safetensors").is_file()):
        raise CheckpointError(f"{path}: exists and is no checkpoint; name a new folder, or one with a checkpoint")


def fingerprint(path: Path | str) -> str:
    """First 12 hexadecimal digits of the SHA-256 of the weights: names a checkpoint in diagnostics and reports."""
    digest = hashlib.sha256()
    with (Path(path) / "model.safetensors").open("rb") as file:  # which may not fit into memory
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()[:12]


def _mixture(path: Path) -> dict[str, Statistics]:
    """Statistics by dataset, of a checkpoint that has several."""
    file = path / MIXTURE_FILE
    found = read_json(file) if file.is_file() else {}
    if not isinstance(found, dict) or not all(isinstance(value, dict) for value in found.values()):
        raise CheckpointError(f"{file}: expected groups of statistics by the name of their dataset")
    return found


def _chosen(path: Path, dataset: str | None, mixture: dict[str, Statistics]) -> Statistics:
    """The statistics to run by."""
    if dataset is None:
        own: Statistics = read_json(path / "statistics.json")
        return own
    if dataset not in mixture:
        raise CheckpointError(f"{path}: no statistics of a dataset {dataset!r}; choices: {choices(mixture)}")
    return mixture[dataset]


def _check_sizes(path: Path, config: PolicyConfig, contract: RobotContract, statistics: Statistics,
                 tokenizer: WordTokenizer | HubTokenizer) -> None:  # fmt: skip
    """Model, contract and statistics must speak of the same numbers."""
    for name in config.observation.names:
        contract.stream(name)
    try:
        check_sees(config.model.type, MODEL_REGISTRY[config.model.type].sees, config.observation)
        check_images(config.model, config.observation)
        check_rates(config.model, contract)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if set(config.model.cameras) != set(config.observation.images):
        raise CheckpointError(f"{path}: the model's cameras are {choices(config.model.cameras)}, "
                              f"observation.images has {choices(config.observation.images)}")  # fmt: skip
    if tokenizer.vocab_size != config.model.vocab_size:
        raise CheckpointError(f"{path}: tokenizer.json has {tokenizer.vocab_size} words, model.vocab_size is "
                              f"{config.model.vocab_size}")  # fmt: skip
    fitting = model_sizes(config.observation, contract, tokenizer.vocab_size)
    for key, absent in {"history": 1, "clouds": {}, "sequences": {}, "maps": (), "calibrated": ()}.items():
        found, expected = getattr(config.model, key, absent), fitting.get(key, absent)
        if found != expected:
            raise CheckpointError(f"{path}: model.{key} is {found!r}, but {expected!r} by the observation")
    if not isinstance(statistics, dict):
        raise CheckpointError(f"{path}: statistics.json holds {type(statistics).__name__}, expected groups of numbers")
    numbers = {
        "state": (sum(len(contract.stream(name).names) for name in config.observation.state), config.model.state_dim),
        "action": (len(contract.action_names), config.model.action_dim),
    }
    for name, (declared, modelled) in numbers.items():
        if declared != modelled:
            raise CheckpointError(f"{path}: the contract has {declared} numbers in {name!r}, the model {modelled}")
        for key, values in statistics.get(name, {}).items():
            plans = name == "action" and contract.plans and isinstance(values, list) and isinstance(values[0], list)
            rows = values if plans else [values]
            for row in rows:
                if not isinstance(row, list) or not all(isinstance(v, int | float) and isfinite(v) for v in row):
                    raise CheckpointError(f"{path}: statistics {name}.{key} are no finite numbers: {values!r}")
                if key != "count" and len(row) != declared:
                    raise CheckpointError(f"{path}: statistics {name}.{key} have {len(row)} entries, not {declared}")
            if plans and len(rows) < config.model.horizon:
                raise CheckpointError(f"{path}: statistics {name}.{key} are those of plans of {len(rows)} rows, the "
                                      f"model's horizon is {config.model.horizon}")  # fmt: skip


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Load a safetensors file strictly; raises :class:`CheckpointError` naming what does not fit."""
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = sorted(set(expected) - set(found))
    extra = sorted(set(found) - set(expected))
    wrong = [f"{n} {tuple(found[n].shape)} instead of {shape}" for n, shape in expected.items()
             if n in found and tuple(found[n].shape) != shape]  # fmt: skip
    if missing or extra or wrong:
        raise CheckpointError(f"{path}: weights do not fit config.json: missing {missing or 'none'}, "
                              f"unexpected {extra or 'none'}, of another shape {wrong or 'none'}")  # fmt: skip
    # Assigned, not copied, where there is nothing yet to copy into.
    model.load_state_dict(found, strict=True, assign=any(weight.is_meta for weight in model.parameters()))


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``path`` once the block is done; an older one stays until then.

    Nothing is left of a block that fails; a full disk is a :class:`CheckpointError`.
    """
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        replace_folder(partial, path)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, SafetensorError):  # a full disk, in the words of safetensors
            raise CheckpointError(f"{path}: cannot be written: {error}") from None
        raise


def replace_folder(partial: Path, path: Path) -> None:
    """Put the whole folder in place; the old one is moved aside first, since folders cannot be swapped portably."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(partial, path)
    except OSError:
        if old.exists():
            os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, data: Any) -> None:
    """Plain data as a file."""
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")


def read_config(path: Path, kind: type[T], format_: str, files: Sequence[str], what: str) -> T:
    """The ``config.json`` of a folder that has all of ``files``, as ``kind``; raises :class:`CheckpointError`."""
    absent = [name for name in files if not (path / name).is_file()]
    if absent:
        there = ", ".join(sorted(p.name for p in path.iterdir())) if path.is_dir() else "no such folder"
        raise CheckpointError(f"{path}: not a {what}: {', '.join(absent)} missing; found: {there or 'nothing'}")
    data = read_json(path / "config.json")
    if not isinstance(data, dict) or data.get("format") != format_:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise CheckpointError(f"{path}: config.json has format {found!r}, expected {format_!r}")
    try:
        return from_dict(kind, data)
    except ConfigError as error:
        raise CheckpointError(f"{path}/config.json: {error}") from None


def read_json(path: Path) -> Any:
    """A file as plain data; raises :class:`CheckpointError` for one that is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, not JSON
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
