"""transformers' CLIPTextModel on trial; imported only where transformers is installed."""
