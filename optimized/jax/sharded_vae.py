"""AutoencoderKL in JAX over the ranks of a mesh: the parameters lie there as partition rules say, the rest is left to XLA.

Each rank has some channels between the two convolutions of each residual block, whole groups of the norm there; images are on
every rank. The reference's own text is cut so as it stands: XLA adds the ranks' products up once for each residual block, and
moves nothing else.

    placed = shard_state(state, partition_rules.VAE, mesh)       once
    mean, logvar = encode_of_placed(placed, images, config=config, mesh=mesh)
    out = decode_of_placed(placed, latents, config=config, mesh=mesh)
"""

from functools import partial

import jax
from jax.sharding import Mesh

from gaugeblock.optimized import partition_rules
from gaugeblock.optimized.jax.sharded_models import run_on_ranks
from gaugeblock.reference import validation
from gaugeblock.reference.configs import VAEConfig
from gaugeblock.reference.jax import vae as reference


def encode(state: reference.State, images: jax.Array, *, config: VAEConfig, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.jax.vae.encode`, over the ranks of a mesh; arrays are global.

    Args: as of it; a state that does not lie on the mesh is brought there, the encoder's half of it. And
        mesh: One axis, "ranks", whose size divides norm_num_groups.

    Raises: as it, and
        TypeError: `mesh` is not a mesh.
        ValueError: `mesh` has not the one axis "ranks", or its ranks do not divide the size above.

    Source: gaugeblock.reference.jax.vae; Shoeybi et al. 2019 (arXiv:1909.08053), section 3, of convolutions.
    """
    shapes = reference.encoder_shapes(config)
    validation.vae_encode(state, images, config, shapes, reference.decoder_shapes(config))
    own = {name: state[name] for name in shapes}
    return run_on_ranks(encode_of_placed, partition_rules.VAE, own, images, config=config, mesh=mesh)


def decode(state: reference.State, latents: jax.Array, *, config: VAEConfig, mesh: Mesh) -> jax.Array:
    """As `gaugeblock.reference.jax.vae.decode`, over the ranks of a mesh; arrays are global.

    Args: as of it; a state that does not lie on the mesh is brought there, the decoder's half of it. And
        mesh: One axis, "ranks", whose size divides norm_num_groups.

    Raises: as it, and
        TypeError: `mesh` is not a mesh.
        ValueError: `mesh` has not the one axis "ranks", or its ranks do not divide the size above.

    Source: gaugeblock.reference.jax.vae; Shoeybi et al. 2019 (arXiv:1909.08053), section 3, of convolutions.
    """
    shapes = reference.decoder_shapes(config)
    validation.vae_decode(state, latents, config, shapes, reference.encoder_shapes(config))
    own = {name: state[name] for name in shapes}
    return run_on_ranks(decode_of_placed, partition_rules.VAE, own, latents, config=config, mesh=mesh)


@partial(jax.jit, static_argnames=("config", "mesh"))
def encode_of_placed(placed: reference.State, images: jax.Array, *, config: VAEConfig, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """Do what `encode` does with a state as `shard_state` places it by `partition_rules.VAE`."""
    return reference.encode(placed, images, config=config)


@partial(jax.jit, static_argnames=("config", "mesh"))
def decode_of_placed(placed: reference.State, latents: jax.Array, *, config: VAEConfig, mesh: Mesh) -> jax.Array:
    """Do what `decode` does with a state as `shard_state` places it by `partition_rules.VAE`."""
    return reference.decode(placed, latents, config=config)
