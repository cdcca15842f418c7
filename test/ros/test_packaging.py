"""What is shipped: package.xml, CMakeLists.txt, pyproject.toml and setup.py say the same thing."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import sysconfig
from importlib.metadata import metadata
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest

from vla_core import resources
from vla_core.observation.definitions import DEFINITIONS
from vla_ros import wheels
from vla_ros.wheels import BuildError, build_messages, lacking, name_this_python, write_package

ROOT = Path(__file__).parents[2]
INSTALLED = metadata("vla_ros")
CMAKE = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")


def test_pip_and_ros_name_one_version() -> None:
    package = ElementTree.parse(ROOT / "package.xml").getroot()
    assert INSTALLED["Version"] == package.findtext("version")
    assert INSTALLED["License-Expression"] == package.findtext("license")


def test_the_base_needs_no_ros() -> None:
    base = [r for r in INSTALLED.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert base and not [r for r in base if re.match(r"ros-|rclpy", r)]


def test_every_message_is_built() -> None:
    built = set(re.findall(r'"(msg/\w+\.msg)"', CMAKE))
    assert built == {f"msg/{path.name}" for path in (ROOT / "msg").glob("*.msg")}


def test_every_node_is_a_program_and_every_program_has_a_main() -> None:
    modules = dict(re.findall(r"install_program\((\w+) vla_ros\.(\w+)\)", CMAKE))
    nodes = {path.stem for path in (ROOT / "vla_ros").glob("*_node.py")}
    assert nodes <= set(modules)
    for module in modules.values():
        source = (ROOT / "vla_ros" / f"{module}.py").read_text(encoding="utf-8")
        assert "def main(" in source and '__name__ == "__main__"' in source, module


def test_setup_lists_every_shared_file(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, list[tuple[str, list[str]]]] = {}
    # Only what setup.py passes on is of interest, whichever setuptools there is, if any.
    monkeypatch.setitem(sys.modules, "setuptools", SimpleNamespace(setup=told.update))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    listed = {f"{folder}/{Path(f).name}": f for folder, files in told["data_files"] for f in files}
    shared = [
        path.relative_to(ROOT).as_posix()
        for pattern in ("package.xml", "config/**/*", "launch/*.py", "msg/*.msg")
        for path in ROOT.glob(pattern)
        if path.is_file()
    ]
    assert listed == {f"share/vla_ros/{path}": path for path in shared}


@pytest.mark.parametrize("packages", ["lib/python3.11/site-packages", "."])
def test_an_installation_finds_its_shared_files(tmp_path: Path, packages: str) -> None:
    """Below a prefix (pip, colcon), and beside the packages (`pip install --target`)."""
    package = tmp_path / packages / "vla_core"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    source = Path(resources.__file__).read_text(encoding="utf-8")
    (package / "resources.py").write_text(source, encoding="utf-8")
    shared = tmp_path / "share" / "vla_ros" / "config" / "some.yaml"
    shared.parent.mkdir(parents=True)
    shared.touch()
    program = "from vla_core.resources import share; print(share('config/some.yaml'))"
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(package.parent)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert Path(result.stdout.strip()).resolve() == shared.resolve()


def test_a_file_that_is_not_shipped_is_an_error_that_names_the_places() -> None:
    with pytest.raises(FileNotFoundError, match=r"config/no\.yaml is not among .*looked at /"):
        resources.share("config/no.yaml")


def test_a_sourced_workspace_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "share" / "vla_ros").mkdir(parents=True)
    (tmp_path / "share" / "vla_ros" / "extra.yaml").touch()
    monkeypatch.setenv("AMENT_PREFIX_PATH", f"/nowhere:{tmp_path}")
    assert resources.share("extra.yaml") == tmp_path / "share" / "vla_ros" / "extra.yaml"


def test_messages_travel_through_their_serialization() -> None:
    from rclpy.serialization import deserialize_message, serialize_message
    from vla_ros.msg import ActionChunk, Episode

    chunk = ActionChunk(horizon=2, names=["x"], units=["m"], actions=[1.0, -2.5])
    assert deserialize_message(serialize_message(chunk), ActionChunk) == chunk
    episode = Episode(state=Episode.FAILED, index=3, seed=-1, task="push-v3", steps=62)
    assert deserialize_message(serialize_message(episode), Episode) == episode


def test_the_cmake_files_of_wheels_come_to_name_this_python(tmp_path: Path) -> None:
    path = tmp_path / "share" / "some_msgs" / "cmake" / "export.cmake"
    path.parent.mkdir(parents=True)
    path.write_text(
        'INCLUDES "/opt/python/cp312-cp312/include/python3.12;'
        '/opt/python/cp312-cp312/lib/python3.12/site-packages/numpy/_core/include"\n',
        encoding="utf-8",
    )
    assert name_this_python(tmp_path) == 1
    expected = f'INCLUDES "{sysconfig.get_path("include")};{np.get_include()}"\n'
    assert path.read_text(encoding="utf-8") == expected
    assert name_this_python(tmp_path) == 0


def test_a_failed_build_shows_the_end_of_its_log(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "CMakeLists.txt").write_text('message(FATAL_ERROR "no such luck")\n', encoding="utf-8")
    with pytest.raises(BuildError, match=r"(?s)building the messages failed; .*no such luck"):
        build_messages(source, tmp_path / "prefix", tmp_path / "build")


def test_no_message_is_lacking_here() -> None:
    assert lacking() == []


def test_a_package_without_its_compiled_half_is_lacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an interrupted build leaves it."""
    monkeypatch.setitem(wheels.DEFINITIONS, "half_made_msgs", {"Wheel": "float32 torque\n"})
    monkeypatch.syspath_prepend(str(tmp_path))
    assert lacking() == ["half_made_msgs"]
    (tmp_path / "half_made_msgs").mkdir()
    (tmp_path / "half_made_msgs" / "__init__.py").touch()
    (tmp_path / "half_made_msgs" / "msg.py").write_text(
        "class Meta(type):\n    _TYPE_SUPPORT = None\n    @classmethod\n"
        "    def __import_type_support__(cls): pass\n"
        "class Wheel(metaclass=Meta): pass\n", encoding="utf-8",
    )  # fmt: skip
    assert lacking() == ["half_made_msgs"]


@pytest.mark.parametrize(("name", "depends"), [("ackermann_msgs", "std_msgs"), ("tf2_msgs", "geometry_msgs")])
def test_the_packages_that_are_built_are_whole(tmp_path: Path, name: str, depends: str) -> None:
    write_package(name, tmp_path)
    package = ElementTree.parse(tmp_path / "package.xml").getroot()
    assert package.findtext("name") == name and package.findtext("depend") == depends
    assert package.findtext("member_of_group") == "rosidl_interface_packages"
    cmake = (tmp_path / "CMakeLists.txt").read_text(encoding="utf-8")
    assert f"project({name})" in cmake and f"find_package({depends} REQUIRED)" in cmake
    built = set(re.findall(r'"msg/(\w+)\.msg"', cmake))
    assert built == {path.stem for path in (tmp_path / "msg").iterdir()} == set(DEFINITIONS[name])


def test_an_installation_brings_what_is_not_built_here() -> None:
    package = ElementTree.parse(ROOT / "package.xml").getroot()
    needed = {entry.text for kind in ("depend", "exec_depend") for entry in package.findall(kind)}
    assert set(DEFINITIONS) <= needed


def test_a_build_makes_what_is_lacking_and_then_the_messages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built: list[tuple[str, str]] = []

    def note(source: Path, prefix: Path, build: Path) -> None:
        assert prefix == tmp_path and (source / "CMakeLists.txt").is_file() and (source / "package.xml").is_file()
        built.append((source.name, build.name))

    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(wheels, "build_messages", note)
    monkeypatch.setattr(wheels, "lacking", lambda: ["tf2_msgs"])
    assert wheels.main() == 0
    assert built == [("tf2_msgs-source", "tf2_msgs"), (ROOT.name, "vla_ros")]
    assert capsys.readouterr().out.splitlines()[-1] == f"the messages of vla_ros, tf2_msgs are in {tmp_path}"
