"""vla_core runs where there is no ROS, and is imported where the extra `train` is not installed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vla_core

ROOT = Path(vla_core.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MODULES = [".".join(("vla_core", *f.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__") for f in FILES]
EXACT = {"rclpy", "vla_ros", "launch", "launch_ros", "rosidl_runtime_py", "rosbag2_py", "cv_bridge", "tf2_ros",
         "ament_index_python", "rcl_interfaces", "builtin_interfaces", "rpyutils"}  # fmt: skip
ENDINGS = ("_msgs", "_srvs", "_interfaces")
TRAIN = {
    "transformers",
    "tokenizers",
    "peft",
    "timm",
    "gguf",
    "accelerate",
    "torchvision",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "tensorrt",
}  # the extras `train` and `export`

SERVE = {"websockets", "msgpack", "prometheus_client"}  # the extra `serve`


def is_ros(module: str) -> bool:
    top = module.split(".")[0]
    return top in EXACT or top.endswith(ENDINGS)


def imported(file: Path) -> set[str]:
    """Every absolute module named by an import statement, at any depth."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module or "")
    return found


def test_the_search_sees_the_package() -> None:
    assert {"vla_core.contract", "vla_core.runtime.core", "vla_core.sim.metaworld"} <= set(MODULES)
    assert is_ros("sensor_msgs.msg") and is_ros("vla_ros.bridge") and not is_ros("rosbags.typesys")


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_no_import_statement_names_ros(file: Path) -> None:
    assert not {module for module in imported(file) if is_ros(module)}


@pytest.mark.parametrize("absent", ["ros", "train", "serve"])
def test_every_module_imports_where_an_optional_part_cannot(absent: str) -> None:
    names, endings = {"ros": (EXACT, ENDINGS), "train": (TRAIN, ()), "serve": (SERVE, ())}[absent]
    program = f"""
import importlib, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top in {names!r} or top.endswith({endings!r}):
            raise ImportError("it is not here: " + name)
sys.meta_path.insert(0, Refuse())
for name in {MODULES!r}:
    importlib.import_module(name)
print(len(sys.modules))
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT.parent, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
