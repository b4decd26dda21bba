"""Right but different language models."""

import torch
from torch.nn import functional

from gaugeblock.conformance.selftest.right.of_models import rounded
from gaugeblock.conformance.selftest.simulated import language_models as simulated
from gaugeblock.conformance.selftest.variant import right


class FunctionsOfTorch(simulated.Decoder):
    """torch's linear, rms_norm, embedding and attention."""

    def linear(self, state, name, inputs):
        return functional.linear(inputs, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(self, state, name, hidden, config):
        return functional.rms_norm(hidden, hidden.shape[-1:], state[f"{name}.weight"], config.rms_norm_eps)

    def embed(self, state, ids):
        return functional.embedding(ids.long(), state["model.embed_tokens.weight"])

    def shared(self, heads, config):
        return heads

    def attended(self, query, key, value, may_look):
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=may_look, enable_gqa=True)

    def products(self, inputs, matrices):
        return (inputs[..., None, :] @ matrices.mT)[..., 0, :]


class InFloat64(FunctionsOfTorch):
    """Everything in float64, rounded once."""

    def parameters(self, state):
        return {name: tensor.double() for name, tensor in state.items()}


class GroupByGroup(simulated.Decoder):
    """Queries of one head of keys side by side; a rotation of complex numbers; an additive mask."""

    def rotated(self, heads, angles):
        x, y = heads.chunk(2, -1)
        turned = torch.complex(x, y) * torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
        return torch.cat([turned.real, turned.imag], -1)

    def shared(self, heads, config):
        return heads

    def attended(self, query, key, value, may_look):
        lost = ~may_look.any(-1, keepdim=True)
        bias = torch.zeros(may_look.shape).masked_fill(~(may_look | lost), -torch.inf)
        grouped = query.unflatten(1, (key.shape[1], -1))
        scores = grouped @ key[:, :, None].mT / query.shape[-1] ** 0.5 + bias[:, None]
        return (scores.softmax(-1) @ value[:, :, None]).flatten(1, 2).masked_fill(lost, 0)


class OperandsRounded(simulated.Decoder):
    """What is multiplied is rounded to the dtype of the state, as tensor cores want it; gradients are not."""

    def parameters(self, state):
        self.dtype = next(iter(state.values())).dtype
        return super().parameters(state)

    def linear(self, state, name, inputs):
        own = inputs if name.endswith("mlp.gate") else rounded(inputs, self.dtype)  # a router's stays float32
        return super().linear(state, name, own)


class EveryOperationRounded(FunctionsOfTorch):
    """PyTorch in the dtype of the state, operation by operation; of attention, and of routers in float32."""

    def parameters(self, state):
        return dict(state)

    def linear(self, state, name, inputs):
        if name.endswith("mlp.gate"):
            return functional.linear(inputs.float(), state[f"{name}.weight"].float())
        return super().linear(state, name, inputs)

    def experts(self, state, name, hidden, config):
        out, logits = super().experts(state, name, hidden, config)
        return out.to(hidden.dtype), logits


@right(batch_invariant=False)
class LladaOfTorch(FunctionsOfTorch, simulated.Llada):
    """torch's functions in float32."""


@right(batch_invariant=False)
class DreamInFloat64(InFloat64, simulated.Dream):
    """Everything in float64, rounded once."""


@right()
class LladaGroupByGroup(GroupByGroup, simulated.Llada):
    """Queries of one head of keys side by side; a rotation of complex numbers; an additive mask."""


@right()
class DreamRounded(OperandsRounded, simulated.Dream):
    """What is multiplied is rounded to the dtype of the state."""


@right(batch_invariant=False)
class SdarOfTorch(FunctionsOfTorch, simulated.Sdar):
    """torch's functions in float32."""


@right()
class SdarGroupByGroup(GroupByGroup, simulated.Sdar):
    """Queries of one head of keys side by side; a rotation of complex numbers; an additive mask."""


@right(dtypes=("float16", "bfloat16"), rounding="eager", batch_invariant=False)
class SdarRoundedEverywhere(EveryOperationRounded, simulated.Sdar):
    """PyTorch in the dtype of the state, operation by operation."""


@right(batch_invariant=False)
class SdarMoeOfTorch(FunctionsOfTorch, simulated.SdarMoe):
    """torch's functions in float32, every expert of every token."""


@right(dtypes=("float16", "bfloat16"), rounding="eager", batch_invariant=False)
class SdarMoeRoundedEverywhere(EveryOperationRounded, simulated.SdarMoe):
    """PyTorch in the dtype of the state, operation by operation."""


@right(batch_invariant=False)
class SdarCachedInFloat64(InFloat64, simulated.SdarCached):
    """Everything in float64, rounded once."""


@right()
class SdarCachedRounded(OperandsRounded, simulated.SdarCached):
    """What is multiplied is rounded to the dtype of the state."""


@right(batch_invariant=False)
class SdarTrainingOfTorch(FunctionsOfTorch, simulated.SdarTraining):
    """torch's functions in float32."""


@right()
class SdarTrainingGroupByGroup(GroupByGroup, simulated.SdarTraining):
    """Queries of one head of keys side by side; a rotation of complex numbers; an additive mask."""
