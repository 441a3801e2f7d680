"""A run's policy under Ray Serve, asked by OpenAI's client over HTTP."""

import socket
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from made_runs import made_run

from rayalign.after.serving import serve_policy
from rayalign.errors import ConfigError, DataError

TOKEN = "a-token-of-the-tests-alone"


@pytest.fixture(scope="module")
def cluster(cluster_without_serve):
    """An endpoint needs its port."""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return made_run(tmp_path_factory.mktemp("served") / "run", "sea").path


@pytest.fixture(scope="module")
def server(cluster, run_dir, tmp_path_factory):
    """Best of 3 by the run's posterior, with a token."""
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text(TOKEN)
    with serve_policy(
        run_dir, port=free_port(), model="mine", best_of=3, token_file=token, **{"rollout.cpus_per_replica": 0.5}
    ) as found:
        yield found


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def client(server, token=TOKEN):
    return openai.OpenAI(base_url=server.url, api_key=token, max_retries=0, timeout=60)


def ask(server, i, **more):
    messages = [{"role": "user", "content": f"pick for c{i % 16}"}]
    return client(server).chat.completions.create(model="mine", messages=messages, seed=i, **more)


def test_openais_client_is_answered_by_the_policy_many_at_a_time(server):
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda i: ask(server, i, n=2), range(16)))
    assert all(len(reply.choices) == 2 and reply.model == "mine" for reply in together)
    assert all(choice.message.content.startswith("a") for reply in together for choice in reply.choices)
    again = [choice.message.content for choice in ask(server, 5, n=2).choices]
    assert again == [choice.message.content for choice in together[5].choices]


def test_completions_models_and_streams_are_there(server):
    reply = client(server).completions.create(model="mine", prompt=["pick for c1", "pick for c2"], temperature=0)
    assert len(reply.choices) == 2
    assert [model.id for model in client(server).models.list()] == ["mine"]
    events = list(ask(server, 0, stream=True))
    assert "".join(event.choices[0].delta.content or "" for event in events).startswith("a")


def test_a_wrong_token_gets_nothing(server):
    with pytest.raises(openai.AuthenticationError):
        client(server, "another-token-than-it").models.list()


def test_mistakes_are_told_before_anything_is_served(run_dir, tmp_path, monkeypatch):
    monkeypatch.delenv("RAYALIGN_SERVE_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="can be reached from other machines"), serve_policy(run_dir, host="0.0.0.0"):
        pass
    with pytest.raises(DataError, match="neither a directory nor a Hugging Face id"), serve_policy(tmp_path / "no/no"):
        pass
    with pytest.raises(ConfigError, match=r"loop\.budget has no meaning"), serve_policy(run_dir, **{"loop.budget": 3}):
        pass
