"""An index that is brought up to date is the one that would be made anew, whatever
happened to the files.
"""

import errno
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    multiple,
    rule,
)
from index_fakes import FakeEncoder, content, faults, options, write_noise
from PIL import Image

from cloob.errors import InputError
from cloob.search.index import Index

NAMES = [
    f"{folder}{name}"
    for folder in ("", "a/", "a/b c/")
    for name in ("x.png", "y.jpg", "z.png")
]


class Updates(RuleBasedStateMachine):
    files = Bundle("files")

    @initialize()
    def begin(self):
        self.root = Path(tempfile.mkdtemp())
        self.folder = self.root / "pictures"
        self.folder.mkdir()
        write_noise(
            self.folder / "always.png", 999
        )  # a source of which nothing is left is another matter
        self.encoders = {
            "fake": FakeEncoder(),
            "second": FakeEncoder("second", seed=1, dim=5),
        }
        self.index = Index.create(self.root / "index")
        self.clock = 10**18

    def remove_empty_folders(self):
        """One that is left looks like the place of a disk that is not mounted."""
        for folder, *_ in [*os.walk(self.folder)][:0:-1]:
            if not any(Path(folder).iterdir()):
                Path(folder).rmdir()

    def stamp(self, path):
        self.clock += 10**9
        os.utime(path, ns=(self.clock, self.clock))

    @rule(target=files, name=st.sampled_from(NAMES), seed=st.integers(0, 4))
    def write(self, name, seed):
        self.stamp(write_noise(self.folder / name, seed))
        return name

    @rule(target=files, name=st.sampled_from(NAMES))
    def damage(self, name):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no picture")
        self.stamp(path)
        return name

    @rule(name=files)
    def touch(self, name):
        if (self.folder / name).exists():
            self.stamp(self.folder / name)

    @rule(
        name=files, caption=st.sampled_from(["a dog", "a cat", None]), old=st.booleans()
    )
    def caption(self, name, caption, old):
        beside = (self.folder / name).with_suffix(".txt")
        if caption is None:
            beside.unlink(missing_ok=True)
        elif beside.parent.is_dir():
            beside.write_text(caption)
            self.stamp(beside)
            if old:  # long before the pictures
                os.utime(beside, ns=(10**18, 2 * 10**18 - self.clock))

    @rule(target=files, name=consumes(files), to=st.sampled_from(NAMES))
    def move(self, name, to):
        if not (self.folder / name).exists():
            return multiple()
        (self.folder / to).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).rename(self.folder / to)
        return to

    @rule(target=files, name=files, to=st.sampled_from(NAMES))
    def copy(self, name, to):
        if name == to or not (self.folder / name).exists():
            return multiple()
        (self.folder / to).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(self.folder / name, self.folder / to)
        return to

    @rule(name=consumes(files))
    def delete(self, name):
        (self.folder / name).unlink(missing_ok=True)

    @rule(one=files, other=files)
    def swap(self, one, other):
        first, second, between = (
            self.folder / one,
            self.folder / other,
            self.root / "between",
        )
        if one != other and first.exists() and second.exists():
            for path, to in ((first, between), (second, first), (between, second)):
                path.rename(to)

    @rule(
        workers=st.sampled_from([0, 2]),
        size=st.sampled_from([1, 4]),
        name=st.sampled_from(["fake", "second"]),
    )
    def update(self, workers, size, name):
        self.remove_empty_folders()
        encoder, models = (
            self.encoders[name],
            [model.name for model in self.index.models],
        )
        before = content(self.index, name if name in models else None)
        seen, known = (
            encoder.seen,
            {row[0] for row in before.values() if np.isfinite(row[-1]).all()},
        )
        summary = self.index.update(
            [self.folder], options(encoder, workers=workers, batch_size=size)
        )
        with Index.create(self.root / "anew") as anew:
            anew.update([self.folder], options(self.encoders[name].copy()))
            assert content(self.index, name) == content(anew, name)
            assert faults(self.index) == faults(anew)
        shutil.rmtree(self.root / "anew")
        after = content(self.index, name)
        assert summary.added - summary.removed == len(after) - len(before) + len(
            set(faults(self.index)) & set(before)
        )
        assert encoder.seen - seen <= len({row[0] for row in after.values()} - known)
        again = self.index.update([self.folder], options(encoder))
        assert (
            again.unchanged == len(after)
            and again.embedded == again.added == again.changed == again.removed == 0
        )
        for model in (
            self.index.models
        ):  # no vector of another model is of a picture that was here before
            for path, row in content(self.index, model.name).items():
                if np.isfinite(row[-1]).all():
                    with Image.open(path) as image:
                        assert np.allclose(
                            row[-1],
                            self.encoders[model.name].copy().rows([image])[0],
                            atol=1e-3,
                        )

    def teardown(self):
        if hasattr(self, "index"):
            self.index.close()
            shutil.rmtree(self.root)


TestUpdates = Updates.TestCase
TestUpdates.settings = settings(max_examples=8, stateful_step_count=14, deadline=None)


@pytest.fixture
def folder(tmp_path):
    for seed, name in enumerate(["a.png", "sub/b.png", "sub/c.png"]):
        write_noise(tmp_path / "pictures" / name, seed)
    return tmp_path / "pictures"


def by_name(index):
    return {
        Path(item.path).name: item.id
        for item in index.items(index.store.ids().tolist())
    }


def test_a_renamed_file_and_a_renamed_source_are_copies_of_their_vectors(folder, index):
    first, second = FakeEncoder(), FakeEncoder("second", seed=1)
    index.update([folder], options(first))
    index.update([folder], options(second))
    (folder / "a.png").rename(folder / "sub" / "d.png")
    summary = index.update([folder], options(first))
    assert (summary.added, summary.removed, summary.unchanged, summary.embedded) == (
        1,
        1,
        2,
        0,
    )
    new = folder.rename(folder.with_name("new name"))
    assert (
        index.update([new], options(first)).added == 3
    )  # the old source looks unmounted
    assert index.update([], options(first, remove_all=True)).removed == 3
    assert (
        index.update([], options(second)).unchanged == 3
        and first.seen + second.seen == 6
    )
    for model in (first, second):
        rows = index.store.vectors(model.name, index.store.ids().tolist())
        for item, row in zip(
            index.items(index.store.ids().tolist()), rows, strict=True
        ):
            with Image.open(item.path) as image:
                np.testing.assert_allclose(
                    row, model.copy().rows([image])[0], atol=1e-3
                )
    write_noise(new / "sub" / "b.png", 50)
    assert index.update([], options(first)).changed == 1
    assert np.isnan(
        index.store.vectors("second", [by_name(index)["b.png"]])
    ).all()  # it was of other bytes


@pytest.mark.parametrize("kind", ["folder", "table"])
def test_a_source_that_is_not_mounted_keeps_its_pictures(folder, index, kind):
    encoder, source = FakeEncoder(), folder
    if kind == "table":
        source = folder.with_name("t.csv")
        source.write_text(
            "filepath\npictures/a.png\npictures/sub/b.png\npictures/sub/c.png\n"
        )
    index.update([source], options(encoder))
    with pytest.raises(InputError, match="no such file"):
        index.update([folder.with_name("nowhere")], options(encoder))
    folder.rename(folder.with_name("unmounted"))
    for empty in (False, True):
        if empty:
            folder.mkdir()
        summary = index.update([], options(encoder))
        assert (
            list(summary.refused) == [str(source)]
            and "nothing was removed" in summary.refused[str(source)]
        )
        assert len(index) == 3 and summary.removed == 0
    assert np.isfinite(index.store.vectors("fake", index.store.ids().tolist())).all()
    assert index.update([], options(encoder, remove_all=True)).removed == (
        3 if kind == "folder" else 0
    )
    assert len(index) == 0


def test_a_picture_that_has_no_finite_vector_is_a_fault(folder, index):
    class Broken(FakeEncoder):
        def encode_image(self, images):
            rows = super().encode_image(images)
            rows[0] = float("nan")
            return rows

    summary = index.update([folder], options(Broken()))
    assert summary.faults == {"embedding not finite": 1} and summary.added == 2


def test_equal_files_are_embedded_once(folder, index):
    for number in range(6):  # more than are decoded ahead
        write_noise(folder / f"{number}.png", 50)
    assert (
        index.update([folder], options(FakeEncoder(), workers=2, batch_size=1)).embedded
        == 4
    )


def test_what_cannot_be_read_now_stays(folder, index, monkeypatch):
    first, second = FakeEncoder(), FakeEncoder("second", seed=1)
    index.update([folder], options(first))
    index.update([folder], options(second))
    before = by_name(index)
    os.utime(folder / "a.png", (10**9, 10**9))
    write_noise(folder / "new.png", 50)

    def refuse(call, *names):
        def refused(path, *rest, **more):
            if Path(path).name in names:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return call(path, *rest, **more)

        return refused

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", refuse(os.stat, "a.png", "new.png"))
            patch.setattr(os, "scandir", refuse(os.scandir, "sub"))
            summary = index.update([folder], options(first))
        assert summary.faults == {"no permission to read": 2} and (
            summary.removed,
            summary.unchanged,
        ) == (0, 0)
        assert summary.left_out.counts == {"folder cannot be listed": 1}
        assert by_name(index) == before and list(faults(index)) == [
            str(folder / "new.png")
        ]
    assert np.isfinite(index.store.vectors("second", [before["a.png"]])).all()
    summary = index.update([folder], options(first))
    assert (summary.described, summary.added, summary.embedded) == (1, 1, 1)
    assert not summary.faults and not faults(index)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_not_utf8_is_left_out_and_counted(tmp_path, index):
    """Neither database nor JSON takes it."""
    write_noise(tmp_path / "p" / "a.png", 1)
    write_noise(Path(os.fsdecode(bytes(tmp_path / "p") + b"/caf\xe9.png")), 2)
    done = index.update([tmp_path / "p"], options(FakeEncoder()))
    assert (done.added, done.left_out.counts) == (
        1,
        {"name that is not UTF-8, to be renamed": 1},
    )
