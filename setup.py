"""Installs config/, launch/ and msg/ into share/vla_ros; all else is declared in pyproject.toml."""

from pathlib import Path

from setuptools import setup

SHARE = "share/vla_ros"


def shared_files() -> list[tuple[str, list[str]]]:
    """One (folder below the installation prefix, files) pair a folder, as setuptools wants it."""
    folders: dict[str, list[str]] = {
        SHARE: ["package.xml"],
        f"{SHARE}/launch": [str(path) for path in sorted(Path("launch").glob("*.launch.py"))],
    }
    # msg/ too: bags with this package's messages are read without ROS.
    for path in (*sorted(Path("config").rglob("*")), *sorted(Path("msg").glob("*.msg"))):
        if path.is_file():
            folders.setdefault(f"{SHARE}/{path.parent.as_posix()}", []).append(str(path))
    return list(folders.items())


setup(data_files=shared_files())
