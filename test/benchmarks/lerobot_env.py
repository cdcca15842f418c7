"""An environment in which LeRobot runs, built once beside the benchmarks' results, and LeRobot as a process.

LeRobot 0.4.4 wants other versions of a few packages than this one does. They are put in front of this environment's:
the rest (torch, pyarrow, pandas, …) is shared.
"""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
import venv
from pathlib import Path
from types import TracebackType
from typing import Any

import vla_core
from test.benchmarks.framework import BenchmarkError

# Without their own needs: these are the ones that reading and writing a dataset imports.
PACKAGES = (
    "lerobot==0.4.4", "datasets==4.8.5", "huggingface-hub==0.35.3", "draccus==0.10.0", "av==15.1.0",
    "torchvision==0.28.0", "torchcodec==0.13.0", "dill==0.4.0", "multiprocess==0.70.19", "xxhash", "jsonlines",
    "deepdiff", "orderly-set", "mergedeep", "toml", "pyyaml-include", "typing-inspect", "mypy-extensions", "attrs",
    "httpx", "httpcore", "h11", "anyio", "sniffio", "aiohttp", "aiohappyeyeballs", "aiosignal", "frozenlist",
    "multidict", "yarl", "propcache", "requests", "tqdm",
)  # fmt: skip
# Its policies besides, with the versions that it asks for.
POLICY_PACKAGES = (
    "transformers==4.57.6", "tokenizers==0.22.1", "diffusers==0.35.2", "numpy==2.2.6", "gymnasium==1.4.0",
    "cloudpickle", "farama-notifications", "pyserial", "einops", "cachebox",
)  # fmt: skip
NAME = "LeRobot 0.4.4"
FOLDER = Path(vla_core.__file__).parents[1] / "out/bench/lerobot"
ANSWER_S = 300


def python(policies: bool = False) -> Path:
    """The interpreter of LeRobot's environment, which is made if it is not there; ``policies``: one that runs them."""
    folder = FOLDER.with_name("lerobot_policies") if policies else FOLDER
    packages = (*PACKAGES, *POLICY_PACKAGES) if policies else PACKAGES
    found, whole = folder / "bin/python", folder / ".whole"
    if whole.is_file() and whole.read_text() == "\n".join(packages):
        return found
    venv.create(folder, with_pip=True, clear=True)
    own = next((folder / "lib").glob("python*")) / "site-packages"
    (own / "zz_shared.pth").write_text("\n".join(site.getsitepackages()))
    command = [str(found), "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps", *packages]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"LeRobot's environment cannot be made: {' '.join(done.stderr.split())[-300:]}")
    whole.write_text("\n".join(packages))
    return found


def environment(place: Path, threads: int = 1) -> dict[str, str]:
    """The variables of its process; ``place`` is where it may keep what it needs once."""
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(place / "cache"),
                 "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "SVT_LOG": "1"}  # fmt: skip
    variables.pop("PYTHONPATH", None)
    return variables


class LeRobot:
    """LeRobot as a process that answers requests (``lerobot_peer.py``); what it says besides goes to ``log``."""

    def __init__(self, log: Path, threads: int = 1) -> None:
        self._log = log.open("w", encoding="utf-8")
        script = Path(__file__).with_name("lerobot_peer.py")
        self._process = subprocess.Popen([str(python()), str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=self._log, text=True, env=environment(log.parent, threads))  # fmt: skip

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise self._ended()

    def _ended(self) -> BenchmarkError:
        self._process.wait()
        self._log.flush()
        words = Path(self._log.name).read_text(encoding="utf-8").strip().splitlines()
        return BenchmarkError(f"{NAME} ended: {words[-1] if words else 'without a word'}")

    def __enter__(self) -> LeRobot:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        if kind is not None:
            self._process.kill()
        self._process.communicate()
        self._log.close()


if __name__ == "__main__":
    print(python(), file=sys.stdout)
