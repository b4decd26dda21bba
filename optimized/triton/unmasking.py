"""Which masked places are decided, in one kernel: no sort, no sum over places that waits for another.

A program has a row. A place's rank is how many masks come before it, found by comparing it with all, some at a time; so are the
entropies before it. Blocks have 4 to 128 places: the work of a sort would be less, its steps are more. It is bound by its launch.
"""

import torch
import triton
import triton.language as tl

from gaugeblock.optimized.triton.launch import device_of, reject_float64, require_triton_device
from gaugeblock.reference import validation
from gaugeblock.reference.configs import PlaceStrategy

# Comparisons at a time: 16 a thread. With 64 they spill, of 128 places on sm_90.
TILE = 2048
LEAST = tl.constexpr(-3.4028234663852886e38)  # the lowest number: a mask of no confidence still comes before what is no mask


@triton.jit
def _load_row(confidence_ptr, masked_ptr, places, exists, confidence_stride, masked_stride):
    """Return confidences, of which NaN and -inf are the least number, and where masks are."""
    confidence = tl.load(confidence_ptr + places * confidence_stride, mask=exists, other=0.0).to(tl.float32)
    confidence = tl.where(confidence >= LEAST, confidence, LEAST)
    return confidence, tl.load(masked_ptr + places * masked_stride, mask=exists, other=0) != 0


@triton.jit
def _choose_places(
    confidence_ptr, masked_ptr, counts_ptr, accepted_ptr, num_places, bound,
    row_stride, place_stride, masked_row_stride, masked_place_stride, counts_stride,
    STRATEGY: tl.constexpr, BLOCK_PLACES: tl.constexpr, BLOCK_OTHERS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    confidence_ptr += row * row_stride
    masked_ptr += row * masked_row_stride
    places = tl.arange(0, BLOCK_PLACES)[:, None].to(tl.int64)
    exists = places < num_places
    confidence, is_masked = _load_row(confidence_ptr, masked_ptr, places, exists, place_stride, masked_place_stride)
    ranks = tl.full([BLOCK_PLACES, 1], 0, tl.int32)
    sums = -confidence
    for first in range(0, num_places, BLOCK_OTHERS):
        others = first + tl.arange(0, BLOCK_OTHERS)[None, :].to(tl.int64)
        theirs, others_masked = _load_row(
            confidence_ptr, masked_ptr, others, others < num_places, place_stride, masked_place_stride
        )
        ahead = others < places
        if STRATEGY != "sequential":
            ahead = (theirs > confidence) | ((theirs == confidence) & ahead)
        ahead &= others_masked
        ranks += tl.sum(ahead.to(tl.int32), axis=1)[:, None]
        if STRATEGY == "entropy_bounded":  # others have no use for them
            sums += tl.sum(tl.where(ahead, -theirs, 0.0), axis=1)[:, None]

    count = tl.load(counts_ptr + row * counts_stride)
    if STRATEGY == "entropy_bounded":
        count = tl.maximum(tl.sum((is_masked & (sums < bound)).to(tl.int32)), 1)
    accepted = ranks < count
    if STRATEGY == "dynamic":
        # fewer than the counts best are among those, and of as many or more those are a part
        accepted |= confidence > bound
    tl.store(accepted_ptr + row * num_places + places, accepted & is_masked, mask=exists)


def choose_places(
    confidence: torch.Tensor, is_masked: torch.Tensor, counts: torch.Tensor, *, strategy: PlaceStrategy, bound: float
) -> torch.Tensor:
    """Choose the masks that are decided now: `reference.torch.unmasking.choose_places`, in one kernel.

    Args:
        confidence: [batch_size, places], bfloat16, float16 or float32, any strides; a NaN is the least.
        is_masked: [batch_size, places], bool, any strides.
        counts: [batch_size], integer, any stride.
        strategy: "static", "dynamic", "sequential" or "entropy_bounded".
        bound: A confidence, or an entropy; rounded to float32.

    Returns:
        [batch_size, places], bool.

    Raises:
        TypeError: An array is not of the dtype above, or `bound` is not a number.
        ValueError: Shapes do not fit together, `strategy` is unknown, or Triton cannot run on the device.

    Source: `gaugeblock.reference.torch.unmasking.choose_places`.
    """
    validation.choose_places(confidence, is_masked, counts, strategy, bound)
    reject_float64("confidence", confidence)
    require_triton_device("confidence", confidence)
    batch_size, num_places = confidence.shape
    accepted = torch.empty(confidence.shape, dtype=torch.bool, device=confidence.device)
    if not accepted.numel():
        return accepted
    block_places = triton.next_power_of_2(num_places)
    with device_of(confidence):
        _choose_places[(batch_size,)](
            confidence, is_masked.view(torch.uint8), counts, accepted, num_places, float(bound),
            *confidence.stride(), *is_masked.stride(), *counts.stride(),
            STRATEGY=strategy, BLOCK_PLACES=block_places, BLOCK_OTHERS=min(block_places, max(1, TILE // block_places)),
            num_warps=4,
        )  # fmt: skip
    return accepted
