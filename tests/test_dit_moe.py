"""DiT-MoE against a model of torch.nn's modules with the names and formulas of the public code, against its twin, by itself."""

import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from test_references import assert_all_equal_to_rounding, assert_equal_to_rounding, random
from torch import nn
from torch.nn import functional

from gaugeblock.reference import states
from gaugeblock.reference.configs import DIT_MOE_PRESETS, DiTConfig, DiTMoEConfig, DiTMoEModelConfig
from gaugeblock.reference.jax import dit_moe as jax_dit_moe
from gaugeblock.reference.torch import dit, dit_moe

SMALL = DiTMoEModelConfig(
    input_size=6, patch_size=2, in_channels=3, hidden_size=20, depth=2, num_heads=5, mlp_ratio=1.5, num_classes=7,
    frequency_embedding_size=16, num_experts=4,
)  # fmt: skip
FLASH = replace(SMALL, qk_norm=True, norm_eps=1e-2, learn_sigma=False, timestep_scale=1000.0)


class Expert(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, tokens):
        return self.down_proj(functional.silu(self.gate_proj(tokens)) * self.up_proj(tokens))


class Moe(nn.Module):
    """Each token by itself passes the experts of its highest scores, weighted by these scores as they are."""

    def __init__(self, config: DiTMoEModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.top_k, self.alpha, self.per_sample = config.moe.top_k, config.moe.aux_loss_alpha, config.moe.per_sample
        self.gate = nn.Linear(width, config.num_experts, bias=False)
        self.experts = nn.ModuleList(Expert(width, int(config.mlp_ratio * width)) for _ in range(config.num_experts))
        self.shared_experts = Expert(width, config.num_shared_experts * width)

    def forward(self, tokens_BSD):
        rows, losses = [], []
        for tokens in tokens_BSD:
            scores = self.gate(tokens).softmax(-1)
            chosen = scores.argsort(dim=-1, descending=True)[:, : self.top_k]
            rows.append(
                torch.stack(
                    [
                        self.shared_experts(token) + sum(score[expert] * self.experts[expert](token) for expert in ids.tolist())
                        for token, score, ids in zip(tokens, scores, chosen, strict=True)
                    ]
                )
            )
            losses.append((functional.one_hot(chosen, len(self.experts)).sum((0, 1)), scores))
        if not self.per_sample:
            losses = [(sum(counts for counts, _ in losses), torch.cat([scores for _, scores in losses]))]
        of_samples = [(counts.double() / counts.sum()) @ scores.mean(0) * len(self.experts) for counts, scores in losses]
        return torch.stack(rows), self.alpha * sum(of_samples) / len(of_samples)


class Attention(nn.Module):
    """timm's; with norms of queries and keys and other names, that of the public code's flash kernel."""

    def __init__(self, config: DiTMoEModelConfig) -> None:
        super().__init__()
        self.heads, features, width = config.num_heads, config.hidden_size // config.num_heads, config.hidden_size
        self.first, self.last = ("Wqkv", "out_proj") if config.qk_norm else ("qkv", "proj")
        self.add_module(self.first, nn.Linear(width, 3 * width))
        for name in ("q_norm", "k_norm"):
            self.add_module(name, nn.LayerNorm(features, eps=1e-6) if config.qk_norm else nn.Identity())
        self.add_module(self.last, nn.Linear(width, width))

    def forward(self, tokens):
        batch, length, width = tokens.shape
        qkv = self.get_submodule(self.first)(tokens).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(self.q_norm(query), self.k_norm(key), value)
        return self.get_submodule(self.last)(attended.transpose(1, 2).reshape(tokens.shape))


class Block(nn.Module):
    def __init__(self, config: DiTMoEModelConfig) -> None:
        super().__init__()
        self.attn, self.moe = Attention(config), Moe(config)
        self.norm1, self.norm2 = (
            nn.LayerNorm(config.hidden_size, elementwise_affine=False, eps=eps) for eps in (1e-6, config.norm_eps)
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden_size, 6 * config.hidden_size))

    def forward(self, tokens, conditioning):
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.adaLN_modulation(conditioning)[:, None].chunk(6, -1)
        tokens = tokens + gate_1 * self.attn(self.norm1(tokens) * (1 + scale_1) + shift_1)
        out, loss = self.moe(self.norm2(tokens) * (1 + scale_2) + shift_2)
        return tokens + gate_2 * out, loss


class FinalLayer(nn.Module):
    def __init__(self, config: DiTMoEModelConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden_size, 2 * config.hidden_size))


class Model(nn.Module):
    """The public model, by its names."""

    def __init__(self, config: DiTMoEModelConfig) -> None:
        super().__init__()
        self.config, width = config, config.hidden_size
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(config.in_channels, width, config.patch_size, config.patch_size)
        self.t_embedder = nn.Module()
        self.t_embedder.mlp = nn.Sequential(nn.Linear(config.frequency_embedding_size, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embedder = nn.Module()
        self.y_embedder.embedding_table = nn.Embedding(config.num_classes + 1, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_patches, width), requires_grad=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)

    def places(self):
        """`[1, S, D]`: of each patch, sines and cosines of its column, then those of its row."""
        side, quarter = self.config.input_size // self.config.patch_size, self.config.hidden_size // 4
        table = []
        for row in range(side):
            for column in range(side):
                angles = [[place / 10000 ** (i / quarter) for i in range(quarter)] for place in (column, row)]
                table.append([f(angle) for axis in angles for f in (math.sin, math.cos) for angle in axis])
        return torch.tensor([table], dtype=torch.float64)

    def forward(self, latents, times, labels):
        config = self.config
        half = config.frequency_embedding_size // 2
        frequencies = torch.tensor([math.exp(-math.log(10000) * i / half) for i in range(half)], dtype=torch.float64)
        angles = config.timestep_scale * times[:, None] * frequencies
        conditioning = self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], 1)) + self.y_embedder.embedding_table(labels)
        tokens = self.x_embedder.proj(latents).flatten(2).mT + self.pos_embed
        losses = 0
        for block in self.blocks:
            tokens, loss = block(tokens, conditioning)
            losses = losses + loss
        shift, scale = self.final_layer.adaLN_modulation(conditioning)[:, None].chunk(2, -1)
        normalized = functional.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
        patches = self.final_layer.linear(normalized * (1 + scale) + shift)
        side, patch = config.input_size // config.patch_size, config.patch_size
        out = patches.reshape(len(latents), side, side, patch, patch, config.out_channels)
        return torch.einsum("nhwpqc->nchpwq", out).reshape(len(latents), config.out_channels, *latents.shape[2:]), losses


def public_model(config: DiTMoEModelConfig) -> Model:
    """In float64, with random weights and the fixed position table."""
    model = Model(config).double()
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        offset = 1 if "_norm.weight" in name else 0
        parameter.data = random(*parameter.shape, seed=seed) * max(1, parameter[0].numel()) ** -0.5 + offset
    model.pos_embed.data = model.places()
    return model


def public_checkpoint(config: DiTMoEModelConfig) -> dict[str, torch.Tensor]:
    return public_model(config).state_dict()


def inputs_of(config: DiTMoEModelConfig, batch_size: int = 3) -> list[torch.Tensor]:
    latents = random(batch_size, config.in_channels, config.input_size, config.input_size, seed=90)
    labels = torch.tensor([config.num_classes, 0, 2])[:batch_size]
    return [latents, torch.tensor([0.75, 0.25, 0.999], dtype=torch.float64)[:batch_size], labels]


def cotangents_of(config: DiTMoEModelConfig, batch_size: int = 3) -> list[torch.Tensor]:
    shape = (batch_size, config.out_channels, config.input_size, config.input_size)
    return [random(*shape, seed=91), torch.tensor(1.25, dtype=torch.float64)]


def assert_gradients_equal(actual, expected, state) -> None:
    """Of the latents, then of a state; a bias of all keys shifts all scores of a query alike, so that its gradient is 0."""
    names = ["latents", *state]
    nothing = [index for index, name in enumerate(names) if name.endswith("k_norm.bias")]
    for index in nothing:
        for each in (actual[index], expected[index]):
            assert np.abs(np.asarray(each)).max() < 100 * np.finfo(np.asarray(each).dtype).eps
    kept = [index for index in range(len(names)) if index not in nothing]
    assert_all_equal_to_rounding([actual[index] for index in kept], [expected[index] for index in kept])


def to_jax(tensors):
    return jax.tree.map(lambda tensor: jnp.asarray(tensor.numpy()), tensors)


@pytest.mark.parametrize(
    ("config", "batch_size"),
    [
        (SMALL, 3),
        (FLASH, 3),
        (replace(SMALL, moe=DiTMoEConfig(top_k=3, aux_loss_alpha=1.0, per_sample=True)), 3),
        (replace(FLASH, patch_size=3, depth=1, num_experts=1, num_shared_experts=1, moe=DiTMoEConfig(top_k=1)), 1),
        (replace(SMALL, num_heads=1, input_size=5, patch_size=5, moe=DiTMoEConfig(top_k=4, aux_loss_alpha=0.5)), 1),
    ],
)
def test_dit_moe_is_the_public_model(config, batch_size):
    model, (latents, times, labels), cotangents = (
        public_model(config),
        inputs_of(config, batch_size),
        cotangents_of(config, batch_size),
    )
    latents.requires_grad_()
    expected = model(latents, times, labels)
    tracked = {name: parameter for name, parameter in model.named_parameters() if name != "pos_embed"}
    gradients = torch.autograd.grad(expected, [latents, *tracked.values()], cotangents, materialize_grads=True)
    expected_gradients = dit_moe.load_state(dict(zip(tracked, gradients[1:], strict=True)), config=config)

    state = {
        name: entry.detach().requires_grad_() for name, entry in dit_moe.load_state(model.state_dict(), config=config).items()
    }
    assert {name: tuple(entry.shape) for name, entry in state.items()} == dit_moe.state_shapes(config)
    actual = dit_moe.dit_moe(state, latents, times, labels, config=config)
    assert_all_equal_to_rounding([each.detach() for each in actual], [each.detach() for each in expected])
    actual_gradients = torch.autograd.grad(actual, [latents, *state.values()], cotangents)
    assert_gradients_equal(actual_gradients, [gradients[0], *expected_gradients.values()], state)
    if config.num_experts > 1 and config.num_patches > 1:  # else a softmax is 1
        assert [name for name, each in expected_gradients.items() if each.abs().max() < 1e-4] == [
            name for name in state if name.endswith("k_norm.bias")
        ]


@pytest.mark.parametrize(
    ("name", "published", "norms"),
    [
        ("DiT-MoE-S/2-8E2A", 199_307_552, 0),
        ("DiT-MoE-S/2-16E2A", 369_213_728, 0),
        ("DiT-MoE-B/2-8E2A", 795_861_536, 0),
        ("DiT-MoE-XL/2-8E2A", 4_168_164_128, 8_064),
        ("DiT-MoE-G/2-16E2A", 16_503_717_152, 14_080),
    ],
)
def test_presets_have_as_many_parameters_as_the_public_models(name, published, norms):
    config = DIT_MOE_PRESETS[name]
    table = config.num_patches * config.hidden_size  # fixed, but a parameter of the public code
    assert states.num_parameters(dit_moe.state_shapes(config)) + table == published + norms
    with torch.device("meta"):
        model = Model(config)
    assert sum(each.numel() for each in model.parameters()) == published + norms


@pytest.mark.parametrize("config", [SMALL, FLASH], ids=["timm", "flash"])
def test_a_public_checkpoint_survives_the_file(tmp_path, config):
    public = {name: each.float().contiguous() for name, each in public_checkpoint(config).items()}
    assert ("blocks.0.attn.Wqkv.weight" in public) == config.qk_norm
    safetensors.torch.save_file(public, tmp_path / "dit_moe.safetensors")
    checkpoint = safetensors.torch.load_file(tmp_path / "dit_moe.safetensors")
    loaded, of_jax = dit_moe.load_state(checkpoint, config=config), jax_dit_moe.load_state(to_jax(checkpoint), config=config)
    assert list(loaded) == list(of_jax) == list(dit_moe.state_shapes(config))
    for name, entry in loaded.items():
        np.testing.assert_array_equal(of_jax[name], entry)
    again = dit_moe.load_state(loaded, config=config)
    assert all(torch.equal(again[name], entry) for name, entry in loaded.items())
    gate_up = loaded["blocks.1.moe.experts.gate_up_proj"][3]
    inner = config.intermediate_size
    assert torch.equal(gate_up[:inner], public["blocks.1.moe.experts.3.gate_proj.weight"])
    assert torch.equal(gate_up[inner:], public["blocks.1.moe.experts.3.up_proj.weight"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: {k: v for k, v in state.items() if "experts.3.up_proj" not in k}, "experts.3.up_proj.weight"),
        (lambda state: state | {"blocks.1.moe.experts.4.up_proj.weight": torch.zeros(30, 20)}, "experts.4.up_proj.weight"),
        (lambda state: state | {"blocks.0.attn.q_norm.weight": torch.zeros(4)}, "blocks.0.attn.q_norm.weight"),
        (lambda state: state | {"blocks.0.moe.gate.weight": torch.zeros(20, 4)}, "blocks.0.moe.gate.weight of shape (4, 20)"),
        (lambda state: state | {"pos_embed": torch.zeros(1, 9, 20)}, "the fixed position table or none"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(spoil, message):
    bad = spoil({name: each.float() for name, each in public_checkpoint(SMALL).items()})
    for module, checkpoint in ((dit_moe, bad), (jax_dit_moe, to_jax(bad))):
        with pytest.raises(ValueError, match=re.escape(message)):
            module.load_state(checkpoint, config=SMALL)


@pytest.mark.parametrize("config", [SMALL, replace(FLASH, timestep_scale=2.0)], ids=["timm", "flash"])
@pytest.mark.parametrize("x64", [False, True])
def test_jax_dit_moe_is_that_of_torch(config, x64):
    dtype = torch.float64 if x64 else torch.float32
    state = {name: each.to(dtype) for name, each in dit_moe.load_state(public_checkpoint(config), config=config).items()}
    latents, times, labels = inputs_of(config)
    leaves = [each.detach().requires_grad_() for each in (latents.to(dtype), *state.values())]
    expected = dit_moe.dit_moe(dict(zip(state, leaves[1:], strict=True)), leaves[0], times, labels, config=config)
    cotangents = [each.to(dtype) for each in cotangents_of(config)]
    expected_gradients = torch.autograd.grad(expected, leaves, cotangents)
    with jax.enable_x64(x64):
        jax_times, jax_labels = to_jax([times.to(dtype), labels])

        @jax.jit
        def function(latents, *leaves):
            return jax_dit_moe.dit_moe(dict(zip(state, leaves, strict=True)), latents, jax_times, jax_labels, config=config)

        actual, pull_back = jax.vjp(function, *to_jax([each.detach() for each in leaves]))
        gradients = jax.jit(pull_back)(tuple(to_jax(cotangents)))
        assert_all_equal_to_rounding(list(actual), [each.detach() for each in expected])
        assert_gradients_equal(gradients, expected_gradients, state)


def test_the_auxiliary_loss_is_the_sum_of_the_layers():
    state, inputs = dit_moe.load_state(public_checkpoint(SMALL), config=SMALL), inputs_of(SMALL)
    state |= {name: torch.zeros_like(each) for name, each in state.items() if name.endswith("gate.weight")}
    # all experts score alike: each layer's loss is alpha, whatever experts are chosen
    loss = dit_moe.dit_moe(state, *inputs, config=SMALL)[1]
    assert_equal_to_rounding(loss, torch.tensor(SMALL.depth * SMALL.moe.aux_loss_alpha, dtype=torch.float64))


def test_half_precision_is_rounded_once():
    state = {name: each.bfloat16() for name, each in dit_moe.load_state(public_checkpoint(FLASH), config=FLASH).items()}
    latents, times, labels = inputs_of(FLASH)
    latents, times = latents.bfloat16(), times.float()
    out, loss = dit_moe.dit_moe(state, latents, times, labels, config=FLASH)
    wide, wide_loss = dit_moe.dit_moe(
        {name: each.float() for name, each in state.items()}, latents.float(), times, labels, config=FLASH
    )
    assert torch.equal(out, wide.bfloat16())
    assert loss.dtype == torch.float32 and torch.equal(loss, wide_loss)


@pytest.mark.parametrize("module", [dit_moe, jax_dit_moe])
def test_a_block_computes_in_float32_and_rounds_once(module):
    wide = dit.block_state(dit_moe.load_state(public_checkpoint(FLASH), config=FLASH), 1)
    wide = [{name: each.bfloat16().float() for name, each in wide.items()}, *(
        random(*shape, seed=5).bfloat16().float() for shape in ((2, 9, 20), (2, 20))
    )]  # fmt: skip
    arrays = to_jax(wide) if module is jax_dit_moe else wide
    narrow = jax.tree.map(lambda each: each.astype(jnp.bfloat16) if module is jax_dit_moe else each.bfloat16(), arrays)
    (actual, loss), (expected, _) = module.block(*narrow, config=FLASH), module.block(*arrays, config=FLASH)
    assert "bfloat16" in str(actual.dtype) and "float32" in str(loss.dtype)
    assert bool((actual == (expected.astype(jnp.bfloat16) if module is jax_dit_moe else expected.bfloat16())).all())


@pytest.mark.parametrize("module", [dit_moe, jax_dit_moe])
@pytest.mark.parametrize(("argument", "shape"), [("hidden_states", (2, 9, 19)), ("conditioning", (2, 1, 20))])
def test_a_bad_call_of_a_block_names_the_argument(module, argument, shape):
    zeros = torch.zeros if module is dit_moe else jnp.zeros
    state = {name: zeros(each) for name, each in dit_moe.block_shapes(FLASH).items()}
    arrays = {"hidden_states": zeros((2, 9, 20)), "conditioning": zeros((2, 20))} | {argument: zeros(shape)}
    with pytest.raises(ValueError, match=f"^{argument} must "):
        module.block(state, **arrays, config=FLASH)


def test_an_empty_batch_has_no_loss():
    for batch_size in (0, 1):
        state = dit_moe.load_state(public_checkpoint(SMALL), config=SMALL)
        inputs = inputs_of(SMALL, batch_size)
        out, loss = dit_moe.dit_moe(state, *inputs, config=SMALL)
        assert out.shape == (batch_size, 6, 6, 6) and (loss == 0) == (batch_size == 0)
        of_jax, jax_loss = jax_dit_moe.dit_moe(*to_jax([state, *inputs]), config=SMALL)
        assert of_jax.shape == out.shape and (jax_loss == 0) == (batch_size == 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 0}, "num_experts must be positive, got 0"),
        ({"num_shared_experts": 0}, "num_shared_experts must be positive, got 0"),
        ({"timestep_scale": -1.0}, "timestep_scale must be positive, got -1.0"),
        ({"num_heads": 3}, "hidden_size must be a multiple of 3, got 20"),
        ({"moe": DiTMoEConfig(num_groups=3)}, "num_experts must be a multiple of 3, its groups, got 4"),
        ({"moe": DiTMoEConfig(top_k=3, num_groups=2)}, "moe.top_k must be in 1..2"),
    ],
)
def test_a_model_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}"):
        replace(SMALL, **changes)


@pytest.mark.parametrize("module", [dit_moe, jax_dit_moe])
def test_the_config_of_a_dit_is_refused(module):
    with pytest.raises(TypeError, match=r"^config must be a DiTMoEModelConfig, got DiTConfig"):
        module.dit_moe({}, None, None, None, config=DiTConfig())
