"""docs/export.md: the example that needs neither torch nor this package gives the model's rows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cloob.models.encoder import DualEncoder
from support import run_script

PAGE = Path(__file__).parents[3] / "docs" / "export.md"
pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="the documentation is not beside the tests")


def test_the_example_without_torch_and_cloob(model: DualEncoder, exported: Path, tmp_path: Path) -> None:
    (code,) = re.findall(r"```py\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 26
    assert code.replace('"DIR"', f'"{exported.name}"') in (exported / "README.md").read_text(encoding="utf-8")
    code = code.replace("dog.jpg", "dog.png")
    pictures = ("cat.jpg", "dog.png")
    for number, (name, size, channels) in enumerate(zip(pictures, ((90, 131), (200, 67)), (3, 4), strict=True)):
        noise = np.random.default_rng(number).integers(0, 256, (5, 7, channels), dtype=np.uint8)
        Image.fromarray(noise).resize(size).save(tmp_path / name, quality=95)
    script = (
        "import sys\nsys.modules['torch'] = sys.modules['cloob'] = sys.modules['open_clip'] = None\n"
        + code.replace('Path("DIR")', "Path(sys.argv[1])")
        + "\nimport json; print(json.dumps((images @ run('onnx/text_model.onnx', np.array(tokens)).T).tolist()))"
    )
    run = run_script(script, str(exported), cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    found = torch.tensor(json.loads(run.stdout.splitlines()[-1]))
    texts = ["a photo of a cat", "a photo of a dog"]
    wanted = model.encode_image([tmp_path / name for name in pictures]) @ model.encode_text(texts).T
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-4
