"""Bags, one or thousands, to a LeRobotDataset: streaming, over several processes, resumable, with a report.

What is done so far is kept in ``.<name>.partial`` beside the dataset's place: finished bags in ``shards``
(:mod:`shards`), and the dataset that grows from them in ``dataset``. It is renamed when it is whole.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vla_core.config import to_dict
from vla_core.contract import ContractError, RobotContract
from vla_core.data.bag import BagError
from vla_core.data.bag import info as bag_info
from vla_core.data.episodes import EPISODE_TOPIC
from vla_core.data.executor import results
from vla_core.data.folder import ACTION, FORMAT, IMAGES, STATE
from vla_core.data.happened import EXECUTED, INTERVENED, REWARD, Happened, recorded
from vla_core.data.lerobot.layout import V30, VERSIONS, Feature, image, vector
from vla_core.data.lerobot.video import VideoOptions
from vla_core.data.lerobot.writer import LeRobotWriter
from vla_core.data.plans import plan_names, rows_recorded
from vla_core.data.report import Report, Thresholds, check
from vla_core.data.shards import BagJob, Shard, convert_bag, episode_rows, written
from vla_core.errors import VlaError, choices
from vla_core.observation.builder import ObservationBuilder, ObservationSpec

REPORT = "vla_ros/report.json"
SMALL_BYTES = 64 * 1024 * 1024  # bags of this size together are done before other processes have started


class ConvertError(VlaError):
    """A conversion that cannot be done, and why."""


@dataclass(frozen=True)
class Conversion:
    """A finished dataset and the report of how it was made (also in ``vla_ros/report.json``)."""

    path: Path
    report: Report


def convert(
    bags: Sequence[Path],
    out: Path,
    spec: ObservationSpec,
    contract: RobotContract | None = None,
    *,
    keep_failed: bool = False,
    version: str = V30,
    video: VideoOptions | None = None,
    workers: int | None = None,
    ray: bool = False,
    on_bad: Literal["stop", "skip"] = "stop",
    thresholds: Thresholds | None = None,
    resume: bool = True,
    progress: Callable[[int], None] = lambda done: None,
) -> Conversion:
    """Build the dataset ``out`` from ``bags``, in their order; it is there when it is whole, and not before.

    A bag is one episode, or one for each mark that starts an episode inside it.

    Args:
        contract: the contract to read the bags by; None takes the one embedded in the first bag.
        keep_failed: keep episodes that are marked as failed or aborted, or never ended; they are no demonstrations.
        version: of LeRobotDataset, v3.0 or v2.1.
        video: encode the cameras as videos, with loss; None keeps PNGs, which are what the robot sees bit for bit.
        workers: processes; None takes as many as there are cores, or this one alone for small bags.
        ray: run the jobs on Ray, ``workers`` of them at a time.
        on_bad: whether a bag that is damaged, unclosed, without a topic or of wrong types stops everything or is
            skipped and named in the report.
        thresholds: what must hold for every stream of every bag.
        resume: go on from the bags that an interrupted conversion has finished, and keep them when this one fails.
        progress: called with the number of bags done.
    """
    thresholds = thresholds or Thresholds()
    if out.exists():
        raise ConvertError(f"{out} exists already; remove it or choose another folder")
    if version not in VERSIONS:
        raise ConvertError(f"LeRobotDataset {version!r} cannot be written; choices: {choices(VERSIONS)}")
    if on_bad not in ("stop", "skip"):
        raise ConvertError(f"on_bad {on_bad!r}; choices: stop, skip")
    names = _names(bags)
    given, contract = contract, _contract(bags, contract, on_bad)
    try:
        ObservationBuilder(contract, spec)  # a spec that the contract cannot serve is no fault of one bag
    except VlaError as error:
        raise error if given else ConvertError(f"{bags[0]}: by the contract in it, {error}") from None
    with _staging(out, resume) as partial, written(out):
        plan_rows, happened = rows_recorded(bags, contract), recorded(bags, contract)
        jobs = [
            BagJob(path=path, name=name, shards=partial / "shards", contract=contract, spec=spec,
                   keep_failed=keep_failed, video=video, thresholds=thresholds, plan_rows=plan_rows,
                   happened=happened)
            for path, name in zip(bags, names, strict=True)
        ]  # fmt: skip
        _forget_others(partial / "shards", jobs)
        writer = LeRobotWriter(
            out, version=version, fps=contract.rate_hz,
            features=features(contract, spec, video is not None, plan_rows, happened),
            robot_type=contract.name,
            description={"format": FORMAT, "contract": to_dict(contract), "observation": to_dict(spec)},
        )  # fmt: skip
        report = Report()
        with writer, results(convert_bag, jobs, _workers(workers, bags, ray), ray) as shards:
            for done, (job, shard) in enumerate(zip(jobs, shards, strict=True), 1):
                _take(writer, report, job, shard, on_bad)
                progress(done)
            _check_something(report, out, bags)
            assert writer.description is not None
            writer.description["left_out"] = [*report.left_out, *report.bad]
            if video is not None:
                report.notes.append(f"pictures are videos ({video.codec}, crf {video.crf}), not bit for bit what the "
                                    "robot sees")  # fmt: skip
            place = partial / "dataset" / REPORT
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(json.dumps(report.to_dict(), indent=1), encoding="utf-8")
    return Conversion(out, report)


def _take(writer: LeRobotWriter, report: Report, job: BagJob, shard: Shard, on_bad: str) -> None:
    """Add a bag's episodes to the dataset and its figures to the report."""
    if shard.error is not None:
        if on_bad == "stop":
            kinds: dict[str, type[VlaError]] = {"ContractError": ContractError, "BagError": BagError}
            raise kinds.get(shard.kind, VlaError)(shard.error)
        report.bad.append({"bag": job.name, "error": shard.error})
        return
    assert shard.streams is not None and shard.counts is not None
    check(str(job.path), shard.streams, job.thresholds)
    report.add(job.name, shard.streams, shard.counts)
    report.left_out += shard.left_out
    for entry in shard.episodes:
        writer.add(episode_rows(shard, entry, job))
        report.episodes += 1
        report.frames += entry["length"]


def _check_something(report: Report, out: Path, bags: Sequence[Path]) -> None:
    if report.episodes:
        return
    if report.left_out:
        first = report.left_out[0]
        raise ConvertError(f"{out}: none of the {len(report.left_out)} episodes succeeded (the first, {first['bag']}: "
                           f"{first['why']}); keep failed ones with --keep-failed")  # fmt: skip
    if report.bad:
        raise ConvertError(f"{out}: all {len(report.bad)} bags are bad; the first: {report.bad[0]['error']}")
    others = f" and in {len(bags) - 1} others" if len(bags) > 1 else ""
    raise ConvertError(f"{out}: no tick lies in an episode: in {bags[0]}{others} the marks on {EPISODE_TOPIC!r} start "
                       "none where there are observations and commands")  # fmt: skip


def _names(bags: Sequence[Path]) -> list[str]:
    """What each bag is called: its folder's name, with as many parents as tell it from the others."""
    if not bags:
        raise ConvertError("no bags to convert")
    places = [path.resolve() for path in bags]
    twice = [str(path) for path, count in Counter(places).items() if count > 1]
    if twice:
        raise ConvertError(f"named twice: {', '.join(twice)}; a bag is converted once")
    if len({path.name for path in places}) == len(places):
        return [path.name for path in places]
    common = Path(os.path.commonpath(places))
    return [str(path.relative_to(common)) for path in places]


def _contract(bags: Sequence[Path], given: RobotContract | None, on_bad: str) -> RobotContract:
    """The contract that was given, unless the first bag has another one; or the first that is in a bag."""
    first: VlaError | None = None
    for path in bags:
        try:
            found = bag_info(path).contract
            if given is not None and on_bad == "stop":
                given.check_same(found, "the dataset", str(path))
            return given or found
        except BagError as error:
            if given is not None:
                return given
            first = first or error
            if on_bad == "stop":
                break
    assert first is not None
    raise first


def _workers(workers: int | None, bags: Sequence[Path], ray: bool) -> int:
    if workers is not None:
        return max(1, min(workers, len(bags)))
    if not ray and sum(_bytes(path) for path in bags) < SMALL_BYTES:
        return 1
    return max(1, min(len(os.sched_getaffinity(0)), len(bags)))


def _bytes(path: Path) -> int:
    with suppress(OSError):
        return sum(file.stat().st_size for file in path.iterdir())
    return 0


def features(
    contract: RobotContract, spec: ObservationSpec, video: bool, plan_rows: int | None = None,
    happened: Happened | None = None,
) -> dict[str, Feature]:  # fmt: skip
    """LeRobot's features of a dataset for ``spec``, whose actions are plans of ``plan_rows`` rows or single ones."""
    found = {}
    if spec.state:
        found[STATE] = vector(state_names(contract, spec))
    for name, size in spec.images.items():
        found[f"{IMAGES}{name}"] = image(size.height, size.width, video=video)
    names = contract.action_names if plan_rows is None else plan_names(contract, plan_rows)
    found[ACTION] = vector(names)
    if happened is not None and happened.executed:
        found[EXECUTED] = vector(contract.action_names)
    if happened is not None and happened.reward:
        found[REWARD] = vector(("reward",))
    if happened is not None and happened.intervened:
        found[INTERVENED] = vector(("intervened",))
    for name in () if happened is None else happened.truth_columns:
        found[name] = Feature("string", (1,))
    return found


def state_names(contract: RobotContract, spec: ObservationSpec) -> tuple[str, ...]:
    """Names of the entries of the state: the contract's, with the stream's before them unless there is but one."""
    streams = {name: contract.stream(name).names for name in spec.state}
    if len(streams) == 1 and not any("." in entry for entries in streams.values() for entry in entries):
        return next(iter(streams.values()))
    return tuple(f"{name}.{entry}" for name, entries in streams.items() for entry in entries)


@contextmanager
def _staging(out: Path, resume: bool) -> Iterator[Path]:
    """The folder of what is done so far, for one process at a time; kept after an error when it is of use."""
    partial = out.with_name(f".{out.name}.partial")
    with written(out):
        if not out.parent.is_dir():
            out.parent.mkdir(parents=True)
        partial.mkdir(exist_ok=True)
        lock = (partial / "lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConvertError(f"{out}: another process is converting to it") from None
        try:
            if not resume:
                shutil.rmtree(partial / "shards", ignore_errors=True)
            yield partial
        except BaseException:
            if not resume or not any((partial / "shards").glob("*/bag.json")):
                shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(partial, ignore_errors=True)


def _forget_others(shards: Path, jobs: Sequence[BagJob]) -> None:
    """Remove what was left by a conversion of other bags, or with other wishes."""
    wanted = set()
    for job in jobs:
        with suppress(BagError):
            wanted.add(job.fingerprint())
    for folder in shards.glob("*"):
        if folder.name not in wanted:
            shutil.rmtree(folder, ignore_errors=True)
