"""Chunked log-probabilities are the plain ones, gradients included, for every kind of head."""

import pytest
import torch
from torch import nn

from rayalign.learner.logprobs import PolicyModule, chunked_logprobs, token_logprobs


def plain_logprobs(logits_NV, targets_N):
    return logits_NV.log_softmax(-1).gather(-1, targets_N[:, None]).squeeze(-1)


def test_token_logprobs_pass_gradcheck():
    torch.manual_seed(0)
    logits_NV = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    targets_N = torch.tensor([0, 6, 3, 3, 1])
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, targets_N), logits_NV)
    torch.testing.assert_close(token_logprobs(logits_NV, targets_N), plain_logprobs(logits_NV, targets_N))


def test_token_logprobs_of_huge_logits_stay_finite():
    logits_NV = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    value = token_logprobs(logits_NV, torch.tensor([1]))
    value.sum().backward()
    assert value.item() == -1e4
    torch.testing.assert_close(logits_NV.grad, torch.tensor([[-1.0, 1.0, 0.0]]))


@pytest.mark.parametrize("chunk", [1, 3, 16, 100])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]
)
def test_chunks_give_the_plain_values_and_gradients(chunk, dtype, tolerance):
    torch.manual_seed(1)
    hidden_ND, head = torch.randn(16, 8), nn.Linear(8, 50, bias=True)
    targets_N, weights_N = torch.randint(50, (16,)), torch.randn(16)
    results = []
    for way in ("plain", "chunks"):
        h, layer = hidden_ND.to(dtype).requires_grad_(), nn.Linear(8, 50).to(dtype)
        layer.load_state_dict(head.state_dict())
        if way == "plain":
            value = plain_logprobs(layer(h).to(torch.promote_types(dtype, torch.float32)), targets_N)
        else:
            value = chunked_logprobs(h, targets_N, layer, chunk)
        (value * weights_N).sum().backward()
        results.append((value.detach(), h.grad, layer.weight.grad, layer.bias.grad))
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, atol=tolerance, rtol=tolerance)


def rows():
    """Two rows: prompt of 2 and response of 3; prompt of 1 and response of 2, padded."""
    ids_RT = torch.tensor([[5, 6, 7, 8, 1], [9, 10, 1, 0, 0]])
    attention_RT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    response_RT = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]], dtype=torch.bool)
    return ids_RT, attention_RT, response_RT


def by_hand(model, ids, prompt_length):
    """Sum of the response's log-probabilities from the model's own logits, one sequence, no padding."""
    logits_TV = model(input_ids=ids[None]).logits[0].double()
    return sum(logits_TV[t - 1].log_softmax(-1)[ids[t]] for t in range(prompt_length, len(ids)))


@pytest.mark.parametrize("tied", [False, True])
def test_policy_module_sums_responses_end_of_sequence_included_and_padding_excluded(policy_dir, tied_policy_dir, tied):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tied_policy_dir if tied else policy_dir)
    policy = PolicyModule(model, chunk_tokens=2)
    assert not policy.own_forward
    ids_RT, attention_RT, response_RT = rows()
    logprob_R = policy(ids_RT, attention_RT, response_RT)
    expected = [by_hand(model, ids_RT[0], 2), by_hand(model, ids_RT[1, :3], 1)]
    torch.testing.assert_close(logprob_R.double(), torch.stack(expected), atol=1e-4, rtol=1e-5)

    logprob_R.sum().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch.stack(expected).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, atol=1e-4, rtol=1e-3)


def tiny(kind, **settings):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    small = dict(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **small | settings)).eval()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gemma2", {"final_logit_softcapping": 2.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 4.0}),
        ("gpt2", {"n_embd": 32, "n_layer": 1, "n_head": 2}),
    ],
)
def test_heads_that_scale_or_cap_their_logits_are_followed(kind, settings):
    model = tiny(kind, **settings)
    policy = PolicyModule(model, chunk_tokens=2)
    assert not policy.own_forward
    ids_RT, attention_RT, response_RT = rows()
    expected = torch.stack([by_hand(model, ids_RT[0], 2), by_hand(model, ids_RT[1, :3], 1)])
    torch.testing.assert_close(policy(ids_RT, attention_RT, response_RT).double(), expected, atol=1e-3, rtol=1e-4)


def test_a_head_that_nobody_knows_is_left_to_the_model_itself():
    class Odd(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner, self.config = model, model.config

        def get_decoder(self):
            return self.inner.get_decoder()

        def get_output_embeddings(self):
            return self.inner.get_output_embeddings()

        def forward(self, **inputs):
            output = self.inner(**inputs)
            output.logits = output.logits * 3.0
            return output

    model = Odd(tiny("llama"))
    policy = PolicyModule(model, chunk_tokens=2)
    assert policy.own_forward
    ids_RT, attention_RT, response_RT = rows()
    expected = torch.stack([by_hand(model, ids_RT[0], 2), by_hand(model, ids_RT[1, :3], 1)])
    torch.testing.assert_close(policy(ids_RT, attention_RT, response_RT).double(), expected, atol=1e-3, rtol=1e-4)
