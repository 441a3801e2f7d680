"""The oracle under a real Ray Serve. One cluster for the module; every test runs an application of its own."""

import json
import math
import os
import pickle
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray
from ray import cloudpickle, serve

from rayalign.errors import DataError, OracleError, ResourceError, WaitError
from rayalign.serve import OracleClient, OracleConfig, deployment, start_oracle, stop_oracle
from rayalign.serve.oracles import oracle_factory
from rayalign.types import Candidate, Duel, Prompt, Verdict

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # replicas can't import a test module
CONFIG = OracleConfig(kind="function", cpus_per_replica=0.1, request_timeout_s=60)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=2, include_dashboard=False)
    serve.start(proxy_location="Disabled")  # an instance that is not ours: `stop_oracle` would end Serve between tests
    yield
    serve.shutdown()
    ray.shutdown()


@pytest.fixture
def running(request, tmp_path):
    """Starts oracles under the test's name and stops them after it."""
    name = request.node.name.replace("[", "-").strip("]")[:60]
    folder = tmp_path / "journal"

    def start(factory, config=CONFIG, journal=True):
        return start_oracle(config, factory, name, folder if journal else None)

    start.name, start.folder = name, folder
    yield start
    stop_oracle(name, stop_serve=False)


def response(text):
    return Candidate(text=text, token_ids=(1,), logprobs=(-1.0,), policy_version=0)


def make_duels(n, offset=0):
    return [
        Duel(
            id=f"duel-{i}",
            batch=0,
            prompt=Prompt(id=f"p{i}", text=f"prompt {i}", token_ids=(1, 2)),
            first=response("x" * (i % 7)),
            second=response("x" * (i % 5)),
        )
        for i in range(offset, offset + n)
    ]


def truth(duel):
    return 1 / (1 + math.exp(len(duel.second.text) - len(duel.first.text)))


def length(prompt, text):
    return float(len(text))


class Recording:
    """Writes down who judged what, then answers the truth after `seconds`."""

    id = "recording"

    def __init__(self, path, seconds=0.0):
        self.path, self.seconds = path, seconds

    def judge(self, duels):
        with open(self.path, "a") as file:
            file.write(json.dumps({"pid": os.getpid(), "ids": [d.id for d in duels]}) + "\n")
        time.sleep(self.seconds)
        return [Verdict(duel_id=d.id, probability=truth(d)) for d in duels]


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def journalled(folder):
    return [row["duel_id"] for file in folder.glob("*.jsonl") for row in read_lines(file)]


def test_verdicts_are_right_and_in_order_across_pieces_and_replicas(running):
    config = OracleConfig(kind="function", cpus_per_replica=0.1, num_replicas=2, max_batch_size=64, price=0.5)
    oracle = running(oracle_factory(config, custom=length), config)
    duels = make_duels(1000)
    verdicts = oracle.judge(duels)
    assert [v.duel_id for v in verdicts] == [d.id for d in duels]
    assert [v.probability for v in verdicts] == pytest.approx([truth(d) for d in duels])
    assert {v.price for v in verdicts} == {0.5}
    assert oracle.id == "function:" + length.__module__ + ":length"
    assert sorted(journalled(running.folder)) == sorted(d.id for d in duels)
    assert oracle.judge([]) == []


def test_service_opens_no_http_port(running):
    running(oracle_factory(CONFIG, custom=length))
    assert serve.status().proxies == {}


def test_calls_of_many_callers_are_judged_together(running, tmp_path):
    log = tmp_path / "log"
    oracle = running(lambda: Recording(log, seconds=0.1))
    duels = make_duels(48)
    with ThreadPoolExecutor(48) as pool:
        verdicts = [v for [v] in pool.map(lambda d: oracle.judge([d]), duels)]
    assert [v.probability for v in verdicts] == pytest.approx([truth(d) for d in duels])
    sizes = [len(line["ids"]) for line in read_lines(log)]
    assert sum(sizes) == 48
    assert len(sizes) <= 16
    assert max(sizes) >= 8


def test_no_go_is_larger_than_max_batch_size(running, tmp_path):
    log = tmp_path / "log"
    config = OracleConfig(kind="function", cpus_per_replica=0.1, max_batch_size=10)
    oracle = running(lambda: Recording(log), config)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: oracle.judge(make_duels(17, offset=100 * i)), range(4)))
    assert max(len(line["ids"]) for line in read_lines(log)) <= 10


def test_duel_twice_in_a_list_is_asked_once(running, tmp_path):
    log = tmp_path / "log"
    oracle = running(lambda: Recording(log), journal=False)
    a, b = make_duels(2)
    assert [v.duel_id for v in oracle.judge([a, b, a])] == [a.id, b.id, a.id]
    assert [line["ids"] for line in read_lines(log)] == [[a.id, b.id]]


def test_two_threads_never_ask_the_same_duel_at_the_same_time(running, tmp_path):
    log = tmp_path / "log"
    oracle = running(lambda: Recording(log, seconds=0.3))
    duels = make_duels(4)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: oracle.judge(duels), range(4)))
    assert answers == [answers[0]] * 4
    assert [line["ids"] for line in read_lines(log)] == [[d.id for d in duels]]


def test_killed_replicas_lose_no_duel_and_charge_none_twice(running, tmp_path):
    log, duels = tmp_path / "log", make_duels(600)
    config = OracleConfig(kind="function", cpus_per_replica=0.1, num_replicas=2, max_batch_size=20, price=1.0)
    oracle = running(lambda: Recording(log, seconds=0.15), config)
    killed, over = set(), threading.Event()

    def kill():
        while not over.wait(0.5) and len(killed) < 3:
            alive = [line["pid"] for line in read_lines(log) if line["pid"] not in killed]
            if alive:
                os.kill(alive[-1], signal.SIGKILL)
                killed.add(alive[-1])

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        verdicts = oracle.judge(duels)
    finally:
        over.set()
        killer.join()
    assert len(killed) == 3
    assert [v.duel_id for v in verdicts] == [d.id for d in duels]
    assert [v.probability for v in verdicts] == pytest.approx([truth(d) for d in duels])
    charged = journalled(running.folder)
    assert sorted(charged) == sorted(d.id for d in duels)


def test_paid_answer_is_given_again_even_by_another_service(running, tmp_path):
    log, duels = tmp_path / "log", make_duels(5)
    first = running(lambda: Recording(log)).judge(duels)
    again = running(oracle_factory(CONFIG, custom=lambda prompt, text: 0.0))
    assert again.judge(duels) == first
    assert len(read_lines(log)) == 1
    assert again.judge(make_duels(1, offset=10))[0].probability == 0.5


def test_two_replicas_that_are_asked_the_same_at_the_same_moment_buy_it_once(running, tmp_path):
    log, duels, other = tmp_path / "log", make_duels(40), f"{running.name}-other"
    config = OracleConfig(kind="function", cpus_per_replica=0.1, max_batch_size=16, price=1.0)
    factory = lambda: Recording(log, seconds=0.4)  # noqa: E731
    clients = [running(factory, config), start_oracle(config, factory, other, running.folder)]
    try:
        with ThreadPoolExecutor(2) as pool:
            one, two = pool.map(lambda client, asked: client.judge(asked), clients, [duels, duels[::-1]])
    finally:
        stop_oracle(other, stop_serve=False)
    lines = read_lines(log)
    asked = [name for line in lines for name in line["ids"]]
    assert sorted(asked) == sorted(journalled(running.folder)) == sorted(d.id for d in duels)
    assert len({line["pid"] for line in lines}) == 2, "both asked, about different duels"
    assert one == two[::-1]


def test_what_a_killed_replica_was_asking_about_is_asked_by_another_at_once(running, tmp_path):
    log, duels, other = tmp_path / "log", make_duels(5), f"{running.name}-other"
    config = OracleConfig(kind="function", cpus_per_replica=0.1, retries=0)
    first = running(lambda: Recording(log, seconds=60), config)
    second = start_oracle(config, lambda: Recording(log), other, running.folder)
    with ThreadPoolExecutor(2) as pool:
        try:
            lost = pool.submit(first.judge, duels)
            while not read_lines(log):
                time.sleep(0.05)
            taken_over = pool.submit(second.judge, duels)
            time.sleep(1.0)
            assert not taken_over.done() and len(read_lines(log)) == 1, "it waits for the one who asks"
            os.kill(read_lines(log)[0]["pid"], signal.SIGKILL)
            assert [v.duel_id for v in taken_over.result(30)] == [d.id for d in duels]
            with pytest.raises(OracleError, match="died 1 time"):
                lost.result(30)
        finally:
            stop_oracle(other, stop_serve=False)
    assert sorted(journalled(running.folder)) == sorted(d.id for d in duels)


def test_failure_is_neither_charged_nor_kept(running, tmp_path):
    class Moody:
        id = "moody"

        def __init__(self):
            self.asked = 0

        def judge(self, duels):
            self.asked += 1
            if self.asked == 1:
                return [Verdict(duel_id=d.id, failure="no mood") for d in duels]
            return [Verdict(duel_id=d.id, probability=1.0) for d in duels]

    config = OracleConfig(kind="function", cpus_per_replica=0.1, price=3.0)
    oracle = running(Moody, config)
    [refused] = oracle.judge(make_duels(1))
    assert (refused.probability, refused.failure, refused.price) == (None, "no mood", 0.0)
    assert journalled(running.folder) == []
    assert oracle.judge(make_duels(1))[0].price == 3.0


def test_answer_that_is_not_a_number_is_an_error_for_its_caller_alone(running):
    oracle = running(oracle_factory(CONFIG, custom=lambda prompt, text: math.nan if prompt == "prompt 3" else 1.0))
    duels = make_duels(8)

    def ask(duel):
        try:
            return oracle.judge([duel])[0].probability
        except OracleError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, duels))
    assert "returned nan as a reward in duel duel-3 (prompt p3)" in answers[3]
    assert answers[:3] + answers[4:] == [0.5] * 7
    assert "duel-3" not in journalled(running.folder)


def test_slow_oracle_is_a_timeout_that_says_so_and_its_answer_is_kept(running, tmp_path):
    log = tmp_path / "log"
    config = OracleConfig(kind="function", cpus_per_replica=0.1, request_timeout_s=1.0)
    oracle = running(lambda: Recording(log, seconds=2.5), config)
    duels = make_duels(3)
    with pytest.raises(
        WaitError, match=r"waited 1 s \(oracle.request_timeout_s\) for the oracle recording to answer about 3"
    ):
        oracle.judge(duels)
    deadline = time.monotonic() + 20
    while not journalled(running.folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [v.probability for v in oracle.judge(duels)] == pytest.approx([truth(d) for d in duels])
    assert len(read_lines(log)) == 1


def test_replica_that_dies_on_every_attempt_is_an_error(running):
    class Deadly:
        id = "deadly"

        def judge(self, duels):
            os.kill(os.getpid(), signal.SIGKILL)

    config = OracleConfig(kind="function", cpus_per_replica=0.1, retries=0)
    with pytest.raises(OracleError, match=r"died 1 time on the same 1 duels \(duel-0, \.\.\.\); oracle.retries=0"):
        running(Deadly, config).judge(make_duels(1))


def test_broken_replica_reports_itself_and_is_replaced(running, tmp_path):
    marker = tmp_path / "was here"

    class Broken:
        id = "broken"

        def __init__(self):
            self.broken = not marker.exists()
            marker.touch()

        def judge(self, duels):
            if self.broken:
                raise RuntimeError("device lost")
            return [Verdict(duel_id=d.id, probability=1.0) for d in duels]

    config = OracleConfig(kind="function", cpus_per_replica=0.1, health_check_period_s=0.5)
    oracle = running(Broken, config)
    deadline, messages = time.monotonic() + 40, set()
    while time.monotonic() < deadline:
        try:
            assert oracle.judge(make_duels(1))[0].probability == 1.0
            break
        except OracleError as error:
            messages.add(str(error))
            time.sleep(0.2)
    else:
        pytest.fail("the broken replica was not replaced")
    assert messages == {"oracle broken raised RuntimeError: device lost"}


def test_client_works_from_another_process(running):
    oracle = running(oracle_factory(CONFIG, custom=length))
    assert pickle.loads(pickle.dumps(oracle)).id == oracle.id

    @ray.remote(num_cpus=0.1)
    class Collector:
        def ask(self, client, duels):
            return client.id, client.judge(duels)

    name, verdicts = ray.get(Collector.remote().ask.remote(oracle, make_duels(3)), timeout=60)
    assert name == oracle.id
    assert verdicts == oracle.judge(make_duels(3))


def test_reward_model_is_served(running, tmp_path, save_llama):
    from rayalign.serve.reward_model import RewardModelOracle

    config = OracleConfig(kind="reward_model", target=save_llama(tmp_path / "model"), cpus_per_replica=0.1)
    duels = make_duels(40)
    here = RewardModelOracle(config)
    service = running(oracle_factory(config), config)
    assert service.id == here.id
    assert [v.probability for v in service.judge(duels)] == pytest.approx(
        [v.probability for v in here.judge(duels)], abs=1e-5
    )


def test_oracle_that_can_not_be_made_is_one_error_with_its_own_words(running):
    def factory():
        raise DataError("oracle.target='nowhere' can't be loaded")

    started = time.monotonic()
    with pytest.raises(DataError, match=r"^oracle.target='nowhere' can't be loaded$"):
        running(factory)
    assert time.monotonic() - started < 30
    assert running.name not in serve.status().applications


def test_factory_that_raises_anything_else_is_an_oracle_error(running):
    def factory():
        raise ZeroDivisionError("a: strange\nmessage")

    with pytest.raises(OracleError, match=r"could not be made: ZeroDivisionError: a: strange"):
        running(factory)


def test_start_that_takes_too_long_says_what_it_waited_for(running):
    config = OracleConfig(kind="function", cpus_per_replica=0.1, start_timeout_s=2.0)
    with pytest.raises(WaitError, match=r"waited 2 s \(oracle.start_timeout_s\) for the oracle service"):
        running(lambda: time.sleep(600), config)
    assert running.name not in serve.status().applications


def test_replicas_that_can_not_fit_are_refused_at_once(running):
    config = OracleConfig(kind="function", num_replicas=3, cpus_per_replica=1.0)
    with pytest.raises(ResourceError, match="need 3 CPUs, but the cluster has 2"):
        running(oracle_factory(config, custom=length), config)
    with pytest.raises(ResourceError, match=r"oracle\.gpus_per_replica=1"):
        start_oracle(OracleConfig(gpus_per_replica=1.0), list, "no-gpu")


def test_asking_a_service_that_does_not_run_is_an_error(running):
    with pytest.raises(OracleError, match="the oracle service 'nobody' is not running"):
        OracleClient("nobody", CONFIG, ("x", False)).judge(make_duels(1))
    oracle = running(oracle_factory(CONFIG, custom=length))
    oracle.judge(make_duels(1))
    stop_oracle(running.name, stop_serve=False)
    stop_oracle(running.name, stop_serve=False)
    quick = OracleClient(running.name, OracleConfig(request_timeout_s=5.0), ("x", False))
    with pytest.raises(OracleError, match="is not running"):
        quick.judge(make_duels(1))


def test_replicas_are_added_up_to_max_replicas_while_callers_wait(running, tmp_path, monkeypatch):
    hurried = {"upscale_delay_s": 0.1, "metrics_interval_s": 0.5}
    monkeypatch.setattr(deployment, "AUTOSCALING", deployment.AUTOSCALING | hurried)
    log, over = tmp_path / "log", threading.Event()
    config = OracleConfig(kind="function", cpus_per_replica=0.1, max_replicas=2, target_ongoing=1.0, max_batch_size=1)
    oracle = running(lambda: Recording(log, seconds=0.2), config)

    def states():
        return serve.status().applications[running.name].deployments["oracle"].replica_states

    def ask(caller):
        asked = 0
        while not over.is_set():
            oracle.judge(make_duels(1, offset=1_000 * caller + asked))
            asked += 1
        return asked

    assert states() == {"RUNNING": 1}
    deadline = time.monotonic() + 60
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, caller) for caller in range(8)]
        try:
            while len({line["pid"] for line in read_lines(log)}) < 2 and time.monotonic() < deadline:
                time.sleep(0.1)
        finally:
            over.set()
    assert states() == {"RUNNING": 2} and len({line["pid"] for line in read_lines(log)}) == 2
    assert sum(future.result() for future in asked) == len(journalled(running.folder))
