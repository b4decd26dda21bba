"""A token of each row of logits and how sure the model is of it, in one read of logits and draws.

A vocabulary is wide and the rows of a block are few, so a row is cut into tiles of columns, a program each. A tile's program
reads its logits and draws once and writes the best score and its token, the two highest logits, the sum of exponentials and, for
an entropy, the sum of exponentials times logits: 24 bytes for 4096 columns. A second kernel, of a program for each row, puts the
tiles together and reads the chosen logit again. Both are bound by memory: 6 bytes for each bfloat16 logit with its draw, 2
without.

Logits and draws are addressed by their strides. How a row is cut is decided by the vocabulary alone: a row's bits do not depend
on its batch.
"""

import torch
import triton
import triton.language as tl

from gaugeblock.optimized.triton.arithmetic import divide
from gaugeblock.optimized.triton.launch import device_of, reject_float64, require_triton_device
from gaugeblock.optimized.triton.topk import keys_of
from gaugeblock.reference import validation
from gaugeblock.reference.configs import TokenConfidence

# 16 elements of logits and of draws a thread in 8 warps; 38 programs for each row of 151936 tokens.
BLOCK_COLUMNS = 4096
FIELDS = tl.constexpr(4)  # of a tile: the two highest logits, the sum of exponentials, and that times logits


@triton.jit
def _draw_of_tiles(
    logits_ptr, uniforms_ptr, keys_ptr, ids_ptr, sums_ptr, vocabulary_size, temperature,
    row_stride, column_stride, uniforms_row_stride, uniforms_column_stride,
    CONFIDENCE: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lanes = tl.arange(0, BLOCK_COLUMNS)[None, :]
    columns = tile.to(tl.int64) * BLOCK_COLUMNS + lanes
    exists = columns < vocabulary_size
    pointers = logits_ptr + row * row_stride + columns * column_stride
    logits = tl.load(pointers, mask=exists, other=float("-inf")).to(tl.float32)
    scores = logits
    if uniforms_ptr is not None:
        draws = tl.load(uniforms_ptr + row * uniforms_row_stride + columns * uniforms_column_stride, mask=exists, other=0.5).to(
            tl.float32
        )
        scores = divide(logits, tl.full([1, 1], temperature, tl.float32)) - tl.log(-tl.log(draws))
    keys = keys_of(scores, exists)
    best = tl.argmax(keys, axis=1)[:, None]
    place = row * tl.num_programs(1) + tile + tl.arange(0, 1)[:, None]
    tl.store(keys_ptr + place, tl.max(keys, axis=1)[:, None])
    tl.store(ids_ptr + place, tile * BLOCK_COLUMNS + best)

    highest = tl.max(logits, axis=1)[:, None]
    shifted = tl.where(logits == float("-inf"), float("-inf"), logits - highest)  # and not NaN where all are -inf
    exponentials = tl.exp(shifted)
    tl.store(sums_ptr + place * FIELDS, highest)
    tl.store(sums_ptr + place * FIELDS + 2, tl.sum(exponentials, axis=1)[:, None])
    if CONFIDENCE == "margin":
        others = tl.where(lanes == tl.argmax(logits, axis=1)[:, None], float("-inf"), logits)
        tl.store(sums_ptr + place * FIELDS + 1, tl.max(others, axis=1)[:, None])
    if CONFIDENCE == "negative_entropy":
        weighted = tl.where(exponentials == 0, 0.0, exponentials * shifted)
        tl.store(sums_ptr + place * FIELDS + 3, tl.sum(weighted, axis=1)[:, None])


@triton.jit
def _choice_of_rows(
    logits_ptr, keys_ptr, ids_ptr, sums_ptr, token_ids_ptr, confidences_ptr, row_stride, column_stride,
    num_tiles: tl.constexpr, CONFIDENCE: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)[:, None]
    tiles = tl.arange(0, BLOCK_TILES)[None, :]
    exists = tiles < num_tiles
    places = row * num_tiles + tiles
    keys = tl.load(keys_ptr + places, mask=exists, other=-(2**31))
    token = tl.load(ids_ptr + row * num_tiles + tl.argmax(keys, axis=1)[:, None])
    tl.store(token_ids_ptr + row, token.to(tl.int64))

    highs = tl.load(sums_ptr + places * FIELDS, mask=exists, other=float("-inf"))
    highest = tl.max(highs, axis=1)[:, None]
    shifts = highs - highest
    shares = tl.exp(shifts)
    totals = tl.load(sums_ptr + places * FIELDS + 2, mask=exists, other=0.0)
    total = tl.sum(tl.where(shares == 0, 0.0, shares * totals), axis=1)[:, None]
    if CONFIDENCE == "probability":
        chosen = tl.load(logits_ptr + row * row_stride + token.to(tl.int64) * column_stride).to(tl.float32)
        confidence = divide(tl.exp(chosen - highest), total)
    elif CONFIDENCE == "margin":
        seconds = tl.load(sums_ptr + places * FIELDS + 1, mask=exists, other=float("-inf"))
        seconds = tl.where(tiles == tl.argmax(highs, axis=1)[:, None], seconds, highs)
        confidence = divide(1.0 - tl.exp(tl.max(seconds, axis=1)[:, None] - highest), total)
    else:
        weighted = tl.load(sums_ptr + places * FIELDS + 3, mask=exists, other=0.0)
        weighted = tl.where(shares == 0, 0.0, shares * (weighted + shifts * totals))
        confidence = divide(tl.sum(weighted, axis=1)[:, None], total) - tl.log(total)
    tl.store(confidences_ptr + row, confidence)


def draw_tokens(
    logits: torch.Tensor, uniforms: torch.Tensor | None, *, temperature: float, confidence: TokenConfidence
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a token of each row and say how sure the model is: `reference.torch.token_choices.draw_tokens`, in one read.

    Args:
        logits: [num_rows, vocabulary_size], bfloat16, float16 or float32; any strides. -inf forbids a token.
        uniforms: [num_rows, vocabulary_size], float32 in [0, 1), any strides; None at temperature 0, where it is not read.
        temperature: 0 or more.
        confidence: "probability", "margin" or "negative_entropy", all without temperature and draw.

    Returns:
        token_ids: [num_rows], int64; of equal scores the lowest id.
        confidences: [num_rows], float32.

    Raises:
        TypeError: An array is not of the dtype above, or `temperature` is not a number.
        ValueError: A shape or device is wrong, a value is out of its range, uniforms are missing, or Triton cannot run on the
            device.

    Source: `gaugeblock.reference.torch.token_choices.draw_tokens`.
    """
    validation.draw_tokens(logits, uniforms, temperature, confidence)
    reject_float64("logits", logits)
    require_triton_device("logits", logits)
    num_rows, vocabulary_size = logits.shape
    block_columns = min(BLOCK_COLUMNS, triton.next_power_of_2(vocabulary_size))
    num_tiles = triton.cdiv(vocabulary_size, block_columns)
    token_ids = logits.new_empty(num_rows, dtype=torch.int64)
    confidences = logits.new_empty(num_rows, dtype=torch.float32)
    if not num_rows:
        return token_ids, confidences
    keys, ids = logits.new_empty((2, num_rows, num_tiles), dtype=torch.int32)
    sums = logits.new_empty((num_rows, num_tiles, FIELDS.value), dtype=torch.float32)
    draws = uniforms if temperature > 0 else None
    with device_of(logits):
        _draw_of_tiles[(num_rows, num_tiles)](
            logits, draws, keys, ids, sums, vocabulary_size, float(temperature),
            *logits.stride(), *((0, 0) if draws is None else draws.stride()),
            CONFIDENCE=confidence, BLOCK_COLUMNS=block_columns, num_warps=max(1, block_columns // 512),
        )  # fmt: skip
        _choice_of_rows[(num_rows,)](
            logits, keys, ids, sums, token_ids, confidences, *logits.stride(),
            num_tiles=num_tiles, CONFIDENCE=confidence, BLOCK_TILES=triton.next_power_of_2(num_tiles), num_warps=1,
        )  # fmt: skip
    return token_ids, confidences
