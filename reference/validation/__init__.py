"""What a call must look like: the checks at the public entrance of every operation, for any array framework.

One function per operation, with the operation's own arguments. Each returns None, or raises

- `TypeError` where an argument is not an array, has the wrong dtype, or is an option that must be an integer;
- `ValueError` where a rank, a size, a device or a value is wrong;

and the message begins with the argument's name. Only `.shape`, `.dtype` and `.device` are read, so a check
starts no kernel; functions whose names end in `_in_range` alone read values, on a GPU only within `gpu_values_checked`.
"""

from gaugeblock.reference.validation.arrays import FLOATING, INTEGER, dtype_name, gpu_values_checked, random_draw, state_entries
from gaugeblock.reference.validation.auxiliary_losses import (
    correction_bias_update,
    expert_load,
    load_balancing_loss,
    router_z_loss,
    routing_entropy,
    sequence_balance_loss,
)
from gaugeblock.reference.validation.biased_moe_layers import gpt_oss_moe, upcycled_gpt2_moe
from gaugeblock.reference.validation.capacity_routers import expert_choice, gshard_top2, switch_top1
from gaugeblock.reference.validation.clip_text import clip_input_ids_in_range, clip_position_ids, clip_text
from gaugeblock.reference.validation.decoding import decoding
from gaugeblock.reference.validation.dispatch import (
    align_to_blocks,
    permute,
    places_in_range,
    routed_rows_in_range,
    sort_by_expert,
    unpermute,
)
from gaugeblock.reference.validation.dit import class_labels_in_range, dit, dit_block, position_table
from gaugeblock.reference.validation.dit_moe import dit_moe_config
from gaugeblock.reference.validation.dit_moe_layers import dit_moe
from gaugeblock.reference.validation.experts import (
    expert_ids_in_range,
    fused_geglu,
    fused_gelu_mlp,
    fused_swiglu,
    fused_swiglu_oai,
    gated_shared_swiglu,
    shared_swiglu,
)
from gaugeblock.reference.validation.flux import flux, pack_latents, unpack_latents
from gaugeblock.reference.validation.gated_activations import geglu, swiglu
from gaugeblock.reference.validation.grouped_moe_layers import deepseek_v2_moe, deepseek_v3_moe
from gaugeblock.reference.validation.hyper_connections import hyper_connection
from gaugeblock.reference.validation.input_scaled_moe_layers import llama4_moe
from gaugeblock.reference.validation.language_models import (
    dream,
    language_model_config,
    llada,
    sdar,
    sdar_cached,
    sdar_moe,
    sdar_training,
)
from gaugeblock.reference.validation.layers import (
    gated_residual,
    gated_residual_layer_norm_modulate,
    gelu_mlp,
    layer_norm_modulate,
    patchify,
    self_attention,
    sincos_position_embedding,
    timestep_embedding,
    unpatchify,
)
from gaugeblock.reference.validation.mmdit import mmdit, mmdit_block
from gaugeblock.reference.validation.moe_layers import built_layer, mixtral_moe, qwen2_moe, require_layer
from gaugeblock.reference.validation.noise_schedules import (
    cumulative_alphas,
    diffusion_schedule,
    dynamic_mu,
    edm_schedule,
    flow_schedule,
    schedule_config,
    shift_sigmas,
)
from gaugeblock.reference.validation.noisy_routers import noise_std_at, noisy_topk, ste_topk
from gaugeblock.reference.validation.norms import group_norm, layer_norm_affine, rms_norm
from gaugeblock.reference.validation.objectives import (
    rectified_flow,
    rectified_flow_min_snr_weights,
    rectified_flow_prediction,
    rectified_flow_times,
    rectified_flow_weights,
    velocity_sign,
)
from gaugeblock.reference.validation.predictions import add_noise, convert_prediction, min_snr_weights, prediction_target
from gaugeblock.reference.validation.quantization import quantize_token_groups
from gaugeblock.reference.validation.quantized_experts import fused_swiglu_fp8, fused_swiglu_int8
from gaugeblock.reference.validation.rotary import qk_norm_rotary, rotary_table, rotate
from gaugeblock.reference.validation.routers import (
    biased_softmax_topk,
    grouped_sigmoid_topk,
    grouped_softmax_topk,
    hash_router,
    sigmoid_input_scaling,
    sigmoid_topk,
    softmax_topk,
    sparsemixer,
    token_ids_in_range,
    topk_softmax,
    zero_expert_topk,
)
from gaugeblock.reference.validation.sampler_steps import (
    ddim_step,
    ddpm_step,
    dynamic_threshold,
    edm_step,
    euler_step,
    flow_step,
    heun_predictor,
    heun_step,
)
from gaugeblock.reference.validation.samplers import churned_sample, euler_sample, sample, starting_noise
from gaugeblock.reference.validation.soft_routers import sinkhorn, soft_moe
from gaugeblock.reference.validation.text_latent_mmdit import text_latent_mmdit, text_latent_tokens_in_range
from gaugeblock.reference.validation.timestep_sampling import biased_timesteps, logit_normal_times, mode_times, timestep_indices
from gaugeblock.reference.validation.token_choices import draw_tokens, filter_logits
from gaugeblock.reference.validation.train_block_diffusion import block_diffusion_batch, block_diffusion_step
from gaugeblock.reference.validation.train_cycle_vae import cycle_vae_batch, cycle_vae_step
from gaugeblock.reference.validation.train_image_diffusion import (
    image_diffusion_batch,
    image_diffusion_batch_on_texts,
    image_diffusion_step,
    image_diffusion_step_on_texts,
)
from gaugeblock.reference.validation.train_moe_lm import moe_lm_batch, moe_lm_step
from gaugeblock.reference.validation.train_stable_diffusion import (
    stable_diffusion_batch,
    stable_diffusion_batch_on_embeddings,
    stable_diffusion_step,
    stable_diffusion_step_on_embeddings,
)
from gaugeblock.reference.validation.training import batch_ids, training_state
from gaugeblock.reference.validation.unet import unet, unet_text_time
from gaugeblock.reference.validation.unmasking import choose_places, dream_places, quotas, random_remasking, unmasking_step
from gaugeblock.reference.validation.upcycled_gpt2 import gpt2_input_ids_in_range, upcycled_gpt2, upcycled_gpt2_config
from gaugeblock.reference.validation.upcycling import adamw_of_used_experts, upcycle
from gaugeblock.reference.validation.vae import vae_decode, vae_encode, vae_latents, vae_sample
