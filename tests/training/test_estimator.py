"""``ContrastiveHeads`` in scikit-learn's hands; ``--objective auto`` and ``members``:
what is tried, joined, cut.
"""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from train_helpers import recall

import cloob
from cloob import cli
from cloob.training.select import Selection
from cloob.training.step import Stepper

ROWS = 500


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two noisy views of one hidden cause."""
    folder = tmp_path_factory.mktemp("auto")
    rng = np.random.default_rng(0)
    cause = rng.normal(size=(ROWS, 6))
    a = cause @ rng.normal(size=(6, 12)) + 0.3 * rng.normal(size=(ROWS, 12))
    b = np.tanh(cause @ rng.normal(size=(6, 8))) + 0.3 * rng.normal(size=(ROWS, 8))
    np.save(folder / "a.npy", a.astype(np.float32))
    np.save(folder / "b.npy", b.astype(np.float32))
    return folder


@pytest.fixture
def config(files, tmp_path):
    start = cloob.get_recipe("vectors").override(
        a=str(files / "a.npy"), b=str(files / "b.npy"), epochs=6
    )
    return start.override(
        device="cpu", tensorboard=False, lr=1e-2, batch_size=50, out=tmp_path / "run"
    )


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    """What is tried and joined takes no more steps than three trainings."""
    out, steps, launch = tmp_path_factory.mktemp("run") / "run", [0], Stepper.launch

    def counting(*args, **options):
        steps[0] += 1
        return launch(*args, **options)

    words = (
        f"--a {files}/a.npy --b {files}/b.npy --epochs 6 --batch-size 50 --lr 0.01"
        f" --device cpu --out {out}"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "launch", counting)
        assert cli.main(["train", "vectors", *words.split()]) == 0
    one_training = 6 * (ROWS - ROWS // 10) // 50
    assert one_training < steps[0] <= 3 * one_training
    return out


def test_all_are_tried_and_what_finds_most_is_joined(run, files):
    choice = json.loads((run / "objectives.json").read_text())
    tried = [(trial["objective"], trial["standardise"]) for trial in choice["trials"]]
    assert tried[:3] == [("cca", None), ("infoloob", "one"), ("infoloob", "column")]
    assert [name for name, _ in tried[3:]] == ["clip", "siglip", "cloob"] and len(
        {way for _, way in tried[3:]}
    ) == 1
    assert choice["clear"] == (choice["difference"][1] > 0) and (
        choice["clear"] or choice["chosen"] == "infoloob"
    )
    assert [each["objective"] for each in choice["beside"]][-1] == "cca" and len(
        choice["beside"]
    ) == 2
    newest = max((run / "checkpoints").iterdir())
    joined = json.loads((newest / "joined.json").read_text())
    epochs = [
        json.loads(line)["val_recall"]
        for line in (run / "epochs.jsonl").read_text().splitlines()
    ]
    assert joined["recall"] > max(epochs) and not (run / "members").exists()
    model, again = cloob.load_model(run), cloob.load_model(f"{run}:last")
    a, b = np.load(files / "a.npy")[:50], np.load(files / "b.npy")[:50]
    x, y = model.encode_a(a), model.encode_b(b)
    assert torch.equal(x, again.encode_a(a)) and x.shape[1] == model.embed_dim
    assert torch.allclose(x.norm(dim=1), torch.ones(50)) and torch.allclose(
        y.norm(dim=1), torch.ones(50)
    )


def test_rows_are_the_heads_side_by_side_less_the_hubs(run, files):
    """Cosines of the joined rows, from the heads alone by the formula of CSLS."""
    model = cloob.load_model(run)
    sides = model.model.image_head, model.model.text_head
    hubs = sides[0].options["hubs"]
    rows = []
    for side, name in zip(sides, "ab", strict=True):
        x = torch.from_numpy(np.load(files / f"{name}.npy")[:50])
        parts = zip(side.options["weights"], side.heads, strict=True)
        rows.append(
            F.normalize(
                torch.cat([w * F.normalize(head(x), dim=1) for w, head in parts], 1),
                dim=1,
            )
        )
    expected = rows[0] @ rows[1].T
    if hubs["rows"]:
        means = [
            (x @ side.bank.T).topk(10).values.mean(1) - side.usual
            for x, side in zip(rows, sides, strict=True)
        ]
        expected = (
            expected - hubs["strength"] * (means[0].unsqueeze(1) + means[1])
        ) / 1.5
    a, b = (np.load(files / f"{name}.npy")[:50] for name in "ab")
    found = model.encode_a(a) @ model.encode_b(b).T
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("seed", [4, 6])
def test_a_bias_against_hubs_does_not_lower_recall_at_ten(seed, tmp_path):
    """Of three equal closed forms, where all that joining can change is the bias; by
    the pairs that chose it.
    """
    rng = np.random.default_rng(seed)
    cause = rng.normal(size=(300, 6))
    a = (cause @ rng.normal(size=(6, 12)) + rng.normal(size=(300, 12))).astype(
        np.float32
    )
    b = (
        np.tanh(cause @ rng.normal(size=(6, 8))) + 0.5 * rng.normal(size=(300, 8))
    ).astype(np.float32)
    files = {"a": a[:240], "b": b[:240], "val_a": a[240:], "val_b": b[240:]}
    for name, rows in files.items():
        np.save(tmp_path / f"{name}.npy", rows)
    config = cloob.get_recipe("vectors").override(
        **{name: f"{tmp_path}/{name}.npy" for name in files}
    )
    config = config.override(
        objective="cca",
        members=2,
        device="cpu",
        tensorboard=False,
        out=tmp_path / "run",
    )
    model = cloob.load_model(cloob.train(config).run)
    rows = [model.encode_a(a[240:]), model.encode_b(b[240:])]
    width = sum(
        head.options["embed_dim"]
        for head in getattr(model.heads[0], "heads", [model.heads[0]])
    )
    assert recall(10, *rows) >= recall(
        10, *(F.normalize(side[:, :width], dim=1) for side in rows)
    )


def test_a_joined_run_is_searched_and_judged_as_any_other(run, files, tmp_path):
    index = tmp_path / "b.idx"
    np.save(tmp_path / "q.npy", np.load(files / "a.npy")[:3])
    (tmp_path / "names.txt").write_text("".join(f"row {i}\n" for i in range(ROWS)))
    words = [
        "index",
        "--b",
        f"{files}/b.npy",
        "--labels",
        f"{tmp_path}/names.txt",
        "--model",
        str(run),
    ]
    assert cli.main([*words, "--out", str(index)]) == 0
    with cloob.Index.open(index) as opened:
        model = cloob.load_model(run)
        query = model.encode_a(np.load(tmp_path / "q.npy"))
        scores = query @ model.encode_b(np.load(files / "b.npy")).T
        best = [opened.search(row.numpy(), top=1).hits[0].item.path for row in query]
    assert best == [f"row {i}" for i in scores.argmax(1).tolist()]
    assert (
        cli.main(["eval", str(run), "--held-out", "--out", str(tmp_path / "report")])
        == 0
    )


def test_members_of_other_seeds_are_resumed_and_cut(config, monkeypatch):
    """A run that ended before its heads were joined joins them when it is resumed; a
    longer one joins anew.
    """
    config = config.override(objective="clip", members=2, embed_dim=16)
    with monkeypatch.context() as patch:
        patch.setattr(Selection, "join", lambda self, result: result)
        alone = cloob.train(config)
    resumed = cloob.train(config.override(resume="auto"))
    assert resumed.already_finished and resumed.checkpoint > alone.checkpoint
    head = cloob.load_model(resumed.run).model.image_head
    kinds = [member["kind"] for member in head.options["members"]]
    assert (
        set(kinds) <= {"mlp", "linear"}
        and head.options["embed_dim"] == 16 == head(torch.zeros(1, 12)).shape[1]
    )
    assert cloob.train(config.override(resume="auto")).checkpoint == alone.checkpoint
    longer = cloob.train(config.override(resume="auto", epochs=12, patience=0))
    assert (longer.run / "checkpoints").is_dir() and longer.epochs == 12
