"""The middle frame of each UCF101 video as a picture, where the paper's suite looks for it.

``python -m cloob.evaluate.sets.ucf101_frames UCF-101 ROOT/ucf101`` reads ``UCF-101/<class>/<video>.avi`` (the unpacked
UCF101.rar) and writes ``ROOT/ucf101/frames/<class>/<video>.jpg``. Frames that are there already stay. It needs PyAV,
``pip install -e ".[video]"``; with ffmpeg instead, see docs/evaluate.md.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cloob.errors import InputError, require

_QUALITY = 95  # of the JPEG


def extract_middle_frames(videos: Path, target: Path) -> tuple[int, list[str]]:
    """Writes the middle frame of every video.

    Args:
        videos: Folder with ``<class>/<video>.avi``.
        target: The set's folder; ``frames/`` is made in it.

    Returns:
        How many frames there are now, and a line for each video that could not be read.

    Raises:
        InputError: No videos there, or PyAV is not installed.
    """
    require("av", "video")
    paths = sorted(videos.glob("*/*.avi"))
    if not paths:
        raise InputError(f"{videos}: no <class>/<video>.avi here (the folder UCF-101 of UCF101.rar would be right)")
    done, failures = 0, []
    for path in paths:
        frame = target / "frames" / path.parent.name / f"{path.stem}.jpg"
        if not frame.is_file():
            try:
                image = middle_frame(path)
            except InputError as error:
                failures.append(str(error))
                continue
            frame.parent.mkdir(parents=True, exist_ok=True)
            temporary = frame.with_name(f".tmp-{os.getpid()}-{frame.name}")
            image.save(temporary, "JPEG", quality=_QUALITY)
            temporary.replace(frame)
        done += 1
    return done, failures


def middle_frame(path: Path) -> Any:
    """Frame n // 2 (from 0) of the n frames of a video, a PIL image.

    The frames are counted by decoding them: what a file says of itself is not always right.

    Raises:
        InputError: The file is no video, or has no frame.
    """
    av = require("av", "video")
    try:
        n = sum(1 for _ in _frames(av, path))
        for index, frame in enumerate(_frames(av, path)):
            if index == n // 2:
                return frame.to_image()
    except (av.FFmpegError, OSError, IndexError) as error:
        raise InputError(f"{path}: cannot be read as a video ({' '.join(str(error).split())})") from None
    raise InputError(f"{path}: no frame in it")


def _frames(av: Any, path: Path) -> Any:
    with av.open(str(path)) as container:
        yield from container.decode(container.streams.video[0])


def main(words: Sequence[str] | None = None) -> int:
    """The command; exit code 1 if some videos could not be read, 2 if nothing was done."""
    arguments = list(sys.argv[1:] if words is None else words)
    if len(arguments) != 2:
        print("usage: python -m cloob.evaluate.sets.ucf101_frames UCF-101 ROOT/ucf101", file=sys.stderr)
        return 2
    try:
        done, failures = extract_middle_frames(Path(arguments[0]), Path(arguments[1]))
    except InputError as error:
        print(f"cloob: {error}", file=sys.stderr)
        return 2
    for line in failures:
        print(f"cloob: {line}", file=sys.stderr)
    print(f"{done:,} frames in {Path(arguments[1]) / 'frames'}, {len(failures):,} videos could not be read")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
