"""Models of which each rank has a part of every parameter: what the conformance suite does not ask of every implementation."""

import pytest
import torch
from on_four_ranks import RANKS, assert_equal_to_rounding, draw, four_ranks, mesh_of
from torch.distributed.tensor import DTensor

from gaugeblock.optimized.distributed import fully_sharded_models as models
from gaugeblock.reference.configs import CLIPTextConfig, SDARMoEConfig, UNetConfig
from gaugeblock.reference.torch import clip_text, sdar, unet
from gaugeblock.reference.unet_states import state_shapes

on_ranks = pytest.fixture(scope="module")(four_ranks)
UNET = UNetConfig(
    in_channels=3, out_channels=2, block_out_channels=(8, 12), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    layers_per_block=1, transformer_layers_per_block=(1, 1), attention_head_dim=(2, 3), cross_attention_dim=6, norm_num_groups=4,
)  # fmt: skip
CLIP = CLIPTextConfig(
    vocab_size=11, hidden_size=12, intermediate_size=20, projection_dim=None, num_hidden_layers=2, num_attention_heads=3,
    max_position_embeddings=7, eos_token_id=10,
)  # fmt: skip

SDAR = SDARMoEConfig(
    vocab_size=11, hidden_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=6,
    moe_intermediate_size=7, block_length=3, num_experts=5, num_experts_per_tok=2, mask_token_id=10,
    rms_norm_eps=1e-6, rope_theta=1e4,
)  # fmt: skip


def state_of(shapes) -> dict[str, torch.Tensor]:
    return {name: draw(*shape, seed=seed) * max(shape) ** -0.5 for seed, (name, shape) in enumerate(shapes.items())}


def trained() -> dict[str, bool]:
    """A module that is kept: what a rank holds, and an update of its parts, of gradients of all ranks' examples."""
    mesh, state = mesh_of(RANKS), state_of(state_shapes(UNET))
    arrays = [draw(5, 3, 4, 6, seed=90), draw(5, seed=91) + 5, draw(5, 4, 6, seed=92)]
    cotangent = draw(5, 2, 4, 6, seed=93)
    rank = mesh.get_local_rank()
    mine = slice(rank, rank + 1) if rank < 3 else slice(3, 5)

    module = models.unet.sharded(state, config=UNET, mesh=mesh)
    held = sum(each.to_local().numel() for each in module.parameters())
    alive = []
    block = module.get_submodule("down_blocks.0.resnets.0")
    later = module.get_submodule("mid_block.resnets.0")
    later.register_forward_hook(lambda *_: alive.append([isinstance(each, DTensor) for each in block.parameters()]))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    (module(*(each[mine] for each in arrays)) * cotangent[mine] * RANKS).sum().backward()  # FSDP averages
    optimizer.step()

    leaves = {name: each.clone().requires_grad_() for name, each in state.items()}
    (unet.unet(leaves, *arrays, config=UNET) * cotangent).sum().backward()
    for name, parameter in module.named_parameters():
        assert_equal_to_rounding(parameter.full_tensor(), (leaves[name] - 0.1 * leaves[name].grad).detach())
    total = sum(each.numel() for each in state.values())
    return {
        "names of the checkpoint": {name for name, _ in module.named_parameters()} == set(state),
        "a part on each rank": held < 0.4 * total,
        "a block is dropped when it has run": all(alive[0]),
    }


def test_a_rank_keeps_its_parts_and_gathers_block_by_block(on_ranks):
    for found in on_ranks(trained):
        assert all(found.values()), found


def raised_by(change: str) -> str:
    """Make a call that is bad on rank 2 alone, then a good one, of no example on rank 1; return what the first raised."""
    mesh, state = mesh_of(RANKS), state_of(clip_text.state_shapes(CLIP))
    rank = mesh.get_local_rank()
    ids = torch.tensor([[1, 10, 3], [4, 5, 10], [10, 6, 7], [8, 9, 10]])
    bad_ids, bad_state = ids, state
    if rank == 2 and change == "ids":
        bad_ids = ids + 1
    elif rank == 2 and change == "state":
        bad_state = {name: each for name, each in state.items() if "fc2" not in name}
    elif rank == 2 and change == "dtype":
        bad_state = {name: each.float() for name, each in state.items()}
    message = "nothing raised"
    try:
        models.clip_text(bad_state, bad_ids, config=CLIP, mesh=mesh)
    except ValueError as error:
        message = str(error)
    mine = ids[:0] if rank == 1 else ids[rank : rank + 1]
    for one, other in zip(
        models.clip_text(state, mine, None, config=CLIP, mesh=mesh), clip_text.clip_text(state, mine, config=CLIP), strict=True
    ):
        assert_equal_to_rounding(one, other)
    return message


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("ids", "input_ids must be in 0..10, got 2..11"),
        ("state", "state"),
        ("dtype", "state must have the same dtype on every rank, got [3, 3, 2, 3]"),
    ],
)
def test_a_bad_call_raises_on_every_rank_and_the_next_call_works(on_ranks, change, told):
    for message in on_ranks(raised_by, change):
        assert message.startswith(told), message


def narrow() -> list[torch.dtype]:
    """A model in bfloat16 of which one result is not rounded, on examples of which some ranks have none; its results' dtypes."""
    mesh, state = mesh_of(RANKS), {name: each.bfloat16() for name, each in state_of(sdar.state_shapes(SDAR)).items()}
    ids = torch.tensor([[1, 10, 3, 3], [4, 5, 10, 10]])
    rank = mesh.get_local_rank()
    logits, router_logits = models.sdar_moe(state, ids[rank : rank + 1], config=SDAR, mesh=mesh)
    wide = {name: each.float() for name, each in state.items()}
    for one, other in zip((logits, router_logits), sdar.sdar_moe(wide, ids[rank : rank + 1], config=SDAR), strict=True):
        # computed in float32, and rounded once where it is bfloat16: at most to the neighbour of what the reference rounds to
        rtol = 2.0**-7 if one.dtype == torch.bfloat16 else 2.0**-16
        torch.testing.assert_close(one, other.to(one.dtype), rtol=rtol, atol=1e-6)
    return [logits.dtype, router_logits.dtype]


def test_what_is_not_rounded_stays_wide(on_ranks):
    assert on_ranks(narrow) == [[torch.bfloat16, torch.float32]] * RANKS
