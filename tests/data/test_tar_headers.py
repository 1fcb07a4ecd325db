"""The members of a tar are those that tarfile finds, whatever its headers hold."""

import io
import os
import tarfile
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloob.data.shards.headers import Member, members_of
from cloob.errors import InputError
from make import write_tar

NAMES = ["a.jpg", "a.txt", "in/a folder/b.jpg", "b" * 99, "a.jpg"]
DAMAGED = (tarfile.TarError, ValueError, IndexError, OverflowError)
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def archive(path, names=NAMES, kind=tarfile.GNU_FORMAT, mtime=1.25, **fields):
    with tarfile.open(path, "w", format=kind) as file:
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 100 * i
            info.mtime = mtime  # half a second is a header of its own in PAX_FORMAT
            for field, value in fields.items():
                setattr(info, field, value)
            file.addfile(info, io.BytesIO(bytes([65 + i]) * info.size))
    return path


def ours(path):
    return members_of(path)


def theirs(path):
    """The complete files that tarfile gives, until it breaks off."""
    size = path.stat().st_size
    members = []
    with suppress(*DAMAGED), tarfile.open(path, "r:") as file:
        info = file.next()
        while info is not None and info.offset < file.offset:
            if info.isreg() and info.offset_data + info.size <= size:
                members.append(Member(info.name, info.offset_data, info.size))
            info = file.next()
    return members


@pytest.mark.parametrize("kind", FORMATS)
def test_what_people_write(tmp_path, kind):
    path = archive(tmp_path / "0.tar", NAMES, kind, 1_700_000_000.25)
    members, missing = ours(path)
    assert [member.name for member in members] == NAMES
    assert members == theirs(path)
    assert missing is None


HEADERS = [
    {"names": ["é.jpg", "a.jpg"]},
    {"names": ["b" * 100, "a.jpg"]},
    {"names": ["long/" * 30 + "a.jpg", "a.jpg"]},
    {"names": ["c/" + "long/" * 25 + "a.jpg"], "kind": tarfile.USTAR_FORMAT},
    {"names": ["a.jpg"], "type": tarfile.DIRTYPE},
    {"names": ["a"], "type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
    {"names": ["a.jpg"], "type": tarfile.LNKTYPE, "linkname": "b"},
    {"names": ["a.jpg"], "type": tarfile.GNUTYPE_SPARSE},
    {
        "names": ["a.jpg", "c.jpg"],
        "kind": tarfile.PAX_FORMAT,
        "pax_headers": {"path": "b.jpg"},
    },
    {"names": []},
]


@pytest.mark.parametrize(
    "fields",
    HEADERS,
    ids=str,
)
def test_headers_of_every_kind(tmp_path, fields):
    path = archive(tmp_path / "0.tar", **fields)
    assert ours(path) == (theirs(path), None)


CUTS = [(place, tarfile.GNU_FORMAT) for place in range(700, 11_000, 700)]
CUTS += [(place, tarfile.PAX_FORMAT) for place in range(2100, 11_000, 700)]


@pytest.mark.parametrize(("place", "kind"), CUTS)
def test_a_cut_archive_has_its_complete_members(tmp_path, place, kind):
    path = archive(tmp_path / "0.tar", kind=kind)
    last = ours(path)[0][-1]
    end = last.offset + -(-last.size // 512) * 512
    os.truncate(path, place)
    members, missing = ours(path)
    assert members == theirs(path)
    assert (missing is None) == (place >= end + 512)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_headers_give_what_tarfile_gives(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("tars") / "0.tar"
    archive(path, NAMES[:3], data.draw(st.sampled_from(FORMATS[1:])))
    content = bytearray(path.read_bytes())
    at_header = data.draw(st.integers(0, 7)) * tarfile.BLOCKSIZE
    # of owner, time and device, which are not looked at, no damage is found
    fields = ((0, 100), (124, 136), (148, 156), (156, 157), (257, 329), (345, 512))
    first, last = data.draw(st.sampled_from(fields))
    start = at_header + data.draw(st.integers(first, last - 1))
    odd = [b"\0", b" ", b"7", b"8", b"\x80", b"\xff", b"_1", b"-1", b"x"]
    for value in data.draw(st.lists(st.sampled_from(odd), min_size=1, max_size=3)):
        content[start : start + len(value)] = value
        start += len(value)
    if data.draw(st.booleans()):  # with a checksum that is right again
        header = bytes(content[at_header : at_header + tarfile.BLOCKSIZE])
        content[at_header + 148 : at_header + 156] = b"%06o\0 " % total(header)
    path.write_bytes(content)
    try:
        members, _ = ours(path)
    except InputError:
        members = []
    assert members == theirs(path)


def total(header):
    return tarfile.calc_chksums(header)[0]


def test_what_follows_the_end_is_said(tmp_path):
    first = write_tar(tmp_path / "0.tar", {"a.jpg": b"1", "a.txt": b"2"})
    second = write_tar(tmp_path / "1.tar", {"b.jpg": b"1", "b.txt": b"2"})
    first.write_bytes(first.read_bytes() + second.read_bytes())
    members, cut = ours(first)
    assert [member.name for member in members] == ["a.jpg", "a.txt"]
    assert "another archive follows" in cut
