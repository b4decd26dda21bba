"""Versions for many processes in torch.distributed: each rank holds its shard of the tokens, experts and parameters."""
