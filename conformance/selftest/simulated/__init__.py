"""Right kernels as a GPU runs them, simulated in torch, stage by stage."""
