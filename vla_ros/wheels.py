"""Builds this package's messages into the running Python environment: `python -m vla_ros.wheels`.

ROS 2 can come from Python wheels alone. Their CMake files name the Python that the wheels were
built with, so nothing can be compiled against them until they name the one that is running.
After the build every program of the environment imports `vla_ros.msg` without sourcing a file.
Messages of common packages that are not among the wheels (`ackermann_msgs`, `tf2_msgs`) are built
too, each as the package of its name. With a ROS 2 installation there are no such wheels, those
packages are there, and only the build of this package's own messages is left to do.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np

from vla_core.errors import VlaError
from vla_core.observation.definitions import DEFINITIONS

# The images that Python wheels are built in keep one Python per version in /opt/python/<tag>.
BUILDER_PYTHON_INCLUDE = re.compile(r"/opt/python/cp\d+-cp\d+/include/python3\.\d+")
BUILDER_NUMPY_INCLUDE = re.compile(r"/opt/python/[^;\"]*/numpy/(?:_core|core)/include")

PACKAGE_XML = """\
<?xml version="1.0"?>
<package format="3">
  <name>{name}</name>
  <version>0.0.0</version>
  <description>The messages of {name} that vla_ros uses, for environments without that package.</description>
  <maintainer email="vla_ros@users.noreply.github.com">vla_ros maintainers</maintainer>
  <license>Apache-2.0</license>
  <buildtool_depend>ament_cmake</buildtool_depend>
  <buildtool_depend>rosidl_default_generators</buildtool_depend>
{depends}
  <exec_depend>rosidl_default_runtime</exec_depend>
  <member_of_group>rosidl_interface_packages</member_of_group>
  <export>
    <build_type>ament_cmake</build_type>
  </export>
</package>
"""
CMAKE_LISTS = """\
cmake_minimum_required(VERSION 3.20)
project({name})
find_package(ament_cmake REQUIRED)
find_package(rosidl_default_generators REQUIRED)
{finds}
rosidl_generate_interfaces({name}
  {files}
  DEPENDENCIES {depends}
)
ament_export_dependencies(rosidl_default_runtime)
ament_package()
"""


class BuildError(VlaError):
    """The messages cannot be built; the text says what is missing or where the log lies."""


def name_this_python(prefix: Path) -> int:
    """Make the CMake files below `prefix`/share name this Python's headers; returns files changed.

    Running it again changes nothing.
    """
    changed = 0
    for path in sorted((prefix / "share").rglob("*.cmake")):
        text = path.read_text(encoding="utf-8")
        # A function, since a path must not be read as a replacement pattern.
        named = BUILDER_NUMPY_INCLUDE.sub(lambda _: np.get_include(), text)
        named = BUILDER_PYTHON_INCLUDE.sub(lambda _: sysconfig.get_path("include"), named)
        if named != text:
            path.write_text(named, encoding="utf-8")
            changed += 1
    return changed


def build_messages(source: Path, prefix: Path, build: Path) -> None:
    """Compile msg/ of the package at `source` and install it into `prefix`, by way of `build`.

    Raises:
        BuildError: a build tool is missing or the build failed.
    """
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        raise BuildError("Python's headers are missing: apt-get install python3-dev")
    if shutil.which("g++") is None:
        raise BuildError("a C++ compiler is missing: apt-get install g++")
    environment = build_environment(prefix)
    cmake = shutil.which("cmake", path=environment["PATH"])
    if cmake is None:
        raise BuildError("cmake is missing: pip install cmake ninja")
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=environment["PATH"]) else []
    # A build folder remembers the programs it was made with; those of another day may be gone.
    shutil.rmtree(build, ignore_errors=True)
    build.mkdir(parents=True)
    configure = [
        *(cmake, "-S", str(source), "-B", str(build), *generator),
        "-DVLA_ROS_MESSAGES_ONLY=ON",
        "-DBUILD_TESTING=OFF",
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_INSTALL_PREFIX={prefix}",
        # ROS 2 releases look Python up by one or the other name.
        f"-DPython3_EXECUTABLE={sys.executable}",
        f"-DPYTHON_EXECUTABLE={sys.executable}",
    ]
    log = build / "build.log"
    with log.open("wb") as output:
        for command in (configure, [cmake, "--build", str(build), "--target", "install"]):
            result = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False)
            if result.returncode != 0:
                lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
                tail = "\n".join(lines[-25:])
                raise BuildError(f"building the messages failed; end of {log}:\n{tail}")


def lacking() -> list[str]:
    """Packages of :data:`DEFINITIONS` whose messages cannot be used in this environment."""
    return [name for name, texts in DEFINITIONS.items() if not all(_usable(name, message) for message in texts)]


def _usable(package: str, message: str) -> bool:
    """Whether a message can be imported and sent: its compiled half is what an interrupted build would lack."""
    try:
        kind = type(getattr(importlib.import_module(f"{package}.msg"), message))
        kind.__import_type_support__()
    except (ImportError, AttributeError):
        return False
    return kind._TYPE_SUPPORT is not None


def write_package(name: str, folder: Path) -> None:
    """Write the package `name` of :data:`DEFINITIONS`, ready to be built, into `folder`."""
    texts = DEFINITIONS[name]
    depends = sorted({needed for text in texts.values() for needed in re.findall(r"\b(\w+)/\w+(?:\[\])? ", text)})
    files = {
        "package.xml": PACKAGE_XML.format(
            name=name, depends="\n".join(f"  <depend>{needed}</depend>" for needed in depends)
        ),
        "CMakeLists.txt": CMAKE_LISTS.format(
            name=name, depends=" ".join(depends), files="\n  ".join(f'"msg/{message}.msg"' for message in texts),
            finds="\n".join(f"find_package({needed} REQUIRED)" for needed in depends),
        ),
        **{f"msg/{message}.msg": text for message, text in texts.items()},
    }  # fmt: skip
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")


def build_environment(prefix: Path) -> dict[str, str]:
    """This process's environment with `prefix` first wherever the build looks for things."""
    environment = dict(os.environ)
    for name, entry in (
        ("PATH", prefix / "bin"),
        ("AMENT_PREFIX_PATH", prefix),
        ("CMAKE_PREFIX_PATH", prefix),
    ):
        environment[name] = os.pathsep.join(filter(None, [str(entry), environment.get(name)]))
    return environment


def main() -> int:
    """Patch and build for the environment that runs this; returns the exit status."""
    source, prefix = Path(__file__).parent.parent, Path(sys.prefix)
    if not (source / "CMakeLists.txt").is_file():
        print(f"error: {source} is no source checkout of vla_ros", file=sys.stderr)
        return 2
    try:
        changed = name_this_python(prefix)
        print(f"CMake files now naming this Python: {changed}; building the messages …", flush=True)
        for name in (others := lacking()):
            print(f"building {name}, which this environment lacks …", flush=True)
            folder = prefix / "build" / f"{name}-source"
            write_package(name, folder)
            build_messages(folder, prefix, build=prefix / "build" / name)
        build_messages(source, prefix, build=prefix / "build" / "vla_ros")
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"the messages of {', '.join(['vla_ros', *others])} are in {prefix}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
