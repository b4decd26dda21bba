"""The MoE layer of DiT-MoE: worked numbers of the public code, its loss, checkpoints, and its options."""

from dataclasses import replace

import pytest
import torch

from gaugeblock.reference.configs import DiTMoEConfig
from gaugeblock.reference.expert_layouts import ExpertWeights, from_w13, to_w13
from gaugeblock.reference.torch import dit_moe_layers
from gaugeblock.reference.torch.auxiliary_losses import load_balancing_loss

PRINTED = {"rtol": 0, "atol": 1e-6}  # of numbers with six or seven decimals
DIGITS = {"rtol": 1e-12, "atol": 1e-14}
PUBLIC = DiTMoEConfig()
LOGITS = torch.tensor([[2, 1, 0, -1], [0, 0.5, 1, 0], [-1, 3, 1, 2], [1, 0, 0, 2]], dtype=torch.float64)
EYE = torch.eye(2, dtype=torch.float64)
STATE = {
    "gate.weight": torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=torch.float64),
    "experts.gate_up_proj": torch.stack([torch.cat([(expert + 1) * EYE, EYE]) for expert in range(3)]),
    "experts.down_proj": torch.stack([EYE] * 3),
    "shared_experts.gate_proj.weight": torch.cat([EYE, EYE]),
    "shared_experts.up_proj.weight": torch.cat([EYE, EYE]),
    "shared_experts.down_proj.weight": torch.cat([EYE, EYE], 1) / 2,
}
TOKENS = torch.tensor([[[1, 2], [-1, 0.5]]], dtype=torch.float64)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def losses(logits: torch.Tensor, config: DiTMoEConfig, samples: int) -> torch.Tensor:
    """Of logits `[T, E]` of so many samples."""
    ids = dit_moe_layers.gate(logits, config)[1]
    return dit_moe_layers.balance_loss(logits.unflatten(0, (samples, -1)), ids.unflatten(0, (samples, -1)), config)


def test_weights_are_probabilities_as_they_are():
    weights, ids = dit_moe_layers.gate(LOGITS, PUBLIC)
    expected = [[0.643914, 0.236883], [0.426933, 0.258948], [0.657233, 0.241783], [0.610296, 0.224515]]
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), **PRINTED)
    assert ids.tolist() == [[0, 1], [2, 1], [1, 3], [3, 0]]


@pytest.mark.parametrize(("per_sample", "expected"), [(False, 0.01068755), (True, 0.01246812)])
def test_losses_of_the_batch_and_of_each_sample(per_sample, expected):
    loss = losses(LOGITS, replace(PUBLIC, per_sample=per_sample), 2)
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), **PRINTED)


def test_a_layer_by_hand():
    out, logits, ids, loss = dit_moe_layers.dit_moe(TOKENS, STATE, config=PUBLIC)
    expected = [[[3.063245, 13.408955], [0.451685, 0.527144]]]
    torch.testing.assert_close(out, torch.tensor(expected, dtype=torch.float64), **PRINTED)
    assert logits.tolist() == [[[1, 2, 3], [-1, 0.5, -0.5]]]
    assert ids.tolist() == [[[2, 1], [1, 2]]]
    torch.testing.assert_close(loss, torch.tensor(0.01327294, dtype=torch.float64), **PRINTED)


def test_of_one_sample_both_losses_are_one_and_that_of_switch():
    per_sample = losses(LOGITS, replace(PUBLIC, per_sample=True), 1)
    assert torch.equal(per_sample, losses(LOGITS, PUBLIC, 1))
    ids = dit_moe_layers.gate(LOGITS, PUBLIC)[1]
    of_switch = 0.01 * load_balancing_loss(LOGITS, ids, torch.ones(4, dtype=torch.bool))
    torch.testing.assert_close(per_sample, of_switch, **DIGITS)


def test_the_loss_is_alpha_where_all_experts_have_the_same_load():
    even = torch.eye(4, dtype=torch.float64)  # each expert is the choice of one token
    torch.testing.assert_close(losses(even, replace(PUBLIC, top_k=1), 2), torch.tensor(0.01, dtype=torch.float64), **DIGITS)


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_the_loss_added_with_the_factor_one_gives_the_public_gradient_whatever_scales_the_other(scale):
    """The public code sends a gradient of 1 to the loss on the way back from the layer's output."""

    class AddLoss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, out, loss):
            return out.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient, torch.ones((), dtype=torch.float64)

    def gradient(reported):
        gate = STATE["gate.weight"].clone().requires_grad_()
        out, _, _, loss = dit_moe_layers.dit_moe(TOKENS, STATE | {"gate.weight": gate}, config=PUBLIC)
        reported(out, loss).backward()
        return gate.grad

    theirs = gradient(lambda out, loss: scale * AddLoss.apply(out, loss).square().sum())
    ours = gradient(lambda out, loss: scale * out.square().sum() + loss)
    torch.testing.assert_close(ours, theirs, **DIGITS)
    of_loss, of_output = gradient(lambda out, loss: loss), gradient(lambda out, loss: scale * out.square().sum())
    rounding = 64 * torch.finfo(torch.float64).eps * float(of_output.abs().max())  # of sums that are subtracted: tens of terms
    torch.testing.assert_close(ours - of_output, of_loss, rtol=0, atol=rounding)
    assert of_loss.norm() > 1e-4


def public_checkpoint(experts: int = 3, width: int = 6, inner: int = 10, shared: int = 4) -> dict[str, torch.Tensor]:
    """A layer as it lies in a checkpoint of DiT-MoE."""
    shapes = {"gate.weight": (experts, width)}
    of_experts = {f"experts.{number}": inner for number in range(experts)}
    for name, rows in {**of_experts, "shared_experts": shared}.items():
        shapes |= {f"{name}.{half}_proj.weight": (rows, width) for half in ("gate", "up")}
        shapes |= {f"{name}.down_proj.weight": (width, rows)}
    return {f"blocks.0.moe.{name}": draw(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}


def test_a_public_checkpoint_goes_in_and_out_exactly():
    public, prefix, experts = public_checkpoint(), "blocks.0.moe.", "blocks.0.moe.experts."
    ours = to_w13(public, "linear", prefix=experts, num_experts=3)
    others = {name.removeprefix(prefix): each for name, each in public.items() if not name.startswith(experts)}
    state = others | {"experts.gate_up_proj": ours.w13, "experts.down_proj": ours.w2}
    tokens = draw(2, 5, 6, seed=99)
    out, logits, ids, _ = dit_moe_layers.dit_moe(tokens, state, config=PUBLIC)

    def swiglu(name, x):
        gate, up, down = (public[f"{prefix}{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        return down @ (torch.nn.functional.silu(gate @ x) * (up @ x))

    probabilities = logits.softmax(-1)
    for place in ((0, 0), (1, 4)):
        chosen = sum(probabilities[place][expert] * swiglu(f"experts.{expert}", tokens[place]) for expert in ids[place].tolist())
        torch.testing.assert_close(out[place], chosen + swiglu("shared_experts", tokens[place]), **DIGITS)

    weights = ExpertWeights(state.pop("experts.gate_up_proj"), state.pop("experts.down_proj"))
    back = {prefix + name: each for name, each in state.items()} | from_w13(weights, "linear", prefix=experts)
    assert back.keys() == public.keys() and all(torch.equal(back[name], public[name]) for name in public)


def test_a_group_is_as_good_as_its_best_expert():
    logits = torch.tensor([[5.0, -5.0, 4.0, 4.0]], dtype=torch.float64)
    weights, ids = dit_moe_layers.gate(logits, DiTMoEConfig(num_groups=2, topk_groups=1, scores="sigmoid"))
    assert ids.tolist() == [[0, 1]]
    torch.testing.assert_close(weights, logits[:, :2].sigmoid(), **DIGITS)


def test_the_factor_multiplies_renormalized_weights_too():
    config = DiTMoEConfig(renormalize=True, routed_scaling_factor=2.5, scores="sigmoid")
    weights, _ = dit_moe_layers.gate(LOGITS, config)
    torch.testing.assert_close(weights.sum(1), torch.full((4,), 2.5, dtype=torch.float64), **DIGITS)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("top_k", 0, "must be positive, got 0"),
        ("num_groups", 0, "must be positive, got 0"),
        ("topk_groups", 0, "must be positive, got 0"),
        ("topk_groups", 2, "must be in 1..num_groups=1, got 2"),
        ("scores", "tanh", "must be 'sigmoid' or 'softmax', got 'tanh'"),
        ("aux_loss_alpha", -0.1, "must be finite and not negative, got -0.1"),
        ("aux_loss_alpha", float("inf"), "must be finite and not negative, got inf"),
        ("routed_scaling_factor", float("nan"), "must be finite, got nan"),
    ],
)
def test_a_bad_option_is_named(name, value, message):
    with pytest.raises(ValueError, match=f"^{name} {message}"):
        DiTMoEConfig(**{name: value})


def test_options_of_another_kind_are_refused():
    with pytest.raises(TypeError, match="config must be a DiTMoEConfig, got dict"):
        dit_moe_layers.dit_moe(TOKENS, STATE, config={"top_k": 2})
