"""Operations in JAX: compiled, and laid out for the platform they run on."""
