"""A judge's model in the oracle's own replicas: what `Endpoint` asks over HTTP is computed here.

    ask(message) --+
    ask(message) --+--> waiting --> one batch: chat template -> padded to the left -> generate -> Reply
    ask(message) --+    (what arrives meanwhile is the next batch)

Padding rule: to the left, and masked, so that what a model says of a message does not depend on its company but for
rounding. Nothing travels and nobody bills, so a call can only be too long.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import torch

from rayalign.errors import DataError
from rayalign.serve.classifier import device_of, longest_input, model_name, placement, version_name
from rayalign.serve.config import OracleConfig
from rayalign.serve.endpoint import SHORT, Reply, Trouble


class LocalJudge:
    """The language model `config.target`, asked as an `Endpoint` is. Thread-safe. `DataError` if it can't be loaded."""

    def __init__(self, config: OracleConfig) -> None:
        from rayalign.system.hf import AutoModelForCausalLM, AutoTokenizer

        self.config = config.judge
        options = {"trust_remote_code": config.trust_remote_code}
        device = device_of(config.device)
        placed = placement(config, device)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(config.target, padding_side="left", **options)
            self._model = AutoModelForCausalLM.from_pretrained(
                config.target, dtype=getattr(torch, config.dtype), **placed, **options
            ).eval()
        except (OSError, ValueError) as error:
            raise DataError(
                f"oracle.target={config.target!r} can't be loaded as a language model: {' '.join(str(error).split())}"
            ) from error
        if "device_map" not in placed:
            self._model.to(device)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.longest = longest_input(self._model, self.tokenizer)
        self.model = model_name(config.target)
        self.host = f"local:{version_name(self._model, config.quantization)}"
        self._digits = _tokens_of(self.tokenizer, ("0", "1"))
        self._waiting: list[tuple[str, Future[Reply]]] = []
        self._queue, self._busy = threading.Lock(), threading.Lock()

    def check(self) -> None:
        """It is there: it was loaded."""

    def ask(self, message: str) -> Reply:
        """The reply to `message`. Raises `Trouble` if it is too long."""
        reply: Future[Reply] = Future()
        with self._queue:
            self._waiting.append((message, reply))
        with self._busy:  # whoever gets it answers for all who wait
            with self._queue:
                batch, self._waiting = self._waiting, []
            if batch:
                self._answer(batch)
        return reply.result()

    def clean(self, text: str) -> str:
        """`text` on one line, not too long."""
        text = " ".join(text.split())
        return text if len(text) <= SHORT else text[:SHORT] + "..."

    # -- inside -------------------------------------------------------------------------------------------------
    def _answer(self, batch: Sequence[tuple[str, Future[Reply]]]) -> None:
        rows: list[tuple[list[int], Future[Reply]]] = []
        try:
            for message, reply in batch:
                ids = self._encode(message)
                if len(ids) + self.config.answer_tokens > self.longest:
                    why = f"the question has {len(ids)} tokens, and with its answer more than {self.longest}"
                    reply.set_exception(Trouble(why, "refused"))
                else:
                    rows.append((ids, reply))
            for (_, reply), said in zip(rows, self._generate([ids for ids, _ in rows]), strict=True):
                reply.set_result(said)
        except BaseException as error:
            for _, reply in batch:
                if not reply.done():
                    reply.set_exception(error)

    def _encode(self, message: str) -> list[int]:
        if not self.tokenizer.chat_template:
            return list(self.tokenizer(message)["input_ids"])
        turns = [{"role": "user", "content": message}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _generate(self, rows: Sequence[list[int]]) -> list[Reply]:
        if not rows:
            return []
        inputs = self.tokenizer.pad({"input_ids": list(rows)}, return_tensors="pt").to(self._model.device)
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if self.config.temperature:
            sampling = {"do_sample": True, "temperature": self.config.temperature, "top_p": 1.0, "top_k": 0}
        with torch.inference_mode():
            made = self._model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=self.config.answer_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
                return_dict_in_generate=True,
                output_logits=True,
                **sampling,
            )
        first = torch.log_softmax(made.logits[0].float(), dim=-1)
        answers = made.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        return [self._reply(answer, logprobs) for answer, logprobs in zip(answers, first, strict=True)]

    def _reply(self, answer: list[int], logprobs: torch.Tensor) -> Reply:
        ends = self._model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        length = next((i for i, token in enumerate(answer) if token in ends), None)
        likely = {text: logprobs[tokens].logsumexp(0).item() for text, tokens in self._digits.items()}
        first = self.tokenizer.decode([answer[0]]).strip()
        if self.config.request and likely:
            first = max(likely, key=lambda text: likely[text])
        return Reply(
            text=self.tokenizer.decode(answer[:length], skip_special_tokens=True),
            finish_reason="length" if length is None else "stop",
            refusal=False,
            first_token=(first, {first: logprobs[answer[0]].item()} | likely),
        )


def _tokens_of(tokenizer: Any, texts: Sequence[str]) -> dict[str, list[int]]:
    """The tokens that are these texts, white space around them aside."""
    written = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    found = {text: [token for token, other in enumerate(written) if other.strip() == text] for text in texts}
    return {text: tokens for text, tokens in found.items() if tokens}
