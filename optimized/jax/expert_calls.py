"""What the experts of each operation compute of their rows, whatever way they are spread.

Shapes: E num_experts, H hidden_size, I intermediate_size, F what the first of the two matrices gives; X any axes of rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp

from gaugeblock.reference.configs import GeluApproximation
from gaugeblock.reference.jax import experts as reference
from gaugeblock.reference.jax.precision import at_least_float32

# the same options give the same object: jit compiles anew for a function that it has not seen, and partials are never equal
with_options = cache(partial)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["up", "down", "up_bias", "down_bias"],
    meta_fields=["activate", "transposed"],
)
@dataclass(frozen=True, kw_only=True)
class Experts:
    """Experts that give down @ activate(up @ row + up_bias) + down_bias; a pytree of their arrays."""

    activate: Callable[[jax.Array], jax.Array]
    """[X, F] -> [X, I]; one object for all calls that compute the same."""
    up: jax.Array
    """[E, F, H]."""
    down: jax.Array
    """[E, H, I]."""
    up_bias: jax.Array | None = None
    """[E, F]."""
    down_bias: jax.Array | None = None
    """[E, H]."""
    transposed: bool = False
    """Whether the matrices lie as [E, in_features, out_features]; a compiled product reads them so, without a copy."""

    @property
    def num_experts(self) -> int:
        return self.up.shape[0]

    def outputs(
        self,
        rows_XH: jax.Array,
        weights_X1: jax.Array,
        used_X1: jax.Array,
        multiply: Callable[[jax.Array, jax.Array], jax.Array],
    ) -> jax.Array:
        """Return what experts give for their rows, weighted, [X, H], float32 at least.

        Args:
            rows_XH: The rows of all experts.
            weights_X1: Of the rows; 0 where a row is none.
            used_X1: 1 for a row, 0 for one that is none: no bias comes to it, and nothing from it to a bias.
            multiply: Takes rows and matrices [E, out_features, in_features], and multiplies each row by its expert's.
        """

        def linear(rows: jax.Array, factors_X1: jax.Array, matrices: jax.Array, biases: jax.Array | None) -> jax.Array:
            out = multiply(rows, matrices.mT if self.transposed else matrices)
            # a bias is a matrix of one column, so that its gradient is a product too, of float32, and no scatter
            return out if biases is None else out + multiply(factors_X1, at_least_float32(biases)[..., None])

        inner_XI = self.activate(linear(rows_XH, used_X1, self.up, self.up_bias))
        return linear(weights_X1 * inner_XI, weights_X1, self.down, self.down_bias)


def swiglu(w13: jax.Array, w2: jax.Array, *, transposed: bool = False) -> Experts:
    """Return the experts of `fused_swiglu`."""
    return Experts(activate=_swiglu, up=w13, down=w2, transposed=transposed)


def geglu(w13: jax.Array, w2: jax.Array, approximate: GeluApproximation) -> Experts:
    """Return the experts of `fused_geglu`."""
    return Experts(activate=with_options(_geglu, approximate=approximate), up=w13, down=w2)


def gelu_mlp(
    w1: jax.Array, b1: jax.Array, w2: jax.Array, b2: jax.Array, approximate: GeluApproximation, *, transposed: bool = False
) -> Experts:
    """Return the experts of `fused_gelu_mlp`."""
    activate = with_options(reference.gelu, approximate=approximate)
    return Experts(activate=activate, up=w1, up_bias=b1, down=w2, down_bias=b2, transposed=transposed)


def swiglu_oai(
    w13: jax.Array,
    b13: jax.Array,
    w2: jax.Array,
    b2: jax.Array,
    alpha: float,
    limit: float,
    *,
    transposed: bool = False,
) -> Experts:
    """Return the experts of `fused_swiglu_oai`."""
    activate = with_options(reference.clamped_swiglu, alpha=alpha, limit=limit)
    return Experts(activate=activate, up=w13, up_bias=b13, down=w2, down_bias=b2, transposed=transposed)


def _swiglu(gate_up_XF: jax.Array) -> jax.Array:
    gate_XI, up_XI = jnp.split(gate_up_XF, 2, axis=-1)
    return jax.nn.silu(gate_XI) * up_XI


def _geglu(gate_up_XF: jax.Array, *, approximate: GeluApproximation) -> jax.Array:
    gate_XI, up_XI = jnp.split(gate_up_XF, 2, axis=-1)
    return reference.gelu(gate_XI, approximate) * up_XI
