"""People whom other programs ask: two doors, two kinds of token, one queue. No Ray."""

import pytest
from starlette.testclient import TestClient

from rayalign.after.serving import serve_oracle
from rayalign.errors import ConfigError
from rayalign.serve.http.app import build_app
from rayalign.serve.http.service import ServiceConfig
from rayalign.serve.http_guard import digest
from rayalign.serve.labelling.app import build_app as build_page
from rayalign.serve.labelling.queue import DuelQueue
from rayalign.serve.labelling.served import PageAndService
from rayalign.serve.labelling.tokens import Tokens

OF_ANN, OF_PROGRAMS = "the-secret-of-ann-1", "the-token-of-programs"


@pytest.fixture
def client(tmp_path):
    queue = DuelQueue(tmp_path / "queue.arrow", ["ann"], undo_s=0)

    async def poll(duels):
        return list(queue.put(duels).values())

    service = ServiceConfig(token_digest=digest(OF_PROGRAMS))
    app = PageAndService(
        build_page(queue, Tokens({"ann": OF_ANN})), build_app(poll, "human:1:majority", service, late=True)
    )
    yield TestClient(app, base_url="http://127.0.0.1:8710", client=("127.0.0.1", 50000))
    queue.close()


def ask(client, *duels, token=OF_PROGRAMS):
    asked = [{"id": name, "prompt": "q", "first": first, "second": second} for name, first, second in duels]
    return client.post("/v1/verdicts", json={"duels": asked}, headers={"Authorization": f"Bearer {token}"})


def test_what_a_program_asks_is_pending_until_somebody_has_voted_on_the_page(client):
    asked = [("a", "one", "two"), ("b", "three", "four")]
    assert client.get("/v1/oracle", headers={"Authorization": f"Bearer {OF_PROGRAMS}"}).json()["late"] is True
    assert [verdict["pending"] for verdict in ask(client, *asked).json()["verdicts"]] == [True, True]
    assert client.post("/api/login", json={"token": OF_ANN}).status_code == 200
    task = client.post("/api/next", json={}).json()["task"]
    assert {task["left"], task["right"]} == {"one", "two"}
    client.post("/api/answer", json={"duel": task["duel"], "choice": "left"})
    first, second = ask(client, *asked).json()["verdicts"]
    assert (first["id"], first["pending"], first["probability"]) == ("a", False, float(task["left"] == "one"))
    assert (second["id"], second["pending"], second["probability"]) == ("b", True, None)
    assert client.post("/api/next", json={}).json()["progress"]["open"] == 1, "asked again, asked once"


def test_neither_token_opens_the_other_door(client):
    assert ask(client, ("a", "one", "two"), token=OF_ANN).status_code == 401
    assert client.get("/v1/oracle").status_code == 401 and client.get("/v1/verdicts/../../").status_code != 500
    assert client.post("/api/login", json={"token": OF_PROGRAMS}).status_code == 401
    bearer = {"headers": {"Authorization": f"Bearer {OF_PROGRAMS}"}}
    assert client.post("/api/next", json={}, **bearer).status_code == 401
    assert client.get("/").text.startswith("<!doctype html>") and client.get("/health").json() == {"status": "ok"}
    assert "/v1/verdicts" in client.get("/openapi.json").json()["paths"]


def test_where_others_can_reach_them_people_need_tokens_beside_the_one_of_programs(tmp_path):
    (tmp_path / "token").write_text(OF_PROGRAMS)
    asked = {"host": "0.0.0.0", "token_file": tmp_path / "token", "folder": tmp_path / "people"}
    with pytest.raises(ConfigError, match=r"oracle\.human\.tokens_file is not set"), serve_oracle("human", **asked):
        pass
    assert not (tmp_path / "people").exists()
