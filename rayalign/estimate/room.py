"""Whether a calibration fits into this machine: it runs all roles in one process, one of each."""

from __future__ import annotations

from dataclasses import replace

from rayalign.agents.agent import Agent
from rayalign.errors import ConfigError
from rayalign.estimate.labelling import free_oracles
from rayalign.estimate.memory import memory_of
from rayalign.estimate.oracle_memory import oracle_memory
from rayalign.estimate.role import GIB, RoleMemory, total
from rayalign.estimate.shape import ModelShape
from rayalign.runs.config import RunConfig
from rayalign.system.memory import free_memory, gpu_memory

WAY_OUT = (
    "Leave --calibrate out, calibrate with a smaller policy of the same kind, or lower what takes most, such as "
    "learner.micro_batch_tokens."
)


def in_one_process(config: RunConfig) -> RunConfig:
    """`config` as a calibration runs it: one engine, one scorer, one learner that shares its work with nobody."""
    learner = replace(config.learner, strategy="plain", num_workers=1, offload=False)
    return replace(
        config,
        learner=learner,
        rollout=replace(config.rollout, num_replicas=1),
        scorer=replace(config.scorer, num_replicas=1),
    )


def check_room(
    config: RunConfig, agent: Agent, shape: ModelShape, prompt_tokens: int, batch_prompts: int, custom: object = None
) -> None:
    """Raise `ConfigError` if a calibration needs more memory than there is, or GPUs where there are none.

    Nothing is loaded for it. The arguments are those of `memory_of`; `custom` is an oracle that was given by hand.
    """
    roles, _ = memory_of(in_one_process(config), agent, shape, prompt_tokens, batch_prompts, oracles=False)
    roles = [role for role in roles if role.role != "reference engine"]  # the one engine answers for both
    for section, asked in free_oracles(config, custom).items():
        one = replace(asked, max_replicas=0, num_replicas=1)
        found = oracle_memory(section, one, prompt_tokens, config.rollout.max_tokens)
        roles += [found] if isinstance(found, RoleMemory) else []
    on_gpu = [role for role in roles if role.device == "gpu"]
    if on_gpu:
        gpu = gpu_memory()
        if gpu is None:
            raise ConfigError(
                f"--calibrate runs {_listed(on_gpu)} on a GPU, as the settings say, and this machine has none that "
                "torch can use. Leave --calibrate out, or run it on a machine like those of the run."
            )
        # vLLM takes its share, whatever it needs of it.
        taken = sum(round(role.claims * gpu[1]) if role.claims else role.total for role in on_gpu)
        _refuse("the GPU", on_gpu, taken, gpu[0])
    _refuse("this machine", [r for r in roles if r.device == "cpu"], total(roles, "cpu"), free_memory())


def _refuse(where: str, roles: list[RoleMemory], needed: int, free: int) -> None:
    if needed > free:
        raise ConfigError(
            f"--calibrate loads the policy into this process and needs about {needed / GIB:.1f} GiB on {where} "
            f"({_listed(roles)}), which has {free / GIB:.1f} GiB free. {WAY_OUT}"
        )


def _listed(roles: list[RoleMemory]) -> str:
    return ", ".join(f"{role.role} {role.total / GIB:.1f} GiB" for role in roles)
