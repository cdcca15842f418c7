"""Checkpoints and datasets on a model hub, through huggingface_hub: by name wherever a folder is taken, and back.

A local folder always goes first. What was downloaded once is found again without a network, which is how a robot
should run. Nothing but the files that belong to a checkpoint or a dataset is downloaded or uploaded: no pickles.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from vla_core.errors import VlaError

Kind = Literal["model", "dataset"]

CHECKPOINT_FILES = ("config.json", "model.safetensors", "statistics.json", "tokenizer.json", "contract.yaml")
PATTERNS: dict[Kind, tuple[str, ...]] = {
    "model": (*CHECKPOINT_FILES, "dataset_statistics.json", "evaluation.json", "README.md"),
    "dataset": ("meta/*", "data/*", "videos/*", "images/*", "vla_ros/*", "README.md"),
}  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


class HubError(VlaError):
    """A hub that cannot be reached, or that has not what is asked of it."""


def local_folder(name: Path | str, kind: Kind = "model", revision: str | None = None) -> Path:
    """The folder ``name``, or a copy of the hub's repository of that name; other names are returned as they are.

    ``user/name@revision`` names a branch, a tag or a commit, as ``revision`` does. Raises :class:`HubError` when the
    repository is neither reachable nor in the local cache.
    """
    path = Path(name).expanduser()
    if path.exists() or not _NAME.fullmatch(str(name)):
        return path
    repo_id, _, asked = str(name).partition("@")
    with _named_errors(repo_id, f"{name}: no such folder here, and"):
        return _download(repo_id, kind, revision or asked)


def foreign_folder(name: Path | str, patterns: tuple[str, ...], revision: str | None = None) -> Path:
    """:func:`local_folder` of a model in another project's layout, whose files are those that ``patterns`` name."""
    path = Path(name).expanduser()
    if path.exists() or not _NAME.fullmatch(str(name)):
        return path
    repo_id, _, asked = str(name).partition("@")
    with _named_errors(repo_id, f"{name}: no such folder here, and"):
        return _download(repo_id, "model", revision or asked, patterns)


def any_folder(name: Path | str) -> Path:
    """:func:`local_folder` of a checkpoint or, where the hub has none of that name, of a dataset."""
    try:
        return local_folder(name, "model")
    except HubError as error:
        try:
            return local_folder(name, "dataset")
        except HubError:
            raise error from None


def pull(name: str, kind: Kind = "model", out: Path | None = None) -> Path:
    """Download ``user/name`` or ``user/name@revision`` into the local cache, or into the new folder ``out``."""
    if not _NAME.fullmatch(name):
        raise HubError(f"{name!r} is no name of a repository; expected user/name or user/name@revision")
    if out is not None and out.exists():
        raise HubError(f"{out} exists already; remove it or choose another folder")
    repo_id, _, revision = name.partition("@")
    with _named_errors(repo_id, "not downloaded:"):
        copy = _download(repo_id, kind, revision)
    if out is None:
        return copy
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(copy, partial)  # the cache's links become files
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out


def push(
    folder: Path, repo_id: str, *, private: bool = False, message: str = "", evaluation: Path | None = None
) -> str:
    """Upload a checkpoint or dataset as one commit, and return the address of its page.

    The repository is made where it is not there; a card is written where the folder has no ``README.md``. Files of an
    earlier upload that are gone here go there, too. A dataset gets its format version as a tag, which LeRobot asks for.

    Args:
        evaluation: JSON file of ``vla evaluate``, uploaded with a checkpoint and told in its card.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    from vla_core import card

    kind = kind_of(folder)
    _check_whole(folder, kind)
    if not _NAME.fullmatch(repo_id) or "@" in repo_id:
        raise HubError(f"{repo_id!r} is no name of a repository; expected user/name")
    if evaluation is not None and kind == "dataset":
        raise HubError(f"{folder}: a dataset has no evaluation; leave it out")
    files = {str(file.relative_to(folder)): file for file in _files(folder, kind)}
    contents: dict[str, Path | bytes] = dict(files)
    if evaluation is not None:
        contents["evaluation.json"] = evaluation
    if "README.md" not in files:
        contents["README.md"] = card.write(folder, kind, repo_id, evaluation).encode()
    api = HfApi(library_name="vla_ros")
    with _named_errors(repo_id, "not uploaded:"):
        repo = api.create_repo(repo_id, repo_type=kind, private=private or None, exist_ok=True)
        stale = [name for name in api.list_repo_files(repo_id, repo_type=kind)
                 if name not in contents and _belongs(name, kind)]  # fmt: skip
        operations: list[Any] = [CommitOperationDelete(path_in_repo=name) for name in stale]
        operations += [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
                       for name, content in sorted(contents.items())]  # fmt: skip
        api.create_commit(repo_id, operations, repo_type=kind, commit_message=message or f"Upload {folder.name}")
        if kind == "dataset":
            version = card.dataset_version(folder)
            if version in [ref.name for ref in api.list_repo_refs(repo_id, repo_type=kind).tags]:
                api.delete_tag(repo_id, tag=version, repo_type=kind)
            api.create_tag(repo_id, tag=version, repo_type=kind)
    return str(repo)


def kind_of(folder: Path) -> Kind:
    """Whether a folder is a checkpoint or a dataset; raises :class:`HubError` when it is neither."""
    if (folder / "model.safetensors").is_file() and (folder / "config.json").is_file():
        return "model"
    if (folder / "meta" / "info.json").is_file():
        return "dataset"
    raise HubError(f"{folder}: neither a checkpoint (config.json, model.safetensors) nor a dataset (meta/info.json)")


def _check_whole(folder: Path, kind: Kind) -> None:
    """Raise where something is missing that whoever downloads it would miss."""
    if kind == "dataset":
        from vla_core.data.folder import open_folder

        open_folder(folder)
        return
    absent = [name for name in CHECKPOINT_FILES if not (folder / name).is_file()]
    if absent:
        raise HubError(f"{folder}: not a whole checkpoint: {', '.join(absent)} missing")


def _download(repo_id: str, kind: Kind, revision: str, patterns: tuple[str, ...] = ()) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo_id, repo_type=kind, revision=revision or None, library_name="vla_ros",
                                  allow_patterns=list(patterns or PATTERNS[kind])))  # fmt: skip


def _files(folder: Path, kind: Kind) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        if file.is_file() and _belongs(file.relative_to(folder).as_posix(), kind):
            yield file


def _belongs(name: str, kind: Kind) -> bool:
    """Whether a file is one of a checkpoint's or dataset's own; caches and training states are not."""
    return any(name == pattern or (pattern.endswith("/*") and name.startswith(pattern[:-1]))
               for pattern in PATTERNS[kind])  # fmt: skip


@contextmanager
def _named_errors(repo_id: str, where: str) -> Iterator[None]:
    """One line for what the hub's library raises: who was asked for what, why it failed, what to do."""
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    try:
        yield
    except errors.GatedRepoError:
        raise HubError(f"{where} {repo_id} at {hub} is open to those alone whom its owner lets in: ask for access on "
                       "its page, then `hf auth login`") from None  # fmt: skip
    except errors.RepositoryNotFoundError:
        raise HubError(f"{where} {hub} has no repository {repo_id} that you may see; is the name right? For a private "
                       "one: `hf auth login`, or set HF_TOKEN") from None  # fmt: skip
    except errors.RevisionNotFoundError:
        raise HubError(f"{where} {repo_id} at {hub} has no such revision") from None
    except errors.LocalTokenNotFoundError:
        raise HubError(f"{where} {hub} wants to know who you are: `hf auth login`, or set HF_TOKEN") from None
    except errors.LocalEntryNotFoundError as error:
        cause = error.__cause__ or error
        why = "was not asked (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else f"cannot be reached ({_short(cause)})"
        raise HubError(f"{where} {repo_id} is not in the local cache {constants.HF_HUB_CACHE} and {hub} {why}: "
                       "download it once where there is a network, or copy the folder here") from None  # fmt: skip
    except errors.HfHubHTTPError as error:
        raise HubError(f"{where} {hub} answered for {repo_id}: {_short(error)}") from None
    except (errors.HFValidationError, errors.OfflineModeIsEnabled, OSError, _transport_error()) as error:
        raise HubError(f"{where} {repo_id} at {hub}: {_short(error)}") from None


def _transport_error() -> type[Exception]:
    """What the library's HTTP client raises without an answer; the client differs between its versions."""
    from huggingface_hub import errors

    return errors.HfHubHTTPError.__mro__[1]


def _short(error: BaseException | None) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
