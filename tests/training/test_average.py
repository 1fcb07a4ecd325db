"""The moving average of weights, beside its formula."""

import torch
from torch import nn

from cloob.training.optim import Average
from support import seeded


class Sides(nn.Module):
    """Two towers that share a trunk, with statistics, a count, an empty buffer and a
    mask of −∞.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        trunk = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
        self.a = nn.Sequential(trunk, nn.Linear(4, 3))
        self.b = trunk
        self.half = nn.Linear(3, 3).bfloat16()
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
        self.register_buffer("empty", torch.zeros(0, 2))
        self.register_buffer("none", None)


def change(module, seed):
    generator = seeded(seed)
    with torch.no_grad():
        for name, value in {**dict(module.named_parameters())}.items():
            assert name
            value.add_(torch.randn(value.shape, generator=generator))
        norm = module.b[1]
        norm.running_mean += 0.5
        norm.num_batches_tracked += 1


def test_the_average_of_towers_that_share_a_module_is_the_formula():
    module = Sides()
    decay = 0.75
    average = Average(module, decay)
    expected = None
    for step in range(4):
        change(module, step)
        finite = torch.tensor(step != 2)
        average.update(module, finite)
        now = {k: v.clone() for k, v in module.state_dict().items()}
        if expected is None:
            expected = now
        for name, value in now.items():
            if not value.is_floating_point() or name == "mask":
                expected[name] = value
            elif finite:
                old = expected[name]
                expected[name] = old + (1 - decay) * (value - old)
    found = average.encoder.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        close = 2e-2 if value.dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(found[name], value, rtol=close, atol=close)
    assert average.encoder.a[0] is average.encoder.b
