"""Headers that are read directly give what tarfile gives, and of all that is not plain
nothing.
"""

import io
import os
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloob.data.shards import headers, tar
from cloob.data.shards.headers import plain_members
from cloob.data.shards.tar import TarReader
from cloob.errors import InputError
from make import write_tar


def archive(path, names, kind=tarfile.GNU_FORMAT, mtime=0, **facts):
    with tarfile.open(path, "w", format=kind) as file:
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = 100 * i, mtime
            for fact, value in facts.items():
                setattr(info, fact, value)
            file.addfile(info, io.BytesIO(bytes([65 + i]) * info.size))
    return path


def plain(path):
    with path.open("rb") as file:
        return plain_members(file.fileno(), os.fstat(file.fileno()).st_size)


def both(path):
    """What is found with plain headers, and by tarfile alone."""
    found = []
    for read in (plain_members, lambda file, size: None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tar, "plain_members", read)
            try:
                found.append(TarReader((path,)).listing(0))
            except InputError as error:
                found.append(str(error))
    return found


NAMES = ["a.jpg", "a.txt", "in/a folder/b.jpg", "b" * 99, "a.jpg"]


@pytest.mark.parametrize(
    ("kind", "mtime"),
    [
        (tarfile.USTAR_FORMAT, 0),
        (tarfile.GNU_FORMAT, 1_700_000_000),
        (tarfile.PAX_FORMAT, 1_700_000_000.25),  # as WebDataset writes it
    ],
)
def test_what_people_write_is_plain(tmp_path, kind, mtime):
    path = archive(tmp_path / "0.tar", NAMES, kind, mtime)
    expected, cut = TarReader((path,)).listing(0)
    assert plain(path) == expected
    assert cut is None
    with tarfile.open(path) as file:
        assert [(m.name, m.offset_data, m.size) for m in file] == expected


@pytest.mark.parametrize(
    "facts",
    [
        {"names": ["é.jpg"]},
        {"names": ["b" * 100]},
        {"names": ["long/" * 30 + "a.jpg"]},
        {"names": ["c/" + "long/" * 25 + "a.jpg"], "kind": tarfile.USTAR_FORMAT},
        {"names": ["a.jpg"], "type": tarfile.DIRTYPE},
        {"names": ["a.jpg"], "type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
        {"names": ["a.jpg"], "type": tarfile.LNKTYPE, "linkname": "b"},
        {"names": ["a.jpg"], "type": tarfile.GNUTYPE_SPARSE},
        {
            "names": ["a.jpg"],
            "kind": tarfile.PAX_FORMAT,
            "pax_headers": {"path": "b.jpg"},
        },
        {"names": []},
    ],
    ids=str,
)
def test_all_else_is_left_to_tarfile(tmp_path, facts):
    path = archive(tmp_path / "0.tar", **facts)
    assert plain(path) is None
    assert both(path)[0] == both(path)[1]


@pytest.mark.parametrize("place", range(0, 11_000, 700))
def test_cut_archives(tmp_path, place):
    path = archive(tmp_path / "0.tar", NAMES)
    last = plain(path)[-1]
    end = last.offset + -(-last.size // 512) * 512
    os.truncate(path, place)
    assert (plain(path) is not None) == (place >= end + 1024)
    first, second = both(path)
    assert first == second


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_headers_give_what_tarfile_gives(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("tars") / "0.tar"
    kind = data.draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    archive(path, NAMES[:3], kind, mtime=1.5)
    content = bytearray(path.read_bytes())
    at_header = data.draw(st.integers(0, 7)) * tarfile.BLOCKSIZE
    # of owner, time and device, which are not looked at, no damage is found
    fields = ((0, 100), (124, 136), (148, 156), (156, 157), (257, 329), (345, 512))
    first, last = data.draw(st.sampled_from(fields))
    start = at_header + data.draw(st.integers(first, last - 1))
    odd = st.sampled_from(
        [b"\0", b" ", b"7", b"8", b"\x80", b"\xff", b"_1", b"-1", b"x"]
    )
    for value in data.draw(st.lists(odd, min_size=1, max_size=3)):
        content[start : start + len(value)] = value
        start += len(value)
    if data.draw(st.booleans()):  # with a checksum that is right again
        header = bytes(content[at_header : at_header + tarfile.BLOCKSIZE])
        total = headers._sum(header)
        content[at_header + 148 : at_header + 156] = b"%06o\0 " % total
    path.write_bytes(content)
    first, second = both(path)
    assert first == second


def test_what_follows_the_end_is_said(tmp_path):
    first = write_tar(tmp_path / "0.tar", {"a.jpg": b"1", "a.txt": b"2"})
    second = write_tar(tmp_path / "1.tar", {"b.jpg": b"1", "b.txt": b"2"})
    first.write_bytes(first.read_bytes() + second.read_bytes())
    assert plain(first) is None
    members, cut = TarReader((first,)).listing(0)
    assert [member.name for member in members] == ["a.jpg", "a.txt"]
    assert "another archive follows" in cut
