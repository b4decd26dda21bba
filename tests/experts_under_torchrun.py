"""Started by torchrun in four processes, for tests/test_experts_on_ranks.py: experts in every layout are those on one rank."""

import torch
import torch.distributed as dist
from test_experts_on_ranks import LAYOUTS, check_layout

torch.set_num_threads(1)
dist.init_process_group("gloo")
for layout in LAYOUTS:
    check_layout(layout)
dist.barrier()
if dist.get_rank() == 0:
    print(f"{len(LAYOUTS)} layouts on {dist.get_world_size()} ranks")
dist.destroy_process_group()
