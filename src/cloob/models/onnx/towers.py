"""A graph on onnxruntime in the place of a tower of torch's.

Shapes: n items, L tokens, D = embed_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cloob.models.onnx.session import Graph


class GraphImages(nn.Module):
    """The image tower.

    Args:
        graph: Its graph.
        preprocess_cfg: open_clip's.
    """

    def __init__(self, graph: Graph, preprocess_cfg: dict[str, Any]) -> None:
        super().__init__()
        self.graph, self.preprocess_cfg = graph, preprocess_cfg

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) normalised pixels to (n, D)."""
        pixels = images.detach().to("cpu", torch.float32).contiguous()
        return torch.from_numpy(self.graph(pixels.numpy())).to(images.device)


class GraphTexts(nn.Module):
    """The text tower.

    Args:
        graph: Its graph.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, L) tokens to (n, D)."""
        rows = tokens.detach().to("cpu", torch.int64).contiguous()
        return torch.from_numpy(self.graph(rows.numpy())).to(tokens.device)
