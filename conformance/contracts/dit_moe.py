"""The contract of DiT-MoE."""

from dataclasses import fields
from typing import Any

import torch

from gaugeblock.conformance.contracts import dit as of_dit
from gaugeblock.conformance.contracts import flash_attention, model_states
from gaugeblock.conformance.engine.contract import Contract, Input, Output, Regime, Rejection, Workload, row
from gaugeblock.conformance.engine.factors import Factor, edges, either
from gaugeblock.conformance.engine.inputs.bad_calls import changed
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference.configs import DIT_MOE_PRESETS, DiTConfig, DiTMoEConfig, DiTMoEModelConfig
from gaugeblock.reference.torch import dit_moe as model


@row
def dit_moe() -> Contract:
    """The row of `dit_moe.dit_moe`."""
    return Contract(
        name="dit_moe.dit_moe",
        summary="A DiT whose feed-forward networks are MoE layers; with the sum of the losses of their load.",
        formula=(
            "x = patches, embedded, + position table; c = embedding of timestep_scale * timesteps + class embedding; x, loss = "
            "block(x, c), depth times: attention (with layer_norm of queries and keys if qk_norm), dit_moe_layers.dit_moe, each "
            "modulated before and gated after; out = unpatchify(linear(layer_norm_modulate(x, shift, scale))), shift, scale = "
            "linear(silu(c)); auxiliary_loss = sum of the losses"
        ),
        source="Fei et al. 2024 (arXiv:2407.11633), section 2; feizc/DiT-MoE models.py, class DiT",
        reference=model.dit_moe,
        inputs=(
            Input("state", leaves=state_leaves, differentiable=True),
            Input("latents", of_dit.IMAGE, differentiable=True),
            Input("timesteps", ("batch_size",), dtype="float32"),
            Input("class_labels", ("batch_size",), dtype="int64"),
        ),
        outputs=(
            Output("out", ("batch_size", "out_channels", "input_size", "input_size"), differentiable=True),
            Output("auxiliary_loss", (), dtype="float32", differentiable=True),
        ),
        options=("config",),
        batch="batch_size",
        landmarks=(
            sizes(2, tiny_model(norm_eps=1e-2)),
            # what four ranks can share
            sizes(3, tiny_model(heads=(16, 4), depth=1, top_k=1, qk_norm=True, timestep_scale=1000.0)),
            # heads and experts of DiT-MoE-G
            sizes(1, tiny_model(heads=(88, 1), depth=1, mlp_ratio=0.5, qk_norm=True, num_experts=16)),
        ),
        factors=FACTORS,
        build=point,
        traits=of_dit.TRAITS,
        regimes=(
            Regime("dithered", dithered),
            Regime("constants", near_constants, "worst element"),
            Regime("adversarial", extreme, "worst element"),
            Regime("special", special, "worst element", differentiable=False),
        ),
        rounded_as=flash_attention.of(model.dit_moe, model),
        chooses_inside=True,
        cases=0.1,
        configure=lambda parameters: {"config": configuration(parameters)},
        flops=flops,
        moved=moved,
        rigid=True,
        workloads=(
            Workload("dit-moe-s-8e2a/256px-batch-8", sizes(8, DIT_MOE_PRESETS["DiT-MoE-S/2-8E2A"]), PUBLIC),
            Workload("dit-moe-xl-8e2a/256px-batch-4", sizes(4, DIT_MOE_PRESETS["DiT-MoE-XL/2-8E2A"]), PUBLIC),
            Workload(
                "two-cores/dit-moe-batch-2",
                sizes(2, DiTMoEModelConfig(hidden_size=192, depth=2, num_heads=3, patch_size=4)),
                "a size for a CPU: half the width of DiT_MoE_S_2",
            ),
        ),
        shardings=model_states.SHARDINGS,
        rejections=REJECTIONS,
        implementations=(
            *model_states.on_one_device("dit_moe"),
            model_states.fsdp2("dit_moe"),
            model_states.jax_sharded("sharded_dit:dit_moe", only=FITS_RANKS),
        ),
    )


FITS_RANKS = "num_heads % 4 == 0 and num_experts % 4 == 0"
PUBLIC = "feizc/DiT-MoE models.py"
OF_MODEL = tuple(each.name for each in fields(DiTMoEModelConfig) if each.name != "moe")
OF_LAYER = tuple(each.name for each in fields(DiTMoEConfig))


def configuration(parameters: Parameters) -> DiTMoEModelConfig:
    """The model at given parameters."""
    layer = DiTMoEConfig(**{name: parameters[name] for name in OF_LAYER})
    return DiTMoEModelConfig(**{name: parameters[name] for name in OF_MODEL}, moe=layer)


def state_leaves(parameters: Parameters) -> dict[str, Input]:
    """The model's parameters."""
    return model_states.leaves(model.state_shapes(configuration(parameters)))


def sizes(batch_size: int, config: DiTMoEModelConfig) -> dict[str, Any]:
    """One point of the input space."""
    of_model = {name: getattr(config, name) for name in OF_MODEL}
    return {"batch_size": batch_size, **vars(config.moe), **of_model, "out_channels": config.out_channels}


def tiny_model(
    *,
    heads: tuple[int, int] = (16, 2),
    patches: tuple[int, int] = (4, 2),
    depth: int = 2,
    mlp_ratio: float = 1.5,
    **others: Any,
) -> DiTMoEModelConfig:
    """A model small enough for an interpreter."""
    layer = DiTMoEConfig(**{name: others.pop(name) for name in OF_LAYER if name in others})
    sizes = {"in_channels": 3, "num_classes": 10, "frequency_embedding_size": 32, "num_experts": 4} | others
    (hidden_size, num_heads), (input_size, patch_size) = heads, patches
    return DiTMoEModelConfig(
        input_size=input_size,
        patch_size=patch_size,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
        moe=layer,
        **sizes,
    )


FACTORS = (
    edges("batch_size", 1, 2, 3),
    Factor(
        "heads", str, values=((16, 1), (16, 2), (16, 4), (24, 3)), of=lambda sizes: (sizes["hidden_size"], sizes["num_heads"])
    ),
    Factor("patches", str, values=((4, 4), (4, 2), (6, 2)), of=lambda sizes: (sizes["input_size"], sizes["patch_size"])),
    edges("depth", 1, 2),
    either("learn_sigma", False, True),
    either("norm_eps", 1e-6, 1e-2),
    edges("num_experts", 1, 2, 4),
    edges("num_shared_experts", 1, 2),
    edges("top_k", 1, 2, option=True),
    either("qk_norm", False, True),
    either("timestep_scale", 1.0, 1000.0),
    either("per_sample", False, True),
    either("scores", "softmax", "sigmoid"),
    either("aux_loss_alpha", 0.01, 1.0),
)


def point(batch_size: int, num_experts: int, top_k: int, **others: Any) -> dict[str, Any] | None:
    """The point with these values of the factors."""
    if top_k > num_experts:
        return None
    return sizes(batch_size, tiny_model(num_experts=num_experts, top_k=top_k, **others))


def flops(parameters: Parameters) -> float:
    """Matrix products of tokens and of what steers them, and attention; each token passes `top_k` of the routed experts."""
    config = configuration(parameters)
    attention = 4.0 * config.depth * config.num_patches**2 * config.hidden_size
    products = 0.0
    for name, shape in model.state_shapes(config).items():
        if not name.startswith(of_dit.TABLE):
            is_steering = name.startswith("t_embedder") or "adaLN" in name
            part = config.moe.top_k / config.num_experts if "moe.experts" in name else 1.0
            products += part * model_states.product_flops(shape, 1 if is_steering else config.num_patches)
    return float(parameters["batch_size"] * (attention + products))


def moved(parameters: Parameters, itemsize: int) -> float:
    """Parameters, latents and result, once each."""
    return of_dit.moved_by(configuration(parameters), model.state_shapes, parameters["batch_size"], itemsize)


def dithered(draw: Draw, parameters: Parameters) -> Tensors:
    """As of DiT, with times that the model scales to the same, and gates that are not near a tie.

    One feature of each token is that of a pixel which is not near 0, and hardly anything else moves it; all gates look at it
    first, in turns of their own. Else, in bfloat16, of 24 choices one is always near a tie.
    """
    config = configuration(parameters)
    tensors = of_dit.drawn(draw, parameters, model.state_shapes(config), around_one=("_norm.weight",))
    pixels = tensors["latents"][:, 0, :: config.patch_size, :: config.patch_size]
    pixels += pixels.sign()
    feature = chosen_by(config)
    kernel = tensors["state/x_embedder.proj.weight"][feature]
    kernel *= 0.125
    kernel[0, 0, 0] = 1.5
    turns = torch.arange(config.num_experts) - (config.num_experts - 1) / 2
    for index in range(config.depth):
        for part in ("weight", "bias"):
            steering = tensors[f"state/blocks.{index}.adaLN_modulation.1.{part}"].unflatten(0, (6, -1))[:, feature]
            steering *= 0.25
        gate = tensors[f"state/blocks.{index}.moe.gate.weight"]
        gate *= 0.25
        gate[:, feature] = turns[draw.permutation(config.num_experts)] * min(1.5, 4 / config.num_experts)
    return tensors | {"timesteps": tensors["timesteps"] / parameters["timestep_scale"]}


def near_constants(draw: Draw, parameters: Parameters) -> Tensors:
    """The first patch's variance stays near the eps of every LayerNorm; a shift takes the pixel's part in choosing experts."""
    config = configuration(parameters)
    tensors = of_dit.near_eps(dithered(draw, parameters), config)
    for index in range(config.depth):
        shifts = tensors[f"state/blocks.{index}.adaLN_modulation.1.bias"].unflatten(0, (6, -1))[3]
        shifts[chosen_by(config)] = 3.0 - 6.0 * float(draw.integers(0, 2, 1))
    return tensors


def chosen_by(config: DiTMoEModelConfig) -> int:
    """The feature by which experts are chosen, of the sines of a column that of the longest wave: nearly 0."""
    return config.hidden_size // 4 - 1


def extreme(draw: Draw, parameters: Parameters) -> Tensors:
    """Attention that picks single tokens; latents from 2^-4 to 2^4."""
    return of_dit.picking(draw, dithered(draw, parameters), parameters)


def special(draw: Draw, parameters: Parameters) -> Tensors:
    """An example with a NaN and one with an infinity."""
    return of_dit.with_bad_examples(dithered(draw, parameters))


EXPERTS = "state/blocks.0.moe.experts.down_proj"
REJECTIONS = (
    *of_dit.REJECTIONS,
    Rejection("an expert too many", EXPERTS.removeprefix("state/"), changed(EXPERTS, lambda each: torch.cat([each, each]))),
    Rejection("the config of a DiT", "config", lambda call: {"config": DiTConfig()}),
)
