"""What is shipped: package.xml, CMakeLists.txt, pyproject.toml and setup.py say the same thing."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import textwrap
from email.parser import Parser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from vla_core import resources
from vla_ros.wheels import BuildError, build_messages, name_this_python

ROOT = Path(__file__).parents[2]
CMAKE = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The metadata that pip would install, field by field."""
    folder = tmp_path_factory.mktemp("metadata")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    text = (folder / "vla_ros.egg-info" / "PKG-INFO").read_text(encoding="utf-8")
    message = Parser().parsestr(text)
    fields: dict[str, list[str]] = {}
    for name, value in message.items():
        fields.setdefault(name, []).append(value)
    listed = (folder / "vla_ros.egg-info" / "SOURCES.txt").read_text(encoding="utf-8")
    fields["Sources"] = listed.splitlines()
    return fields


def test_pip_and_ros_name_one_version(metadata: dict[str, list[str]]) -> None:
    package = ElementTree.parse(ROOT / "package.xml").getroot()
    assert metadata["Version"] == [package.findtext("version")]
    assert metadata["License-Expression"] == [package.findtext("license")]


def test_the_base_needs_no_ros(metadata: dict[str, list[str]]) -> None:
    base = [r for r in metadata["Requires-Dist"] if "extra ==" not in r]
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


def test_pip_installs_the_shared_files_where_share_finds_them(
    tmp_path: Path, metadata: dict[str, list[str]]
) -> None:
    """An installation laid out by setup.py's own list, run from outside this checkout."""
    subprocess.run(
        [sys.executable, "setup.py", "-q", "install_data", "--install-dir", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    packages = tmp_path / "lib" / "python3" / "site-packages" / "vla_core"
    packages.mkdir(parents=True)
    (packages / "__init__.py").touch()
    source = Path(resources.__file__).read_text(encoding="utf-8")
    (packages / "resources.py").write_text(source, encoding="utf-8")
    program = """
        import sys
        sys.path.insert(0, sys.argv[1])
        from vla_core.resources import share
        for name in sys.argv[2:]:
            print(share(name))
    """
    wanted = [
        str(path.relative_to(ROOT))
        for folder in ("config", "launch")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    ]
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(packages.parent), *wanted],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    expected = [str(tmp_path / "share" / "vla_ros" / name) for name in wanted]
    assert result.stdout.splitlines() == expected


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
    (source / "CMakeLists.txt").write_text(
        'message(FATAL_ERROR "no such luck")\n', encoding="utf-8"
    )
    with pytest.raises(BuildError, match=r"(?s)building the messages failed; .*no such luck"):
        build_messages(source, tmp_path / "prefix", tmp_path / "build")
