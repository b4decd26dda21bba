"""transformers' layer that is DiT-MoE's, and its loss, on trial; imported only where transformers is installed."""

import torch
from torch.func import functional_call
from transformers import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from gaugeblock.conformance.engine.vocabulary import DTYPES
from gaugeblock.conformance.peers.peer import peer
from gaugeblock.conformance.peers.transformers import sorted_by, without_parameters

DEEPSEEK_V2S = "scores == 'softmax' and not renormalize and topk_groups == num_groups"  # the loss chooses from all experts


@peer("dit_moe_layers.dit_moe", dtypes=DTYPES, rounding="eager", oracle=True, right_in=("float32",), only=DEEPSEEK_V2S)
class TransformersDeepseekV2AndLoss:
    """DeepSeek-V2's, whose router does not sort; the loss is Mixtral's, which is top_k times ours."""

    def __call__(self, hidden_states, state, *, config):
        experts, width, inner = state["experts.down_proj"].shape
        theirs = DeepseekV2Config(
            hidden_size=width, moe_intermediate_size=inner, n_routed_experts=experts, n_shared_experts=1, num_attention_heads=1,
            num_experts_per_tok=config.top_k, n_group=config.num_groups, topk_group=config.topk_groups,
            topk_method="group_limited_greedy", routed_scaling_factor=config.routed_scaling_factor,
        )  # fmt: skip
        theirs._experts_implementation = "eager"
        block = without_parameters(DeepseekV2Moe, theirs)
        out = functional_call(block, dict(state), hidden_states)
        logits, weights, ids = functional_call(block.gate, {"weight": state["gate.weight"]}, hidden_states)
        ids = sorted_by(logits, weights, ids)[1]
        samples = logits.reshape(*hidden_states.shape[:2], experts) if config.per_sample else logits[None]
        losses = [load_balancing_loss_func((each,), experts, config.top_k) for each in samples]
        loss = config.aux_loss_alpha / config.top_k * torch.stack(losses).mean()
        logits, ids = (each.reshape(*hidden_states.shape[:2], each.shape[1]) for each in (logits, ids))
        return out, logits.float(), ids, loss
