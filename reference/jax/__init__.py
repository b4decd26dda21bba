"""JAX references, twins of `gaugeblock.reference.torch`; they can be jitted with their options static."""
