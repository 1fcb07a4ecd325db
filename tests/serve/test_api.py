"""The API against answers by plain loops over the index's own rows."""

import asyncio
import io
import json
import threading
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from PIL import Image
from served_colours import N, build, draw, web_of

from cloob.search.index import Index
from cloob.search.update import UpdateOptions
from cloob.serve.app import make_app
from cloob.serve.config import ServeConfig
from make import picture
from search_colours import ColourModel, loads


def ask(client, path, **body):
    answer = client.post(f"/api/{path}", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def nearest(index, words):
    """Scores of all pictures for some words."""
    query = ColourModel().encode_text([words])[0].numpy()
    ids = index.store.ids().tolist()
    rows = index.store.vectors(ids)
    return {id_: float(row @ query) for id_, row in zip(ids, rows, strict=True)}


def agrees(hits, scores, top):
    """Ties may come in any order: the scores are the best ones, and each belongs to its
    picture.
    """
    found = [hit["score"] for hit in hits]
    expected = sorted(scores.values(), reverse=True)[:top]
    assert found == pytest.approx(expected, abs=1e-5)
    assert len({hit["id"] for hit in hits}) == len(hits)
    for hit in hits:
        assert hit["score"] == pytest.approx(scores[hit["id"]], abs=1e-5)


def test_the_cutoff_says_that_nothing_fits(client):
    fitting = ask(client, "search", parts=[{"words": "red"}], top=40)
    assert 0 < len(fitting["hits"]) < 40
    assert fitting["cut"] == 40 - len(fitting["hits"])
    for hit in fitting["hits"][:10]:
        assert hit["caption"] == "a red square"
    everything = ask(client, "search", parts=[{"words": "red"}], top=40, cutoff=False)
    assert len(everything["hits"]) == 40
    assert everything["cut"] == 0


def test_a_filter_narrows_every_way_of_asking(client, index):
    where = "caption like '%blue%' and width >= 26"
    items = index.items(index.store.ids().tolist())
    fits = {
        item.id for item in items if "blue" in str(item.caption) and item.width >= 26
    }
    assert 0 < len(fits) < N
    assert set(client.get("/api/ids", params={"where": where}).json()["ids"]) == fits
    hits = ask(client, "search", parts=[{"words": "red"}], cutoff=False, where=where)[
        "hits"
    ]
    assert {hit["id"] for hit in hits} == fits
    like = {"parts": [{"item": 2}], "cutoff": False, "where": where}
    similar = ask(client, "search", **like)["hits"]
    assert {hit["id"] for hit in similar} == fits - {2}
    assert ask(client, "classify", labels=["red", "blue"], where=where)[
        "classified"
    ] == len(fits)
    newest = client.get("/api/ids", params={"where": where, "order": "newest"}).json()[
        "ids"
    ]
    by_date = sorted(
        index.items(list(fits)),
        key=lambda item: (str(item.date), item.id),
        reverse=True,
    )
    assert newest == [item.id for item in by_date]


def test_months_count_the_newest_first(client, index):
    for where in ("", "width >= 26"):
        params = {"where": where} if where else {}
        shown = client.get("/api/months", params=params).json()["months"]
        newest = client.get("/api/ids", params={**params, "order": "newest"}).json()
        items = {item.id: item for item in index.items(newest["ids"])}
        dates = [items[id_].date[:7] for id_ in newest["ids"]]
        expected = {month: dates.count(month) for month in dict.fromkeys(dates)}
        found = [(one["month"], one["count"]) for one in shown]
        assert found == [*expected.items()]


def test_labels_have_margins_and_a_cutoff_where_these_count(client):
    plain = ask(client, "classify", labels=["red", "blue"])["labels"]
    assert [label["margins"] for label in plain] == [None, None]
    strict = ask(client, "classify", labels=["red", "blue"], none=True, cutoff=2)
    for label in strict["labels"]:
        fits = label["label"] != "none of these"
        assert len(label["margins"]) == len(label["ids"]) == label["count"]
        for margin in label["margins"]:
            assert (margin >= 2) is fits
    refused = client.post("/api/classify", json={"labels": ["red", "b"], "cutoff": 2})
    assert refused.status_code == 400
    assert "cutoff needs" in refused.json()["detail"]


def test_a_model_says_when_it_is_ready(tmp_path, pictures, encoder, monkeypatch):
    loads(monkeypatch)
    build(tmp_path / "idx", pictures, encoder).close()
    with Index.open(tmp_path / "idx") as index:
        web = web_of(index)
        assert not web.get("/api/health").json()["ready"]
        ask(web, "search", parts=[{"words": "red"}])
        assert web.get("/api/health").json()["ready"]


def test_beyond_this_machine_neither_an_answer_nor_a_filter_shows_a_full_path(
    index, pictures
):
    for local in (True, False):
        with web_of(index, local=local) as web:
            answer = web.get("/api/items/1")
            assert (str(pictures) in answer.text) is local
            assert answer.json()["path"].endswith(answer.json()["name"])
            for where in ("source like '/%'", "not path is null"):
                assert web.get("/api/ids", params={"where": where}).status_code == (
                    200 if local else 400
                )
            assert (
                web.get("/api/ids", params={"where": "name like '1%'"}).status_code
                == 200
            )


def test_pictures_come_by_id(client, index):
    item = index.items([3])[0]
    answer = client.get("/api/items/3/picture")
    assert answer.content == Path(item.path).read_bytes()
    assert answer.headers["content-type"] == "image/png"
    small = client.get("/api/items/3/thumbnail?size=64")
    assert small.headers["content-type"] == "image/jpeg"
    assert max(Image.open(io.BytesIO(small.content)).size) <= 64
    for other in ("3/thumbnail?size=128", "4/thumbnail?size=64"):
        assert (
            client.get(f"/api/items/{other}").headers["etag"] != small.headers["etag"]
        )
    for path, first in (("picture", answer), ("thumbnail?size=64", small)):
        assert (
            first.headers["cache-control"] == "private, no-cache"
        )  # another index has the same addresses
        again = client.get(
            f"/api/items/3/{path}", headers={"if-none-match": first.headers["etag"]}
        )
        assert again.status_code == 304
        assert not again.content
        several = {
            "if-none-match": f'"other", W/{first.headers["etag"]}'
        }  # as a proxy that compresses asks
        assert client.get(f"/api/items/3/{path}", headers=several).status_code == 304
    assert [
        found["id"] for found in client.get("/api/items?id=3&id=999&id=1").json()
    ] == [3, 1]
    assert client.get("/api/items/3").json()["caption"] == item.caption


def test_words_are_never_a_path_or_an_address(client, index, tmp_path):
    (tmp_path / "red.png").write_bytes(picture("red"))
    for words in (
        str(tmp_path / "red.png"),
        "http://127.0.0.1:9/red.png",
        "../red.png",
    ):
        found = ask(client, "search", parts=[{"words": words}], cutoff=False)
        agrees(found["hits"], nearest(index, words), 50)


def test_equal_queries_that_arrive_together_go_through_the_model_once(index, encoder):
    words = [f"number {i % 12} of many" for i in range(24)]

    async def together():
        app = make_app(index, ServeConfig())
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://localhost"
        ) as web:
            bodies = [
                {"parts": [{"words": each}], "cutoff": False, "top": 5}
                for each in words
            ]
            answers = await asyncio.gather(
                *(web.post("/api/search", json=body) for body in bodies)
            )
            return [answer.json() for answer in answers]

    encoder.batches.clear()
    answers = asyncio.run(together())
    assert sum(encoder.batches) == len(set(words))
    for each, answer in zip(words, answers, strict=True):
        agrees(answer["hits"], nearest(index, each), 5)


def test_what_nobody_waits_for_any_more_is_not_computed(index, monkeypatch):
    computed = []
    begun = threading.Event()
    go = threading.Event()
    classify = Index.classify

    def wait_and_classify(self, labels, *rest, **options):
        computed.append(labels[0])
        begun.set()
        assert go.wait(60)
        return classify(self, labels, *rest, **options)

    monkeypatch.setattr(Index, "classify", wait_and_classify)
    app = make_app(index, ServeConfig())

    async def ask(label, *, leaves):
        body = json.dumps({"labels": [label, "red"]}).encode()
        messages = [{"type": "http.disconnect"}] if leaves else []
        messages.append({"type": "http.request", "body": body, "more_body": False})
        status = []

        async def receive():
            return messages.pop() if messages else await asyncio.sleep(60)

        async def send(message):
            status.extend([message["status"]] if "status" in message else [])

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/api/classify",
            "raw_path": b"/api/classify",
            "query_string": b"",
            "headers": headers,
            "http_version": "1.1",
            "scheme": "http",
            "server": ("localhost", 80),
            "root_path": "",
        }
        await app(scope, receive, send)
        return status[0]

    async def together():
        first = asyncio.create_task(ask("first", leaves=False))
        await asyncio.to_thread(begun.wait, 60)
        others = [
            asyncio.create_task(ask(label, leaves=label != "last"))
            for label in ("second", "third", "last")
        ]
        await asyncio.sleep(0.2)
        go.set()
        return await asyncio.gather(first, *others)

    assert asyncio.run(together()) == [200, 499, 499, 200]
    assert computed == ["first", "last"]


def test_an_index_that_grows_is_seen_at_once(tmp_path):
    encoder = ColourModel()
    folder = draw(tmp_path / "pictures", range(30))
    with build(tmp_path / "idx", folder, encoder) as opened, web_of(opened) as web:
        before = web.get("/api/health").json()
        found = ask(web, "search", parts=[{"words": "red"}], cutoff=False, top=100)
        assert before["pictures"] == 30
        assert found["searched"] == 30
        draw(folder, range(30, 41))
        (folder / "0.png").unlink()
        with Index.open(
            tmp_path / "idx", writable=True
        ) as other:  # as another process does
            other.update([folder], UpdateOptions(model=encoder))
        after = web.get("/api/health").json()
        found = ask(web, "search", parts=[{"words": "red"}], cutoff=False, top=100)
        assert after["revision"] > before["revision"]
        assert after["pictures"] == found["searched"] == len(found["hits"]) == 40
        assert len(web.get("/api/ids").json()["ids"]) == 40


# A filter, weights that cancel, ids that are not there: well-formed, and refused with
# these.
CHECKS = {
    "positive_data_acceptance": {"expected-statuses": ["2xx", 400, 404, 413, 415]}
}


@pytest.fixture
def schemathesis():
    found = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    # It imports this late. While threads of an index run, Python 3.11 may fail to parse
    # it: "AST constructor recursion depth mismatch" (python/cpython#106905).
    pytest.importorskip("schemathesis.specs.openapi.schemas")
    return found


@pytest.mark.nightly
def test_the_api_keeps_to_its_description(schemathesis, index):
    """Every operation with well-formed requests, which are answered, and as many
    malformed ones, which are refused.
    """
    app = make_app(index, ServeConfig(local=False, max_upload_pixels=100_000))
    config = schemathesis.Config.from_dict({"checks": CHECKS})
    described = schemathesis.openapi.from_asgi("/api/openapi.json", app, config=config)
    operations = [found.ok() for found in described.get_all_operations()]
    modes = schemathesis.GenerationMode
    for operation in operations:
        for mode in (modes.POSITIVE, modes.NEGATIVE):
            wrong = mode is modes.NEGATIVE
            if wrong and (
                operation.path == "/api/uploads"
                or not (operation.body or operation.query)
            ):
                continue  # nothing to get wrong; forms that are none: test_guard.py

            @settings(max_examples=300, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)  # fmt: skip
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case):
                case.call_and_validate()

            ask()
    assert len(operations) == 12
