"""Routers that choose by noisy logits: worked examples of moe-emergence, float32 on a CPU, to as many digits as were printed."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gaugeblock.optimized.triton import noisy_routers as triton_noisy_routers
from gaugeblock.reference.jax import noisy_routers as jax_noisy_routers
from gaugeblock.reference.torch import auxiliary_losses, noisy_routers

LOGITS = torch.tensor([[2, 1, 0, -1], [0, 0.5, 1, 0], [-1, 3, 1, 2]])
PROBS = [
    [0.643914, 0.236883, 0.087144, 0.032059],
    [0.157060, 0.258948, 0.426933, 0.157060],
    [0.012038, 0.657233, 0.088947, 0.241783],
]
ENTROPY = [0.947537, 1.294722, 0.887543]
SIX_DIGITS = {"rtol": 0, "atol": 0.6e-6}  # of what was printed, and float32's own rounding
EVERY = (1, 2, 3, 4)


def in_jax(router_logits, noise, **options):
    outputs = jax_noisy_routers.ste_topk(jnp.asarray(router_logits.detach().numpy()), jnp.asarray(noise.numpy()), **options)
    return [torch.from_numpy(np.array(each)) for each in outputs]


FORWARD = pytest.mark.parametrize(
    "ste_topk", [noisy_routers.ste_topk, in_jax, triton_noisy_routers.ste_topk], ids=["torch", "jax", "triton"]
)
BACKWARD = pytest.mark.parametrize("ste_topk", [noisy_routers.ste_topk, triton_noisy_routers.ste_topk], ids=["torch", "triton"])


def assert_printed(actual, printed):
    torch.testing.assert_close(actual.detach(), torch.tensor(printed), **SIX_DIGITS)


def gradient(ste_topk, of_weights, **options):
    logits = LOGITS.clone().requires_grad_()
    weights = ste_topk(logits, torch.zeros_like(LOGITS), noise_std=0.0, **options)[0]
    return torch.autograd.grad(weights, logits, of_weights)[0]


@FORWARD
@pytest.mark.parametrize("training", [False, True])
def test_one_expert_of_the_example_weighs_just_1(ste_topk, training):
    weights, ids, probs, probs_clean, logits, entropy = ste_topk(
        LOGITS, torch.zeros_like(LOGITS), top_k=1, noise_std=0.0, training=training
    )
    assert weights.tolist() == [[1.0], [1.0], [1.0]] and ids.tolist() == [[0], [2], [1]]
    assert_printed(probs, PROBS)
    assert_printed(probs_clean, PROBS)
    assert_printed(entropy, ENTROPY)
    assert torch.equal(logits, LOGITS)


@FORWARD
@pytest.mark.parametrize("training", [False, True])
def test_two_experts_of_the_example_share_what_is_chosen(ste_topk, training):
    weights, ids, *_ = ste_topk(LOGITS, torch.zeros_like(LOGITS), top_k=2, noise_std=0.0, training=training)
    assert ids.tolist() == [[0, 1], [2, 1], [1, 3]]
    assert_printed(weights, [[0.731059, 0.268941], [0.622459, 0.377541], [0.731059, 0.268941]])


@BACKWARD
def test_gradients_of_the_example_go_straight_through(ste_topk):
    printed = [[0.229289, -0.152532, -0.056113, -0.020643], [-0.134108, -0.221107, 0.489322, -0.134108],
               [0.007912, -0.225278, 0.058459, 0.158907]]  # fmt: skip
    assert_printed(gradient(ste_topk, torch.tensor([[1.0], [2.0], [-1.0]]), top_k=1, training=True), printed)


@BACKWARD
@pytest.mark.parametrize("training", [False, True])
def test_gradients_of_two_experts_leave_the_others_alone(ste_topk, training):
    of_weights = torch.tensor([[1.0, 0.5], [0.0, 0.0], [0.0, 0.0]])
    assert_printed(gradient(ste_topk, of_weights, top_k=2, training=training)[0], [0.098306, -0.098306, 0.0, 0.0])


@BACKWARD
def test_one_expert_has_no_gradient_outside_of_training(ste_topk):
    logits = LOGITS.clone().requires_grad_()
    weights = ste_topk(logits, torch.zeros_like(LOGITS), top_k=1, noise_std=0.1, training=False)[0]
    assert not weights.requires_grad or not torch.autograd.grad(weights.sum(), logits)[0].any()


@FORWARD
def test_noise_of_the_example_chooses_another_expert_and_changes_no_clean_figure(ste_topk):
    noise = torch.tensor([[0.0, 8, 0, 0]])
    _, ids, probs, probs_clean, logits, entropy = ste_topk(LOGITS[1:2], noise, top_k=1, noise_std=0.075, training=True)
    assert ids.tolist() == [[1]] and torch.equal(logits, LOGITS[1:2])
    assert_printed(probs, [[0.129493, 0.389017, 0.351997, 0.129493]])
    assert_printed(probs_clean, PROBS[1:2])
    assert_printed(entropy, ENTROPY[1:2])


@FORWARD
@pytest.mark.parametrize(("noise_std", "training"), [(0.0, True), (1.0, False)])
def test_noise_of_no_deviation_or_outside_of_training_is_none(ste_topk, noise_std, training):
    noise = torch.full_like(LOGITS, 3.0).tril()
    noisy = ste_topk(LOGITS, noise, top_k=2, noise_std=noise_std, training=training)
    silent = ste_topk(LOGITS, torch.zeros_like(LOGITS), top_k=2, noise_std=0.0, training=False)
    assert all(map(torch.equal, noisy, silent)) and torch.equal(noisy[2], noisy[3])


def test_losses_of_the_example_follow_from_what_is_returned():
    everyone = torch.ones(len(LOGITS), dtype=torch.bool)
    for top_k, balance in ((1, 1.141822), (2, 1.179139)):
        _, ids, _, _, logits, _ = noisy_routers.ste_topk(
            LOGITS, torch.zeros_like(LOGITS), top_k=top_k, noise_std=0.0, training=True
        )
        assert_printed(auxiliary_losses.load_balancing_loss(logits, ids, everyone), balance)
        torch.testing.assert_close(auxiliary_losses.router_z_loss(logits, everyone), torch.tensor(7.025221), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("probs", "ids", "balance"),
    [
        ([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]], [[0], [0], [1], [2]], 1.0125),
        ([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]], [[0, 1], [0, 1], [1, 0], [2, 0]], 1.06875),
        ([[0.51, 0.49]] * 6 + [[0.0, 1.0]] * 4, [[0]] * 6 + [[1]] * 4, 0.9224),  # 1 is no bound from below
    ],
)
def test_balance_of_the_example(probs, ids, balance):
    everyone = torch.ones(len(ids), dtype=torch.bool)
    assert_printed(auxiliary_losses.load_balancing_loss(torch.tensor(probs).log(), torch.tensor(ids), everyone), balance)


def test_z_loss_of_zeros():
    assert_printed(auxiliary_losses.router_z_loss(torch.zeros(5, 8), torch.ones(5, dtype=torch.bool)), 4.324077)


@BACKWARD
def test_every_result_hands_its_gradient_on(ste_topk):
    generator = torch.Generator().manual_seed(0)
    logits, noise = (torch.randn(5, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    noise.requires_grad_()
    for place in (0, 2, 3, 4, 5):
        leaf = logits.clone().requires_grad_()
        output = ste_topk(leaf, noise, top_k=2, noise_std=0.5, training=True)[place]
        cotangent = torch.randn(output.shape, dtype=torch.float64, generator=generator)
        grads = torch.autograd.grad((output * cotangent).sum(), (leaf, noise), allow_unused=True)
        assert grads[0].any() and grads[1] is None


@BACKWARD
def test_z_loss_reaches_the_logits_through_those_that_are_returned(ste_topk):
    everyone, logits = torch.ones(len(LOGITS), dtype=torch.bool), LOGITS.clone().requires_grad_()
    returned = ste_topk(logits, torch.ones_like(LOGITS), top_k=1, noise_std=0.1, training=True)[4]
    through, direct = (
        torch.autograd.grad(auxiliary_losses.router_z_loss(each, everyone), logits)[0] for each in (returned, logits)
    )
    assert torch.equal(through, direct)


@FORWARD
@pytest.mark.parametrize(
    "laid_out", [lambda x: x, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)], ids=["whole", "not"]
)
def test_a_batch_of_sequences_is_a_batch_of_tokens(ste_topk, laid_out):
    generator = torch.Generator().manual_seed(1)
    logits, noise = (torch.randn(3, 5, 6, generator=generator) for _ in range(2))
    options = {"top_k": 2, "noise_std": 0.3, "training": True}
    flat = ste_topk(logits.reshape(15, 6), noise.reshape(15, 6), **options)
    of_sequences = ste_topk(laid_out(logits), laid_out(noise), **options)
    assert all(map(torch.equal, of_sequences, flat))
    assert [tuple(each.shape) for each in of_sequences] == [(15, 2), (15, 2), (15, 6), (15, 6), (15, 6), (15,)]


@FORWARD
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"router_logits": torch.zeros(4)}, r"^router_logits must be \[num_tokens, num_experts\], got \(4,\)"),
        ({"router_logits": torch.zeros(1, 1, 3, 4)}, r"^router_logits must be .*, got \(1, 1, 3, 4\)"),
        ({"router_logits": torch.zeros(1, 3, 4)}, r"^noise must have the shape of router_logits, \(1, 3, 4\), got \(3, 4\)"),
        ({"noise_std": -0.1}, r"^noise_std must be 0 or more, got -0.1"),
        ({"top_k": 5}, r"^top_k must be in 1\.\.num_experts=4, got 5"),
    ],
)
def test_a_bad_call_of_ste_topk_names_its_argument(ste_topk, bad, message):
    call = {"router_logits": LOGITS, "noise": LOGITS, "top_k": 1, "noise_std": 0.1, "training": True}
    with pytest.raises(ValueError, match=message):
        ste_topk(**call | bad)


SCHEDULES = pytest.mark.parametrize(
    "noise_std_at", [noisy_routers.noise_std_at, jax_noisy_routers.noise_std_at], ids=["torch", "jax"]
)


@SCHEDULES
@pytest.mark.parametrize(
    ("total_steps", "step", "deviation"),
    [(10000, 0, 0.1), (10000, 1, 0.09996), (10000, 625, 0.075), (10000, 1250, 0.05), (10000, 2499, 4e-5), (100, 12, 0.052),
     (100, 24, 0.004)],
)  # fmt: skip
def test_noise_falls_on_a_line(noise_std_at, total_steps, step, deviation):
    assert math.isclose(noise_std_at(step, total_steps, 0.25, 0.1), deviation, rel_tol=1e-12)


@SCHEDULES
def test_there_is_no_noise_after_the_annealing(noise_std_at):
    assert [noise_std_at(step, 10000, 0.25, 0.1) for step in (2500, 2501, 10000)] == [0.0] * 3
    assert noise_std_at(0, 3, 0.25, 0.1) == 0.0  # int(0.75) steps have noise
    assert noise_std_at(27, 100, 0.29, 0.1) > 0.0 == noise_std_at(28, 100, 0.29, 0.1)  # int(28.999999999999996)


@SCHEDULES
@pytest.mark.parametrize(
    ("bad", "error"),
    [({"step": -1}, ValueError), ({"step": 0.5}, TypeError), ({"total_steps": -1}, ValueError),
     ({"anneal_fraction": 1.5}, ValueError), ({"anneal_fraction": -0.5}, ValueError), ({"noise_std": -1.0}, ValueError),
     ({"noise_std": "1"}, TypeError)],
)  # fmt: skip
def test_a_bad_call_of_the_schedule_names_its_argument(noise_std_at, bad, error):
    call = {"step": 0, "total_steps": 100, "anneal_fraction": 0.25, "noise_std": 0.1}
    with pytest.raises(error, match=f"^{next(iter(bad))} must be "):
        noise_std_at(**call | bad)


def by_hand(logits, noise_logits, noise, top_k):
    """Equations 3 to 5, number by number."""
    noisy = [x + n * math.log(1 + math.exp(s)) for x, s, n in zip(logits, noise_logits, noise, strict=True)]
    ids = sorted(range(len(noisy)), key=lambda expert: -noisy[expert])[:top_k]
    total = sum(math.exp(noisy[expert]) for expert in ids)
    return [math.exp(noisy[expert]) / total for expert in ids], ids


@pytest.mark.parametrize("top_k", EVERY)
def test_noisy_topk_is_equations_3_to_5(top_k):
    generator = torch.Generator().manual_seed(2)
    arrays = [torch.randn(9, 4, dtype=torch.float64, generator=generator) for _ in range(3)]
    weights, ids = noisy_routers.noisy_topk(*arrays, top_k=top_k)
    for row in range(9):
        expected_weights, expected_ids = by_hand(*(each[row].tolist() for each in arrays), top_k)
        assert ids[row].tolist() == expected_ids
        np.testing.assert_allclose(weights[row], expected_weights, rtol=1e-12)  # of float64; sums run in another order


def test_noise_of_noisy_topk_gets_no_gradient():
    generator = torch.Generator().manual_seed(3)
    arrays = [torch.randn(4, 3, generator=generator).requires_grad_() for _ in range(3)]
    for module in (noisy_routers, triton_noisy_routers):
        weights = module.noisy_topk(*arrays, top_k=2)[0]
        grads = torch.autograd.grad((weights * torch.rand(weights.shape)).sum(), arrays, allow_unused=True)
        assert grads[0].any() and grads[1].any() and grads[2] is None
    in_jax = jax.grad(lambda *given: jax_noisy_routers.noisy_topk(*given, top_k=2)[0][:, 0].sum(), argnums=2)
    assert not np.any(in_jax(*(jnp.asarray(each.detach().numpy()) for each in arrays)))
