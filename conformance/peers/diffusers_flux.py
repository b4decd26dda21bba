"""diffusers' FluxTransformer2DModel on trial; imported only where diffusers is installed."""
