"""How the work of one optimizer step is shared: plain, DDP, and DeepSpeed's ZeRO 1-3, behind one interface.

`update.py` knows only `Strategy`; nothing here knows preferences, agents or Ray.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rayalign.errors import DataError
from rayalign.learner.config import LearnerConfig
from rayalign.learner.logprobs import PolicyModule
from rayalign.learner.microbatch import MicroBatch
from rayalign.learner.policy import trainable, whole


class Strategy:
    """One worker's view of the model that is trained. Also the plain strategy's own implementation: nobody to ask.

    Gradients of `backward` add up until `step`. Each worker's loss is its share of one sum, so that strategies that
    average over workers get it multiplied by their number.
    """

    def __init__(self, policy: PolicyModule, config: LearnerConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.policy = policy
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.module: Any = self._wrap()
        self.optimizer = self._make_optimizer()

    # -- to be overridden -----------------------------------------------------------------------------------------
    def _wrap(self) -> Any:
        return self.policy.to(self.device)

    def _make_optimizer(self) -> Any:
        """AdamW over float32 masters: steps of 1e-7 would vanish in the rounding of bfloat16 weights."""
        self.masters = [
            p if p.dtype == torch.float32 else p.detach().float().requires_grad_()
            for p in trainable(self.policy).values()
        ]
        return make_adamw(self.masters, self.config)

    def logprobs(self, micro: MicroBatch, last: bool) -> Tensor:
        """Summed response log-probabilities of a micro-batch's rows, `R`, for `backward`; `last` of this step?"""
        return self.module(*self.on_device(micro))

    def backward(self, loss: Tensor) -> None:
        """Add gradients to those of this step."""
        loss.backward()

    def step(self, learning_rate: float) -> float:
        """Clip, step, clear gradients. Returns the norm before clipping; if it is not finite, nothing was changed."""
        parameters = list(trainable(self.policy).values())
        for parameter, master in zip(parameters, self.masters, strict=True):
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
        norm = float(nn.utils.clip_grad_norm_(self.masters, self.config.max_grad_norm or math.inf))
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
            with torch.no_grad():
                for parameter, master in zip(parameters, self.masters, strict=True):
                    if master is not parameter:
                        parameter.copy_(master)
        self.optimizer.zero_grad()
        self.policy.zero_grad()
        return norm

    def gathered(self, parameters: Sequence[nn.Parameter], write: bool = False) -> AbstractContextManager[Any]:
        """Parameters whole while entered, by all workers together; with `write`, what each of them writes is kept."""
        return whole(parameters)

    def shard(self, module: PolicyModule) -> Any:
        """Another module (a frozen reference), placed as the policy is; only ever called under `no_grad`."""
        return module.to(self.device)

    def save(self, folder: Path) -> None:
        """Write weights and optimizer into `folder`, each worker its part; rank 0's and others' are merged later."""
        if self.rank == 0:
            from safetensors.torch import save_file

            parameters = {name: p.detach().cpu().contiguous() for name, p in trainable(self.policy).items()}
            save_file(parameters, folder / "weights.safetensors")
            masters = [
                None if m is p else m for m, p in zip(self.masters, trainable(self.policy).values(), strict=True)
            ]
            torch.save({"optimizer": self.optimizer.state_dict(), "masters": masters}, folder / "optimizer.pt")

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; the number of workers may differ."""
        from safetensors.torch import load_file

        saved = load_file(folder / "weights.safetensors")
        parameters = trainable(self.policy)
        if saved.keys() != parameters.keys():
            raise DataError(
                f"the checkpoint in {folder} holds other weights than learner.lora and the policy ask for; "
                "resume with the settings of the run."
            )
        state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])
            for master, kept in zip(self.masters, state["masters"], strict=True):
                if kept is not None:
                    master.copy_(kept)
        self.optimizer.load_state_dict(state["optimizer"])

    # -- the same for all --------------------------------------------------------------------------------------
    def on_device(self, micro: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments of `PolicyModule.forward`."""
        tensors = (micro.input_ids_RT, micro.attention_mask_RT, micro.response_mask_RT)
        return tuple(t.to(self.device, non_blocking=True) for t in tensors)  # type: ignore[return-value]

    def gather(self, mine: Any) -> list[Any]:
        """See `gather_objects`."""
        return gather_objects(mine)


def gather_objects(mine: Any) -> list[Any]:
    """Every worker's small picklable object, by rank, on every worker."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [mine]
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    return everybody


class Ddp(Strategy):
    """Weights on every worker, gradients averaged in the last backward of a step."""

    def _wrap(self) -> Any:
        from torch.nn.parallel import DistributedDataParallel

        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(self.policy.to(self.device), device_ids=devices)

    def logprobs(self, micro: MicroBatch, last: bool) -> Tensor:
        """Gradients are exchanged in the last backward only, which DDP wants to know before its forward."""
        with contextlib.nullcontext() if last else self.module.no_sync():
            return super().logprobs(micro, last)

    def backward(self, loss: Tensor) -> None:
        """DDP averages over workers."""
        super().backward(loss * self.world_size)


class DeepSpeed(Strategy):
    """Optimizer state (ZeRO-1), gradients (2) and weights (3) sharded over the workers; master weights in float32.

    `managed_gradient_accumulation` is off: `step` is the boundary, so that a batch may have any number of
    micro-batches. A checkpoint can be restored only by as many workers as wrote it.
    """

    def _wrap(self) -> Any:
        import deepspeed

        _no_shared_memory_kernels()
        # Gradient norms are checked in `step`; DeepSpeed's own dist init finds Ray Train's process group.
        deepspeed.init_distributed(
            dist_backend=dist.get_backend(), timeout=timedelta(seconds=self.config.batch_timeout_s)
        )
        self._scatter(self.policy)
        optimizer = make_adamw([p for p in self.policy.parameters() if p.requires_grad], self.config)
        engine, _, _, _ = deepspeed.initialize(model=self.policy, optimizer=optimizer, config=self._settings())
        if hasattr(engine.optimizer, "check_grad_overflow"):
            engine.optimizer.check_grad_overflow = True  # in float32 too: a step that is not finite must not be taken
        return engine

    def _make_optimizer(self) -> Any:
        return self.module.optimizer

    def _settings(self) -> dict[str, Any]:
        stage = int(self.config.strategy.removeprefix("zero"))
        zero: dict[str, Any] = {"stage": stage}
        if self.config.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
            if stage == 3:
                zero["offload_param"] = {"device": "cpu"}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "gradient_clipping": self.config.max_grad_norm,
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": self.config.dtype == "bfloat16"},
            "steps_per_print": 10**9,
        }

    @property
    def _shards_weights(self) -> bool:
        return self.config.strategy == "zero3"

    def backward(self, loss: Tensor) -> None:
        """DeepSpeed averages over workers too."""
        self.module.backward(loss * self.world_size)

    def step(self, learning_rate: float) -> float:
        """See `Strategy.step`; DeepSpeed skips a step whose gradient is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.module.step()
        norm = self.module.get_global_grad_norm()
        return math.inf if self.optimizer.overflow or norm is None else float(norm)

    def gathered(self, parameters: Sequence[nn.Parameter], write: bool = False) -> AbstractContextManager[Any]:
        """See `Strategy.gathered`."""
        sharded = [p for p in parameters if hasattr(p, "ds_id")]
        if not self._shards_weights or not sharded:
            return contextlib.nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if write else None)

    def _scatter(self, module: PolicyModule) -> None:
        """Move the module to the device; ZeRO-3 does it parameter by parameter, keeping one shard of each there."""
        if not self._shards_weights:
            module.to(self.device)
            return
        import deepspeed

        deepspeed.zero.Init(module=module, config_dict_or_path=self._settings())
        for buffer in module.buffers():
            buffer.data = buffer.data.to(self.device)

    def shard(self, module: PolicyModule) -> Any:
        """ZeRO-3 shards the reference as well: two whole models would not fit where one does not."""
        self._scatter(module)
        if not self._shards_weights:
            return module
        import deepspeed

        settings = self._settings()
        settings["zero_optimization"].pop("offload_optimizer", None)
        engine, *_ = deepspeed.initialize(model=module, config=settings)
        engine.eval()
        return engine

    def save(self, folder: Path) -> None:
        """DeepSpeed's own checkpoint: each worker writes its shards."""
        (folder / "deepspeed").mkdir(exist_ok=True)
        self.module.save_checkpoint(str(folder), tag="deepspeed", exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        """See `save`."""
        loaded, _ = self.module.load_checkpoint(str(folder), tag="deepspeed", load_module_strict=False)
        if loaded is None:
            raise DataError(f"the checkpoint in {folder} is not DeepSpeed's; resume with the strategy of the run.")


def _no_shared_memory_kernels() -> None:
    """Spare CPU workers a compiler run of half a minute: the kernels it builds serve inference only."""
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False


def make_adamw(parameters: Sequence[Tensor], config: LearnerConfig) -> torch.optim.AdamW:
    """AdamW with the config's settings; the learning rate is set anew before each step."""
    return torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=config.adam_betas, weight_decay=config.weight_decay, fused=True
    )


def make_strategy(policy: PolicyModule, config: LearnerConfig, device: torch.device) -> Strategy:
    """The strategy that `config.strategy` names, over the process group that is initialised (or none)."""
    kind = {"plain": Strategy, "ddp": Ddp}.get(config.strategy, DeepSpeed)
    return kind(policy, config, device)
