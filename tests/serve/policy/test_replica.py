"""What a replica of the endpoint has in it, behind an HTTP server of its own: no cluster, but real sockets."""

import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import uvicorn
from made_runs import made_run

from rayalign.after.aligned import Aligned, load_chooser
from rayalign.serve.http_guard import digest
from rayalign.serve.policy.config import PolicyServerConfig
from rayalign.serve.policy.deployment import _PolicyDeployment

TOKEN = "a-token-of-the-tests-alone"


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    run = str(made_run(tmp_path_factory.mktemp("replica") / "run", "sea").path)
    aligned = Aligned.find(run)
    config = PolicyServerConfig(model="mine", token_digest=digest(TOKEN), best_of=3)
    replica = _PolicyDeployment(config, aligned.rollout, aligned.policy, lambda: load_chooser(run))
    server = uvicorn.Server(
        uvicorn.Config(replica.__serve_build_asgi_app__(), port=0, lifespan="on", log_level="error")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    server.should_exit = True
    thread.join(timeout=10)
    replica.answerer.close()


def test_openais_client_talks_to_it_over_http_from_many_threads(url):
    client = openai.OpenAI(base_url=url, api_key=TOKEN, max_retries=0, timeout=60)

    def ask(i):
        messages = [{"role": "user", "content": f"pick for c{i % 16}"}]
        reply = client.chat.completions.create(model="mine", messages=messages, seed=i, n=2)
        return [choice.message.content for choice in reply.choices]

    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(ask, range(24)))
    assert all(len(answers) == 2 and all(answer.startswith("a") for answer in answers) for answers in together)
    assert ask(7) == together[7]
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=url, api_key="another-token-than-it", max_retries=0).models.list()
