"""What parameters of the text-latent MMDiT are before training, by the ends of their names, for both frameworks.

Source: Joshua-Zhang-Jiaquan/LGDLM latentDLM_mmdit/models/multimodal_mmdit.py, _init_weights; mmdit 0.3.0 and hyper-connections
0.4.11 (PyPI), mHCv2.py.
"""

from collections.abc import Mapping

CONSTANTS = {
    "mmdit.norms.0.g": 1.0,
    "mmdit.norms.1.g": 1.0,
    "projection.1.weight": 1.0,
    "projection.1.bias": 0.0,
    "to_cond.2.weight": 0.0,
    "to_post_branch_gammas.2.weight": 0.0,
    "to_post_branch_gammas.2.bias": 1.0,
    "norm.gamma": 0.0,
    "dynamic_alpha_fn": 0.0,
    "dynamic_beta_fn": 0.0,
    "static_beta": 1.0,
    "_scale": 0.01,
    "text_head.bias": 0.0,
    "text_head_clusters.bias": 0.0,
    "latent_head.3.bias": 0.0,
}
DEVIATIONS = {  # of what is normal
    "token_embed.weight": 1.0,
    "position_embed": 0.02,
    "text_head.weight": 0.02,
    "text_head_clusters.weight": 0.02,
    "latent_head.3.weight": 0.02,
}
SCALE_AND_SHIFT = "to_cond.2.bias"  # of an adaptive norm: a half of 1, a half of 0
STATIC_ALPHA = "static_alpha"  # which stream is read, one that is drawn, and the identity


def of_name(table: Mapping[str, float], name: str) -> float | None:
    """Return what a table has for a parameter, if it has anything."""
    return next((value for end, value in table.items() if name.endswith(end)), None)
