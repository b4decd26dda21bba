"""Frozen configurations, shared by the PyTorch and the JAX references, with presets of published models.

They are imported from here, wherever they stand: the cases of the gate are made of these classes.
"""

from gaugeblock.reference.configs.dit import DIT_PRESETS, DiTConfig
from gaugeblock.reference.configs.dit_moe_layer import DiTMoEConfig
from gaugeblock.reference.configs.image_diffusion import ImageDiffusionConfig
from gaugeblock.reference.configs.options import (
    E4M3_MAX,
    SMALLEST_WEIGHT_SUM,
    GeluApproximation,
    RotaryPairs,
    ScoreFunction,
    SecondExpertPolicy,
    TimestepSampling,
    VelocitySign,
)
from gaugeblock.reference.configs.unet import UNET_PRESETS, UNetBlock, UNetConfig
