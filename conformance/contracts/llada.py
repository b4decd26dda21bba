"""The contract of LLaDA."""

from gaugeblock.conformance.contracts import flash_attention, language_models, model_states
from gaugeblock.conformance.engine.contract import Contract, Input, Output, Workload, row
from gaugeblock.reference.configs import DREAM_PRESETS, LLADA_PRESETS, LLaDAConfig
from gaugeblock.reference.torch import decoder
from gaugeblock.reference.torch import llada as reference


@row
def llada() -> Contract:
    """The row of `llada.llada`."""
    return Contract(
        name="llada.llada",
        summary="Predicts masked tokens, each token seeing all others.",
        formula=(
            "x = token embedding; x = x + attn_out(attention(query, key, value)) of attn_norm(x), query and key rotated; x = x + "
            "ff_out(silu(ff_proj(y)) * up_proj(y)), y = ff_norm(x); logits = ff_out(ln_f(x))"
        ),
        source="Nie et al. 2025 (arXiv:2502.09992), section 2; ML-GSAI/LLaDA",
        reference=reference.llada,
        inputs=(
            Input("state", leaves=MODEL.leaves, differentiable=True),
            Input("input_ids", language_models.IDS, dtype="int64", indexes="vocab_size"),
            Input("attention_mask", language_models.IDS, dtype="bool"),
        ),
        outputs=(Output("logits", (*language_models.IDS, "vocab_size"), differentiable=True),),
        options=("config",),
        batch="batch_size",
        landmarks=(
            MODEL.sizes(3, 7, MODEL.tiny((3, 1), hidden_size=24)),
            MODEL.sizes(1, 9, MODEL.tiny((8, 4), num_hidden_layers=1, rms_norm_eps=1e-2)),
        ),
        factors=language_models.FACTORS,
        build=MODEL.build,
        traits=language_models.MASK_TRAITS,
        regimes=MODEL.regimes(),
        rounded_as=flash_attention.of(reference.llada, decoder),
        cases=0.1,
        configure=MODEL.options,
        flops=MODEL.flops,
        moved=MODEL.moved,
        rigid=True,
        workloads=(
            Workload("llada-8b/512-tokens", MODEL.sizes(1, 512, LLADA_PRESETS["LLaDA-8B"]), "GSAI-ML/LLaDA-8B-Base"),
            Workload(
                "two-cores/llada-64-tokens",
                MODEL.sizes(1, 64, MODEL.tiny((4, 4), hidden_size=256, head_dim=64, intermediate_size=768, vocab_size=2048)),
                "a size for a CPU",
            ),
        ),
        shardings=model_states.SHARDINGS,
        rejections=MODEL.rejections(DREAM_PRESETS["Dream-7B"]),
        without=language_models.WITHOUT,
        implementations=(
            *model_states.on_one_device("llada"),
            model_states.fsdp2("llada"),
            language_models.tensor_parallel("llada"),
        ),
    )


MODEL = language_models.Model(
    config_class=LLaDAConfig,
    state_shapes=reference.state_shapes,
    pairs=language_models.all_pairs,
    also_of_tokens=("attention_mask",),
    more=language_models.padding,
)
