"""Small pickles that would make much of little: refused before they do, each in one line."""

from __future__ import annotations

import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from cloob import load_model
from cloob.errors import InputError
from cloob.models.weights import crowsonkb
from cloob.models.weights.formats import pickles, torchfile

START = b"\x80\x02"
ORDERED = b"ccollections\nOrderedDict\n"
INTLIST = b"ctorch.jit._pickle\nbuild_intlist\n"
MODULE = b"c__torch__.M\nX\n)\x81"
TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n(("
    b"X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQK\x00))\x89" + ORDERED
    + b")RtR"
)  # fmt: skip


def text(letters: str) -> bytes:
    return b"X" + struct.pack("<I", len(letters)) + letters.encode()


def archive(path: Path, pickled: bytes, *, scripted: bool = False) -> Path:
    """A zip as torch writes, with one storage of four bytes."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", START + pickled + b".")
        file.writestr("a/data/0", bytes(4))
        if scripted:
            file.writestr("a/constants.pkl", START + b").")
    return path


def nested(levels: int) -> bytes:
    """A tuple that holds the same tuple twice, and so on: 2^levels empty ones, told in 5 bytes a level."""
    return b")q\x00" + b"".join(b"h%c\x86q%c" % (level, level + 1) for level in range(levels))


def refused(path: Path, said: str) -> None:
    with pytest.raises(InputError) as caught:
        load_model(path)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("scripted", [False, True])
def test_a_value_that_is_kept_is_not_copied_again_and_again(
    scripted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pickles, "_MAX_HANDED", 20_000)
    made = INTLIST if scripted else ORDERED
    items = b"K\x01" * 1000 if scripted else b"".join(b"J" + struct.pack("<i", i) + b"N\x86" for i in range(1000))
    kept = b"(" + made + b"q\x00](" + items + b"e\x85q\x01"
    refused(archive(tmp_path / "m.pt", kept + b"h\x00h\x01R" * 100 + b"t", scripted=scripted), "values handed to calls")


@pytest.mark.parametrize(
    "argument",
    [b"}(" + b"K\x01NK\x02N" + b"u", b"](" + nested(18) + b"N\x86e", b"(" + text("ab") + b"t", b"K\x01"],
    ids=["dict", "key that is a tuple", "strings", "number"],
)
def test_an_ordered_dict_is_made_of_a_list_of_pairs(argument: bytes, tmp_path: Path) -> None:
    refused(archive(tmp_path / "m.pt", ORDERED + argument + b"\x85R"), "OrderedDict with arguments of another kind")


def test_an_ordered_dict_of_python_2_is_read(tmp_path: Path) -> None:
    pairs = b"](" + text("a") + b"K\x01\x86" + text("b") + b"K\x02\x86e"
    path = archive(tmp_path / "m.pt", ORDERED + pairs + b"\x85R")
    assert torchfile.read_torch(path).value == {"a": 1, "b": 2}


def test_one_long_name_is_not_given_to_many_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchfile, "MAX_SPELLED", 50_000)
    many = b"}(" + b"".join(text(f"n{i}") + b"h\x00" for i in range(100)) + b"u"
    inner = MODULE + b"}h\x01" + MODULE + many + b"bsb"
    kept = text("tensor") + TENSOR + b"q\x00" + text("name") + text("k" * 1000) + b"q\x01"
    path = archive(tmp_path / "m.pt", MODULE + b"}(" + kept + text("inner") + inner + b"ub", scripted=True)
    refused(path, "its names have more than 50,000 characters")


def test_one_long_name_is_not_given_to_many_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crowsonkb, "MAX_SPELLED", 50)
    path = tmp_path / "m.pkl"
    path.write_bytes(pickle.dumps({"params": ({"k" * 60: {"w": None}}, {})}, protocol=4))
    path.with_suffix(".json").write_text("{}")
    refused(path, "its names have more than 50 characters")


@pytest.mark.parametrize("levels", [1, 18])
def test_a_configuration_file_that_is_no_name_is_told_by_its_kind(levels: int, tmp_path: Path) -> None:
    pickled = b"}(" + text("state_dict") + b"}" + text("model_config_file") + nested(levels) + b"u"
    refused(archive(tmp_path / "m.pt", pickled), "model_config_file is a tuple; the name of a file beside it is wanted")


def test_parameters_are_read_as_tensors(tmp_path: Path) -> None:
    """``torch.save(dict(model.named_parameters()))``, without any hooks."""
    value = torch.arange(6.0).reshape(2, 3)
    torch.save({"a": torch.nn.Parameter(value), "b": value + 1}, tmp_path / "p.pt")
    file = torchfile.read_torch(tmp_path / "p.pt")
    tensors = file.tensors(file.value, "weights")
    with (tmp_path / "p.pt").open("rb") as handle:
        assert torch.equal(tensors["a"].read(handle), value) and torch.equal(tensors["b"].read(handle), value + 1)
    whole, hooks = b"ctorch._utils\n_rebuild_parameter\n(", ORDERED + b")R"
    torchfile.read_torch(archive(tmp_path / "good.pt", whole + TENSOR + b"\x89" + hooks + b"tR"))
    for arguments in (b"K\x01\x89" + hooks, TENSOR + b"\x89K\x01"):
        with pytest.raises(InputError):
            torchfile.read_torch(archive(tmp_path / "bad.pt", whole + arguments + b"tR"))
