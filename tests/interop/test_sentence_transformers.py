"""Our losses in sentence-transformers' trainer, on a tiny model that is really
trained.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import tiny_bert

for package in ("sentence_transformers", "datasets", "accelerate"):
    pytest.importorskip(
        package,
        reason='pip install -e ".[sentence-transformers]" brings what is missing',
    )

from torch.testing import assert_close  # noqa: E402

from cloob import ContrastiveObjective, load_model  # noqa: E402
from cloob.errors import InputError  # noqa: E402
from cloob.functional import cloob_reference  # noqa: E402
from cloob.interop.negatives import contrast_with_negatives  # noqa: E402
from cloob.interop.sentence_transformers import (  # noqa: E402
    CachedCLOOBLoss,
    CLOOBLoss,
    InfoLOOBLoss,
    RetrievalFrom,
)
from make import tiny_model  # noqa: E402
from support import overlaid, raises, run_cloob, torchrun  # noqa: E402

TWO = {key: tiny_bert.PAIRS[key] for key in ("anchor", "positive")}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    path = tmp_path_factory.mktemp("bert")
    tiny_bert.build(path)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder with an exported ``CLIPModel``."""
    path = tmp_path_factory.mktemp("clip")
    tiny_model(path / "run", objective="clip")
    words = f"export {path}/run --out {path}/model"
    run_cloob(f"{words} --to transformers")
    return path


@pytest.fixture
def model(bert):
    return tiny_bert.load(bert).train()


def tokens(model, columns):
    return [model.preprocess(texts) for texts in columns.values()]


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    "columns", [TWO, tiny_bert.PAIRS], ids=["pairs", "hard negatives"]
)
@pytest.mark.parametrize("hopfield", [False, True], ids=["infoloob", "cloob"])
def test_value_is_the_objective_of_unit_embeddings(model, columns, hopfield):
    loss = CLOOBLoss(model, 20.0, 5.0) if hopfield else InfoLOOBLoss(model, 20.0)
    embedded = [
        model(column)["sentence_embedding"] for column in tokens(model, columns)
    ]
    rows = [F.normalize(side, dim=1) for side in embedded]
    objective = ContrastiveObjective(hopfield=hopfield, inv_tau=20.0, beta=5.0)
    if len(rows) == 2:
        expected = objective(*rows)
    else:
        expected = contrast_with_negatives(objective, *rows)
    found = loss(tokens(model, columns), None)
    assert_close(found, expected, rtol=1e-6, atol=1e-6)
    if hopfield and len(rows) == 2:
        assert_close(expected, cloob_reference(*rows, 20.0, 5.0))


def assert_same(model, found, expected, tolerance):
    """Two losses agree, and so do their gradients."""
    assert_close(found, expected, rtol=1e-5, atol=1e-6)
    expected.backward()
    right = gradients(model)
    (3.0 * found).backward()  # as a loss scaler does
    left = gradients(model)
    assert right
    assert left.keys() == right.keys()
    for name, value in right.items():
        error = float((left[name] / 3.0 - value).abs().max())
        wanted = tolerance * float(value.abs().max()) + 1e-7
        assert error <= wanted, name


@pytest.mark.parametrize(
    "sizes",
    [{"mini_batch_size": 3}, {"mini_batch_size": 50}, {"mini_batch_num_tokens": 20}],
)
def test_cached_equals_plain(model, sizes):
    cached = CachedCLOOBLoss(model, **sizes)(tokens(model, tiny_bert.PAIRS))
    plain = CLOOBLoss(model)(tokens(model, tiny_bert.PAIRS))
    assert_same(model, cached, plain, 1e-5)


def test_what_a_user_of_theirs_would_type(model, tmp_path):
    raises(ValueError, "scale is inv_tau here", CLOOBLoss, model, scale=20.0)
    for bad in (0, -1):
        words = "positive integer or None"
        raises(ValueError, words, CachedCLOOBLoss, model, mini_batch_num_tokens=bad)
    loss = CachedCLOOBLoss(model, mini_batch_num_tokens=20)
    assert loss.get_config_dict()["mini_batch_num_tokens"] == 20
    raises(ValueError, "has no retrieval", RetrievalFrom, InfoLOOBLoss(model), 0.5)
    (tmp_path / "adapter_config.json").write_text("{}")
    raises(InputError, "merge_and_unload", load_model, tmp_path)


def test_a_saved_clip_model_says_its_loss(clip, tmp_path):
    for kind, name in ((CachedCLOOBLoss, "cloob"), (InfoLOOBLoss, "infoloob")):
        model = tiny_bert.load(clip)
        kind(model, inv_tau=20.0)
        model.save_pretrained(str(tmp_path / name), create_model_card=False)
        trained = load_model(tmp_path / name, device="cpu").make_objective()
        assert trained.name == name
        assert float(trained.inv_tau) == 20.0


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
def test_the_example_of_the_page_trains(model, tmp_path, monkeypatch):
    """docs/interop.md, with the tiny model in place of the one that it fetches."""
    page = Path(__file__).parents[2] / "docs" / "interop.md"
    if not page.is_file():
        pytest.skip("docs/interop.md is not beside the tests")
    text = page.read_text(encoding="utf-8")
    section = text.partition("\n## sentence-transformers\n")[2]
    code = re.search(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sentence_transformers.SentenceTransformer", lambda name: model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = {}
    exec(compile(code, str(page), "exec"), names)
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    defaults = CLOOBLoss(model).get_config_dict()
    assert names["loss"].get_config_dict() == defaults


def test_retrieval_joins_after_a_share_of_the_steps(model, tmp_path):
    """Steps that move nothing, so that each has the value of the formula."""
    loss = CachedCLOOBLoss(model, mini_batch_size=3)
    columns = tiny_bert.PAIRS
    losses = tiny_bert.fit(
        model,
        loss,
        columns,
        tmp_path,
        callbacks=[RetrievalFrom(loss, 0.4)],
        learning_rate=0.0,
    )
    plain, retrieved = (
        float(kind(model)(tokens(model, columns)).detach())
        for kind in (InfoLOOBLoss, CLOOBLoss)
    )
    assert losses == pytest.approx([plain, plain, retrieved, retrieved], abs=1e-4)
    assert abs(plain - retrieved) > 0.01


def test_a_last_batch_of_one_pair_is_zero_and_warned_of_once(model):
    one = {name: texts[:1] for name, texts in tiny_bert.PAIRS.items()}
    for columns in (one, {name: one[name] for name in TWO}):
        kind = CLOOBLoss(model)
        with pytest.warns(UserWarning, match="per_device_train_batch_size"):
            loss = kind(tokens(model, columns))
        assert float(loss.detach()) == 0.0
        loss.backward()
        for g in gradients(model).values():
            assert float(g.abs().max()) == 0.0
        # and does not warn again
        assert float(kind(tokens(model, columns)).detach()) == 0.0


@pytest.mark.parametrize("cached", [False, True])
def test_matryoshka(model, cached):
    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

    inner = CachedCLOOBLoss(model, mini_batch_size=3) if cached else CLOOBLoss(model)
    loss = MatryoshkaLoss(model, inner, [16, 4], matryoshka_weights=[1.0, 0.5])
    rows = [model(features)["sentence_embedding"] for features in tokens(model, TWO)]
    expected = sum(
        weight
        * cloob_reference(*(F.normalize(side[:, :d], dim=1) for side in rows), 30.0)
        for d, weight in ((16, 1.0), (4, 0.5))
    )
    assert_same(model, loss(tokens(model, TWO), None), expected, 1e-4)
    assert RetrievalFrom(loss, 0.5).objective is inner.objective


LORA = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import tiny_bert
from peft import LoraConfig, PeftModel
from cloob.interop.sentence_transformers import CachedCLOOBLoss, CLOOBLoss
for loss in (CLOOBLoss, CachedCLOOBLoss):
    model = tiny_bert.load(Path(sys.argv[1]))
    model.add_adapter(LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights="gaussian"))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = tiny_bert.fit(model, loss(model), tiny_bert.PAIRS, Path(sys.argv[1]) / "out", learning_rate=1.0)
    moved = {name for name, p in model.named_parameters() if not p.equal(start[name])}
    assert moved and all("lora_" in name for name in moved) and losses[-1] < losses[0], (losses, moved)
    model.save_pretrained(sys.argv[1] + "/tuned", create_model_card=False)
    merged = tiny_bert.load(Path(sys.argv[1]))  # docs/interop.md
    before = merged.encode(["a red car"])
    merged[0].auto_model = PeftModel.from_pretrained(merged[0].auto_model, sys.argv[1] + "/tuned").merge_and_unload()
    assert abs(merged.encode(["a red car"]) - model.encode(["a red car"])).max() < 1e-6
    assert abs(merged.encode(["a red car"]) - before).max() > 1e-5
"""


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_lora(bert):
    """In an environment of its own: the newest transformers wants a later peft than
    there is.
    """
    python = overlaid("peft==0.21.2", "transformers==5.19.*")
    done = subprocess.run(
        [python, "-c", LORA, str(bert), str(Path(__file__).parents[1])],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["plain", "cached pictures"])
def test_two_processes_equal_one(kind, bert, clip, tmp_path):
    """SGD, as many pairs as a global batch holds, hard negatives of texts."""
    folder, columns = (
        (clip, tiny_bert.pictures()) if "pictures" in kind else (bert, tiny_bert.PAIRS)
    )
    model = tiny_bert.load(folder)
    expected = tiny_bert.fit(model, CLOOBLoss(model), columns, tmp_path)
    worker = Path(__file__).with_name("sentence_transformers_worker.py")
    torchrun([worker, folder, kind], 2)
    found = torch.load(folder / f"{kind}.pt")
    assert found["losses"] == pytest.approx(expected, abs=1e-4)
    start = tiny_bert.load(folder).state_dict()
    moved = 0.0
    for name, value in model.state_dict().items():
        moved = max(moved, float((value - start[name]).abs().max()))
        assert_close(found["state"][name], value, rtol=1e-4, atol=1e-6)
    assert moved > 1e-3
