"""What a step, the objective and ranking ask of a device: kernels, waits, copies.

Counted on a device that is pretended (``pretended_device.py``), in another process.
Not covered: streams, NCCL, and what asks for CUDA by its name.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# The kernels of a call, some more than counted.
OBJECTIVES = {
    "cloob": 270,
    "clip": 100,
    "infoloob": 90,
    "siglip": 80,
    "cloob, learned beta": 330,
    "cloob, bf16": 480,
}
STEPS = {
    "tiny-vit, cloob": 780,
    "tiny-vit, clip, clipped": 900,
    "tiny-vit, cloob, two optimisers": 790,
    "tiny-vit, cloob, bf16": 1_040,
    "tiny-resnet, cloob": 940,
    "tiny-resnet, cloob, ema": 960,
    "tiny-resnet, cloob, micro": 3_800,
}


@pytest.fixture(scope="module")
def found():
    script = Path(__file__).with_name("pretended_device.py")
    done = subprocess.run(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def assert_asks(found, kernels, waits=0, copies=0):
    assert "raised" not in found, found
    assert found["kernels"] <= kernels, found
    assert found["waits"] <= waits, found
    assert found["copies"] <= copies, found
    assert found["mixed"] == 0, found


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_objective(found, name):
    """In the loop nothing waits; a call of one's own waits once, for its checks."""
    assert_asks(found[f"{name}, in the loop"], OBJECTIVES[name])
    assert_asks(found[f"{name}, own call"], OBJECTIVES[name], waits=1)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_of_towers(found, name):
    assert_asks(found[name], STEPS[name])


def test_a_moving_average_takes_at_most_twenty_kernels(found):
    plain = found["tiny-resnet, cloob"]["kernels"]
    assert found["tiny-resnet, cloob, ema"]["kernels"] <= plain + 20


@pytest.mark.parametrize("steps", [4, 8])
def test_an_epoch_of_heads_waits_once_and_copies_its_order(found, steps):
    """No step waits or copies: an epoch waits for its mean loss, and sends the device
    its order and its rows' numbers.
    """
    assert_asks(found[f"heads, {steps} steps"], 440 * steps, waits=1, copies=2)


@pytest.mark.parametrize("batches", [4, 8])
def test_held_out_vectors_wait_as_often_for_many_rows_as_for_few(found, batches):
    """For the ranks, which the host takes with their ids."""
    assert_asks(found[f"heads, {batches} held-out"], 185 * batches, waits=6, copies=2)


@pytest.mark.parametrize("batches", [2, 4])
def test_held_out_pictures_wait_once(found, batches):
    assert_asks(found[f"validation of {batches} batches"], 250 * batches, waits=1)


def test_ranks_wait_as_often_for_many_blocks_as_for_one(found):
    """In blocks of 64, and in one of 256 rows."""
    assert_asks(found["ranks, blocks of 256"], 130, waits=5)
    assert_asks(found["ranks, blocks of 64"], 450, waits=5)
