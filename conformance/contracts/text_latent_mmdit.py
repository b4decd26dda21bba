"""The contract of the text-latent MMDiT."""

from dataclasses import fields, replace
from typing import Any

import torch
from hypothesis import strategies as st

from gaugeblock.conformance.contracts import flash_attention, model_states
from gaugeblock.conformance.engine.contract import Contract, Input, Output, Regime, Rejection, Workload, row
from gaugeblock.conformance.engine.factors import Factor, Trait, edges, either
from gaugeblock.conformance.engine.inputs.bad_calls import changed
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference.configs import TEXT_LATENT_MMDIT_PRESETS, TextLatentMMDiTConfig
from gaugeblock.reference.torch import text_latent_mmdit as model


@row
def text_latent_mmdit() -> Contract:
    """The row of `text_latent_mmdit.text_latent_mmdit`."""
    return Contract(
        name="text_latent_mmdit.text_latent_mmdit",
        summary="A transformer on the tokens of a text and one latent vector, in several residual streams, with a time for each.",
        formula=(
            "x = token embedding + position embedding; y = projection(latent) + position embedding; c = combine(both times); "
            "x, y = block(x, y, c) in num_residual_streams streams, n_blocks times, summed up; text_logits = "
            "text_head(rms_norm(x)); latent_pred = latent_head(rms_norm(y)); cluster_logits = text_head_clusters(rms_norm(x))"
        ),
        source="LGDLM latentDLM_mmdit/models/multimodal_mmdit.py on mmdit 0.3.0; Xie et al. 2025 (arXiv:2512.24880), section 4",
        reference=model.text_latent_mmdit,
        inputs=(
            Input("state", leaves=state_leaves, differentiable=True),
            Input("text_tokens", ("batch_size", "num_tokens"), dtype="int64", indexes="vocab_size"),
            Input("latents", ("batch_size", "latent_dim"), differentiable=True),
            Input("text_timesteps", ("batch_size",), dtype="float32"),
            Input("latent_timesteps", ("batch_size",), dtype="float32"),
            Input("attention_mask", ("batch_size", "num_tokens"), dtype="bool"),
        ),
        outputs=(
            Output("text_logits", ("batch_size", "num_tokens", "vocab_size"), differentiable=True),
            Output("latent_pred", ("batch_size", 1, "latent_dim"), differentiable=True),
            Output("cluster_logits", ("batch_size", "num_tokens", "cluster_logits_size"), differentiable=True),
        ),
        options=("config",),
        batch="batch_size",
        parameters=parameters,
        landmarks=(
            sizes(3, 7, tiny_model(cluster_size=3)),
            # the least, since with a budget of gradients each block of four connections, of twenty rounds each, takes seconds
            sizes(2, 5, tiny_model(20, num_residual_streams=4, n_blocks=1)),
            sizes(1, 9, tiny_model(40, n_blocks=1, num_residual_streams=3)),
        ),
        factors=FACTORS,
        build=point,
        traits=TRAITS,
        regimes=(
            Regime("dithered", dithered),
            Regime("constants", near_constants, "worst element"),
            Regime("adversarial", extreme, "worst element"),
            Regime("special", special, "worst element", differentiable=False),
        ),
        rounded_as=flash_attention.of(model.text_latent_mmdit, model),
        cases=0.05,  # a budget with the gradients of all parameters takes seconds
        configure=lambda parameters: {"config": configuration(parameters)},
        flops=flops,
        moved=moved,
        rigid=True,
        workloads=(
            Workload(
                "cluster/batch-4", sizes(4, 4096, TEXT_LATENT_MMDIT_PRESETS["cluster"]), "LGDLM, configuration of the cluster"
            ),
            Workload(
                "two-cores/smoke", sizes(2, 128, TEXT_LATENT_MMDIT_PRESETS["smoke"]), "LGDLM, configuration of the smoke test"
            ),
        ),
        shardings=model_states.SHARDINGS,
        rejections=REJECTIONS,
        implementations=(
            *model_states.on_one_device("text_latent_mmdit"),
            model_states.fsdp2("text_latent_mmdit"),
        ),
    )


TABLES = ("token_embed", "position_embed")
NORM_SCALES = ("projection.1.weight", "mmdit.norms")
OF_LATENT = ("latent_encoder", "latent_head", "joint_attn.to_qkv.1", "joint_attn.to_out.1", "feedforwards.1")
STEERING = ("conditioning", "to_cond", "to_post_branch_gammas")
ENDS_OF_BRANCHES = ("joint_attn.to_out", "ff.2", "projection.3")
FIRST = "mmdit.blocks.0"


def configuration(parameters: Parameters) -> TextLatentMMDiTConfig:
    """The model at given parameters."""
    return TextLatentMMDiTConfig(**{field.name: parameters[field.name] for field in fields(TextLatentMMDiTConfig)})


def state_leaves(parameters: Parameters) -> dict[str, Input]:
    """The model's parameters."""
    return model_states.leaves(model.state_shapes(configuration(parameters)))


def flops(parameters: Parameters) -> float:
    """Matrix products of the text's tokens, of the latent and of what steers them; attention; streams read and mixed."""
    config, num_tokens = configuration(parameters), parameters["num_tokens"]
    streams, inner_size = config.num_residual_streams, model.NUM_HEADS * model.HEAD_SIZE
    mixed = 2 * 2.0 * streams * (2 + streams) * config.hidden_size * (num_tokens + 1)
    total = config.n_blocks * (4.0 * (num_tokens + 1) ** 2 * inner_size + mixed)
    for name, shape in model.state_shapes(config).items():
        if "residual_fns" in name:
            rows = streams * (1 if "residual_fns.1" in name else num_tokens) if "dynamic" in name else 0
        else:
            rows = 0 if any(each in name for each in TABLES) else num_tokens
            rows = 1 if any(each in name for each in (*OF_LATENT, *STEERING)) else rows
        total += model_states.product_flops(shape, rows)
    return float(parameters["batch_size"] * total)


def moved(parameters: Parameters, itemsize: int) -> float:
    """Parameters, latents and results, once each, and of the tables the rows of all tokens."""
    config, tokens = configuration(parameters), parameters["batch_size"] * parameters["num_tokens"]
    rows = (tokens + parameters["num_tokens"]) * config.hidden_size
    results = tokens * (config.vocab_size + config.cluster_logits_size) + 2 * parameters["batch_size"] * config.latent_dim
    return itemsize * (model_states.moved(model.state_shapes(config), without=TABLES) + rows + results)


def sizes(batch_size: int, num_tokens: int, config: TextLatentMMDiTConfig) -> dict[str, Any]:
    """One point of the input space."""
    others = {"cluster_logits_size": config.cluster_logits_size}
    return {"batch_size": batch_size, "num_tokens": num_tokens, **vars(config), **others}


def tiny_model(hidden_size: int = 24, **others: Any) -> TextLatentMMDiTConfig:
    """A model small enough for an interpreter; its heads are as wide as all others'."""
    small = TextLatentMMDiTConfig(vocab_size=11, latent_dim=6, hidden_size=hidden_size, n_blocks=2, cond_dim=10, max_seq_len=17)
    return replace(small, **others)


NUM_TOKENS = (7, 1, 2, 16, 17)
FACTORS = (
    edges("batch_size", 1, 2, 3),
    edges("num_tokens", *sorted(NUM_TOKENS)),
    Factor("hidden_size", str, values=(24, 20, 40)),
    edges("n_blocks", 1, 2),
    edges("num_residual_streams", 2, 3, 4),
    either("cluster_size", 0, 3),
)


def point(batch_size: int, num_tokens: int, **others: Any) -> dict[str, Any] | None:
    """The point with these values of the factors."""
    return sizes(batch_size, num_tokens, tiny_model(**others))


@st.composite
def parameters(draw: st.DrawFn) -> dict[str, Any]:
    """Tiny models with two to four streams."""
    values: dict[str, Any] = {factor.name: draw(st.sampled_from(factor.values)) for factor in FACTORS}
    return point(**values) or {}


def _mask(value: bool) -> Any:
    return lambda tensors: {"attention_mask": torch.full_like(tensors["attention_mask"], value)}


def _times(text: float, latent: float) -> Any:
    return lambda tensors: {
        **model_states.full(tensors, "text_timesteps", text),
        **model_states.full(tensors, "latent_timesteps", latent),
    }


TRAITS = (
    Trait("int32", "dtype of text_tokens", dtypes={"text_tokens": "int32"}),
    Trait("no padding", "values of attention_mask", _mask(True)),
    Trait("padding alone", "values of attention_mask", _mask(False)),  # then the latent is all that any token sees
    Trait("text known", "values of timesteps", _times(0, 1)),
    Trait("latent known", "values of timesteps", _times(1, 0)),
)


def dithered(draw: Draw, parameters: Parameters) -> Tensors:
    """Weights scaled by fan-in, none of them 0, so that every connection differs from token to token."""
    config = configuration(parameters)
    state = model_states.drawn(draw, model.state_shapes(config), tables=TABLES, around_one=NORM_SCALES)
    for name, tensor in state.items():
        if "dynamic_" in name:  # products of them are of the size of the static ones
            tensor.div_(tensor.square().mean().sqrt() * config.hidden_size**0.5)
        elif name.endswith("_scale"):
            tensor += 1
    batch_size, num_tokens = parameters["batch_size"], parameters["num_tokens"]
    return {
        **state,
        "text_tokens": draw.integers(0, config.vocab_size, batch_size, num_tokens),
        "latents": draw.normal(batch_size, config.latent_dim),
        "text_timesteps": draw.uniform(batch_size),
        "latent_timesteps": draw.uniform(batch_size),
        "attention_mask": draw.uniform(batch_size, num_tokens) < 0.8,
    }


def near_constants(draw: Draw, parameters: Parameters) -> Tensors:
    """Where constants count: variances stay near the eps of every LayerNorm; inputs of the activations are near -2.

    There the exact GELU and its approximation by tanh differ by a tenth and more.
    """
    tensors = dithered(draw, parameters)
    for name, tensor in tensors.items():
        if any(each in name for each in (*TABLES, *ENDS_OF_BRANCHES, "projection.0")):
            tensor *= 2.0**-8
        elif name.endswith(("ff.0.0.weight", "latent_head.0.weight")):
            tensor *= 2.0**-4
        elif name.endswith(("ff.0.0.bias", "latent_head.0.bias")):
            tensor.mul_(0.25).sub_(2)
    return tensors


def extreme(draw: Draw, parameters: Parameters) -> Tensors:
    """Attention that picks single tokens, connections that nearly pick streams, and one feature far larger than the others."""
    tensors = dithered(draw, parameters)
    for name, tensor in tensors.items():
        if "to_qkv" in name:
            tensor[: 2 * model.NUM_HEADS * model.HEAD_SIZE] *= 2
        elif name.endswith("static_alpha"):
            tensor *= 4
            tensor[:, 1:] -= 200  # which shares know nothing of: exponentials do
    tensors["state/text_encoder.position_embed"][..., -1] += 2.0**5
    return tensors


def special(draw: Draw, parameters: Parameters) -> Tensors:
    """A token that is NaN, in the middle of an example, and a place that is infinite."""
    tensors = dithered(draw, parameters)
    ids = tensors["text_tokens"]
    tensors["state/text_encoder.token_embed.weight"][0, 0] = torch.nan
    tensors["text_tokens"] = torch.where(ids == 0, 1, ids)
    if parameters["num_tokens"] > 2:
        tensors["text_tokens"][0, 1] = 0
        tensors["state/text_encoder.position_embed"][0, 2, -1] = torch.inf
    return tensors


def _text(call: dict[str, Any], ids: torch.Tensor) -> dict[str, Any]:
    return {"text_tokens": ids, "attention_mask": torch.ones_like(ids, dtype=torch.bool)}


OUT = f"state/{FIRST}.joint_attn.to_out.0.weight"
REJECTIONS = (
    Rejection("a parameter transposed", "joint_attn.to_out.0.weight", changed(OUT, lambda each: each.T)),
    Rejection("a parameter too many", "blocks.99.to_out", lambda call: {"state/mmdit.blocks.99.to_out": call[OUT]}),
    Rejection("a text too long", "text_tokens", lambda call: _text(call, call["text_tokens"].repeat(1, 18))),
    Rejection("a text without tokens", "text_tokens", lambda call: _text(call, call["text_tokens"][:, :0])),
    Rejection("several latent tokens", "latents", changed("latents", lambda each: each[:, None].repeat(1, 2, 1))),
)
