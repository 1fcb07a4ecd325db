"""The paper's sets on tiny folders in their own layouts, and CLIP's names and
templates as they were published.
"""

from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from cloob.errors import InputError
from cloob.evaluation.sets.paper import (
    LAYOUTS,
    Sets,
    open_paper,
    open_paper_set,
    prompts_of,
)
from cloob.pictures import decode
from evaluate_fakes import picture

RED = picture("red")


def put(path, content=RED):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def write_lines(path, *lines):
    put(path, "".join(f"{line}\n" for line in lines))


def birdsnap(root):
    home = root / "birdsnap"
    test = {"Allens_Hummingbird/1.jpg": 1, "Black_bellied_Plover/2.jpg": 2}
    test["Black_bellied_Plover/lost.jpg"] = 2
    pictures = test | {"Allens_Hummingbird/3.jpg": 1}
    write_lines(
        home / "species.txt",
        "id\tcommon\tscientific\tdir",
        "1\tAllen's Hummingbird\tS. sasin\tAllens_Hummingbird",
        "2\tBlack-bellied Plover\tP. squatarola\tBlack_bellied_Plover",
        "",
    )
    rows = [f"http://x/{path}\tmd5\t{path}\t{n}\t0" for path, n in pictures.items()]
    write_lines(home / "images.txt", "url\tmd5\tpath\tspecies_id\tbb_x1", *rows)
    write_lines(home / "test_images.txt", "path", *test)
    for path in pictures.keys() - {"Black_bellied_Plover/lost.jpg"}:
        put(home / "download" / "images" / path)
    names = prompts_of("birdsnap")[0]
    return [names.index("Allens Hummingbird"), names.index("Black bellied Plover")]


def country211(root):
    codes = [a + b for a in "ABCDEFGHI" for b in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"][:211]
    for code in codes:
        put(root / "country211" / "test" / code / "1.jpg")
    return list(range(211))


def flowers102(root):
    home = root / "flowers-102"
    for number in range(1, 7):
        put(home / "jpg" / f"image_{number:05d}.jpg")
    splits = {"trnid": [4, 2], "valid": [5, 6], "tstid": [3, 1]}
    savemat(home / "imagelabels.mat", {"labels": np.array([[77, 1, 102, 3, 4, 5]])})
    savemat(
        home / "setid.mat", {name: np.array([rows]) for name, rows in splits.items()}
    )
    return [101, 76]


def gtsrb(root):
    home = root / "gtsrb"
    ppm = b"P6\n2 2\n255\n" + bytes(range(12))
    rows = ["00000.ppm;2;2;16", "00001.ppm;2;2;1"]
    write_lines(home / "GT-final_test.csv", "Filename;Width;Height;ClassId", *rows)
    for i in range(2):
        put(home / "GTSRB" / "Final_Test" / "Images" / f"0000{i}.ppm", ppm)
        put(home / "GTSRB" / "Training" / f"0000{i}" / "00000_00000.ppm", ppm)
    return [16, 1]


def ucf101(root):
    home = root / "ucf101"
    first = "HandstandPushups/v_HandStandPushups_g01_c01"
    lists = home / "ucfTrainTestlist"
    write_lines(lists / "testlist01.txt", f"{first}.avi", "YoYo/v_YoYo_g01_c01.avi")
    write_lines(lists / "trainlist01.txt", "YoYo/v_YoYo_g08_c01.avi 101")
    for frame in (f"{first}.jpg", "YoYo/v_YoYo_g01_c01.png", "YoYo/v_YoYo_g08_c01.jpg"):
        put(home / "frames" / frame)
    return [36, 100]


def stanford_cars(root):
    home = root / "stanford_cars"
    (home / "devkit").mkdir(parents=True)
    fields = [("fname", object), ("class", object)]
    for part, file, labels in (
        ("test", "cars_test_annos_withlabels.mat", (196, 1)),
        ("train", "devkit/cars_train_annos.mat", (2, 3)),
    ):
        names = ["00001.jpg", "00002.jpg"]
        rows = np.array([[*zip(names, labels, strict=True)]], dtype=fields)
        savemat(home / file, {"annotations": rows})
        for name in names:
            put(home / f"cars_{part}" / name)
    classes = np.array([["a", "b"]], dtype=object)
    savemat(home / "devkit" / "cars_meta.mat", {"class_names": classes})
    return [195, 0]


def imagenet(root):
    home = root / "imagenet" / "val"
    for label in range(1000):
        (home / f"n{label:08d}").mkdir(parents=True)
    put(home / "n00000007" / "ILSVRC2012_val_00000001.JPEG")
    put(home / "n00000999" / "ILSVRC2012_val_00000002.JPEG")
    return [7, 999]


def imagenetv2(root):
    home = root / "imagenetv2-matched-frequency-format-val"
    for label in range(1000):
        (home / str(label)).mkdir(parents=True)
    put(home / "10" / "a.jpeg")
    put(home / "2" / "b.jpeg")
    return [2, 10]  # by number: as text, 10 would come first


# Classes (of the sets), templates (the paper's, section on zero-shot evaluation), and
# the labels to train on.
SETS = {
    birdsnap: (500, 1, []),  # the label of the first
    country211: (211, 5, None),
    flowers102: (102, 1, [2, 0, 3, 4]),
    gtsrb: (43, 3, [0, 1]),
    ucf101: (101, 48, [100]),
    stanford_cars: (196, 8, [1, 2]),
    imagenet: (1000, 80, None),
    imagenetv2: (1000, 80, None),
}


@pytest.fixture(autouse=True)
def any_checksum(monkeypatch):
    """Flowers102's files of labels are known by their MD5, which ours cannot have."""
    monkeypatch.setattr(
        "torchvision.datasets.flowers102.check_integrity",
        lambda path, *_: Path(path).is_file(),
    )


@pytest.mark.parametrize("make", SETS, ids=lambda make: make.__name__)
def test_a_set_in_its_own_layout(make, tmp_path):
    labels = make(tmp_path)
    name = make.__name__
    n_classes, n_templates, training = SETS[make]
    data = open_paper_set(name, tmp_path)
    assert data.name == name
    assert data.labels.tolist() == labels
    assert len(data.classnames) == n_classes
    assert len(data.templates) == n_templates
    for index in range(min(len(data), 3)):
        key, content = data.read(index)
        assert (tmp_path / key).read_bytes() == content
        assert decode(content).mode == "RGB"
    if training is not None:
        train = open_paper_set(name, tmp_path, "train")
        assert train.labels.tolist() == (training or labels[:1])


@pytest.mark.parametrize(
    ("make", "files", "old"),
    [
        (
            birdsnap,
            ("birdsnap/images.txt", "birdsnap/test_images.txt"),
            "Allens_Hummingbird/1.jpg",
        ),
        (gtsrb, ("gtsrb/GT-final_test.csv",), "00000.ppm"),
        (
            ucf101,
            ("ucf101/ucfTrainTestlist/testlist01.txt",),
            "YoYo/v_YoYo_g01_c01.avi",
        ),
    ],
)
def test_a_list_leads_not_out_of_the_root(tmp_path, make, files, old):
    root = tmp_path / "root"
    secret = tmp_path / "YoYo" / "secret.jpg"
    make(root)
    put(secret)
    outside = "../" * 40 + str(secret).lstrip("/")
    for file in files:
        put(root / file, (root / file).read_text().replace(old, outside))
    said = rf"^{make.__name__}: its lists name '.*YoYo/secret\.jpg', which is not below"
    with pytest.raises(InputError, match=said):
        open_paper_set(make.__name__, root)


def test_the_paper_suite_keeps_what_is_there(tmp_path):
    ucf101(tmp_path)
    gtsrb(tmp_path)
    found = Sets()
    open_paper(found, tmp_path, probe=True)
    assert [data.name for data in found.sets] == ["gtsrb", "ucf101"]
    assert found.training.keys() == {"gtsrb", "ucf101"}
    assert found.missing.keys() == LAYOUTS.keys() - {"gtsrb", "ucf101"}
