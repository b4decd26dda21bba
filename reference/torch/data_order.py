"""In which order a training run takes its examples: a function of its seed and step, so that a saved run needs to keep no place.

Examples are counted 0 .. num_examples - 1. A run goes over all of them again and again, each time in another order; a batch may
end one pass and begin the next. An order is never written down: where an example stands in it is computed for it alone.

Shapes: B batch_size.
"""

import torch

from gaugeblock.reference import purposes, validation
from gaugeblock.reference.torch import random

ROUNDS = 8
WORD = 0xFFFFFFFF


def batch_ids(step: int, *, batch_size: int, num_examples: int, seed: int) -> torch.Tensor:
    """Return which examples the step takes: those at batch_size * step and the next places of all passes in a row.

    Args:
        step: The updates made so far.
        batch_size: Of all ranks together, each of which takes its part of the ids.
        num_examples: In 1 .. 2**32.
        seed: Of the run, in 0 .. 2**64 - 1.

    Returns:
        [batch_size], int64.

    Raises:
        TypeError: An argument is no integer.
        ValueError: An argument is out of its range.
    """
    validation.batch_ids(step, batch_size, num_examples, seed)
    places_B = torch.arange(batch_size) + step * batch_size
    return shuffled(places_B % num_examples, places_B // num_examples, num_examples=num_examples, seed=seed)


def shuffled(places: torch.Tensor, passes: torch.Tensor, *, num_examples: int, seed: int) -> torch.Tensor:
    """Return which examples stand at these places of these passes, both [B]; a permutation of all examples for each pass.

    It permutes 2**(2 * half) numbers, as few as hold all examples, and goes on from what is none of them until it is one.

    Source: Luby and Rackoff, How to Construct Pseudorandom Permutations from Pseudorandom Functions (1988), section 3; Black and
    Rogaway, Ciphers with Arbitrary Finite Domains (2002), section 3, for the going on.
    """
    half = max(1, -(-(num_examples - 1).bit_length() // 2))
    ids_B = _permuted(places, passes, half, seed)
    while (ids_B >= num_examples).any():
        ids_B = torch.where(ids_B >= num_examples, _permuted(ids_B, passes, half, seed), ids_B)
    return ids_B


def _permuted(numbers: torch.Tensor, passes: torch.Tensor, half: int, seed: int) -> torch.Tensor:
    """Permute numbers of 2 * half bits: in each round, one half is changed by a draw for the other."""
    most = (1 << half) - 1
    left_B, right_B = numbers >> half, numbers & most
    for index in range(ROUNDS):
        key_B = ((passes << half) + right_B) & WORD
        drawn_B = random.bits((), seed=seed, step=index, example=key_B, purpose=purposes.DATA_ORDER)
        left_B, right_B = right_B, left_B ^ (drawn_B & most)
    return left_B << half | right_B
