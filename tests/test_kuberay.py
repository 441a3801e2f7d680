"""The KubeRay manifest: what its command starts, and that the pods which it asks for can hold that."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import ray
import yaml
from typer.testing import CliRunner

import rayalign.loop.loop
from rayalign.cli import app
from rayalign.runs.resources import check_nodes, plan

ROOT = Path(__file__).parents[1]
MANIFEST = ROOT / "tuned_examples" / "kuberay" / "sea_tinyworld.yaml"
SAYS_WHAT_IT_GOT = """#!{python}
import json, sys
print(json.dumps(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def job():
    found = {part["kind"]: part for part in yaml.safe_load_all(MANIFEST.read_text(encoding="utf-8"))}
    return found["RayJob"]["spec"] | {"claim": found["PersistentVolumeClaim"]}


def groups(job):
    cluster = job["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def arguments(job, runs):
    """What `rayalign` is called with where `/runs` is the folder `runs`, as `ray job submit` calls it: in a shell."""
    command = runs / "bin" / "rayalign"
    command.parent.mkdir(exist_ok=True)
    command.write_text(SAYS_WHAT_IT_GOT.format(python=sys.executable))
    command.chmod(0o755)
    entrypoint = subprocess.list2cmdline(shlex.split(job["entrypoint"].replace("/runs", str(runs))))
    environment = {"PATH": f"{command.parent}:/usr/bin:/bin"}
    done = subprocess.run(entrypoint, shell=True, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def planned(words, monkeypatch):
    """The plan of the run that the command `rayalign` would start with `words`."""
    plans = []

    class Planned(Exception):
        pass

    def keep(plan_, *_):
        plans.append(plan_)
        raise Planned

    monkeypatch.setattr(rayalign.loop.loop, "execute", keep)
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, Planned), done.output
    return plans[0]


def test_the_entrypoint_starts_the_run_and_then_resumes_it(job, tmp_path, monkeypatch):
    words = arguments(job, tmp_path)
    config = planned(words, monkeypatch).config
    assert (config.agent_name, config.run_dir) == ("sea", str(tmp_path / "sea-tinyworld"))
    assert (tmp_path / "sea-tinyworld" / "config.yaml").exists(), "a run that was planned has written its settings"
    assert arguments(job, tmp_path) == ["resume", str(tmp_path / "sea-tinyworld")]
    assert planned(arguments(job, tmp_path), monkeypatch).config == config


def test_every_role_fits_on_the_pods_with_its_labels(job, tmp_path, monkeypatch):
    nodes = []
    for group in groups(job):
        [container] = group["template"]["spec"]["containers"]
        resources = {"CPU": float(container["resources"]["requests"]["cpu"])}
        nodes += [{"Alive": True, "Labels": group["labels"], "Resources": resources}] * group.get("replicas", 1)
    found = planned(arguments(job, tmp_path), monkeypatch)
    have = {"CPU": sum(node["Resources"]["CPU"] for node in nodes)}
    config = plan(found.config, found.agent, have, found.set_by_user)
    check_nodes(config, found.agent, nodes)
    asked = [config.loop.collector_nodes, config.oracle.nodes, config.rollout.nodes, config.learner.nodes]
    assert asked == [{"role": role} for role in ("head", "head", "rollout", "learner")]


def test_all_pods_mount_the_volume_that_is_claimed_and_run_this_version(job):
    for group in groups(job):
        pod = group["template"]["spec"]
        [volume], [container] = pod["volumes"], pod["containers"]
        assert volume["persistentVolumeClaim"]["claimName"] == job["claim"]["metadata"]["name"]
        assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/runs"}]
        assert container["image"] == f"rayalign:{rayalign.__version__}"
        assert group["rayStartParams"] == {}, "KubeRay wants the field, and needs nothing in it"
    assert job["claim"]["spec"]["accessModes"] == ["ReadWriteMany"]
    assert job["rayClusterSpec"]["rayVersion"].split(".")[:2] == ray.__version__.split(".")[:2]


def test_the_page_builds_the_image_that_the_manifest_names(job):
    page = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    assert f"docker build -t rayalign:{rayalign.__version__} " in page
    assert f"FROM rayproject/ray:{job['rayClusterSpec']['rayVersion']}-py311" in page
