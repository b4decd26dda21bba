"""What random draws are for: the `purpose` of each kind in `random.py`, so that no two kinds of a run share numbers.

The models count down from the last one, 2**32 - 1, for their initial weights.
"""

TRAINING_NOISE = 0
TRAINING_TIMES = 1
LABEL_DROPOUT = 2
SAMPLING_NOISE = 3
UPCYCLING = 4
SAMPLER_STEP_NOISE = 5
TOKEN_DRAWS = 6
PLACE_DRAWS = 7
LATENT_NOISE = 8
NOISE_OFFSET = 9
INPUT_PERTURBATION = 10
DATA_ORDER = 11
PSEUDO_TOKENS = 12
CYCLE_NOISE = 13
CYCLE_TIMES = 14
ROUTER_NOISE = 20
MASK_TIMES = 24
MASKED_TOKENS = 25
