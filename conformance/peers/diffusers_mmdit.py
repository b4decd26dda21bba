"""diffusers' SD3Transformer2DModel on trial; imported only where diffusers is installed."""
