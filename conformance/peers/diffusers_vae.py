"""diffusers' AutoencoderKL on trial; imported only where diffusers is installed."""
