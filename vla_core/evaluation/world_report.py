"""The report of a world model: report.json, report.html and an animated picture of real against imagined."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from vla_core.data.sequences import Sequences
from vla_core.evaluation.world import OpenLoop, Returns, open_loop, returns
from vla_core.inspect import figures
from vla_core.inspect.page import page
from vla_core.inspect.report import Picture, Report, Section, Table
from vla_core.world_checkpoint import WorldCheckpoint

SHOWN = 8  # pictures of a strip
FRAME_MS = 80


def write_report(world: WorldCheckpoint, sequences: Sequences, out: Path, *, context: int = 5,
                 ahead: int = 45) -> str:  # fmt: skip
    """Write the report on held-out ``sequences`` to ``out``; returns its figures in a line or two."""
    longest = max(sequences.whole(int(s), 10**9) for s in sequences.data.starts[:-1])
    ahead = min(ahead, longest - context)
    if ahead < 1:
        return f"no report: the longest held-out episode has {longest} ticks, more than {context} are needed"
    found = open_loop(world.model, sequences, context=context, ahead=ahead)
    earned = returns(world.model, sequences, context=context)
    out.mkdir(parents=True, exist_ok=True)
    numbers = _numbers(found, earned)
    (out / "report.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    for camera in found.real:
        _animation(found, camera, out / f"imagined_{camera}.gif")
    (out / "report.html").write_text(page([_report(str(out), found, earned)]), encoding="utf-8")
    return _line(found, earned, out)


def _numbers(found: OpenLoop, earned: Returns) -> dict[str, Any]:
    curves = {name: getattr(found, name) for name in ("picture", "picture_copy", "state", "state_copy")}
    return {
        "context": found.context, "ahead": _ahead(found), "windows": found.windows, "episodes": len(earned.true),
        "open_loop_mse": {name: curve.tolist() for name, curve in curves.items() if curve is not None},
        "returns": {"true": earned.true.tolist(), "observed": earned.observed.tolist(),
                    "imagined": earned.imagined.tolist(),
                    "spearman_observed": _or_none(earned.observed_correlation),
                    "spearman_imagined": _or_none(earned.imagined_correlation)},
    }  # fmt: skip


def _line(found: OpenLoop, earned: Returns, out: Path) -> str:
    errors = "; ".join(f"{what} {error.mean():.4g} (last one kept: {copy.mean():.4g})"
                       for what, error, copy in _curves(found))  # fmt: skip
    return (f"{out}: {_ahead(found)} ticks ahead, mean squared error: {errors}\n"
            f"rank correlation with the true return of {len(earned.true)} held-out episodes: "
            f"{earned.observed_correlation:.3f} from what is seen, {earned.imagined_correlation:.3f} from what is "
            f"imagined after {found.context} ticks")  # fmt: skip


def _report(path: str, found: OpenLoop, earned: Returns) -> Report:
    steps = list(range(1, _ahead(found) + 1))
    curves = [
        Picture(f"error of {what}", figures.lines({"imagined": (steps, error.tolist()),
                                                   "last one kept": (steps, copy.tolist())},
                                                  "ticks ahead", "mean squared error"))
        for what, error, copy in _curves(found)
    ]  # fmt: skip
    note = (f"{found.context} ticks are seen, {_ahead(found)} more imagined from the actions alone; means over "
            f"{found.windows} held-out windows.")  # fmt: skip
    rows = [(str(k), *(f"{value:.3f}" for value in row))
            for k, row in enumerate(zip(earned.true, earned.observed, earned.imagined, strict=True))]  # fmt: skip
    sections = [
        Section("Open loop", note, pictures=curves),
        *(Section(f"Camera {camera}", "Above what came, below what was imagined.",
                  pictures=[Picture("one window", _sheet(found, camera), "jpeg")]) for camera in found.real),
        Section("Returns", "Sums of rewards of held-out episodes.",
                Table(("episode", "true", "from what is seen", "imagined"), rows)),
    ]  # fmt: skip
    tiles = [(f"{earned.observed_correlation:.3f}", "rank correlation of returns, from what is seen"),
             (f"{earned.imagined_correlation:.3f}", "rank correlation of returns, imagined")]  # fmt: skip
    tiles += [(f"{copy.mean() / error.mean():.2f} x", f"less error of {what} than keeping the last")
              for what, error, copy in _curves(found)]  # fmt: skip
    return Report("checkpoint", path, "a world model on held-out episodes", tiles=tiles, sections=sections)


def _curves(found: OpenLoop) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """What was imagined: its name, its error and that of keeping the last."""
    pairs = (("pictures", found.picture, found.picture_copy), ("state", found.state, found.state_copy))
    return [(what, error, copy) for what, error, copy in pairs if error is not None and copy is not None]


def _ahead(found: OpenLoop) -> int:
    return len(next(curve for _, curve, _ in _curves(found)))


def _sheet(found: OpenLoop, camera: str) -> bytes:
    places = np.unique(np.linspace(0, _ahead(found) - 1, SHOWN).round().astype(int))
    return figures.contact_sheet(
        [[(f"+{k + 1}", _pixels(frames[k])) for k in places] for frames in (found.real[camera], found.imagined[camera])]
    )


def _animation(found: OpenLoop, camera: str, file: Path) -> None:
    """Real and imagined side by side."""
    from PIL import Image

    pairs = zip(found.real[camera], found.imagined[camera], strict=True)
    frames = [Image.fromarray(np.concatenate([_pixels(real), _pixels(imagined)], axis=1)) for real, imagined in pairs]
    larger = [frame.resize((frame.width * 3, frame.height * 3), Image.Resampling.NEAREST) for frame in frames]
    larger[0].save(file, save_all=True, append_images=larger[1:], duration=FRAME_MS, loop=0)


def _pixels(picture: np.ndarray) -> np.ndarray:
    """(3, H, W) in [0, 1] as (H, W, 3) uint8."""
    pixels: np.ndarray = (picture.transpose(1, 2, 0).clip(0, 1) * 255).round().astype(np.uint8)
    return pixels


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else value
