"""diffusers' UNet2DConditionModel on trial; imported only where diffusers is installed."""
