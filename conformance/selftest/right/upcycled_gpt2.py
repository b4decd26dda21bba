"""Right but different upcycled GPT-2s."""

import torch
from torch.nn import functional

from gaugeblock.conformance.selftest.right.of_models import rounded
from gaugeblock.conformance.selftest.simulated.upcycled_gpt2 import TOKENS, UpcycledGpt2
from gaugeblock.conformance.selftest.variant import right


class FunctionsOfTorch(UpcycledGpt2):
    """torch's products, layer_norm, embedding and attention."""

    def product(self, inputs, matrix):
        return inputs @ matrix

    def norm(self, state, name, hidden):
        scale, shift = state[f"{name}.weight"], state[f"{name}.bias"]
        return functional.layer_norm(hidden, hidden.shape[-1:], scale, shift, self.eps())

    def attended(self, query, key, value):
        return functional.scaled_dot_product_attention(query, key, value, is_causal=True)


@right(batch_invariant=False)
class UpcycledGpt2OfTorch(FunctionsOfTorch):
    """torch's products, layer_norm, embedding and attention in float32."""

    def embed(self, state, ids):
        return functional.embedding(ids, state[TOKENS]) + super().embed({**state, TOKENS: 0 * state[TOKENS]}, ids)


@right()
class GeluAndWeightsWrittenOut(UpcycledGpt2):
    """The GELU by a sigmoid; weights as the softmax of the chosen logits; loads counted one by one."""

    def gelu(self, inner):
        return inner * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3))

    def normalized(self, chosen, probs):
        return chosen.log().softmax(-1)

    def load(self, ids):
        counts = [(ids == expert).flatten(1).sum(1) for expert in range(self.config.num_experts)]
        return torch.stack(counts, 1).double() / ids[0].numel()


@right()
class HeadByHead(UpcycledGpt2):
    """A head after the other, queries scaled; a mask that is added."""

    def attended(self, query, key, value):
        bias = torch.zeros(query.shape[2], query.shape[2]).masked_fill(~self.may_look(query.shape[2]), -torch.inf)
        heads = [
            ((each_query * self.scale(query)) @ each_key.mT + bias).softmax(-1) @ each_value
            for each_query, each_key, each_value in zip(query.unbind(1), key.unbind(1), value.unbind(1), strict=True)
        ]
        return torch.stack(heads, 1)


@right(batch_invariant=False)
class UpcycledGpt2InFloat64(FunctionsOfTorch):
    """Everything in float64, rounded once."""

    def parameters(self, state):
        return {name: tensor.double() for name, tensor in state.items()}

    def layer(self, state, hidden, noise):
        out, _, *said = super().layer(state, hidden, noise)
        return out, self.product(hidden, state["router.gate.weight"].mT), *said


@right()
class OperandsRounded(UpcycledGpt2):
    """What is multiplied outside of routers and experts is rounded to the dtype of the state; gradients are not."""

    def parameters(self, state):
        self.dtype = state[TOKENS].dtype
        return super().parameters(state)

    def heads(self, qkv):
        return tuple(rounded(each, self.dtype) for each in super().heads(qkv))


@right(dtypes=("float16", "bfloat16"), rounding="eager", batch_invariant=False)
class EveryOperationRounded(FunctionsOfTorch):
    """PyTorch in the dtype of the state, operation by operation, but for what routers compute."""

    def parameters(self, state):
        return state

    def layer(self, state, hidden, noise):
        gate = {"router.gate.weight": state["router.gate.weight"].float()}
        out, *said = super().layer({**state, **gate}, hidden.float(), noise)
        return out.to(hidden.dtype), *said

    def mlp(self, state, hidden):
        own = next(iter(state.values())).dtype
        return super().mlp(state, hidden.to(own)).to(hidden.dtype)
