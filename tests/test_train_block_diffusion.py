"""The block diffusion training step: transformers' models and the loss by hand, its twin, saving, bad calls."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # transformers imports triton, which then decorates

import math
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
import torch
import transformers
from stable_models import assert_same_to_rounding
from text_models import KINDS, MODELS, NUM_TOKENS, batch_of, config_of, state_of
from trained_models import draws, same_bits, to_jax
from wide_floats import float32_is_float64

from gaugeblock.conformance.peers.transformers_decoders import their_config
from gaugeblock.reference import decoder_states
from gaugeblock.reference.configs import EMAConfig, LLaDAConfig, SDARConfig, SDARMoEConfig
from gaugeblock.reference.jax import language_models as jax_language_models
from gaugeblock.reference.jax import train_block_diffusion as jax_trainer
from gaugeblock.reference.torch import language_models, training
from gaugeblock.reference.torch import train_block_diffusion as trainer

EPS = np.finfo(np.float64).eps
EACH = pytest.mark.parametrize("kind", KINDS)
EACH_MODEL = pytest.mark.parametrize("name", MODELS)
CAUSAL_LMS = {
    "sdar": transformers.Qwen3ForCausalLM, "moe": transformers.Qwen3MoeForCausalLM, "llada": transformers.LlamaForCausalLM,
    "dream": transformers.Qwen2ForCausalLM,
}  # fmt: skip


def places_of(samples: list[int]) -> list[int]:
    return [samples[:place].count(sample) for place, sample in enumerate(samples)]


def rows_of_transformers(config, parameters, noisy, clean, samples) -> torch.Tensor:
    """Logits of one sequence's noisy tokens by transformers' model, under a mask that is written out here."""
    model, length = config.model, len(noisy)
    is_sdar = isinstance(model, SDARConfig | SDARMoEConfig)
    tokens = [(place, copy) for copy in ((0, 1) if is_sdar else (0,)) for place in range(length)]
    block = [place // model.block_length for place in places_of(samples)] if is_sdar else None

    def sees(query, key) -> bool:
        (i, of_query), (j, of_key) = query, key
        if not is_sdar:
            return samples[j] >= 0
        if samples[i] != samples[j] or samples[i] < 0:
            return query == key  # a token that sees nothing has no softmax: its own result does not matter
        if of_query == 0:
            return block[i] == block[j] if of_key == 0 else block[i] > block[j]
        return of_key == 1 and block[i] >= block[j]

    mask = torch.tensor([[0.0 if sees(query, key) else -1e30 for key in tokens] for query in tokens])
    places = places_of(samples) * 2 if is_sdar else list(range(length))
    theirs = theirs_of(type(model), model)
    state = decoder_states.llada_as_transformers(parameters, model) if isinstance(model, LLaDAConfig) else parameters
    arguments = {
        "input_ids": torch.cat([noisy, clean])[None] if is_sdar else noisy[None],
        "attention_mask": mask[None, None],
        "position_ids": torch.tensor([places]),
    }
    return torch.func.functional_call(theirs, state, (), arguments).logits[0, :length]


def theirs_of(kind, model):
    name = next(name for name, each in MODELS.items() if type(each) is kind)
    return CAUSAL_LMS[name](their_config(model)).double()


def loss_by_hand(config, parameters, ids, labels, samples, noisy, shares) -> torch.Tensor:
    """Of all draws of a step, token by token."""
    total, count, batch = torch.zeros((), dtype=torch.float64), 0, len(ids)
    for row in range(batch):
        of_row = samples[row].tolist()
        logits = rows_of_transformers(config, parameters, noisy[row], ids[row], of_row)
        has_label = [of_row[place] >= 0 and int(labels[row, place]) != -100 for place in range(NUM_TOKENS)]
        for place in range(NUM_TOKENS):
            is_masked = bool(noisy[row, place] == config.model.mask_token_id)
            count += is_masked if config.mean_over == "masked" else has_label[place] if config.mean_over == "tokens" else 0
            if not is_masked:
                continue
            assert has_label[place]
            # Dream's tokens are predicted by the tokens before them
            own = logits[max(0, place - 1) if config.model is MODELS["dream"] else place]
            if config.excludes_mask_token:
                own = own[:-1]  # the mask token is the last one
            p = float(shares[row, place])
            near = sum(
                0.1 * 0.9 ** (abs(place - other) - 1) / 2
                for other in range(NUM_TOKENS)
                if of_row[other] == of_row[place] and noisy[row, other] != config.model.mask_token_id
            )
            weight = {"inverse": 1 / p, "none": 1.0, "linear": 1 - p, "cart": near}[config.weighting]
            share = sum(has_label) * batch if config.mean_over == "examples" else 1
            total = total + weight * (torch.logsumexp(own, 0) - own[labels[row, place]]) / share
    return total / max(1, count)


@EACH
def test_loss_and_gradients_are_those_of_transformers_and_the_loss_by_hand(kind):
    config, batch = config_of(kind), batch_of()
    state = state_of(config)
    shares, _ = trainer.draws(batch[2], batch[3], 0, config=config)
    divided = trainer.weighted_batch(*batch, 0, dtype=torch.float64, config=config)
    noisy, weights = divided[0], divided[-1]
    assert 10 < (noisy == 19).sum() < 35 and not (weights[noisy != 19]).any()
    leaves = {name: each.clone().requires_grad_() for name, each in training.part_of_state(state, "model").items()}
    with float32_is_float64():
        loss = loss_by_hand(config, leaves, *batch[:3], noisy, shares)
    gradients = dict(zip(leaves, torch.autograd.grad(loss, [*leaves.values()]), strict=True))

    _, metrics = trainer.train_step(state, *batch, config=config)
    torch.testing.assert_close(metrics.loss, loss.detach(), rtol=64 * EPS, atol=0)
    _, found = training.metrics_and_gradients(trainer.shares, state, divided, config=config)
    assert set(found) == set(gradients)
    for name, each in gradients.items():
        if not name.endswith("k_proj.bias"):  # softmax sees of it what rotations leave
            torch.testing.assert_close(found[name], each, rtol=0, atol=2048 * EPS * float(each.abs().max()), msg=name)
            assert abs(each).max() > 1e-9, name  # gradients reach every parameter
    norm = torch.cat([each.flatten() for each in gradients.values()]).norm()
    torch.testing.assert_close(metrics.gradient_norm, norm, rtol=1024 * EPS, atol=0)


@EACH
def test_order_and_microbatches_of_unequal_numbers_of_tokens_do_not_matter(kind):
    config, batch = config_of(kind), batch_of(7)
    state = state_of(config)
    expected, metrics = trainer.train_step(state, *batch, config=config)
    order = torch.tensor([3, 6, 0, 4, 1, 5, 2])
    for steps in (3, 9):
        accumulated = replace(config, accumulation_steps=steps)
        actual, other = trainer.train_step(state, *(each[order] for each in batch), config=accumulated)
        assert_same_to_rounding(vars(other), vars(metrics), units=1024)
        assert_same_to_rounding(actual, expected, units=2**20)  # AdamW divides by gradients that may be small


@EACH
def test_a_run_is_repeated_and_resumed_bit_for_bit(kind, tmp_path):
    config = config_of(kind, accumulation_steps=2, ema=EMAConfig(), num_warmup_steps=2)
    state, batches = state_of(config), [batch_of(size) for size in (5, 2, 3)]

    def run(state, batches):
        for each in batches:
            state, _ = trainer.train_step(state, *each, config=config)
        return state

    copies = {name: each.clone() for name, each in state.items()}
    through = run(state, batches)
    assert same_bits(state, copies) and same_bits(run(state, batches), through)
    training.save_state(run(state, batches[:1]), tmp_path / "run.safetensors", config=config)
    assert same_bits(run(training.load_state(tmp_path / "run.safetensors", config=config), batches[1:]), through)
    other = replace(config, least_share=0.25)
    with pytest.raises(ValueError, match="least_share"):
        training.load_state(tmp_path / "run.safetensors", config=other)


@EACH_MODEL
def test_layers_are_recomputed_bit_for_bit(name):
    results, kept = [], []
    for asked in (False, True):
        config, sizes = config_of(name, activation_checkpointing=asked), {}

        def keep(tensor: torch.Tensor, sizes: dict = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            state, metrics = trainer.train_step(state_of(config), *batch_of(), config=config)
        results.append(state | vars(metrics))
        kept.append(sum(sizes.values()))
    assert same_bits(*results) and 3 * kept[1] < kept[0]


@pytest.mark.parametrize("kind", ["moe", "bd3-lm", "llada, tuned", "dream"])
def test_torch_and_jax_make_the_same_steps(kind):
    config, batch = config_of(kind, accumulation_steps=2), batch_of()
    state = state_of(config)
    with jax.enable_x64(True):
        jax_state, jax_batch = to_jax(state), to_jax(batch)
        for _ in range(2):
            state, metrics = trainer.train_step(state, *batch, config=config)
            jax_state, jax_metrics = jax_trainer.train_step(jax_state, *jax_batch, config=config)
            # the share of masks is of float32, whose sum and product XLA rounds once or twice
            assert_same_to_rounding(vars(jax_metrics), vars(metrics), units=2**31)
        assert_same_to_rounding(jax_state, state, units=2**34)


def test_both_begin_with_the_same_parameters():
    config = config_of("dream")  # the one with biases; JAX compiles the draw of each shape
    state, jax_state = trainer.initial_state(config), jax_trainer.initial_state(config)
    assert list(state) == list(jax_state) and same_bits(jax_state, state)
    assert not state["model.model.layers.1.self_attn.k_proj.bias"].any() and state["model.model.norm.weight"].eq(1).all()


@EACH_MODEL
def test_a_new_model_knows_nothing(name):
    config = config_of(name, weighting="none", mean_over="masked")
    state = trainer.initial_state(config)
    parameters = training.part_of_state(state, "model")
    assert list(jax_language_models.state_shapes(config.model)) == list(parameters)
    matrices = torch.cat([each.flatten() for each in parameters.values() if each.ndim > 1])
    assert abs(matrices.mean()) < 1e-3 and abs(matrices.std() - 0.02) < 1e-3
    _, metrics = trainer.train_step(state, *batch_of(), config=config)
    assert abs(metrics.loss - math.log(20)) < 0.05


def test_the_loss_falls_from_the_start_of_a_run():
    config = config_of("bd3-lm", weighting="none", mean_over="masked", learning_rate=1e-2)
    state = trainer.initial_state(config)
    ids = (torch.arange(NUM_TOKENS) + torch.arange(8)[:, None]) % 7
    losses = []
    for step in range(40):
        batch = ids, ids, torch.zeros_like(ids), torch.arange(8) + 8 * step
        state, metrics = trainer.train_step(state, *batch, config=config)
        losses.append(metrics.loss)
    assert abs(losses[0] - math.log(19)) < 0.1 and torch.stack(losses[-10:]).mean() < 0.6 * losses[0]


@pytest.mark.parametrize(
    ("kind", "module"), [("sdar", trainer), ("llada, tuned", trainer), ("dream", trainer), ("llada, tuned", jax_trainer)]
)
def test_where_nothing_is_masked_nothing_is_learned(kind, module):
    config, (ids, labels, samples, examples) = config_of(kind, weight_decay=0.0), batch_of()
    state = trainer.initial_state(config)
    batch = ids, torch.full_like(labels, -100), samples, examples
    if module is jax_trainer:
        state, batch = to_jax(state), to_jax(batch)
    new_state, metrics = module.train_step(state, *batch, config=config)
    assert metrics.loss == 0 and metrics.gradient_norm == 0
    for name, each in training.part_of_state(state, "model").items():
        assert np.array_equal(new_state[f"model.{name}"], each)


@EACH
def test_padding_and_what_is_behind_a_mask_do_not_matter(kind):
    config, (ids, labels, samples, examples) = config_of(kind), batch_of()
    state = state_of(config)
    expected, _ = trainer.train_step(state, ids, labels, samples, examples, config=config)
    hidden = samples < 0
    if isinstance(config.model, LLaDAConfig) or config.model is MODELS["dream"]:
        noisy, _, _ = trainer.masked_batch(ids, labels, samples, examples, 0, dtype=torch.float64, config=config)
        hidden |= noisy == 19
    changed = torch.where(hidden, (ids + 5) % 19, ids), torch.where(samples < 0, 3, labels), samples, examples
    actual, _ = trainer.train_step(state, *changed, config=config)
    assert not changed[0].equal(ids)
    if kind == "moe":  # rows of padding are added up with others of an expert
        assert_same_to_rounding(actual, expected, units=2**14)
    else:
        assert same_bits(actual, expected)
    other, _ = trainer.train_step(state, torch.where(hidden, ids, (ids + 5) % 19), labels, samples, examples, config=config)
    assert not same_bits(other, expected)


def test_cross_entropies_of_narrow_logits_are_computed_in_float32():
    ids, labels, samples, examples = batch_of()
    config, logits = config_of("llada"), draws(*ids.shape, 20, seed=7).bfloat16()
    batch = trainer.weighted_batch(ids, labels, samples, examples, 0, dtype=torch.float32, config=config)
    loss = trainer.weighted_loss(lambda *_: logits, *batch, config=config)
    losses = torch.nn.functional.cross_entropy(logits.double().mT, labels, reduction="none")
    torch.testing.assert_close(loss.double(), (batch[-1] * losses).sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["sdar", "dream"])
def test_masters_stay_wide_and_the_scale_of_the_loss_changes_no_bit(name):
    config, batch = config_of(name, accumulation_steps=2), batch_of()
    state = {key: each if key == "step" else each.float() for key, each in state_of(config).items()}
    results = [trainer.train_step(state, *batch, config=replace(config, loss_scale=scale)) for scale in (1.0, 2.0**10)]
    assert same_bits(results[0][0], results[1][0])
    new_state, rounded = trainer.train_step(state, *batch, config=replace(config, compute_dtype="bfloat16"))
    assert 0 < abs(rounded.loss / results[0][1].loss - 1) < 0.02
    assert rounded.loss.dtype == torch.float32 and all(
        each.dtype == torch.float32 for key, each in new_state.items() if key != "step"
    )


def test_a_model_is_told_clean_blocks_and_padding():
    arrays = [torch.full((1, 2), number) for number in (1, 2, -3)]
    told = partial(language_models.predict, lambda *arrays: arrays)
    assert [each.tolist() for each in told(*arrays, config=MODELS["moe"])] == [[[1, 1]], [[2, 2]], [[-3, -3]]]
    assert [each.tolist() for each in told(*arrays, config=MODELS["dream"])] == [[[1, 1]], [[False, False]]]
