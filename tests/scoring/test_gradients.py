"""Projected LoRA gradients: those of one backward per response through PEFT's adapters and a dense projection."""

import copy

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from rayalign.errors import ConfigError
from rayalign.learner.logprobs import PolicyModule
from rayalign.learner.microbatch import pad_rows
from rayalign.rollout.weights import pack
from rayalign.scoring.config import ScorerConfig
from rayalign.scoring.gradients import _PROJECTION, NONZEROS, LoraGradients, initial_down, project
from rayalign.scoring.model import ScorerModel

DIM, RANK, SEED = 96, 3, 11


def with_adapters(model, rank=RANK):
    """PEFT's adapters, alpha = rank, so that their scale is 1."""
    return peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")).eval()


def matrices(wrapped, part):
    return [m.default.weight for name, m in wrapped.named_modules() if name.endswith(part)]


def plain(wrapped, parameters, prompts, groups):
    """One forward and one backward per response, no padding; the dense projection of the gradients."""
    parts = [project(torch.eye(p.numel()), DIM, SEED, number, _PROJECTION) for number, p in enumerate(parameters)]
    dense = torch.cat(parts)  # parameters x DIM
    policy = PolicyModule(wrapped, chunk_tokens=64)
    found = []
    for prompt, group in zip(prompts, groups, strict=True):
        for candidate in group:
            value = policy(*pad_rows([(prompt.token_ids, candidate.token_ids)])).sum()
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)])
            found.append((gradient @ dense).numpy())
    return np.stack(found)


def assert_close(found, expected):
    error = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert error.max() < 1e-4, error


def initial(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@pytest.fixture
def adapter(policy):
    """Weights version 2: adapters of which both matrices are trained."""
    wrapped = with_adapters(initial(policy))
    torch.manual_seed(5)
    state = {
        name: 0.3 * torch.randn_like(value)
        for name, value in peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False).items()
    }
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in wrapped.peft_config["default"].to_dict().items()}
    return pack(2, state, config)


def test_without_adapters_they_are_the_gradients_of_freshly_initialised_ones(policy, prompts, groups):
    scorer = ScorerModel(ScorerConfig(num_replicas=0, max_gradient_tokens=64, lora_rank=RANK), str(policy))
    found = np.concatenate(scorer.gradients(prompts, groups, dim=DIM, seed=SEED))
    wrapped = with_adapters(initial(policy))
    layers = [m for m in wrapped.modules() if isinstance(m, peft.tuners.lora.Linear)]
    with torch.no_grad():
        for number, layer in enumerate(layers):
            layer.lora_A.default.weight.copy_(initial_down(layer.get_base_layer(), RANK, SEED, number))
    assert_close(found, plain(wrapped, matrices(wrapped, "lora_B"), prompts, groups))
    of_a = torch.autograd.grad(wrapped(torch.ones(1, 3).long()).logits.sum(), matrices(wrapped, "lora_A"))
    assert not any(gradient.any() for gradient in of_a)


def test_loaded_adapters_give_the_gradients_of_both_their_matrices(policy, adapter, prompts, groups):
    scorer = ScorerModel(ScorerConfig(num_replicas=0, max_gradient_tokens=64), str(policy))
    scorer.load(adapter)
    found = np.concatenate(scorer.gradients(prompts, groups, dim=DIM, seed=SEED))
    wrapped = with_adapters(initial(policy))
    peft.set_peft_model_state_dict(wrapped, dict(adapter.tensors()))
    both = [
        getattr(m, part).default.weight
        for m in wrapped.modules()
        if isinstance(m, peft.tuners.lora.Linear)
        for part in ("lora_A", "lora_B")
    ]
    assert_close(found, plain(wrapped, both, prompts, groups))


def test_initial_down_has_the_distribution_of_pefts_initialisation(policy):
    layer = next(m for m in with_adapters(initial(policy), rank=64).modules() if isinstance(m, peft.tuners.lora.Linear))
    theirs, ours = layer.lora_A.default.weight, initial_down(layer.get_base_layer(), 64, SEED, 0)
    assert ours.shape == theirs.shape
    assert ours.abs().max() <= layer.in_features**-0.5
    assert ours.std() == pytest.approx(theirs.std().item(), rel=0.02)


def test_the_batch_a_response_is_in_changes_nothing(scorer, prompts, groups):
    together = scorer.gradients(prompts, groups, dim=DIM, seed=SEED)
    alone = scorer.gradients(prompts[3:4], [groups[3][1:2]], dim=DIM, seed=SEED)
    np.testing.assert_allclose(alone[0][0], together[3][1], rtol=1e-3, atol=1e-4 * np.abs(together[3][1]).max())


def test_the_last_token_of_a_response_counts(scorer, prompts, groups):
    from dataclasses import replace

    candidate = next(c for group in groups for c in group if len(c.token_ids) > 1)
    shorter = replace(candidate, token_ids=candidate.token_ids[:-1], logprobs=candidate.logprobs[:-1])
    full, cut = scorer.gradients(prompts[:1], [[candidate, shorter]], dim=DIM, seed=SEED)[0]
    assert np.linalg.norm(full - cut) > 0.05 * np.linalg.norm(full)


def test_the_same_call_gives_the_same_numbers_and_another_seed_others(scorer, prompts, groups):
    first, again, other = (np.stack(scorer.gradients(prompts, groups, dim=DIM, seed=s)) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


def test_gradients_leave_nothing_behind_and_weights_load_afterwards(policy, weights, adapter, prompts, groups):
    scorer = ScorerModel(ScorerConfig(num_replicas=0), str(policy))
    before = {name: value.clone() for name, value in scorer.live.model.state_dict().items()}
    logprobs = scorer.logprobs(prompts, groups)
    scorer.gradients(prompts, groups, dim=8, seed=0)
    model = scorer.live.model
    assert not any(m._forward_hooks for m in model.modules()) and not model.training
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    np.testing.assert_array_equal(np.stack(scorer.logprobs(prompts, groups)), np.stack(logprobs))
    assert scorer.load(adapter) == adapter.checksum
    scorer.gradients(prompts, groups, dim=8, seed=0)
    assert not any(p.grad is not None for p in model.parameters())
    merged = ScorerModel(ScorerConfig(num_replicas=0), str(policy))
    merged.gradients(prompts, groups, dim=8, seed=0)
    assert merged.load(weights) == weights.checksum


def test_hooks_are_gone_after_an_error(scorer, prompts, groups):
    taken = LoraGradients(scorer.live.model, rank=2, dim=8, seed=0, chunk_tokens=64)
    with pytest.raises(IndexError):
        taken(*pad_rows([((10**6,), (1,))]))
    assert not any(m._forward_hooks for m in scorer.live.model.modules())


def test_groups_may_be_empty(scorer, prompts, groups):
    found = scorer.gradients(prompts[:2], [[], groups[1][:1]], dim=DIM, seed=SEED)
    assert [g.shape for g in found] == [(0, DIM), (1, DIM)] and found[1].dtype == np.float32


def test_a_model_with_transposed_layers_and_bfloat16_weights_has_gradients_too():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()
    rows = pad_rows([((1, 2, 3), (4, 5)), ((6, 7), (8, 9, 10, 11))])
    exact, rounded = (
        LoraGradients(m.requires_grad_(False), rank=RANK, dim=DIM, seed=SEED, chunk_tokens=8)(*rows)
        for m in (model, copy.deepcopy(model).bfloat16())
    )
    cosine = torch.cosine_similarity(exact, rounded)
    assert exact.norm(dim=1).min() > 0 and 0.98 < cosine.min() < 1 - 1e-6 and rounded.dtype == torch.float32


def test_dimensions_are_checked(scorer, prompts, groups):
    with pytest.raises(ConfigError, match="dim=0 must be at least 1"):
        scorer.gradients(prompts, groups, dim=0, seed=0)


# -- the projection ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dim", [1, 3, 4, 10, 64])
def test_a_column_of_the_projection_has_one_entry_of_equal_size_per_block_and_unit_length(dim):
    dense = project(torch.eye(200), dim, 0)
    blocks = min(NONZEROS, dim)
    assert ((dense != 0).sum(dim=1) == blocks).all()
    torch.testing.assert_close(dense.norm(dim=1), torch.ones(200))
    for block in np.array_split(np.arange(dim), blocks) if dim % blocks == 0 else []:
        assert ((dense[:, block] != 0).sum(dim=1) == 1).all()


def test_projection_is_linear_and_depends_on_its_stream_alone():
    torch.manual_seed(0)
    u_RK, v_RK = torch.randn(2, 5, 300)
    torch.testing.assert_close(
        project(2 * u_RK - v_RK, 32, 7, 1), 2 * project(u_RK, 32, 7, 1) - project(v_RK, 32, 7, 1), rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(project(u_RK, 32, 7, 1), project(u_RK, 32, 7, 2))


@pytest.mark.parametrize("kind", ["dense", "periodic", "two large"])
def test_projected_products_are_unbiased_with_the_variance_of_a_johnson_lindenstrauss_matrix(kind):
    torch.manual_seed(0)
    u = {
        "dense": torch.randn(256),
        "periodic": torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0]).repeat(32),
        "two large": torch.cat([torch.full((2,), 10.0), torch.full((254,), 0.1)]),
    }[kind]
    v = u + u.norm() / 16 * torch.randn(256)
    u, v = u / u.norm(), v / v.norm()
    dim, draws = 64, 600
    pairs = torch.stack([project(torch.stack([u, v]), dim, seed) for seed in range(draws)])
    squared, product = pairs[:, 0].square().sum(1), (pairs[:, 0] * pairs[:, 1]).sum(1)
    sigma = (2 / dim / draws) ** 0.5
    assert squared.mean() == pytest.approx(1, abs=4 * sigma)
    assert product.mean() == pytest.approx(float(u @ v), abs=4 * sigma)
    assert squared.var() <= 1.3 * 2 / dim  # 600 draws estimate a variance within some 6%, heavy tails more


def test_all_distances_are_kept():
    torch.manual_seed(0)
    points = torch.randn(60, 4000)
    exact, projected = torch.pdist(points), torch.pdist(project(points, 2048, 3))
    assert ((projected / exact - 1).abs() < 0.1).all()
