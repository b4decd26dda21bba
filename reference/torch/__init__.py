"""PyTorch references: plain and differentiable; computed in float32, or in float64 for float64 inputs."""
