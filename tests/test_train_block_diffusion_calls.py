"""Bad calls and bad configs of the block diffusion training step, and what is not finite."""

import pytest
import torch
from text_models import MODELS, batch_of, config_of
from trained_models import to_jax

from gaugeblock.reference.configs import BlockDiffusionConfig
from gaugeblock.reference.jax import train_block_diffusion as jax_trainer
from gaugeblock.reference.torch import train_block_diffusion as trainer


@pytest.mark.parametrize("module", [trainer, jax_trainer], ids=["torch", "jax"])
def test_a_loss_that_is_not_finite_raises_and_names_it(module):
    config, batch = config_of("llada"), batch_of()
    state = trainer.initial_state(config)
    state["model.model.transformer.ln_f.weight"][3] = torch.nan
    state["step"] += 41
    if module is jax_trainer:
        state, batch = to_jax(state), to_jax(batch)
    with pytest.raises(FloatingPointError, match=r"step 41: loss is not finite \(loss nan"):
        module.train_step(state, *batch, config=config)


BAD = {
    "input_ids must be int32 or int64": lambda ids, labels, samples, examples: (ids.float(), labels, samples, examples),
    "input_ids must be in 0..19": lambda ids, labels, samples, examples: (ids + 5, labels, samples, examples),
    "input_ids must hold at least one example": lambda *batch: [each[:0] for each in batch],
    "input_ids must have one token at least": lambda *batch: [*(each[:, :0] for each in batch[:3]), batch[3]],
    "labels must be in 0..19 or -100, got -101": lambda ids, labels, *others: (ids, labels - 1, *others),
    r"labels must be \[batch_size=5, num_tokens=11\]": lambda ids, labels, *others: (ids, labels[:, 1:], *others),
    "sample_ids must be an array": lambda ids, labels, samples, examples: (ids, labels, None, examples),
    r"example_ids must be \[batch_size=5\]": lambda *batch: (*batch[:3], batch[3][1:]),
}


@pytest.mark.parametrize("module", [trainer, jax_trainer], ids=["torch", "jax"])
@pytest.mark.parametrize("message", BAD)
def test_bad_calls_are_told(module, message):
    config = config_of("sdar")
    state, batch = trainer.initial_state(config), BAD[message](*batch_of())
    if module is jax_trainer:
        state, batch = to_jax(state), [None if each is None else to_jax(each) for each in batch]
    with pytest.raises((TypeError, ValueError), match=message):
        module.train_step(state, *batch, config=config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": MODELS["llada"], "times_of": "block"}, "times_of must be 'sequence' or 'sample' for LLaDAConfig"),
        ({"least_share": 0.5, "greatest_share": 0.25}, "least_share and greatest_share must rise within"),
        ({"least_share": 0.0, "greatest_share": 0.0}, "least_share and greatest_share must rise within"),
        ({"greatest_share": 1.5}, "least_share and greatest_share must rise within"),
        ({"cart_p": 1.0}, r"cart_p must be in \(0, 1\), got 1.0"),
        ({"weighting": "focal"}, "weighting must be 'inverse' or 'none' or 'linear' or 'cart', got 'focal'"),
        ({"mean_over": "rows"}, "mean_over must be 'tokens' or 'masked' or 'examples', got 'rows'"),
        ({"learning_rate": -1.0}, "learning_rate must be positive"),
    ],
)
def test_bad_configs_are_told(changes, message):
    with pytest.raises(ValueError, match=message):
        BlockDiffusionConfig(**{"model": MODELS["sdar"], **changes})
