"""That every combination of a recipe's choices fits the GPUs that it names, by rayalign's own estimate.

Of the longest prompts and answers, and the models' published sizes: no weights, no hub, no Ray.

    while it answers    what vLLM takes, and everybody's memory beside it; of a learner that waits, what it keeps
    while it learns     everybody's; if engines sleep, without theirs and a scorer's current policy
    an engine           the weights, vLLM's own, and keys and values of all answers to one prompt, in what it takes
"""

import re
from dataclasses import replace

import pytest
from published_models import PARAMETERS, save_configs
from recipe_variants import FILES, names, resolved, variants

from rayalign.agents import make_agent
from rayalign.estimate.gpus import assign
from rayalign.estimate.memory import memory_of
from rayalign.estimate.role import GIB
from rayalign.estimate.shape import BYTES, ModelShape

HEADROOM = 0.05
"""Of a GPU: fragments, libraries and CUDA itself, which the estimate leaves out."""
VLLM_OWN = GIB
"""Of an engine: activations of its longest step, and CUDA graphs."""
MODELS = ("policy", "env.tokenizer", "oracle.target", "evaluation.oracle.target", "agent.features.backbone")


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    return save_configs(tmp_path_factory.mktemp("models"))


@pytest.fixture
def counted_once(monkeypatch):
    """The same shapes, each worked out once: half a minute of all combinations is otherwise two."""
    found, count = {}, ModelShape.counted

    def counted(config, kind, **options):
        key = (config.to_json_string(), kind, *sorted(options.items()))
        return found[key] if key in found else found.setdefault(key, count(config, kind, **options))

    monkeypatch.setattr(ModelShape, "counted", counted)


def gpu_gb(name, choices):
    """Of the GPUs that the recipe names: `GPU_GB`, one number or by the choice that it depends on."""
    stated = names(name)["GPU_GB"]
    return stated if isinstance(stated, int) else next(stated[value] for value in choices.values() if value in stated)


def with_gradients(role, config, shape):
    """A scorer that is asked for gradients keeps the activations of a sequence for the way back."""
    backward = config.scorer.max_gradient_tokens * shape.activation_values(False) * BYTES[config.scorer.dtype]
    return replace(role, parts=role.parts | {"activations": max(role.parts["activations"], backward)})


def kept(learner):
    """Bytes of a learner between two batches."""
    return sum(size for part, size in learner.parts.items() if part not in ("activations", "logits"))


def too_much(roles, gpu, sleeping, answers):
    """What does not fit, in words. `answers`: tokens of all answers to one prompt, and their prompts."""
    usable, shape, answers = (1 - HEADROOM) * gpu, *answers
    for on_it in assign([role for role in roles if role.device == "gpu"]):
        taken = sum(round(role.claims * gpu) for role in on_it)
        others = [role for role in on_it if not role.claims]
        answering = taken + sum(kept(r) if sleeping and r.role == "learner" else r.total for r in others)
        asleep = sum(role.total if role.asleep is None else role.asleep for role in on_it)
        for what, needed in (("answering", answering), ("learning", asleep if sleeping else answering)):
            if needed > usable:
                holds = ", ".join(f"{r.role} {(r.claims * gpu or r.total) / GIB:.1f}" for r in on_it)
                yield f"{what}: {needed / GIB:.1f} of {usable / GIB:.1f} GiB: {holds}"
        for role in on_it:
            least = role.parts["weights"] + VLLM_OWN + answers * shape.kv_bytes("bfloat16") if role.claims else 0
            if least > role.claims * gpu:
                yield f"{role.role} takes {role.claims * gpu / GIB:.1f} GiB and needs {least / GIB:.1f}"


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_models_have_as_many_parameters_as_is_published(name, configs):
    assert ModelShape.of(configs[name]).parameters == PARAMETERS[name]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_combination_fits_the_memory_of_the_gpus_that_it_names(file, configs, counted_once):
    wrong = {}
    for choices, settings in variants(file.stem):
        if choices["placement"] == "laptop":
            continue
        model = settings.get("policy") or settings["env.tokenizer"]  # an SFT model of the user's has its base's shape
        here = settings | {key: configs[settings[key]] for key in MODELS if settings.get(key, "") in configs}
        config, shape = resolved(here | {"policy": configs[model]}), ModelShape.of(configs[model])
        agent = type(make_agent(settings["agent"]))(config.agent)
        longest = config.rollout.max_prompt_tokens
        roles, unknown = memory_of(config, agent, shape, longest, agent.prompts_per_batch(config.loop.batch_size))
        assert not unknown, [role.why for role in unknown]
        if settings["agent"] == "active_dpo":
            roles = [with_gradients(role, config, shape) if role.role == "scorer" else role for role in roles]
        samples = max((proposal.n for proposal in agent.proposals()), default=1)
        answers = samples * (longest + config.rollout.max_tokens)
        gpu = gpu_gb(file.stem, choices) * 10**9
        for message in too_much(roles, gpu, config.loop.sleep_engines, (shape, answers)):
            wrong.setdefault(message, " ".join(f"{k}={v}" for k, v in choices.items()))
    assert not wrong, "\n".join(f"{where}: {message}" for message, where in wrong.items())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_header_names_the_gpus_that_the_test_above_is_about(file):
    hardware = re.search(r"^Hardware.*?(?=^\w)", names(file.stem)["__doc__"], re.M | re.S)[0]
    stated = names(file.stem)["GPU_GB"]
    for gb in {stated} if isinstance(stated, int) else set(stated.values()):
        assert f"{gb} GB" in hardware
