"""The counter-based generator: the published vectors, the same numbers in all frameworks, independence."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are decorated

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from gaugeblock.optimized.triton import random as triton_random
from gaugeblock.reference.jax import random as jax_random
from gaugeblock.reference.torch import random as torch_random

KEYS = [
    {"seed": 0, "step": 0, "purpose": 0},
    {"seed": 2**40 + 5, "step": 1, "purpose": 16},
    {"seed": 2**64 - 1, "step": 2**32 - 1, "purpose": 2**32 - 1},
]
EXAMPLES = torch.tensor([[0, 3, 3], [2**32 - 1, 2**31, 7]])


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, words):
    counter, key, words = ([int(word, 16) for word in text.split()] for text in (counter, key, words))
    assert torch_random.philox_4x32(torch.tensor(counter), torch.tensor(key)).tolist() == words
    arrays = (jnp.array(counter, jnp.uint32), jnp.array(key, jnp.uint32))
    assert jax.jit(jax_random.philox_4x32)(*arrays).tolist() == words


@pytest.mark.parametrize("key", KEYS, ids=["zeros", "mixed", "largest"])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5, 90)], ids=str)
def test_torch_jax_and_triton_draw_the_same_bits(shape, key):
    jax_examples = jnp.asarray(EXAMPLES.numpy().astype(np.uint32))
    for draw in ("bits", "uniform", "normal"):
        expected = getattr(torch_random, draw)(shape, example=EXAMPLES, **key).numpy()
        assert expected.shape == (*EXAMPLES.shape, *shape)
        np.testing.assert_array_equal(getattr(jax_random, draw)(shape, example=jax_examples, **key), expected)
        if draw != "uniform":
            actual = getattr(triton_random, draw)(shape, example=EXAMPLES, **key).numpy()
            np.testing.assert_array_equal(actual, expected, strict=True)


def test_jax_draws_the_same_normals_under_jit_with_a_traced_step():
    def draw(step, example):
        return jax_random.normal((4, 3), seed=7, step=step, example=example, purpose=1)

    actual = jax.jit(draw)(jnp.int32(5), jnp.arange(6))
    expected = torch_random.normal((4, 3), seed=7, step=5, example=torch.arange(6), purpose=1)
    np.testing.assert_array_equal(actual, expected, strict=True)


def test_tritons_randint4x_is_the_draw_at_zero():
    @triton.jit
    def kernel(out_ptr, seed):
        block = tl.arange(0, 16)
        words = tl.randint4x(seed, block)
        for word in tl.static_range(4):
            tl.store(out_ptr + 4 * block + word, words[word].to(tl.uint32))

    out = torch.empty(64, dtype=torch.int64)
    kernel[(1,)](out, 2**40 + 5)
    expected = torch_random.bits((64,), seed=2**40 + 5, step=0, example=0, purpose=0)
    assert out.tolist() == expected.tolist()


def test_a_draw_depends_on_its_own_example_only():
    key = {"seed": 1, "step": 2, "purpose": 3}
    together = torch_random.normal((5,), example=torch.tensor([8, 6, 7]), **key)
    alone = [torch_random.normal((5,), example=example, **key) for example in (8, 6, 7)]
    assert together.tolist() == torch.stack(alone).tolist()


def test_a_longer_draw_begins_with_the_shorter_one():
    key = {"seed": 1, "step": 2, "example": 3, "purpose": 4}
    assert torch_random.normal((9,), **key)[:6].tolist() == torch_random.normal((6,), **key).tolist()


@pytest.mark.parametrize("name", ["seed", "step", "example", "purpose"])
def test_each_part_of_the_key_gives_another_draw(name):
    key = {"seed": 1, "step": 2, "example": 3, "purpose": 4}
    assert not torch_random.bits((1000,), **key).eq(torch_random.bits((1000,), **key | {name: 9})).any()


def test_normals_have_the_moments_of_the_normal_distribution():
    z = torch_random.normal((2**20,), seed=0, step=0, example=0, purpose=0).double()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        standard_error = (variance / z.numel()) ** 0.5
        assert abs((z**power).mean() - moment) < 5 * standard_error
    pairs = z.unflatten(0, (-1, 2))
    assert abs(pairs.prod(dim=1).mean()) < 5 / len(pairs) ** 0.5


def test_uniforms_are_multiples_of_their_resolution_below_one():
    u = torch_random.uniform((2**20,), seed=0, step=0, example=0, purpose=0)
    assert u.min() >= 0 and u.max() < 1 and (u * 2**24).frac().count_nonzero() == 0
    assert abs(u.double().mean() - 0.5) < 5 / (12 * u.numel()) ** 0.5


@pytest.mark.parametrize("random", [torch_random, jax_random], ids=["torch", "jax"])
@pytest.mark.parametrize(
    ("name", "bad", "error"),
    [
        ("seed", -1, ValueError),
        ("seed", 2**64, ValueError),
        ("step", 2**32, ValueError),
        ("step", 0.5, TypeError),
    ],
)
def test_a_key_out_of_range_is_rejected(random, name, bad, error):
    key = {"seed": 0, "step": 0, "example": 0, "purpose": 0} | {name: bad}
    with pytest.raises(error, match=f"^{name} must be"):
        random.bits((4,), **key)
