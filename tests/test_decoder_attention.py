"""Attention of language models under masks as a whole, in pieces and by flex_attention: all as the reference's."""

import functools
from dataclasses import replace

import pytest
import torch
from agreement import assert_agree
from test_references import random

from gaugeblock.optimized import decoder_attention, decoder_composition
from gaugeblock.optimized.compiled import block_attention
from gaugeblock.optimized.compiled.decoder_parts import LIBRARY, PARTS
from gaugeblock.optimized.decoder_composition import checked
from gaugeblock.optimized.model_parts import as_it_is
from gaugeblock.reference import validation
from gaugeblock.reference.configs import DreamConfig, LLaDAConfig, SDARConfig, SDARMoEConfig
from gaugeblock.reference.torch import block_masks, dream, llada, sdar
from gaugeblock.reference.torch.attention import attention

# more than one block of flex_attention's tables, and than one piece; heads narrower than it takes
NUM_TOKENS, HEADS, KEY_HEADS, FEATURES = 300, 6, 2, 10
SCALE = FEATURES**-0.5
FLEX = replace(PARTS, block=as_it_is, masks=lambda table: block_attention.BLOCKS)
PIECES = replace(LIBRARY, masks=lambda table: decoder_attention.IN_PIECES)
PLACES = torch.arange(NUM_TOKENS)[None]
IS_REAL = random(3, NUM_TOKENS, seed=1) < 1
IS_REAL[1] = False
SAMPLES = torch.stack([
    torch.zeros(NUM_TOKENS, dtype=torch.int64),
    (random(NUM_TOKENS, seed=2) * 2).long().clamp(min=-1),  # in no order, and padding between
    torch.where(torch.arange(NUM_TOKENS) > 270, -1, torch.arange(NUM_TOKENS) // 70),
])  # fmt: skip
CALLS = {
    "full": ("full_mask", (IS_REAL, IS_REAL), {}),
    "block-causal": ("block_causal_mask", (PLACES, PLACES), {"block_length": 4}),
    "after-a-past": ("block_causal_mask", (PLACES[:, 20:], PLACES), {"block_length": 4}),
    "noisy-clean": ("noisy_clean_mask", (SAMPLES,), {"block_length": 3}),
}
EACH_MASK = pytest.mark.parametrize("name", CALLS)


def heads(num_queries: int, num_keys: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    sizes = ((HEADS, num_queries), (KEY_HEADS, num_keys), (KEY_HEADS, num_keys))
    return [random(3, *each, FEATURES, seed=3 + place).to(dtype) for place, each in enumerate(sizes)]


def expected(query, key, value, mask):
    key, value = (each.repeat_interleave(HEADS // KEY_HEADS, dim=1) for each in (key, value))
    return attention(query, key, value, mask=mask[:, None])


@EACH_MASK
def test_pieces_are_the_whole(name):
    kind, arrays, options = CALLS[name]
    mask = getattr(block_masks, kind)(*arrays, **options)
    cut = decoder_attention.in_pieces(mask)
    assert isinstance(cut, tuple) and len(cut) == -(-mask.shape[1] // decoder_attention.PIECE)
    leaves = [each.requires_grad_() for each in heads(*mask.shape[1:])]
    found, known = decoder_attention.attention(*leaves, cut, scale=SCALE), expected(*leaves, mask)
    cotangent = random(*known.shape, seed=9)
    gradients = [torch.autograd.grad(each, leaves, cotangent) for each in (found, known)]
    actual, wanted = ({"out": out.detach(), **dict(zip("qkv", each, strict=True))}
                      for out, each in zip((found, known), gradients, strict=True))  # fmt: skip
    assert_agree(actual, wanted)
    # a piece has what any of its queries sees, and no more
    first = cut[0].mask.any(dim=0).any(dim=1)[0]
    assert first.all() and len(cut[0].seen) == int(mask[:, : decoder_attention.PIECE].flatten(0, 1).any(dim=0).sum())


def test_queries_of_a_piece_may_see_nothing():
    mask = torch.zeros(2, 2 * decoder_attention.PIECE, 5, dtype=torch.bool)
    mask[:, : decoder_attention.PIECE] = True
    query, key = random(2, 2, mask.shape[1], 4, seed=5), random(2, 1, 5, 4, seed=6)
    out = decoder_attention.attention(query, key, key, decoder_attention.in_pieces(mask), scale=0.5)
    assert not out[:, :, decoder_attention.PIECE :].any() and out[:, :, : decoder_attention.PIECE].all()


def test_masks_are_cut_where_the_host_need_not_wait():
    on_cpu, elsewhere = (torch.empty(1, device=device) for device in ("cpu", "meta"))
    assert LIBRARY.masks(on_cpu) is decoder_attention.IN_PIECES and LIBRARY.masks(elsewhere) is decoder_attention.WHOLE
    assert PARTS.masks(on_cpu) is decoder_attention.WHOLE
    short = block_masks.block_causal_mask(PLACES[:, :9], PLACES[:, :9], block_length=4)
    assert decoder_attention.in_pieces(short) is short


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(block_attention, "_compiled", as_it_is)


@EACH_MASK
def test_rules_of_blocks_are_the_masks(name, uncompiled):
    kind, arrays, options = CALLS[name]
    mask = getattr(block_masks, kind)(*arrays, **options)
    table = getattr(block_attention.BLOCKS, kind)(*arrays, **options)
    places = (torch.arange(size).view(shape) for size, shape in zip(mask.shape, ((-1, 1, 1), (-1, 1), (-1,)), strict=True))
    example, query, key = places
    assert torch.equal(table.mask_mod(example, 0, query, key).expand(mask.shape), mask)
    with torch.no_grad():
        tensors = heads(*mask.shape[1:])
        assert_agree({"out": block_attention.attention(*tensors, table, scale=SCALE)}, {"out": expected(*tensors, mask)})


def test_tables_hide_whole_blocks():
    num_tokens = 1024
    places, samples = torch.arange(num_tokens)[None], torch.zeros(1, num_tokens, dtype=torch.int64)
    tables = (
        block_attention.block_causal_mask(places, places, block_length=4),
        block_attention.noisy_clean_mask(samples, block_length=4),
    )
    # of n * n blocks those before and the diagonal, n / 2 of them more; of noisy and clean, the diagonal once more
    n = num_tokens // 128
    seen = n * (n + 1) / 2, n * (n + 1) + n
    for table, size, number in zip(tables, (n, 2 * n), seen, strict=True):
        assert table.sparsity() == pytest.approx(100 * (1 - number / size**2))


@functools.cache
def model(config_class):
    """A config and random parameters in float64."""
    sizes = {
        "vocab_size": 40, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": HEADS, "mask_token_id": 39,
        "num_key_value_heads": KEY_HEADS, "head_dim": FEATURES, "rms_norm_eps": 1e-3, "rope_theta": 100.0, "block_length": 3,
        "intermediate_size": 10, "moe_intermediate_size": 7, "num_experts": 5, "num_experts_per_tok": 2,
    }  # fmt: skip
    config = config_class(**{name: each for name, each in sizes.items() if name in config_class.__dataclass_fields__})
    shapes = {LLaDAConfig: llada, DreamConfig: dream}.get(config_class, sdar).state_shapes(config)
    return config, {name: random(*shape, seed=seed) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.5)
                    for seed, (name, shape) in enumerate(shapes.items())}  # fmt: skip


IDS = (random(3, NUM_TOKENS, seed=7).abs() * 16).long().clamp(max=38)
NOISY = torch.where(random(3, NUM_TOKENS, seed=8) > 0, IDS, 39)
PAST = tuple(random(2, 3, KEY_HEADS, 270, FEATURES, seed=10 + place) for place in range(2))
MODELS = {
    "llada": (llada.llada, LLaDAConfig, (NOISY, IS_REAL)),
    "dream": (dream.dream, DreamConfig, (NOISY, IS_REAL)),
    "sdar": (sdar.sdar, SDARConfig, (NOISY,)),
    "moe": (sdar.sdar_moe, SDARMoEConfig, (NOISY,)),
    "cached": (sdar.sdar_cached, SDARConfig, (NOISY, *PAST)),
    "training": (sdar.sdar_training, SDARConfig, (NOISY, IDS, SAMPLES)),
}


@pytest.mark.parametrize("parts", [FLEX, PIECES], ids=["flex", "pieces"])
@pytest.mark.parametrize("name", MODELS)
def test_models_agree_with_the_reference(name, parts, uncompiled):
    reference, config_class, arrays = MODELS[name]
    ours = checked(getattr(decoder_composition, reference.__name__), getattr(validation, reference.__name__), parts)
    config, state = model(config_class)
    with torch.no_grad():
        outs = [reference(state, *arrays, config=config), ours(state, *arrays, config=config)]
        known, found = (each if isinstance(each, tuple) else (each,) for each in outs)
        assert_agree(*({str(place): each for place, each in enumerate(out)} for out in (found, known)))
        none = [each[:, :0] if each.ndim == 5 else each[:0] for each in arrays]
        assert len(torch.atleast_1d(as_first(ours(state, *none, config=config)))) == 0


def as_first(out) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.long
@pytest.mark.parametrize(("device", "name"), [("cpu", "block-causal"), ("cuda", "block-causal"), ("cuda", "noisy-clean")])
def test_compiled_by_blocks(device, name):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    kind, arrays, options = CALLS[name]
    # at the second size, torch's code for a CPU, of sizes that are symbols, is not compiled
    for num_examples, num_tokens in ((3, NUM_TOKENS), (2, 260))[: 1 if device == "cpu" else 2]:
        own = [each[:num_examples, :num_tokens].to(device) for each in arrays]
        mask, table = (getattr(each, kind)(*own, **options) for each in (block_masks, block_attention))
        leaves = [each[:num_examples].to(device) for each in heads(*mask.shape[1:], torch.float32)]
        leaves = [each.requires_grad_(device == "cuda") for each in leaves]  # on a CPU flex_attention has no backward
        found, known = block_attention.attention(*leaves, table, scale=SCALE), expected(*(each.double() for each in leaves), mask)
        pairs = {"out": (found, known)}
        if device == "cuda":
            cotangent = random(*known.shape, seed=9).to(device)
            gradients = (torch.autograd.grad(out, leaves, cotangent.to(out.dtype)) for out in (found, known))
            pairs |= dict(zip("qkv", zip(*gradients, strict=True), strict=True))
        for each, other in pairs.values():
            # sums of NUM_TOKENS products in float32 of numbers of the size of 1
            torch.testing.assert_close(each, other.float(), rtol=NUM_TOKENS * 2.0**-24, atol=NUM_TOKENS * 2.0**-24)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@EACH_MASK
def test_compiled_tables_are_the_eager_ones(name):
    kind, arrays, options = CALLS[name]
    eager, fast = (
        getattr(block_attention.BLOCKS, kind)(*(each.to(device) for each in arrays), **options) for device in ("cpu", "cuda")
    )
    assert torch.equal(eager.to_dense(), fast.to_dense().cpu())
