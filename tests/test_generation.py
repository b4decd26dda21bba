"""Language models decode: with a cache as without, the same in torch and JAX, and never more than was asked for."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
import torch
from test_language_models import DENSE, DREAM, LLADA, SPARSE, parameters, predict, to_jax

from gaugeblock.reference.configs import DreamDecodingConfig, LLaDADecodingConfig, SDARDecodingConfig
from gaugeblock.reference.jax import decoding as jax_decoding
from gaugeblock.reference.jax import dream as jax_dream
from gaugeblock.reference.jax import llada as jax_llada
from gaugeblock.reference.jax import sdar as jax_sdar
from gaugeblock.reference.torch import decoding, dream, llada, sdar

MASK = DENSE.mask_token_id
PROMPTS = torch.tensor([[3, 21, 7, 0], [17, 4, 4, 9]])
EXAMPLES = torch.tensor([0, 5])
SDAR_DECODING = SDARDecodingConfig(
    mask_id=MASK, new_tokens=7, block_length=DENSE.block_length, steps=2, temperature=0.0, strategy="static"
)


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "moe"])
def test_sdar_decodes_with_a_cache_as_without(config):
    with_cache = decoding.with_cache(sdar.sdar_cached, parameters(config), config=config)

    def whole(cache: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return predict(config, torch.cat([cache, ids], dim=1))[:, -ids.shape[1] :]

    without = decoding.CachedModel(
        prefill=lambda ids: ids, denoise=whole, store=lambda cache, ids: torch.cat([cache, ids], dim=1)
    )
    made, expected = (
        decoding.sdar_generate(each, PROMPTS, EXAMPLES, config=SDAR_DECODING, seed=1) for each in (with_cache, without)
    )
    assert torch.equal(made, expected) and made.shape == (2, 11)
    assert torch.equal(made[:, :4], PROMPTS) and not bool((made == MASK).any())

    with jax.enable_x64(True):
        in_jax = jax_decoding.with_cache(jax_sdar.sdar_cached, to_jax(parameters(config)), config=config)
        twin = jax_decoding.sdar_generate(in_jax, *to_jax([PROMPTS, EXAMPLES]), config=SDAR_DECODING, seed=1)
    assert np.asarray(twin).tolist() == made.tolist()


@pytest.mark.parametrize(
    ("modules", "model_config", "loop", "config"),
    [
        (
            (llada.llada, jax_llada.llada),
            LLADA,
            "llada_generate",
            LLaDADecodingConfig(mask_id=MASK, new_tokens=6, block_length=3, steps=4, cfg_scale=0.5),
        ),
        (
            (dream.dream, jax_dream.dream),
            DREAM,
            "dream_generate",
            DreamDecodingConfig(mask_id=MASK, new_tokens=6, steps=3, algorithm="entropy"),
        ),
    ],
    ids=["llada", "dream"],
)
def test_what_sees_all_decodes_alike_in_torch_and_jax(
    modules: tuple[Callable, Callable], model_config: Any, loop: str, config: Any
) -> None:
    in_torch, in_jax = modules
    model = partial(in_torch, parameters(model_config), config=model_config)
    made = getattr(decoding, loop)(model, PROMPTS, EXAMPLES, config=config, seed=1)
    assert torch.equal(made[:, :4], PROMPTS) and made.shape == (2, 10) and not bool((made == MASK).any())
    with jax.enable_x64(True):
        twin = partial(in_jax, to_jax(parameters(model_config)), config=model_config)
        assert getattr(jax_decoding, loop)(twin, *to_jax([PROMPTS, EXAMPLES]), config=config, seed=1).tolist() == made.tolist()
