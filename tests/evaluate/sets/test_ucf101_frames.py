"""Middle frames of tiny real videos, and the folder that the set is then read from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cloob.evaluate.sets.paper import open_paper_set
from cloob.evaluate.sets.ucf101_frames import main, middle_frame

av = pytest.importorskip("av", reason="PyAV is not installed")


def video(path: Path, n: int) -> None:
    """A video whose frame i has the grey value 40 · i."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for i in range(n):
            grey = np.full((32, 32, 3), 40 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())


@pytest.mark.parametrize(("n", "middle"), [(1, 0), (4, 2), (5, 2), (6, 3)])
def test_the_middle_frame(n: int, middle: int, tmp_path: Path) -> None:
    video(tmp_path / "a.avi", n)
    image = middle_frame(tmp_path / "a.avi")
    assert image.size == (32, 32)
    assert abs(float(np.asarray(image).mean()) - 40 * middle) < 8


def test_from_videos_to_the_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, root = tmp_path / "UCF-101", tmp_path / "sets"
    video(source / "YoYo" / "v_YoYo_g01_c01.avi", 5)
    video(source / "Archery" / "v_Archery_g01_c01.avi", 3)
    (source / "Archery" / "v_Archery_g02_c01.avi").write_bytes(b"no video")
    assert main([str(source), str(root / "ucf101")]) == 1
    said = capsys.readouterr()
    assert "2 frames in" in said.out and "v_Archery_g02_c01.avi: cannot be read as a video" in said.err
    assert said.err.count("\n") == 1
    lists = root / "ucf101" / "ucfTrainTestlist"
    lists.mkdir()
    lines = ["Archery/v_Archery_g01_c01.avi", "Archery/v_Archery_g02_c01.avi", "YoYo/v_YoYo_g01_c01.avi"]
    (lists / "testlist01.txt").write_text("\n".join(lines) + "\n")
    data = open_paper_set("ucf101", root)
    names = [data.classnames[label] for label in data.labels]
    assert [name.replace(" ", "").lower() for name in names] == ["archery", "archery", "yoyo"]
    with Image.open(root / data.read(2)[0]) as image:
        assert image.format == "JPEG" and abs(float(np.asarray(image).mean()) - 80) < 8
    frame = root / "ucf101" / "frames" / "YoYo" / "v_YoYo_g01_c01.jpg"
    before = frame.stat().st_mtime_ns
    assert main([str(source), str(root / "ucf101")]) == 1 and frame.stat().st_mtime_ns == before
