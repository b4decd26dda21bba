"""Selection inside a kernel: the lanes of a row with the highest scores, whatever the scores are.

Scores are compared as integers, their *keys*. Floats will not do: their maxima skip NaN, and -inf, the
natural mark of a lane that is taken or only padding, is also a score. So in any row the lanes that are chosen
exist and differ.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def key_dtype(score_dtype):
    """Return the integers that hold the keys of scores: int64 for float64, int32 for float32."""
    return tl.int64 if score_dtype == tl.float64 else tl.int32


@triton.constexpr_function
def highest_key(dtype):
    """Return the largest integer, the key of NaN."""
    return 2 ** (dtype.primitive_bitwidth - 1) - 1


@triton.constexpr_function
def no_key(dtype):
    """Return the smallest integer, which is no score's key: it marks what cannot be chosen."""
    return -(2 ** (dtype.primitive_bitwidth - 1))


@triton.jit
def keys_of(scores, selectable):
    """Map scores to integers of the same order; -0 equals +0 and NaN is above all, as in `torch.topk`."""
    keys = tl.where(scores == 0, 0.0, scores).to(key_dtype(scores.dtype), bitcast=True)
    keys = tl.where(keys < 0, keys ^ highest_key(keys.dtype), keys)
    keys = tl.where(scores != scores, highest_key(keys.dtype), keys)
    return tl.where(selectable, keys, no_key(keys.dtype))


@triton.jit
def scores_of(keys, dtype: tl.constexpr):
    """Invert `keys_of`."""
    return tl.where(keys < 0, keys ^ highest_key(keys.dtype), keys).to(dtype, bitcast=True)


@triton.jit
def choose_lanes(keys, count: tl.constexpr, BLOCK_COUNT: tl.constexpr):
    """Return the lanes of the `count` highest keys of each row, of equal ones the lowest first.

    keys: [BLOCK_ROWS, BLOCK_LANES]. Returns int32 [BLOCK_ROWS, BLOCK_COUNT], 0 from column `count` on.
    """
    lanes = tl.arange(0, keys.shape[1])[None, :]
    columns = tl.arange(0, BLOCK_COUNT)[None, :]
    chosen = tl.full([keys.shape[0], BLOCK_COUNT], 0, tl.int32)
    for column in range(count):
        best = tl.argmax(keys, axis=1)[:, None]
        chosen = tl.where(columns == column, best, chosen)
        keys = tl.where(lanes == best, no_key(keys.dtype), keys)
    return chosen
