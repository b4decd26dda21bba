"""The text-latent MMDiT of LGDLM, and its published sizes."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class TextLatentMMDiTConfig:
    """A transformer on the tokens of a text and one latent vector; names as in LGDLM's MultimodalMMDiT and its configurations.

    Options that the public class takes and does not use (`n_heads`, `qk_rmsnorm`) are no fields; nor is `dropout`, since the
    model is as at inference.

    Attributes:
        vocab_size: Rows of the table of tokens. The public class makes them of the tokenizer's tokens and the clusters, together
            rounded up to a multiple of 128; this is what it arrives at.
        latent_dim: Numbers of the latent vector.
        cluster_size: Clusters of tokens, which have ids of their own; with any there is a second head on the text's tokens, with
            as many logits as the first.
        hidden_size: Width of a token.
        n_blocks: Number of blocks.
        cond_dim: Width of the vector that steers the blocks.
        max_seq_len: Tokens that a text has at most.
        num_residual_streams: Copies of the residual stream that each connection mixes anew; at least 2.

    Raises:
        ValueError: A size is not positive.

    Source: Joshua-Zhang-Jiaquan/LGDLM latentDLM_mmdit/models/multimodal_mmdit.py; lucidrains/mmdit, MMDiT of several modalities.
    """

    vocab_size: int = 30592
    latent_dim: int = 32
    cluster_size: int = 0
    hidden_size: int = 1024
    n_blocks: int = 24
    cond_dim: int = 1024
    max_seq_len: int = 4096
    num_residual_streams: int = 2

    def __post_init__(self) -> None:
        for name in ("vocab_size", "latent_dim", "hidden_size", "n_blocks", "cond_dim", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.cluster_size < 0:
            raise ValueError(f"cluster_size must not be negative, got {self.cluster_size}")
        if self.num_residual_streams < 2:
            raise ValueError(f"num_residual_streams must be at least 2, got {self.num_residual_streams}")

    @property
    def cluster_logits_size(self) -> int:
        """Logits of a token by the head of clusters: as many as of the other head, or none without clusters."""
        return self.vocab_size if self.cluster_size else 0


TEXT_LATENT_MMDIT_PRESETS: Mapping[str, TextLatentMMDiTConfig] = MappingProxyType(
    {
        "smoke": TextLatentMMDiTConfig(vocab_size=8192, hidden_size=256, n_blocks=2, cond_dim=256, max_seq_len=128),
        "cluster": TextLatentMMDiTConfig(),  # 30,522 tokens of BERT, rounded up
    }
)
