"""Plain implementations that say what each operation computes, in PyTorch and in JAX.

`gaugeblock.reference.torch` and `gaugeblock.reference.jax` are twins: same files, functions and local names.

Local arrays carry their shape as a suffix, one letter per axis (`logits_TE` is [num_tokens, num_experts]):

    T  num_tokens
    E  num_experts
    K  top_k: experts chosen per token
    N  routed rows: one per token and chosen expert, N = T * K
    G  num_groups: groups of experts
    M  experts in one group, M = E / G
    H  hidden_size
    I  intermediate_size

The diffusion models (`layers`, `dit`, `unet` and others) have images and sequences, and name some letters anew:

    B  batch_size
    S  tokens of a sequence: one per patch
    T  tokens of a text
    J  tokens of text and image together, J = T + S
    D  hidden_size
    A  num_heads
    F  features of a head, or frequencies of an embedding
    R  pairs of features of a head, R = F / 2
    C  channels
    H  height
    W  width
    P  height and width of a patch
    Y  rows of patches
    X  columns of patches

A module names the letters it uses at its top.
"""
