"""Right but different experts beside SwiGLU."""

import torch
from torch.nn.functional import gelu, linear, silu

from gaugeblock.conformance.selftest.variant import right
from gaugeblock.reference.torch import experts


def expert_by_expert(hidden_states, weights, topk_weights, topk_ids, expert):
    """Each expert adds its weighted rows to the tokens that chose it."""
    hidden = hidden_states.float()
    total = torch.zeros_like(hidden)
    for number, own in enumerate(zip(*(each.float().unbind() for each in weights), strict=True)):
        tokens, choices = (topk_ids == number).nonzero(as_tuple=True)
        total = total.index_add(0, tokens, topk_weights[tokens, choices, None].float() * expert(hidden[tokens], *own))
    return total.to(hidden_states.dtype)


@right("experts.fused_geglu", batch_invariant=False, validates=False)
class GeluOfTheLibrary:
    """torch's own GELU, which is 0 far below 0."""

    def __call__(self, hidden_states, w13, w2, topk_weights, topk_ids, *, approximate):
        def expert(rows, first, second):
            gate, up = linear(rows, first).chunk(2, 1)
            return linear(gelu(gate, approximate=approximate) * up, second)

        return expert_by_expert(hidden_states, (w13, w2), topk_weights, topk_ids, expert)


@right("experts.fused_gelu_mlp", batch_invariant=False, validates=False)
class BiasesFirst:
    """Sums that begin with the bias, and torch's own GELU."""

    def __call__(self, hidden_states, w1, b1, w2, b2, topk_weights, topk_ids, *, approximate):
        def expert(rows, first, first_bias, second, second_bias):
            return linear(gelu(linear(rows, first, first_bias), approximate=approximate), second, second_bias)

        return expert_by_expert(hidden_states, (w1, b1, w2, b2), topk_weights, topk_ids, expert)


@right("experts.fused_swiglu_oai", batch_invariant=False, validates=False)
class SteeperSilu:
    """silu(alpha * gate) / alpha, and biases that are weighted apart from the products."""

    def __call__(self, hidden_states, w13, b13, w2, b2, topk_weights, topk_ids, *, alpha, limit):
        def expert(rows, first, first_bias, second):
            gate, up = (linear(rows, first) + first_bias).unflatten(1, (-1, 2)).unbind(2)
            return linear(silu(alpha * gate.clamp(max=limit)) / alpha * (up.clamp(-limit, limit) + 1), second)

        outs = expert_by_expert(hidden_states.float(), (w13, b13, w2), topk_weights, topk_ids, expert)
        return (outs + torch.einsum("tk,tkh->th", topk_weights.float(), b2.float()[topk_ids])).to(hidden_states.dtype)


@right("experts.shared_swiglu")
class TheOnlyExpert:
    """A routed expert that every token chooses."""

    def __call__(self, hidden_states, w13, w2):
        experts.validation.shared_swiglu(hidden_states, w13, w2)
        ids = torch.zeros(len(hidden_states), 1, dtype=torch.int64)
        return experts.fused_swiglu(hidden_states, w13[None], w2[None], torch.ones_like(ids, dtype=torch.float32), ids)


@right("experts.gated_shared_swiglu")
class GateAsWeight:
    """The gate is the weight of a routed expert that every token chooses."""

    def __call__(self, hidden_states, w13, w2, shared_gate):
        experts.validation.gated_shared_swiglu(hidden_states, w13, w2, shared_gate)
        ids = torch.zeros(len(hidden_states), 1, dtype=torch.int64)
        weights = (hidden_states.float() * shared_gate.float()).sum(1, keepdim=True).sigmoid()
        return experts.fused_swiglu(hidden_states, w13[None], w2[None], weights, ids)
