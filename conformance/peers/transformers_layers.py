"""transformers' own MoE layers on trial; imported only where transformers is installed."""

from typing import Any

from torch.func import functional_call
from transformers import MixtralConfig, OlmoeConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from gaugeblock.conformance.engine.vocabulary import DTYPES
from gaugeblock.conformance.peers.peer import peer
from gaugeblock.conformance.peers.transformers import without_parameters


class TransformersBlock:
    """A sparse block; its router's results are those of the router called by itself."""

    block_class: Any
    config_class: Any

    def __call__(self, hidden_states, state, *, top_k, renormalize=True):
        experts, width, inner = state["experts.down_proj"].shape
        shared = state.get("shared_expert.up_proj.weight", state["experts.down_proj"][0].mT)
        config = self.config_class(
            hidden_size=width,
            intermediate_size=inner,
            moe_intermediate_size=inner,
            shared_expert_intermediate_size=shared.shape[0],
            num_experts=experts,
            num_local_experts=experts,
            num_experts_per_tok=top_k,
            norm_topk_prob=renormalize,
        )
        config._experts_implementation = "eager"
        block = without_parameters(self.block_class, config)
        out = functional_call(block, dict(state), hidden_states[None])[0]
        logits, _, ids = functional_call(block.gate, {"weight": state["gate.weight"]}, hidden_states)
        return out, logits.float(), ids


@peer("moe_layers.mixtral_moe", dtypes=DTYPES, rounding="eager", oracle=True, right_in=("float32",))
class TransformersMixtralBlock(TransformersBlock):
    """Mixtral's."""

    block_class, config_class = MixtralSparseMoeBlock, MixtralConfig


@peer("moe_layers.qwen3_moe", dtypes=DTYPES, rounding="eager", oracle=True, right_in=("float32",))
class TransformersQwen3Block(TransformersBlock):
    """Qwen3-MoE's."""

    block_class, config_class = Qwen3MoeSparseMoeBlock, Qwen3MoeConfig


@peer("moe_layers.qwen3_moe", dtypes=DTYPES, rounding="eager", oracle=True, right_in=("float32",))
class TransformersOlmoeBlock(TransformersBlock):
    """OLMoE's."""

    block_class, config_class = OlmoeSparseMoeBlock, OlmoeConfig


@peer("moe_layers.qwen2_moe", dtypes=DTYPES, rounding="eager", oracle=True, right_in=("float32",))
class TransformersQwen2Block(TransformersBlock):
    """Qwen2-MoE's."""

    block_class, config_class = Qwen2MoeSparseMoeBlock, Qwen2MoeConfig
