"""Frozen configurations, shared by the PyTorch and the JAX references, with presets of published models.

They are imported from here, wherever they stand: the cases of the gate are made of these classes.
"""

from gaugeblock.reference.configs.block_diffusion import BlockDiffusionConfig
from gaugeblock.reference.configs.clip_text import CLIP_TEXT_PRESETS, LEGACY_EOS_TOKEN_ID, CLIPTextConfig
from gaugeblock.reference.configs.cycle_vae import CycleVAEConfig
from gaugeblock.reference.configs.decoding import DreamDecodingConfig, LLaDADecodingConfig, SDARDecodingConfig
from gaugeblock.reference.configs.dit import DIT_PRESETS, DiTConfig
from gaugeblock.reference.configs.dit_moe import DIT_MOE_PRESETS, DiTMoEModelConfig
from gaugeblock.reference.configs.dit_moe_layer import DiTMoEConfig
from gaugeblock.reference.configs.flux import FLUX_PRESETS, FluxConfig
from gaugeblock.reference.configs.image_diffusion import ClassModelConfig, ImageDiffusionConfig, ImageModelConfig, TextModelConfig
from gaugeblock.reference.configs.language_models import (
    DREAM_PRESETS,
    LLADA_PRESETS,
    SDAR_MOE_PRESETS,
    SDAR_PRESETS,
    DreamConfig,
    LanguageModelConfig,
    LLaDAConfig,
    SDARConfig,
    SDARMoEConfig,
)
from gaugeblock.reference.configs.mmdit import MMDIT_PRESETS, MMDiTConfig
from gaugeblock.reference.configs.moe_lm import MOE_LM_PRESETS, MoELMConfig
from gaugeblock.reference.configs.options import (
    E4M3_MAX,
    IGNORED_LABEL,
    LARGEST_CHURN,
    SMALLEST_WEIGHT_SUM,
    BetaSchedule,
    ClipActivation,
    ComputeDType,
    CycleVAEMode,
    DreamAlgorithm,
    FinalSigma,
    FlowStart,
    FlowWeighting,
    GeluApproximation,
    LatentTimeMode,
    LearningRateSchedule,
    LossMean,
    MaskTimes,
    MaskWeighting,
    Optimizer,
    PlaceStrategy,
    PredictionType,
    PseudoTokens,
    QkNorm,
    Remasking,
    RotaryPairs,
    ScoreFunction,
    SecondExpertPolicy,
    SigmaSchedule,
    SnrOfTimes,
    TimeShift,
    TimestepBias,
    TimestepSampling,
    TimestepSpacing,
    TokenConfidence,
    VarianceType,
    VelocitySign,
)
from gaugeblock.reference.configs.schedules import (
    DIFFUSION_SCHEDULE_PRESETS,
    EDM_SCHEDULE_PRESETS,
    FLOW_SCHEDULE_PRESETS,
    DiffusionScheduleConfig,
    EDMScheduleConfig,
    FlowScheduleConfig,
)
from gaugeblock.reference.configs.stable_diffusion import StableDiffusionConfig
from gaugeblock.reference.configs.text_latent_mmdit import TEXT_LATENT_MMDIT_PRESETS, TextLatentMMDiTConfig
from gaugeblock.reference.configs.training import EMAConfig, TrainingConfig
from gaugeblock.reference.configs.unet import UNET_PRESETS, UNetBlock, UNetConfig
from gaugeblock.reference.configs.upcycled_gpt2 import UPCYCLED_GPT2_PRESETS, UpcycledGPT2Config
from gaugeblock.reference.configs.vae import VAE_PRESETS, VAEConfig
