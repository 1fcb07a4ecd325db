"""How towers are readied for training: layout, recomputation, compilation; each against the plain towers."""

import pytest
import torch

from cloob.data.open import open_source
from cloob.errors import InputError
from cloob.models.towers import create_model
from cloob.objective import make_objective
from cloob.training.build import prepare_towers
from cloob.training.config import TrainConfig
from cloob.training.given import make_loader
from cloob.training.step import Stepper, TowersWithLoss

CPU = torch.device("cpu")


def towers(name):
    return create_model(name, seed=0).train()


def batch(encoder, n=6):
    generator = torch.Generator().manual_seed(5)
    size = encoder.image_size
    images = torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8)
    return images, encoder.tokenizer([f"number {i}" for i in range(n)])


def steps(encoder, precision="fp32", micro=0, number=2):
    """Losses and gradient norms, features of the last step, weights and buffers after SGD."""
    module = TowersWithLoss(encoder, make_objective("cloob"), precision).train()
    take = Stepper(module, torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0), 0.0, micro)
    take.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=precision == "fp16")
    torch.manual_seed(9)
    results = [take(*batch(encoder), None, 0.05) for _ in range(number)]
    assert all(result.finite for result in results)
    numbers = [(result.loss, result.grad_norm) for result in results]
    return [numbers, results[-1].features[0], dict(encoder.state_dict())]


def assert_same(found, wanted, tolerance):
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(wanted[0]), rtol=tolerance, atol=0.0)
    torch.testing.assert_close(found[1], wanted[1], rtol=0.0, atol=10 * tolerance)
    assert found[2].keys() == wanted[2].keys()
    for name, value in wanted[2].items():
        scale = max(1e-3, float(value.abs().max()))
        torch.testing.assert_close(found[2][name], value, rtol=0.0, atol=tolerance * scale, msg=name)


def prepared(name, **leaves):
    encoder = towers(name)
    prepare_towers(encoder, TrainConfig().override(device="cpu", **leaves).run, CPU)
    return encoder


@pytest.mark.parametrize(
    ("name", "micro"), [("nano-dropout", 2), pytest.param("tiny-convnext", 0, marks=pytest.mark.nightly)]
)
def test_recomputation_changes_nothing_but_memory(nano_configs, name, micro):
    found, kept = [], []
    for encoder in (towers(name), prepared(name, grad_checkpointing=True)):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x):
            found.append(steps(encoder, micro=micro))
        kept.append(sum(saved))
    assert_same(found[1], found[0], 0.0)
    assert kept[1] < kept[0]


def test_recomputation_is_refused_where_a_tower_has_no_switch(nano_configs):
    with pytest.raises(InputError, match="grad_checkpointing is True, but the image tower of nano-resnet has no such"):
        prepared("nano-resnet", grad_checkpointing=True)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("name", "leaves"),
    [
        ("nano-vit", {"grad_checkpointing": True}),
        ("nano-resnet", {}),
        ("nano-dropout", {"micro_batch_size": 2}),  # both passes must draw the same
    ],
    ids=str,
)
def test_generated_code_takes_the_same_steps(nano_configs, name, leaves):
    micro = leaves.get("micro_batch_size", 0)
    assert_same(steps(prepared(name, compile=True, **leaves), micro=micro), steps(towers(name), micro=micro), 1e-4)


@pytest.mark.parametrize("compiled", [False, True])
def test_loaders_leave_shared_padding_out_but_for_compiled_towers(pairs_folder, tmp_path, compiled):
    """The same pairs, and the same step from them: what goes is padding alone."""
    encoder = create_model("tiny-vit", seed=0).train()
    config = TrainConfig().override(data=[str(pairs_folder)], batch_size=8, workers=0, device="cpu", out=tmp_path)
    config = config.override(compile=compiled)
    source = open_source(str(pairs_folder))
    given = next(iter(make_loader(source, encoder, config, torch.device("cpu")).epoch(0)))
    assert given.tokens.shape[1] == (24 if compiled else 8)
    whole = torch.nn.functional.pad(given.tokens, (0, 24 - given.tokens.shape[1]))
    objective = make_objective("cloob")
    losses = [objective(*encoder(given.images, tokens)) for tokens in (given.tokens, whole)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
