"""Losses and figures of a router's load against numbers that others computed, and where they can be told by hand."""

import math

import pytest
import torch
from test_references import assert_equal_to_rounding

from gaugeblock.optimized.triton import auxiliary_losses as triton_losses
from gaugeblock.reference.torch import auxiliary_losses

# DiT-MoE's gate in training, alpha 0.01, two sequences of two tokens; run by its own code
DIT_MOE_LOGITS = torch.tensor([[[2, 1, 0, -1], [0, 0.5, 1, 0]], [[-1, 3, 1, 2], [1, 0, 0, 2]]], dtype=torch.float64)
DIT_MOE_ALPHA, PER_SEQUENCE, PER_BATCH = 0.01, 0.01246812, 0.01068755
WRITTEN_DIGITS = 5e-9


def everywhere(logits: torch.Tensor) -> torch.Tensor:
    return torch.ones(logits.shape[:-1], dtype=torch.bool)


@pytest.mark.parametrize("module", [auxiliary_losses, triton_losses])
def test_balance_losses_are_those_of_dit_moe(module):
    ids, mask = DIT_MOE_LOGITS.topk(2).indices, everywhere(DIT_MOE_LOGITS)
    per_sequence = module.sequence_balance_loss(DIT_MOE_LOGITS, ids, mask, scores="softmax")
    assert abs(DIT_MOE_ALPHA * per_sequence - PER_SEQUENCE) <= WRITTEN_DIGITS
    per_batch = module.load_balancing_loss(*(each.flatten(0, 1) for each in (DIT_MOE_LOGITS, ids, mask)))
    assert abs(DIT_MOE_ALPHA * per_batch - PER_BATCH) <= WRITTEN_DIGITS


@pytest.mark.parametrize("module", [auxiliary_losses, triton_losses])
def test_sequence_balance_loss_of_sigmoids_told_by_hand(module):
    # sigmoids 3/4, 1/4, 1/2 of one token, two of three experts chosen: loads 3/2, 0, 3/2, and shares 1/2, 1/6, 1/3
    logits = torch.tensor([[[math.log(3), -math.log(3), 0]]], dtype=torch.float64)
    loss = module.sequence_balance_loss(logits, torch.tensor([[[0, 2]]]), everywhere(logits), scores="sigmoid")
    assert_equal_to_rounding(loss, torch.tensor(1.25, dtype=torch.float64))


def test_a_sequence_balanced_by_another_is_not_balanced():
    logits = torch.zeros(2, 4, 2, dtype=torch.float64)
    logits[0, :, 0] = logits[1, :, 1] = 100
    mask = everywhere(logits)
    ids = logits.argmax(2, keepdim=True)
    assert auxiliary_losses.sequence_balance_loss(logits, ids, mask, scores="softmax") == 2
    assert auxiliary_losses.load_balancing_loss(logits.flatten(0, 1), ids.flatten(0, 1), mask.flatten()) == 1


@pytest.mark.parametrize("module", [auxiliary_losses, triton_losses])
def test_routing_entropy_is_that_of_torch_distributions(module):
    logits = 3 * torch.randn(33, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert_equal_to_rounding(module.routing_entropy(logits, everywhere(logits)), expected)


def test_routing_entropy_lies_where_that_of_moe_emergence_may_lie():
    logits = 20 * torch.randn(33, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = logits.softmax(1)
    difference = auxiliary_losses.routing_entropy(logits, everywhere(logits)) + (p * (p + 1e-9).log()).sum(1).mean()
    assert 0 < difference <= 12e-9


def test_routing_entropy_of_the_certain_and_of_the_undecided():
    logits = torch.tensor([[0, -torch.inf, -torch.inf]], dtype=torch.float64, requires_grad=True)
    certain = auxiliary_losses.routing_entropy(logits, everywhere(logits))
    assert certain == 0 and torch.equal(torch.autograd.grad(certain, logits)[0], torch.zeros_like(logits))
    undecided = auxiliary_losses.routing_entropy(torch.zeros_like(logits), everywhere(logits))
    assert_equal_to_rounding(undecided.detach(), torch.tensor(3, dtype=torch.float64).log())


def test_expert_load_is_a_bincount_of_what_is_no_padding():
    ids = torch.randint(0, 9, (50, 3), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(50) % 4 != 1
    expected = ids[mask].flatten().bincount(minlength=12)
    assert torch.equal(auxiliary_losses.expert_load(ids, mask, num_experts=12), expected)


def test_biases_rest_at_the_mean_load_alone():
    bias, update_rate = torch.tensor([0.5, 0.5, -0.25, 0.0]), 2**-10  # exact sums
    updated = auxiliary_losses.correction_bias_update(bias, torch.tensor([4, 5, 0, 7]), update_rate=update_rate)
    assert torch.equal(updated, bias + update_rate * torch.tensor([0, -1, 1, -1]))
    # a mean of 4.25: those of 4 have less, too
    updated = auxiliary_losses.correction_bias_update(bias, torch.tensor([4, 5, 4, 4]), update_rate=update_rate)
    assert torch.equal(updated, bias + update_rate * torch.tensor([1, -1, 1, 1]))
