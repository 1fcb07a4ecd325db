import contextlib
import ctypes
import itertools
import math
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
from make import Listed, code_points, encoded, loaded, noise, noise_image, write_table
from support import fork, raises

_PIXEL = b"P6 1 1 255 \x10\x20\x30"  # a whole PPM file


class Numbers(Listed):
    """A source of n pairs: pair i has the caption and key ``"i"``."""

    def __init__(self, n):
        super().__init__([(_PIXEL, str(i)) for i in range(n)], "numbers")


def pixel(image):
    return torch.tensor(np.asarray(image.resize((2, 2)))).permute(2, 0, 1)


def loader(source, batch_size, transform=pixel, **options):
    return loaded(source, transform, code_points, batch_size, **options)


def keys(batches):
    return [int(key) for batch in batches for key in batch.keys]


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys == y.keys
        assert x.skipped == y.skipped
        assert torch.equal(x.images, y.images)
        assert torch.equal(x.tokens, y.tokens)
        assert torch.equal(x.ids, y.ids)


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
    source = Numbers(n)
    options = {"drop_last": drop_last, "shuffle": shuffle}
    options |= {"world_size": world, "seed": 9}
    ranks = [loader(source, batch, rank=rank, **options) for rank in range(world)]
    epochs = [list(rank.epoch(epoch)) for rank in ranks]
    steps = n // batch if drop_last else math.ceil(n / batch)
    assert {len(batches) for batches in epochs} == {steps}
    assert {rank.steps_per_epoch for rank in ranks} == {steps}
    rows_at = EpochOrder([ShardSizes(source.shard_sizes)], 9, shuffle).epoch(epoch)
    order = rows_at(np.arange(n)).tolist()
    for step in range(steps):  # the plain loop
        places = range(step * batch, min((step + 1) * batch, n))
        for rank, batches in enumerate(epochs):
            wanted = [order[place] for place in places if place % world == rank]
            assert keys([batches[step]]) == wanted
    everything = [key for batches in epochs for key in keys(batches)]
    expected = order[: steps * batch] if drop_last else order
    assert sorted(everything) == sorted(expected)
    assert sorted(order) == list(range(n))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(shards, workers):
    with (shards / "00001.tar").open("r+b") as file:
        file.truncate(3000)
    source = open_source(shards)
    transform = TrainTransform(6, scale=(0.3, 0.9), flip=True)
    options = {"transform": transform, "seed": 5, "drop_last": False}
    here = loader(source, 4, **options)
    there = loader(source, 4, workers=workers, **options)
    state = torch.get_rng_state()
    next(there.epoch(0))  # an epoch that is left does not leak into the next
    for epoch in range(3):  # the same processes serve all epochs
        expected = list(here.epoch(epoch))
        assert any(batch.skipped for batch in expected)
        assert_same(expected, list(there.epoch(epoch)))
    _, _, *rest = here.epoch(1)
    assert_same(rest, list(there.epoch(1, start=8)))
    # a loader never draws from the global generator
    assert torch.equal(state, torch.get_rng_state())
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
        options = {"drop_last": False, "world_size": world}
        options["shuffle_buffer"] = 5 if streamed else 0
        ranks = []
        for rank in range(world):
            own = loader(Numbers(n), batch, rank=rank, **options)
            batches = list(own.epoch(1, start, lanes))
            assert len(batches) == own.steps(start)
            ranks.append(batches)
        return [sorted(keys(parts)) for parts in zip(*ranks, strict=True)]

    def cut(order, batch):
        return [sorted(order[at : at + batch]) for at in range(0, len(order), batch)]

    whole = [key for (key,) in epoch(1, 1)]
    assert sorted(whole) == list(range(n))
    begun = epoch(before, lanes)
    assert begun == cut(whole, before)
    passed = min(steps, len(begun)) * before
    rest = epoch(now, world, min(passed, n))
    assert rest == cut(whole[passed:], now)


def rows_of(captions, form):
    """In JSON a picture has a list of captions; else a row for each, which are not one
    after the other.
    """
    if form == "jsonl":
        return [{"filepath": name, "title": own} for name, own in captions.items()]
    rows = []
    for texts in itertools.zip_longest(*captions.values()):
        for name, text in zip(captions, texts, strict=True):
            if text is not None:
                rows.append({"filepath": name, "title": text})
    return rows


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_of_several_captions_of_a_picture_one_is_drawn_in_each_epoch(tmp_path, form):
    """5 pictures with 3 captions each, and one with one; the same on any ranks, with
    workers and after a resumption.
    """
    captions = {"0.png": ["caption 0 0"]}
    for i in range(1, 6):
        captions[f"{i}.png"] = [f"caption {i} {j}" for j in range(3)]
    for i, name in enumerate(captions):
        (tmp_path / name).write_bytes(noise(i))
    path = write_table(tmp_path / f"t.{form}", rows_of(captions, form))
    source = open_source(path)
    assert len(source) == 16
    of_id = {caption_id(text): text for own in captions.values() for text in own}

    def drawn(epoch, batch_size=4, start=0, **options):
        defaults = {"transform": TrainTransform(8), "seed": 3, "drop_last": False}
        pairs = loader(source, batch_size, **defaults | options)
        found = []
        for batch in pairs.epoch(epoch, start):
            texts = [of_id[id_] for id_ in batch.ids.tolist()]
            found += zip(batch.keys, texts, strict=True)
        pairs.close()
        return found

    epochs = [drawn(epoch) for epoch in range(12)]
    for epoch in epochs:
        assert sorted(key for key, _ in epoch) == sorted(captions)
        for key, text in epoch:
            assert text in captions[key]
    found = {text for epoch in epochs for _, text in epoch}
    assert found == set(of_id.values())
    third = epochs[2]
    assert drawn(2, batch_size=6) == third
    assert drawn(2, workers=1) == third
    assert drawn(2, start=4) == third[4:]
    first_rank, second_rank = (drawn(2, rank=rank, world_size=2) for rank in (0, 1))
    assert sorted(first_rank + second_rank) == sorted(third)
    assert drawn(2, seed=4) != third
    wanted = [(name, own[0]) for name, own in captions.items()]
    assert drawn(0, transform=pixel, shuffle=False) == wanted


def test_pictures_of_mixed_sources_are_those_of_each(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(noise(i))
    a = tmp_path / "a.csv"
    a.write_text("filepath,title\n0.png,a\n0.png,b\n1.png,c\n,d\n,e\n")
    b = tmp_path / "b.csv"
    b.write_text("filepath,title\n2.png,f\n0.png,g\n2.png,h\n")
    demo = open_source("demo:val")
    held_out = Subset(open_source(b), np.array([0, 2]), "held out")  # one picture
    source = mix([demo, open_source(a), held_out])
    pairs = loader(source, 10, shuffle=False, drop_last=False)
    assert pairs.pairs_per_epoch == len(demo) + 4 + 1
    *_, last = pairs.epoch(0, start=len(demo) // 10 * 10)
    assert last.keys == ("0.png", "1.png", "2.png")
    assert len(last.skipped) == 2


def test_bad_samples_leave_the_batch_smaller_and_are_listed():
    class Spoilt(Numbers):
        def read(self, index):
            if index in (0, 5):
                raise BadSample("empty caption", str(index))
            if index in (2, 3, 4):
                return super().read(index)
            return RawSample(str(index), b"junk", str(index))

    first, second = loader(Spoilt(10), 5, shuffle=False).epoch(0)
    assert first.keys == ("2", "3", "4")
    assert len(first.images) == 3
    assert len(first.tokens) == 3
    assert len(first.ids) == 3
    found = [(bad.key, bad.reason) for bad in first.skipped]
    assert found == [("0", "empty caption"), ("1", "corrupt image")]
    assert len(second) == 0
    assert second.images.shape == (0, 3, 2, 2)
    assert second.tokens.shape == (0, 4)
    assert second.ids.shape == (0,)
    assert len(second.skipped) == 5


def smooth(index):
    """A picture of a size that depends on the number: JPEG for even ones, else PNG."""
    size = (90 + 17 * index, 70 + 11 * index)
    large = noise_image(index, 8, 8).resize(size, Image.Resampling.BICUBIC)
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
    drawn = list(zip(batch.images, keys([batch]), strict=True))
    # and of two ranks with other batches in another order
    options = {"transform": transform, "seed": 4, "world_size": 2, "shuffle": False}
    for rank in (0, 1):
        for part in loader(source, 4, rank=rank, **options).epoch(2):
            drawn += zip(part.images, keys([part]), strict=True)
    assert len(drawn) == 16

    def crop_of(file, index, seed=4, epoch=2):
        generator = sample_generator(seed, epoch, index)
        return transform.draw(*file.size, generator, file.max_reduction)

    reductions = []
    for pixels, index in drawn:
        data = source.read(index).image
        file = Encoded(data)
        crop = crop_of(file, index)
        assert crop != crop_of(file, index, epoch=3)
        assert crop != crop_of(file, index, seed=5)
        assert torch.equal(pixels, transform.take(file.rgb(crop.reduction), crop))
        reductions.append(crop.reduction)
        # ... which is close to the same crop of the whole picture
        image = decode(data)
        whole = transform.take(image, crop._replace(reduction=1))
        difference = pixels.int() - whole
        assert difference.abs().max() < 12
        if index % 2:  # a PNG has no reduction
            generator = sample_generator(4, 2, index)
            assert torch.equal(pixels, transform(image, generator))
    assert (max(reductions) > 1) == is_reduced


def test_a_batch_larger_than_the_data():
    said = "fewer than one batch of 5; give --batch-size 4 or less"
    raises(InputError, said, loader, Numbers(4), 5)
    said = r"^numbers holds 1 pair; at least 2 training pairs are needed$"
    raises(InputError, said, loader, Numbers(1), 5)
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
    # torch's handler is off, as in the training loop by now
    signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        if source is Wordy:
            time.sleep(0.5)  # the next batch waits for its place in the pipe
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()
        said = rf"DataLoader worker \(pid\(s\) {worker.pid}\) exited unexpectedly"
        raises(RuntimeError, said, list, batches)
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
    failed = ctypes.CDLL(None).unshare(0x20000)
    for words in ("--make-rprivate /", "-t tmpfs -o size=2m none /dev/shm"):
        failed = failed or subprocess.run(["mount", *words.split()]).returncode
    return failed


def test_batches_that_do_not_fit_into_shared_memory(tmp_path):
    """Said by a worker: torch's queue would hang."""
    if sys.platform != "linux":
        pytest.skip("other systems have no /dev/shm")
    mounted = fork(tmp_path / "try", 1, small_shared_memory)
    if mounted.wait() != [0]:
        pytest.skip("this user may not mount a /dev/shm: it takes root")

    def action():
        small_shared_memory()
        options = {"transform": TrainTransform(64), "workers": 1, "shuffle": False}
        small = loader(Numbers(16), 8, **options)
        assert keys(small.epoch(0)) == list(range(16))
        with contextlib.suppress(OSError):  # full
            Path("/dev/shm/taken").write_bytes(bytes(2**21))
        said = r"^shared memory is full \(unable to .*; give the container more"
        raises(InputError, said, next, small.epoch(1))
        small.close()

    ranks = fork(tmp_path / "small", 1, action)
    assert ranks.wait() == [0], ranks.told()


def test_caption_id_ignores_case_and_spacing_only():
    number = caption_id("a red flag")
    assert number == 4936043505520030197  # in every process
    assert caption_id("A  red\n Flag ") == number
    assert caption_id("A RED FLAG") == number
    assert caption_id("a redflag") != number
    assert caption_id("STRASSE") == caption_id("straße")  # casefold, not lower
