"""An index that is brought up to date is the one that would be made anew, whatever
happened to the files.
"""

import errno
import os
import shutil
import sys
import tempfile
from pathlib import Path

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
        self.encoder = FakeEncoder()
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
        first = self.folder / one
        second = self.folder / other
        between = self.root / "between"
        if one != other and first.exists() and second.exists():
            for path, to in ((first, between), (second, first), (between, second)):
                path.rename(to)

    @rule(workers=st.sampled_from([0, 2]), size=st.sampled_from([1, 4]))
    def update(self, workers, size):
        self.remove_empty_folders()
        before = content(self.index)
        seen = self.encoder.seen
        how = options(self.encoder, workers=workers, batch_size=size)
        summary = self.index.update([self.folder], how)
        with Index.create(self.root / "anew") as anew:
            anew.update([self.folder], options(self.encoder.copy()))
            assert content(self.index) == content(anew)
            assert faults(self.index) == faults(anew)
        shutil.rmtree(self.root / "anew")
        after = content(self.index)
        n_lost = len(set(faults(self.index)) & set(before))
        n_more = len(after) - len(before)
        assert summary.added - summary.removed == n_more + n_lost
        known = {row[0] for row in before.values()}
        new = {row[0] for row in after.values()} - known
        assert self.encoder.seen - seen <= len(new)
        again = self.index.update([self.folder], options(self.encoder))
        assert again.unchanged == len(after)
        assert again.embedded == again.added == again.changed == again.removed == 0

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


@pytest.mark.parametrize("kind", ["folder", "table"])
def test_a_source_that_is_not_mounted_keeps_its_pictures(folder, index, kind):
    encoder = FakeEncoder()
    source = folder
    if kind == "table":
        source = folder.with_name("t.csv")
        names = ("a.png", "sub/b.png", "sub/c.png")
        rows = ["filepath", *(f"pictures/{name}" for name in names)]
        source.write_text("\n".join(rows))
    index.update([source], options(encoder))
    before = content(index)
    folder.rename(folder.with_name("unmounted"))
    for is_there in (False, True):
        if is_there:
            folder.mkdir()
        summary = index.update([], options(encoder))
        assert "nothing was removed" in summary.refused[str(source)]
        assert content(index) == before
    index.update([], options(encoder, remove_all=True))
    assert len(index) == 0


def test_a_picture_that_has_no_finite_vector_is_a_fault(folder, index):
    class Broken(FakeEncoder):
        def encode_image(self, images):
            rows = super().encode_image(images)
            rows[0] = float("nan")
            return rows

    summary = index.update([folder], options(Broken()))
    assert summary.faults == {"embedding not finite": 1}
    assert summary.added == len(index) == 2


def test_equal_files_are_embedded_once(folder, index):
    for number in range(6):  # more than are decoded ahead
        write_noise(folder / f"{number}.png", 50)
    how = options(FakeEncoder(), workers=2, batch_size=1)
    assert index.update([folder], how).embedded == 4


def refuse(call, *names):
    """The call, that may not look at some names."""

    def refused(path, *rest, **more):
        if Path(path).name in names:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return call(path, *rest, **more)

    return refused


def test_what_cannot_be_read_now_stays(folder, index, monkeypatch):
    encoder = FakeEncoder()
    index.update([folder], options(encoder))
    before = content(index)
    os.utime(folder / "a.png", (10**9, 10**9))
    new = write_noise(folder / "new.png", 50)
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", refuse(os.stat, "a.png", "new.png"))
            patch.setattr(os, "scandir", refuse(os.scandir, "sub"))
            summary = index.update([folder], options(encoder))
        assert summary.faults == {"no permission to read": 2}
        assert summary.left_out.counts == {"folder cannot be listed": 1}
        assert content(index) == before
        assert list(faults(index)) == [str(new)]
    summary = index.update([folder], options(encoder))
    assert summary.described == 1
    assert summary.added == 1
    assert summary.embedded == 1
    assert not summary.faults
    assert not faults(index)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_not_utf8_is_left_out_and_counted(tmp_path, index):
    """Neither database nor JSON takes it."""
    write_noise(tmp_path / "p" / "a.png", 1)
    write_noise(Path(os.fsdecode(bytes(tmp_path / "p") + b"/caf\xe9.png")), 2)
    done = index.update([tmp_path / "p"], options(FakeEncoder()))
    assert done.added == 1
    assert done.left_out.counts == {"name that is not UTF-8, to be renamed": 1}
