"""``cloob push`` against a stand-in for the hub: what arrives, what loads again, what
fails; and the model card.
"""

import json
import logging
import shutil
import sys

import pytest
import torch
import yaml
from hub import TOKEN, Repository, StandIn
from hypothesis import example, given
from hypothesis import strategies as st
from small_models import OBJECTIVE, RESNET, same_rows, write_model

from cloob import cli, load_model
from cloob.errors import InputError
from cloob.export.card import data_name, gather_facts, model_name, write_card
from cloob.export.exported import Exported
from cloob.heads.head import Head
from cloob.models.aligned.encoders import open_image_encoder, open_text_encoder
from cloob.models.aligned.model import aligned_encoder
from cloob.models.folder import save_model
from cloob.models.load import fingerprint
from cloob.models.towers import open_clip
from make import served
from support import originals, refused, use_hub

NAME = "me/small"
HUGGING_FACE = {
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "tokenizer.json",
    "modules.json",
}
OPEN_CLIP = {
    "open_clip_config.json",
    "open_clip_model.safetensors",
    "objective.json",
    "README.md",
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that this process uses, with a token that it knows and an empty cache."""
    with served(server := StandIn()):
        use_hub(monkeypatch, server.address, tmp_path / "hub-cache")
        monkeypatch.setattr(
            "huggingface_hub.constants.HF_HUB_DISABLE_XET", True, raising=False
        )  # older ones have none
        monkeypatch.setattr(
            "huggingface_hub.utils._http.time.sleep", lambda _: None
        )  # between its attempts
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for handler in logging.getLogger(
            "huggingface_hub"
        ).handlers:  # its stream is of the test that imported it
            monkeypatch.setattr(handler, "stream", sys.stderr)
        yield server


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """A model that transformers has not, which is therefore soon written."""
    return write_model(tmp_path_factory.mktemp("models") / "resnet", vision_cfg=RESNET)


def push(source, *words, name=NAME):
    return cli.main(["push", str(source), name, "--license", "mit", *words])


def test_nothing_private_goes_to_a_public_repository(hub, resnet, capsys):
    hub.repositories[NAME] = Repository(False)
    assert push(resnet, "--private") == 2
    said = (
        "is there already and is public; make it private first, or leave --private out"
    )
    assert capsys.readouterr().err == f"cloob: {NAME}: {said}\n"
    assert hub.repositories[NAME].commits == []


def test_what_is_pushed_is_read_here_by_open_clip_and_by_transformers(
    hub, small, tmp_path, capsys
):
    assert push(small, "--private") == 0
    out, err = capsys.readouterr()
    assert err == f"next: cloob eval hf-hub:{NAME} --zeroshot demo:noto-emoji\n"
    assert out.splitlines()[-2:] == [
        f"{hub.address}/{NAME}",
        f'cloob.load_model("hf-hub:{NAME}") loads it',
    ]
    repository = hub.repositories[NAME]
    assert repository.private and repository.commits == ["Add the model"]
    assert repository.files.keys() >= HUGGING_FACE | OPEN_CLIP
    card = repository.files["README.md"].decode()
    assert (
        "library_name: open_clip" in card
        and 'load_model("hf-hub:me/small")' in card
        and "DIR" not in card
    )
    here, encoder = (
        load_model(f"hf-hub:{NAME}", device="cpu"),
        load_model(small, device="cpu"),
    )
    assert here.objective_config == OBJECTIVE
    same_rows(here, encoder)
    folder = tmp_path / "clone"
    for path, content in hub.repositories[NAME].files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    from transformers import CLIPModel

    library = open_clip()
    model = library.create_model(f"local-dir:{folder}")
    tokens, pixels = (
        library.get_tokenizer(f"local-dir:{folder}")(["a dog"]),
        torch.randn(2, 3, 32, 32),
    )
    with torch.no_grad():
        own = encoder.model.encode_text(tokens), encoder.model.encode_image(pixels)
        torch.testing.assert_close(model.encode_text(tokens), own[0], atol=1e-6, rtol=0)
        torch.testing.assert_close(
            model.encode_image(pixels), own[1], atol=1e-6, rtol=0
        )
        theirs = CLIPModel.from_pretrained(folder).get_image_features(pixels)
        torch.testing.assert_close(
            getattr(theirs, "pooler_output", theirs), own[1], atol=1e-5, rtol=0
        )
    same_rows(load_model(folder, device="cpu"), encoder)
    with_hub = library.create_model(f"hf-hub:{NAME}")
    torch.testing.assert_close(with_hub.encode_text(tokens), own[0], atol=1e-6, rtol=0)


def offer(hub, folder):
    """A repository with the files of a folder."""
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    hub.repositories[NAME] = Repository(False, files)
    return files


def test_a_repository_of_transformers_files_alone_is_read_as_its_folder(
    hub, exported, small, tmp_path, monkeypatch
):
    from transformers import CLIPModel

    folder = shutil.copytree(exported, tmp_path / "clip")
    (folder / "model.safetensors").unlink()
    CLIPModel.from_pretrained(exported).save_pretrained(folder, max_shard_size="1MB")
    assert not (folder / "model.safetensors").exists()
    assert "open_clip_config.json" not in offer(hub, folder)
    original, here = (
        load_model(small, device="cpu"),
        load_model(f"hf-hub:{NAME}", device="cpu"),
    )
    assert here.name == f"hf-hub:{NAME}" and here.objective_config == OBJECTIVE
    same_rows(here, original)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    same_rows(load_model(f"hf-hub:{NAME}", device="cpu"), original)


def test_a_repository_that_asks_for_code_is_refused_before_any_weight_is_fetched(
    hub, exported
):
    files = offer(hub, exported)
    files["config.json"] = json.dumps(
        json.loads(files["config.json"]) | {"auto_map": {"AutoModel": "evil.M"}}
    ).encode()
    with pytest.raises(InputError, match="auto_map asks for Python code"):
        load_model(f"hf-hub:{NAME}")
    assert not [request for request in hub.requests if "model.safetensors" in request]


def test_a_model_that_transformers_has_not_goes_without_its_files(hub, resnet, capsys):
    earlier = dict.fromkeys(HUGGING_FACE | OPEN_CLIP, b"of another model")
    hub.repositories[NAME] = Repository(
        False, earlier | {"notes.txt": b"mine", ".gitattributes": b""}
    )
    assert push(resnet) == 0
    assert (
        "without files of transformers: its image tower is of class ModifiedResNet"
        in capsys.readouterr().out
    )
    files = hub.repositories[
        NAME
    ].files  # what the earlier push left would be another model
    assert files.keys() == OPEN_CLIP | {"notes.txt", ".gitattributes"}
    assert (
        "no files of transformers: its image tower is of class ModifiedResNet"
        in files["README.md"].decode()
    )
    same_rows(
        load_model(f"hf-hub:{NAME}", device="cpu"), load_model(resnet, device="cpu")
    )


def test_towers_that_open_clip_has_not(hub):
    source = originals("crowsonkb/full_vocab/slim.pkl")
    assert push(source) == 0
    files = hub.repositories[NAME].files
    assert files.keys() == {
        "towers.json",
        "model.safetensors",
        "objective.json",
        "README.md",
    }
    assert (
        "library_name: cloob" in files["README.md"].decode()
        and "open_clip" not in files["README.md"].decode()
    )
    same_rows(
        load_model(f"hf-hub:{NAME}", device="cpu"), load_model(source, device="cpu")
    )


def test_heads_on_encoders_of_this_machine_are_refused(hub, small, tmp_path, capsys):
    tower = str(small)
    image, text = (
        open_image_encoder(tower, load_model, None),
        open_text_encoder(tower, load_model),
    )
    heads = [Head(side.features, 12, "linear", 0.0) for side in (image, text)]
    names = {"image_encoder": tower, "text_encoder": tower}
    save_model(
        tmp_path / "heads",
        aligned_encoder(image, text, heads[0], heads[1], names),
        OBJECTIVE,
    )
    error = refused(capsys, "push", str(tmp_path / "heads"), NAME, "--license", "mit")
    assert (
        f"its encoder {tower} is on this machine alone" in error and hub.requests == []
    )


def test_a_dry_run_lists_and_asks_nobody(hub, small, capsys):
    assert push(small, "--dry-run") == 0
    out, _ = capsys.readouterr()
    sizes = {
        line.split()[1]: int(line.split()[0].replace(",", ""))
        for line in out.splitlines()[:-2]
    }
    assert (
        sizes.keys() >= HUGGING_FACE | OPEN_CLIP
        and sizes["model.safetensors"] > 49408 * 16 * 4
    )
    assert out.splitlines()[-2].split()[0] == f"{sum(sizes.values()):,}"
    assert hub.requests == [] and hub.repositories == {}


@pytest.mark.parametrize(
    ("asked", "failure"),
    [
        ("POST /api/repos/create", 401),
        ("POST /api/repos/create", 500),
        ("POST /api/models/me/small/commit", "break"),
        ("POST /api/validate-yaml", 400),
    ],
)
def test_failures_are_one_line(hub, resnet, capsys, asked, failure):
    hub.failures[asked] = failure
    assert push(resnet) == 2
    err = capsys.readouterr().err
    assert (
        err.startswith(f"cloob: {NAME}: {hub.address} did not take it (")
        and err.count("\n") == 1
    ), err
    assert all(repository.files == {} for repository in hub.repositories.values())
    hub.failures.clear()
    assert push(resnet) == 0 and hub.repositories[NAME].files.keys() >= OPEN_CLIP


CONFIG = {
    "pairs": {
        "data": [
            "/home/xaver/secret/pairs.csv",
            "s3://key:word@bucket/x/{0..9}.tar?sig=abc",
            "sets/a|b.csv",
        ]
    },
    "towers": {"model": "small", "init": None},
    "loss": {"objective": "cloob", "retrieval_from": 0.5},
    "optim": {"lr": 0.001, "schedule": "cosine", "weight_decay": 0.1, "ema": 0.0},
    "run": {"batch_size": 128, "precision": "fp32", "seed": 7},
    "save": {"out": "/home/xaver/secret/run"},
}
NUMBERS = {"acc1": 0.123, "acc1_interval": [0.1, 0.15], "acc5": 0.5, "n": 1540}
ROW = {
    "model": "run",
    "settings": OBJECTIVE,
    "zeroshot": {"noto-emoji": NUMBERS},
    "retrieval": {
        "demo:val": {
            "image_to_text@1": 0.25,
            "image_to_text@1_interval": [0.2, 0.3],
            "n": 500,
        }
    },
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with two checkpoints, as training leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    write_model(folder / "checkpoints" / "step-00000040" / "model")
    write_model(folder / "checkpoints" / "step-00000020" / "model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    lines = [{"epoch": n, "step": 20 * n, "samples_seen": 2560 * n} for n in (1, 2)]
    (folder / "epochs.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )
    return folder


def card(run, folder, results=None):
    """Metadata and text of a run's card."""
    facts = gather_facts(str(run), load_model(run, device="cpu"), results)
    write_card(
        folder,
        facts,
        Exported("open_clip", "", "`use`", (), ("clip", "clip")),
        "me/small",
        "mit",
    )
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_a_run_and_its_results(run, tmp_path):
    own = {**ROW, "fingerprint": fingerprint(load_model(run, device="cpu"))}
    other = {**ROW, "model": "run", "fingerprint": "0" * 32, "zeroshot": {}}
    (tmp_path / "results.json").write_text(
        json.dumps({"level": 0.9, "rows": [other, own]})
    )
    metadata, body = card(run, tmp_path, tmp_path / "results.json")
    assert metadata["library_name"] == "open_clip" and metadata["license"] == "mit"
    assert metadata["pipeline_tag"] == "zero-shot-image-classification" and metadata[
        "tags"
    ] == ["cloob", "clip"]
    metrics = metadata["model-index"][0]["results"][0]["metrics"]
    assert [(metric["type"], metric["value"]) for metric in metrics] == [
        ("accuracy", 12.3),
        ("accuracy", 50.0),
    ]
    for line in (
        "| objective | cloob |",
        "| τ⁻¹ | 25.0 |",
        "| β | 9.0 |",
        "| steps | 40 |",
        "| pairs seen | 5,120 |",
        "| retrieval joins | after 50% |",
        "|  |  | (90% interval) | n |",
        "| zero-shot, noto-emoji | top-1 % | 12.3 (10.0–15.0) | 1540 |",
        "| zero-shot, noto-emoji | top-5 % | 50.0 | 1540 |",
        "| retrieval, demo:val | image → text, recall@1 % | 25.0 (20.0–30.0) | 500 |",
    ):
        assert line in body.splitlines()


def test_a_card_says_a_checkpoints_own_steps_and_no_place_of_this_machine(
    run, tmp_path
):
    _, body = card(run / "checkpoints" / "step-00000020", tmp_path)
    assert "| steps | 20 |" in body and "| pairs seen | 2,560 |" in body
    for secret in (
        "/home",
        "xaver",
        "secret",
        "key:",
        "word@",
        "bucket",
        "sig=",
        str(tmp_path),
    ):
        assert secret not in body
    assert "| data | pairs.csv, {0..9}.tar, sets/a\\|b.csv |" in body


def test_results_beside_a_run_are_of_its_weights_or_none(run, tmp_path):
    beside = run.parent / "results.json"
    own = fingerprint(load_model(run, device="cpu"))
    newer = run / "checkpoints" / "step-00000060" / "model"
    try:
        for row in (
            {**ROW, "fingerprint": "0" * 32},
            ROW,
        ):  # of another checkpoint; of nobody knows which
            beside.write_text(json.dumps({"rows": [row]}))
            assert "Not measured" in card(run, tmp_path)[1]
        beside.write_text(
            json.dumps(
                {
                    "rows": [
                        {**ROW, "model": "clip"},
                        {**ROW, "model": "x", "fingerprint": own},
                    ]
                }
            )
        )
        assert "12.3 (10.0–15.0)" in card(run, tmp_path)[1]
        write_model(newer, quick_gelu=True)
        assert "Not measured" in card(run, tmp_path)[1]
        beside.write_text(json.dumps({"rows": [{**ROW, "fingerprint": own}]}))
        with pytest.raises(InputError, match="has no row of the weights of"):
            card(run, tmp_path, beside)
    finally:
        beside.unlink()
        shutil.rmtree(newer.parent, ignore_errors=True)


def test_a_model_without_a_run(small, tmp_path):
    model = shutil.copytree(
        small, tmp_path / "model", ignore=shutil.ignore_patterns("objective.json")
    )
    metadata, body = card(model, tmp_path)
    assert "model-index" not in metadata
    assert "is not known here" in body and "Not measured" in body


@example("~", "https://host.org/")
@given(
    st.text(max_size=40),
    st.sampled_from(
        ["", "/", "~/", "../", "https://host.org/", "s3://b/", "a/", "pipe:cat "]
    ),
)
def test_the_name_of_data_is_never_a_place(tail, start):
    name = data_name(start + tail)
    if start == "a/" and ".." not in tail:
        assert name == start + tail
    elif start:
        assert (
            name
            and not name.startswith(("/", "~", ".."))
            and "host.org" not in name
            and "://" not in name
        )


def test_a_model_that_training_began_with_keeps_its_owner_and_loses_its_place():
    for name in (
        "hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
        "ViT-B-32/laion2b_s34b_b79k",
    ):
        assert model_name(name) == name
    for source in (
        "mine:best",
        "/home/xaver/secret/mine:best",
        "local-dir:/home/xaver/secret/mine",
    ):
        assert model_name(source) == "mine"
    for source, name in (
        ("runs/mine:best", "runs/mine"),
        ("hf-hub:/home/xaver", "xaver"),
        ("w.pkl:port", "w.pkl"),
    ):
        assert model_name(source) == name


def test_a_licence_is_one_word_and_the_hub_knows_which(small, capsys):
    words = ("push", str(small), "me/small", "--dry-run", "--license")
    assert "it must be one word of the hub's" in refused(
        capsys, *words, "my own licence"
    )
    assert (
        cli.main([*words, "LLAMA3"]) == 0
        and "--license llama3" in capsys.readouterr().err
    )
    for name in (
        "vit",
        "a/b/c",
        "a/",
        "../x",
        "me/x--y",
        "me/x.git",
        "me/x y",
        "https://hub/a",
    ):
        assert "it must be ORG/NAME" in refused(
            capsys, "push", str(small), name, "--license", "mit"
        )
