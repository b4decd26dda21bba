"""JAX references, twins of `gaugeblock.reference.torch`; they can be jitted with their options static.

What a twin's docstring says at length is not said again: it reads "As" that one, and what differs. Everywhere arrays are
`jax.Array`, and no device is looked at; what is traced has no values yet, so that an id, a label or an example out of range is
not seen there.
"""
