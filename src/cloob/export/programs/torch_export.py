"""Both towers as programs of torch.export, whatever the number of pictures and texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cloob.errors import InputError, one_line
from cloob.export.exported import Exported, quiet
from cloob.export.programs.towers import Tower, checked, exportable
from cloob.models.encoder import DualEncoder

IMAGE_FILE, TEXT_FILE = "image.pt2", "text.pt2"
_USAGE = """```python
import torch

encode_image = torch.export.load("DIR/image.pt2").module()
encode_text = torch.export.load("DIR/text.pt2").module()
rows = encode_image(pixel_values)  # (n, 3, H, W) float32, normalised -> (n, D) unit rows
rows = encode_text(input_ids)  # (n, L) int64 -> (n, D) unit rows
```

`torch.export.load` is for files of your own or of people you trust: torch does not promise that a file cannot run code.
`cloob.load_model` does not read this folder.
"""


def export_torch(encoder: DualEncoder, folder: Path) -> Exported:
    """Writes the programs of both towers of an encoder on the CPU, in float32, into an empty folder."""
    with exportable(encoder) as towers:
        worst = max(_export(encoder, tower, folder) for tower in towers)
        trims = towers[1].pad is not None
    most = encoder.context_length
    texts = f"2 to {most} tokens: without the padding that all rows share" if trims else f"{most}, padding included"
    notes = (
        f"Read back and checked for 1, 2 and 7 items: unit rows equal the model's to {worst:.0e}.",
        f"`{TEXT_FILE}` takes rows of {texts}.",
        f"Made by torch {torch.__version__}; another version may not read the files.",
    )
    return Exported("pytorch", "torch.export.load reads its programs", _USAGE, notes, ("torch-export",))


def _export(encoder: DualEncoder, tower: Tower, folder: Path) -> float:
    """Writes one tower's program, reads it back and checks it; returns how much an entry of its rows is off at most."""
    path = folder / (IMAGE_FILE if tower.kind == "image" else TEXT_FILE)
    try:
        with quiet():
            program = torch.export.export(
                tower.module, tower.example(), dynamic_shapes=tower.dynamic_shapes(), strict=False
            )
            for module in program.graph_module.modules():
                for node in getattr(module, "graph", program.graph).nodes:
                    node.meta.pop("stack_trace", None)  # paths of this machine
            torch.export.save(program, path)
            run: Any = torch.export.load(path).module()
    except Exception as error:  # torch.export's errors have no common class
        reason = one_line(error, 200)
        raise InputError(f"{encoder.name}: torch.export cannot take its {tower.kind} tower ({reason})") from error
    return checked(encoder.name, tower, run)
