"""Right but different text encoders."""

import torch
from torch.nn import functional

from gaugeblock.conformance.selftest.right.of_models import rounded
from gaugeblock.conformance.selftest.simulated.clip_text import ClipText
from gaugeblock.conformance.selftest.variant import right


class FunctionsOfTorch(ClipText):
    """torch's linear, layer_norm, embedding and attention."""

    def linear(self, state, name, inputs):
        return functional.linear(inputs, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(self, state, name, hidden, config):
        scale, shift = state[f"{name}.weight"], state[f"{name}.bias"]
        return functional.layer_norm(hidden, hidden.shape[-1:], scale, shift, config.layer_norm_eps)

    def attended(self, query, key, value, may_look):
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=may_look)


@right(batch_invariant=False)
class ClipTextOfTorch(FunctionsOfTorch):
    """torch's linear, layer_norm, embedding and attention in float32."""

    def embed(self, state, ids):
        tables = (state[f"text_model.embeddings.{each}_embedding.weight"] for each in ("token", "position"))
        return sum(functional.embedding(each, table) for each, table in zip((ids, self.places(ids)), tables, strict=True))


@right()
class HeadByHead(ClipText):
    """One query, key and value matrix for all three, and a head after the other; scaled queries; an additive mask."""

    def heads(self, state, name, hidden, num_heads):
        names = [f"{name}.{each}_proj" for each in ("q", "k", "v")]
        fused = {f"{name}.{kind}": torch.cat([state[f"{each}.{kind}"] for each in names]) for kind in ("weight", "bias")}
        thirds = self.linear(fused, name, hidden).chunk(3, -1)
        return tuple(each.unflatten(-1, (num_heads, -1)).transpose(1, 2) for each in thirds)

    def attended(self, query, key, value, may_look):
        lost = ~may_look.any(-1, keepdim=True)
        bias = torch.zeros(may_look.shape).masked_fill(~(may_look | lost), -torch.inf)
        heads = [
            ((each_query / query.shape[-1] ** 0.5) @ each_key.mT + bias[:, 0]).softmax(-1) @ each_value
            for each_query, each_key, each_value in zip(query.unbind(1), key.unbind(1), value.unbind(1), strict=True)
        ]
        return torch.stack(heads, 1).masked_fill(lost, 0)


@right()
class ActivationsWrittenOut(ClipText):
    """quick-GELU as x / (1 + exp(-1.702 x)), GELU by erfc; pooled by a matrix of ones and zeros."""

    def activation(self, inner, config):
        if config.hidden_act == "quick_gelu":
            return inner / (1 + torch.exp(-1.702 * inner))
        return inner * torch.special.erfc(-inner / 2**0.5) / 2

    def pool(self, hidden, ids, config):
        marks = ids == ids.amax(1, keepdim=True) if config.eos_token_id == 2 else ids == config.eos_token_id
        is_first = marks & (marks.cumsum(1) == 1)
        return torch.where(is_first[..., None], hidden, 0).sum(1)


@right(batch_invariant=False)
class ClipTextInFloat64(FunctionsOfTorch):
    """Everything in float64, rounded once."""

    def parameters(self, state):
        return {name: tensor.double() for name, tensor in state.items()}


@right()
class OperandsRounded(ClipText):
    """What is multiplied is rounded to the dtype of the state, as tensor cores want it; gradients are not."""

    def parameters(self, state):
        self.dtype = next(iter(state.values())).dtype
        return super().parameters(state)

    def linear(self, state, name, inputs):
        return super().linear(state, name, rounded(inputs, self.dtype))

    def heads(self, state, name, hidden, num_heads):
        return tuple(rounded(each, self.dtype) for each in super().heads(state, name, hidden, num_heads))


@right(dtypes=("float16", "bfloat16"), rounding="eager", batch_invariant=False)
class EveryOperationRounded(FunctionsOfTorch):
    """PyTorch in the dtype of the state, operation by operation."""

    def parameters(self, state):
        return state

    def attended(self, query, key, value, may_look):
        lost = ~may_look.any(-1, keepdim=True)
        scores = query @ key.mT / query.shape[-1] ** 0.5
        return scores.masked_fill(~(may_look | lost), -torch.inf).softmax(-1).masked_fill(lost, 0) @ value
