"""Right ways to write layers whose experts have biases."""

import torch
from torch.nn.functional import gelu

from gaugeblock.conformance.selftest.variant import right


@right("biased_moe_layers.upcycled_gpt2_moe", validates=False, batch_invariant=False)
class ExpertAfterExpert:
    """As the public code has it: each expert that has tokens adds its weighted output to theirs."""

    def __call__(self, hidden_states, state, noise, *, top_k, noise_std, training):
        wide = {name: each.float() for name, each in state.items()}
        logits = hidden_states.float() @ wide["router.gate.weight"].mT
        clean = logits.softmax(-1)
        entropy = -(clean * (clean + 1e-9).log()).sum(-1)
        probs = (logits + noise_std * noise).softmax(-1) if training else clean
        weights, ids = probs.topk(top_k)
        if top_k > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-9)
        else:
            weights = weights - weights.detach() + 1 if training else torch.ones_like(weights)

        out = torch.zeros_like(hidden_states, dtype=torch.float32)
        for expert in ids.unique().tolist():
            tokens, places = (ids == expert).nonzero(as_tuple=True)
            fc, proj = ([wide[f"experts.{name}.{part}"][expert] for part in ("weight", "bias")] for name in ("c_fc", "c_proj"))
            inner = gelu(hidden_states[tokens].float() @ fc[0] + fc[1], approximate="tanh")
            rows = inner.to(hidden_states.dtype).float() @ proj[0] + proj[1]
            out = out.index_add(0, tokens, weights[tokens, places, None] * rows)
        load = torch.stack([(ids == expert).sum() for expert in range(logits.shape[1])]) / max(1, ids.numel())
        return out.to(hidden_states.dtype), logits, ids, probs, entropy, load
