"""Sampling with vLLM 0.32, in the process of whoever builds the engine; CUDA and CPU.

New weights go through vLLM's own reloading, and what the model holds afterwards is read back; see `vllm_worker`.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rayalign.errors import DataError, WeightSyncError
from rayalign.rollout.config import RolloutConfig
from rayalign.rollout.encode import check_fits, context_length, eos_token_ids, load_tokenizer
from rayalign.rollout.engine import Sampling, prompt_seed
from rayalign.rollout.weights import Weights, write_adapter
from rayalign.types import Candidate, Prompt


class VllmEngine:
    """vLLM's `LLM` with token ids in and out. Implements `rayalign.rollout.engine.Engine`."""

    def __init__(self, policy_dir: str | Path, config: RolloutConfig, *, device: str = "cpu") -> None:
        """The environment variables of `RolloutConfig.environment` must be set before vLLM is first imported."""
        from vllm import LLM

        self._config, self._device = config, device
        self.tokenizer = load_tokenizer(policy_dir)
        self.eos_ids = eos_token_ids(policy_dir, self.tokenizer)
        longest = config.max_prompt_tokens + config.max_tokens
        self._context = min(context_length(policy_dir) or longest, longest)
        settings: dict[str, Any] = {
            "dtype": _dtype(Path(policy_dir), config.dtype, device),
            "max_model_len": self._context,
            "max_num_seqs": config.vllm.max_sequences,
            "enforce_eager": config.vllm.enforce_eager,
            "tensor_parallel_size": config.vllm.tensor_parallel,
            "logprobs_mode": "processed_logprobs",  # of the distribution sampled from: after temperature and top_p
            "worker_extension_cls": "rayalign.rollout.vllm_worker.WorkerExtension",
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # no sampling defaults from the checkpoint
            "seed": 0,
        }
        if device == "cpu":
            # vLLM 0.32 can't take back a seeded draw on a CPU, which it does after each part of a prompt cut in parts.
            settings |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, self._context)}
        if device == "cuda":
            settings |= {"gpu_memory_utilization": config.vllm.gpu_memory_utilization, "enable_sleep_mode": True}
        if config.vllm.transport != "object_store":
            settings["weight_transfer_config"] = {"backend": config.vllm.transport}
        if config.vllm.enable_lora:
            settings |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": config.vllm.max_lora_rank}
        try:
            self._llm = LLM(str(policy_dir), **settings)
        except ValueError as error:
            raise DataError(f"policy={str(policy_dir)!r}: vLLM can't run it: {error}") from error
        self._version = 0
        self._adapter: Any = None

    @property
    def version(self) -> int:
        """Weights version that it runs; 0 is the initial policy."""
        return self._version

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seed: int, positions: Sequence[int] | None = None
    ) -> list[list[Candidate]]:
        """`sampling.n` candidates for each prompt, in order; see `Engine.generate`.

        vLLM batches as it goes, so rounding, and with it a rare token, may differ between requests cut differently.
        """
        from vllm import SamplingParams

        if not prompts:
            return []
        positions = range(len(prompts)) if positions is None else positions
        for prompt in prompts:
            check_fits(prompt, sampling.max_tokens, self._context)
        greedy = sampling.temperature == 0
        params = [
            SamplingParams(
                n=1 if greedy else sampling.n,
                temperature=sampling.temperature,
                top_p=1.0 if greedy else sampling.top_p,
                max_tokens=sampling.max_tokens,
                min_tokens=sampling.min_tokens,
                seed=prompt_seed(seed, position),
                logprobs=0,  # of the sampled token alone
                stop_token_ids=list(self.eos_ids),
                detokenize=False,
            )
            for position in positions
        ]
        # What an earlier request left in the cache must not decide how this one is computed.
        self._llm.reset_prefix_cache()
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(prompt.token_ids)} for prompt in prompts],
            params,
            use_tqdm=False,
            lora_request=self._adapter,
        )
        groups = [[self._candidate(response) for response in output.outputs] for output in outputs]
        return [group * sampling.n for group in groups] if greedy else groups

    def _candidate(self, response: Any) -> Candidate:
        ids = tuple(response.token_ids)
        return Candidate(
            text=self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
            token_ids=ids,
            logprobs=tuple(step[token].logprob for token, step in zip(ids, response.logprobs, strict=True)),
            policy_version=self._version,
            finished=response.finish_reason == "stop",
        )

    # -- weights -------------------------------------------------------------------------------------------------
    def load(self, weights: Weights) -> str:
        """Run other weights; returns the checksum read back from vLLM's model (what exactly: see `vllm_worker`)."""
        if weights.adapter is not None:
            found = self._load_adapter(weights)
        else:
            if self._config.vllm.enable_lora:
                raise WeightSyncError(
                    f"weights version {weights.version} are whole weights, but rollout.vllm.enable_lora=True reserves "
                    "the engine for adapters. Publish adapters, or set it to False and publish merged weights."
                )
            found = self._ask_workers("rayalign_load", weights)
        self._llm.reset_prefix_cache()
        self._version = weights.version
        return found

    def weight_transfer(self, step: str, payload: dict[str, Any]) -> None:
        """One step of vLLM's own weight transfer: a method of its workers and its arguments."""
        self._llm.collective_rpc(step, kwargs=payload)

    def adopt(self, weights: Weights) -> str:
        """Count what a weight transfer has brought as `weights`; returns the checksum read back, as `load` does."""
        found = self._ask_workers("rayalign_read_back", weights)
        self._llm.reset_prefix_cache()
        self._version = weights.version
        return found

    def _load_adapter(self, weights: Weights) -> str:
        from vllm.lora.request import LoRARequest

        if not self._config.vllm.enable_lora:
            raise WeightSyncError(
                f"weights version {weights.version} are an adapter, but rollout.vllm.enable_lora=False. Set it to True "
                "(at engine start), or publish merged weights."
            )
        # vLLM reads adapters from disk; memory is disk enough.
        shared_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        with tempfile.TemporaryDirectory(dir=shared_memory) as folder:
            write_adapter(weights, folder)
            adapter_id = weights.version + 1  # vLLM's ids begin at 1; a new id is never mistaken for the old adapter
            request = LoRARequest(f"version-{weights.version}", adapter_id, folder, load_inplace=True)
            self._llm.llm_engine.add_lora(request)
        self._adapter = LoRARequest(f"version-{weights.version}", adapter_id, "loaded")
        return self._ask_workers("rayalign_read_back_adapter", weights, adapter_id)

    def _ask_workers(self, method: str, *args: Any) -> str:
        """The answer of all workers, if it is one; else what the first odd one said."""
        answers = self._llm.collective_rpc(method, args=args)
        wanted = args[0].checksum
        return next((answer for answer in answers if answer != wanted), wanted)

    def sleep(self) -> None:
        """Weights to CPU memory, KV cache discarded (vLLM's sleep level 1); nothing happens on a CPU."""
        if self._device == "cuda":
            self._llm.sleep(level=1)

    def wake(self) -> None:
        """Undo `sleep`."""
        if self._device == "cuda":
            self._llm.wake_up()


def _dtype(policy_dir: Path, dtype: str, device: str) -> str:
    """What `auto` means, said explicitly: vLLM's own `auto` would turn float32 checkpoints into half precision."""
    if dtype == "auto":
        config: Mapping[str, Any] = json.loads((policy_dir / "config.json").read_text())
        dtype = (
            config.get("dtype") or config.get("torch_dtype") or str(torch.get_default_dtype()).removeprefix("torch.")
        )
    return "float32" if dtype == "float16" and device == "cpu" else dtype
