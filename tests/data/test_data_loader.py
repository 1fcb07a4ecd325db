import contextlib
import ctypes
import json
import multiprocessing
import multiprocessing.reduction
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cloob.data.batch import BadSample, RawSample, caption_id
from cloob.data.open import open_source
from cloob.data.order import EpochOrder, ShardSizes, sample_generator
from cloob.data.source import Subset, mix
from cloob.data.transforms import TrainTransform
from cloob.errors import InputError
from cloob.pictures import Encoded, decode
from make import Listed, code_points, encoded, loaded, noise, noise_image
from support import fork, raises

_PIXEL = b"P6 1 1 255 \x10\x20\x30"  # a whole PPM file


class Numbers(Listed):
    """A source of n pairs: pair i has the caption and key ``"i"``."""

    def __init__(self, n):
        super().__init__([(_PIXEL, str(i)) for i in range(n)], "numbers")


def pixel(image):
    return torch.tensor(np.asarray(image.resize((2, 2)))).permute(2, 0, 1)


def loader(source, batch_size, **options):
    return loaded(
        source, options.pop("transform", pixel), code_points, batch_size, **options
    )


def keys(batches):
    return [int(key) for batch in batches for key in batch.keys]


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys == y.keys
        assert x.skipped == y.skipped
        for s, t in ((x.images, y.images), (x.tokens, y.tokens), (x.ids, y.ids)):
            assert torch.equal(s, t)


@settings(max_examples=60)
@given(
    st.integers(2, 60),
    st.integers(1, 5),
    st.integers(1, 20),
    st.booleans(),
    st.booleans(),
    st.integers(0, 3),
)
def test_each_sample_exactly_once_over_all_ranks(
    n, world, batch, drop_last, shuffle, epoch
):
    batch = min(batch, n)
    options = {
        "drop_last": drop_last,
        "shuffle": shuffle,
        "world_size": world,
        "seed": 9,
    }
    ranks = [loader(Numbers(n), batch, rank=rank, **options) for rank in range(world)]
    epochs = [list(r.epoch(epoch)) for r in ranks]
    steps = n // batch if drop_last else -(-n // batch)
    assert {len(e) for e in epochs} == {steps} == {r.steps_per_epoch for r in ranks}
    order = (
        EpochOrder([ShardSizes(Numbers(n).shard_sizes)], 9, shuffle)
        .epoch(epoch)(np.arange(n))
        .tolist()
    )
    for step in range(steps):  # the plain loop
        places = range(step * batch, min((step + 1) * batch, n))
        for rank, batches in enumerate(epochs):
            wanted = [order[place] for place in places if place % world == rank]
            assert keys([batches[step]]) == wanted
    everything = sorted(key for e in epochs for key in keys(e))
    expected = sorted(order[: steps * batch]) if drop_last else list(range(n))
    assert everything == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(shards, workers):
    with (shards / "00001.tar").open("r+b") as file:
        file.truncate(3000)
    source = open_source(shards)
    transform = TrainTransform(6, scale=(0.3, 0.9), flip=True)
    here, there = (
        loaded(source, transform, code_points, 4, seed=5, drop_last=False, workers=w)
        for w in (0, workers)
    )
    state = torch.get_rng_state()
    next(there.epoch(0))  # an epoch that is left does not leak into the next
    for epoch in range(3):  # the same processes serve all epochs
        expected = list(here.epoch(epoch))
        assert any(batch.skipped for batch in expected)
        assert_same(expected, list(there.epoch(epoch)))
    assert_same(list(here.epoch(1))[2:], list(there.epoch(1, start=8)))
    assert torch.equal(
        state, torch.get_rng_state()
    )  # a loader never draws from the global generator
    there.close()


@pytest.mark.parametrize("streamed", [False, True])
@settings(max_examples=60)
@given(
    st.integers(2, 60),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 60),
)
def test_an_epoch_goes_on_with_another_batch_size_and_other_ranks(
    streamed, n, before, now, lanes, world, steps
):
    """The pairs that are left, batch by batch in the order of the epoch as it was
    begun; read shard by shard too.
    """

    def epoch(batch, world, start=0):
        options = {
            "shuffle_buffer": 5 if streamed else 0,
            "drop_last": False,
            "world_size": world,
        }
        loaders = [
            loader(Numbers(n), batch, rank=rank, **options) for rank in range(world)
        ]
        ranks = [list(each.epoch(1, start, lanes)) for each in loaders]
        assert {len(batches) for batches in ranks} == {loaders[0].steps(start)}
        return [
            sorted(key for rank in ranks for key in keys([rank[step]]))
            for step in range(len(ranks[0]))
        ]

    whole = [key for (key,) in epoch(1, 1)]
    assert sorted(whole) == list(range(n))
    begun = epoch(before, lanes)
    expected = [sorted(whole[at : at + before]) for at in range(0, n, before)]
    assert begun == expected
    passed = min(steps, len(begun)) * before
    left = whole[passed:]
    wanted = [sorted(left[at : at + now]) for at in range(0, len(left), now)]
    assert epoch(now, world, min(passed, n)) == wanted


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_of_several_captions_of_a_picture_one_is_drawn_in_each_epoch(tmp_path, form):
    """5 pictures with 3 captions each, and one with one; the same on any ranks, with
    workers and after a resumption.
    """
    captions = {
        f"{i}.png": [f"caption {i} {j}" for j in range(3 if i else 1)] for i in range(6)
    }
    rows = [
        (name, text)
        for j in range(3)
        for name, texts in captions.items()
        for text in texts[j : j + 1]
    ]
    for i, name in enumerate(captions):
        (tmp_path / name).write_bytes(noise(i))
    lines = [
        json.dumps({"filepath": name, "title": texts})
        for name, texts in captions.items()
    ]
    lines = (
        lines
        if form == "jsonl"
        else ["filepath,title", *(f"{name},{text}" for name, text in rows)]
    )
    (tmp_path / f"t.{form}").write_text("\n".join(lines))
    source = open_source(tmp_path / f"t.{form}")
    assert len(source) == 16

    def drawn(epoch, batch_size=4, start=0, transform=None, **options):
        options = {"seed": 3, "drop_last": False} | options
        pairs = loaded(
            source, transform or TrainTransform(8), code_points, batch_size, **options
        )
        batches = list(pairs.epoch(epoch, start))
        pairs.close()
        return [
            pair
            for batch in batches
            for pair in zip(batch.keys, batch.ids.tolist(), strict=True)
        ]

    number = {caption_id(text): text for texts in captions.values() for text in texts}
    epochs = [drawn(epoch) for epoch in range(12)]
    for epoch in epochs:
        assert sorted(key for key, _ in epoch) == sorted(captions)
        assert all(number[id_] in captions[key] for key, id_ in epoch)
    found = {number[id_] for epoch in epochs for _, id_ in epoch}
    assert found == set(number.values())
    assert len({id_ for epoch in epochs for key, id_ in epoch if key == "1.png"}) == 3
    assert epochs[2] == drawn(2, batch_size=6) == drawn(2, workers=1)
    assert epochs[2][4:] == drawn(2, start=4)
    halves = [drawn(2, rank=rank, world_size=2) for rank in (0, 1)]
    expected = sorted(halves[0] + halves[1])
    assert sorted(epochs[2]) == expected
    assert epochs[2] != drawn(2, seed=4)
    wanted = [(k, caption_id(texts[0])) for k, texts in captions.items()]
    assert drawn(0, transform=pixel, shuffle=False) == wanted


def test_pictures_of_mixed_sources_are_those_of_each(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(noise(i))
    (tmp_path / "a.csv").write_text(
        "filepath,title\n0.png,a\n0.png,b\n1.png,c\n,d\n,e\n"
    )
    (tmp_path / "b.csv").write_text("filepath,title\n2.png,f\n0.png,g\n2.png,h\n")
    parts = [
        open_source("demo:val"),
        open_source(tmp_path / "a.csv"),
        open_source(tmp_path / "b.csv"),
    ]
    held_out = Subset(parts[2], np.array([0, 2]), "held out")  # one picture
    options = {"shuffle": False, "drop_last": False}
    pairs = loaded(mix([*parts[:2], held_out]), pixel, code_points, 10, **options)
    assert pairs.pairs_per_epoch == len(parts[0]) + 4 + 1
    *_, last = pairs.epoch(0, start=len(parts[0]) // 10 * 10)
    assert last.keys == ("0.png", "1.png", "2.png")
    assert len(last.skipped) == 2


def test_bad_samples_leave_the_batch_smaller_and_are_listed():
    class Spoilt(Numbers):
        def read(self, index):
            if index in (0, 5):
                raise BadSample("empty caption", str(index))
            return (
                super().read(index)
                if index in (2, 3, 4)
                else RawSample(str(index), b"junk", str(index))
            )

    first, second = loader(Spoilt(10), 5, shuffle=False).epoch(0)
    assert first.keys == ("2", "3", "4")
    assert len(first.images) == len(first.tokens) == len(first.ids) == 3
    found = [(s.key, s.reason) for s in first.skipped]
    assert found == [
        ("0", "empty caption"),
        ("1", "corrupt image"),
    ]
    assert len(second) == 0
    assert second.images.shape == (0, 3, 2, 2)
    assert second.tokens.shape == (0, 4)
    assert second.ids.shape == (0,)
    assert len(second.skipped) == 5


def smooth(index):
    """A picture of a size that depends on the number: JPEG for even ones, else PNG."""
    large = noise_image(index, 8, 8).resize(
        (90 + 17 * index, 70 + 11 * index), Image.Resampling.BICUBIC
    )
    return encoded(large, "PNG" if index % 2 else "JPEG")


@pytest.mark.parametrize("size", [32, 128])
def test_a_batch_is_the_plain_loop(size):
    is_reduced = size == 32
    source = Listed([(smooth(i), f"caption {i}") for i in range(8)])
    transform = TrainTransform(size, scale=(0.5, 0.9), flip=True)
    (batch,) = loader(source, 8, transform=transform, seed=4).epoch(2)
    assert batch.images.shape == (8, 3, size, size)
    assert batch.images.dtype == torch.uint8
    captions = [f"caption {key}" for key in batch.keys]
    assert torch.equal(batch.tokens, code_points(captions))
    assert batch.tokens.dtype == batch.ids.dtype == torch.int64
    assert batch.ids.tolist() == [caption_id(caption) for caption in captions]
    reductions = []
    options = {"transform": transform, "seed": 4, "world_size": 2, "shuffle": False}
    parts = [
        part
        for rank in (0, 1)
        for part in loader(source, 4, rank=rank, **options).epoch(2)
    ]
    drawn = [
        each
        for part in (batch, *parts)
        for each in zip(part.images, keys([part]), strict=True)
    ]
    assert len(drawn) == 16
    for (
        pixels,
        index,
    ) in drawn:  # of one rank, and of two with other batches in another order
        file = Encoded(source.read(index).image)
        crop, *others = (
            transform.draw(*file.size, sample_generator(*at, index), file.max_reduction)
            for at in ((4, 2), (4, 3), (5, 2))
        )
        assert crop not in others
        assert torch.equal(pixels, transform.take(file.rgb(crop.reduction), crop))
        reductions.append(crop.reduction)
        # ... which is close to the same crop of the whole picture
        image = decode(source.read(index).image)
        whole = transform.take(image, crop._replace(reduction=1))
        assert (pixels.int() - whole).abs().max() < 12
        if index % 2:  # a PNG has no reduction
            assert torch.equal(pixels, transform(image, sample_generator(4, 2, index)))
    assert (max(reductions) > 1) == is_reduced


def test_a_batch_larger_than_the_data():
    raises(
        InputError,
        "fewer than one batch of 5; give --batch-size 4 or less",
        loader,
        Numbers(4),
        5,
    )
    raises(
        InputError,
        r"^numbers holds 1 pair; at least 2 training pairs are needed$",
        loader,
        Numbers(1),
        5,
    )
    assert loader(Numbers(4), 5, drop_last=False).steps_per_epoch == 1
    raises(InputError, "numbers holds 0 pairs", loader, Numbers(0), 1, drop_last=False)


class Breaking(Numbers):
    """Its worker breaks off while the main process fetches a tensor from it, and is
    dead only half a second later.
    """

    def __init__(self, n):
        super().__init__(n)
        self.parent = os.getpid()

    def read(self, index):
        if index == 4 and os.getpid() != self.parent:
            multiprocessing.reduction.send_handle = self._break_off
        return super().read(index)

    @staticmethod
    def _break_off(connection, *_):
        connection.close()
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)


class Wordy(Numbers):
    """Keys so long that a batch does not fit into a pipe."""

    def read(self, index):
        return RawSample("x" * 200_000, _PIXEL, str(index))


@pytest.mark.parametrize("source", [Breaking, Wordy])
def test_a_worker_that_dies_is_named(source):
    """Between the announcement of a batch and its tensors, where torch lets the broken
    pipe's error pass; and in the middle of a message, the rest of which never comes: to
    begin reading it would be to wait for ever.
    """
    before = signal.getsignal(signal.SIGCHLD)
    pool = loader(source(8), 2, workers=1, shuffle=False)
    batches = pool.epoch(0)
    next(batches)
    (worker,) = pool._pool.loader._iterator._workers
    signal.signal(
        signal.SIGCHLD, lambda *_: None
    )  # torch's handler is off, as in the training loop by now
    try:
        if source is Wordy:
            time.sleep(0.5)  # the next batch waits for its place in the pipe
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()
        raises(
            RuntimeError,
            rf"DataLoader worker \(pid\(s\) {worker.pid}\) exited unexpectedly",
            list,
            batches,
        )
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert not worker.is_alive()
    pool.close()


def test_workers_leave_ctrl_c_to_the_main_process():
    pool = loader(Numbers(8), 2, workers=1, shuffle=False)
    batches = pool.epoch(0)
    first = next(batches)
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGINT)
    assert keys([first, *batches]) == list(range(8))
    pool.close()


def small_shared_memory():
    """Puts a /dev/shm of 2 MiB before this process; 0 where it may."""
    mounts = (
        ("--make-rprivate", "/"),
        ("-t", "tmpfs", "-o", "size=2m", "none", "/dev/shm"),
    )
    return ctypes.CDLL(None).unshare(0x20000) or max(
        subprocess.run(["mount", *each]).returncode for each in mounts
    )


def test_batches_that_do_not_fit_into_shared_memory(tmp_path):
    """Said by a worker: torch's queue would hang."""
    if sys.platform != "linux" or fork(
        tmp_path / "try", 1, small_shared_memory
    ).wait() != [0]:
        pytest.skip("this user may not mount a /dev/shm: it takes root")

    def action():
        small_shared_memory()
        small = loaded(
            Numbers(16), TrainTransform(64), code_points, 8, workers=1, shuffle=False
        )
        assert keys(list(small.epoch(0))) == list(range(16))
        with contextlib.suppress(OSError):  # full
            Path("/dev/shm/taken").write_bytes(bytes(2**21))
        raises(
            InputError,
            r"^shared memory is full \(unable to .*; give the container more",
            next,
            small.epoch(1),
        )
        small.close()

    ranks = fork(tmp_path / "small", 1, action)
    assert ranks.wait() == [0], ranks.told()


def test_caption_id_ignores_case_and_spacing_only():
    assert (
        caption_id("A  red\n Flag ")
        == caption_id("a red flag")
        == caption_id("A RED FLAG")
    )
    assert caption_id("STRASSE") == caption_id("straße")  # casefold, not lower
    assert caption_id("a red flag") == 4936043505520030197  # in every process
    assert caption_id("a red flag") != caption_id("a redflag")
