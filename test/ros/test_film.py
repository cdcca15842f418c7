"""Films of episodes: one file of all of them, or one each; what cannot be written fails at once."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from vla_core.errors import VlaError
from vla_ros.film import Film


def shoot(path: Path) -> None:
    """Two whole episodes of 3 and 4 pictures, and one of 2 that is cut short."""
    film = Film(path, 5.0)
    for seed, pictures in ((7, 3), (8, 4), (9, 2)):
        for k in range(pictures):
            film.add(np.full((16, 32, 3), 40 * seed % 256 + 5 * k, np.uint8))
        if seed != 9:
            film.end_episode(seed)
    film.close()


def frames(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_a_folder_gets_a_film_of_each_whole_episode(tmp_path: Path) -> None:
    shoot(tmp_path / "films")
    assert {path.name: frames(path) for path in (tmp_path / "films").iterdir()} == {"seed_7.mp4": 3, "seed_8.mp4": 4}


def test_a_file_shows_all_of_them(tmp_path: Path) -> None:
    shoot(tmp_path / "new" / "all.mp4")
    assert frames(tmp_path / "new" / "all.mp4") == 9
    shoot(tmp_path / "all.gif")
    picture = Image.open(tmp_path / "all.gif")
    assert getattr(picture, "n_frames") == 9 and picture.info["duration"] == 200  # noqa: B009


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VlaError, match=r"all\.avi': expected a file that ends in \.gif or \.mp4, or a folder"):
        Film(tmp_path / "all.avi", 5.0)
