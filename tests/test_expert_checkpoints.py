"""A rank reads its share of a checkpoint's experts: the shares are the whole, no other byte is read, bad splits are told."""

from math import prod

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import save_file
from test_expert_layouts import checkpoint, equal

from gaugeblock.reference.expert_checkpoints import resolve_expert_weights
from gaugeblock.reference.expert_layouts import LAYOUTS, ExpertWeights, from_w13

SIZES = (4, 6, 8)  # experts, intermediate size, hidden size


@pytest.fixture
def saved(tmp_path):
    """The tensors of a layout in two files, with others beside them."""

    def save(layout, tensors=None):
        tensors = tensors or checkpoint(layout, torch.tensor, SIZES) | {"lm_head.weight": torch.zeros(50)}
        names = sorted(tensors)
        files = [tmp_path / f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
        for part, file in enumerate(files):
            save_file({name: tensors[name] for name in names[part::2]}, file)
        return files

    return save


def joined(shares):
    """The whole, from `shares[ep_rank][tp_rank]`."""

    def field(name, join):
        if getattr(shares[0][0], name) is None:
            return None
        return torch.cat([join([getattr(share, name) for share in of_expert]) for of_expert in shares])

    def split_rows(parts):
        half = parts[0].shape[1] // 2
        return torch.cat([*(part[:, :half] for part in parts), *(part[:, half:] for part in parts)], 1)

    rows = (lambda parts: torch.cat(parts, 1)) if shares[0][0].interleaved else split_rows
    return ExpertWeights(
        field("w13", rows),
        field("w2", lambda parts: torch.cat(parts, 2)),
        field("b13", rows),
        field("b2", sum),
        interleaved=shares[0][0].interleaved,
    )


@pytest.mark.parametrize("ep_size", [1, 2, 4])
@pytest.mark.parametrize("tp_size", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_ranks_shares_are_the_whole(saved, layout, ep_size, tp_size):
    files = saved(layout)
    shares = [
        [resolve_expert_weights(files, layout, ep_rank=ep, ep_size=ep_size, tp_rank=tp, tp_size=tp_size) for tp in range(tp_size)]
        for ep in range(ep_size)
    ]
    num_experts, inner, width = SIZES
    assert all(share.w13.shape == (num_experts // ep_size, 2 * inner // tp_size, width) for each in shares for share in each)
    assert all(share.w2.shape == (num_experts // ep_size, width, inner // tp_size) for each in shares for share in each)
    assert equal(from_w13(joined(shares), layout), checkpoint(layout, torch.tensor, SIZES))


@pytest.fixture
def bytes_read(monkeypatch):
    """Counts what is indexed out of files: whoever opens one gets slices and nothing else.

    A slice of a mapped file is a view: what is not indexed stays on the disk, but for the rest of a page. The process' own count
    (/proc/self/io) would not tell: mapped pages do not pass through read(2), and the kernel reads ahead.
    """
    count = [0]
    really_open = safetensors.safe_open

    class Part:
        def __init__(self, part):
            self.part, self.get_shape, self.get_dtype = part, part.get_shape, part.get_dtype

        def __getitem__(self, index):
            result = self.part[index]
            count[0] += prod(result.shape) * result.dtype.itemsize
            return result

    class File:
        def __init__(self, *arguments, **keywords):
            self.file = really_open(*arguments, **keywords)

        def __enter__(self):
            file = self.file.__enter__()
            self.keys, self.get_slice = file.keys, lambda name: Part(file.get_slice(name))
            return self

        def __exit__(self, *raised):
            return self.file.__exit__(*raised)

    monkeypatch.setattr(safetensors, "safe_open", File)
    return count


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_reads_its_share_and_no_more(saved, bytes_read, layout):
    files = saved(layout)
    tensors = checkpoint(layout, np.asarray, SIZES)
    bias = sum(tensors[name].nbytes for name in tensors if name in ("experts.down_proj_bias", "experts.w2_bias"))
    split_twice = sum(each.nbytes for each in tensors.values()) - bias
    for ep_size, tp_size in ((1, 1), (4, 1), (1, 3), (2, 3)):
        bytes_read[0] = 0
        resolve_expert_weights(files, layout, ep_rank=ep_size - 1, ep_size=ep_size, tp_rank=tp_size - 1, tp_size=tp_size)
        assert bytes_read[0] == split_twice // (ep_size * tp_size) + bias // ep_size


@pytest.mark.parametrize("framework", ["torch", "jax", "numpy"])
def test_each_framework_gets_its_own_arrays(saved, framework):
    half = {"ep_rank": 1, "ep_size": 2, "tp_rank": 1, "tp_size": 2}
    share = resolve_expert_weights(saved("transposed"), "transposed", **half, framework=framework)
    assert framework in type(share.w13).__module__.replace("jaxlib", "jax")
    expected = checkpoint("transposed", np.asarray, SIZES)
    gate_up = expected["experts.gate_up_proj"][2:].swapaxes(1, 2)
    assert np.array_equal(np.asarray(share.w13), np.concatenate([gate_up[:, 3:6], gate_up[:, 9:12]], 1))
    assert np.array_equal(np.asarray(share.w2), expected["experts.down_proj"][2:, 3:].swapaxes(1, 2))


def test_bfloat16_is_read_as_it_lies_there(saved):
    tensors = checkpoint("linear", lambda values: torch.tensor(values).bfloat16(), SIZES)
    share = resolve_expert_weights(saved("linear", tensors), "linear", ep_rank=3, ep_size=4)
    assert share.w2.dtype == torch.bfloat16 and torch.equal(share.w2[0], tensors["experts.3.down_proj.weight"])


def test_what_was_read_outlives_the_file(saved):
    files = saved("stacked")
    share = resolve_expert_weights(files, "stacked")
    before = share.w13.clone()
    for file in files:
        file.write_bytes(bytes(len(file.read_bytes())))
    assert torch.equal(share.w13, before) and share.w13.is_contiguous()


@pytest.mark.parametrize(
    ("split", "error", "message"),
    [
        ({"ep_size": 3}, ValueError, "ep_size must divide num_experts=4, got 3"),
        ({"tp_size": 4}, ValueError, "tp_size must divide intermediate_size=6, got 4"),
        ({"ep_size": 2, "ep_rank": 2}, ValueError, "ep_rank must be in 0..ep_size - 1 = 1, got 2"),
        ({"tp_rank": -1}, ValueError, "tp_rank must be in 0..tp_size - 1 = 0, got -1"),
        ({"tp_size": 0}, ValueError, "tp_size must be in 1.."),
        ({"ep_size": 2.0}, TypeError, "ep_size must be an integer, got 2.0"),
        ({"framework": "pt"}, ValueError, "framework must be 'torch' or "),
        ({"num_experts": 5}, ValueError, "experts.4.w1.weight is missing"),
    ],
)
def test_a_split_that_does_not_fit_is_told(saved, split, error, message):
    with pytest.raises(error, match=message):
        resolve_expert_weights(saved("mixtral-linear"), "mixtral-linear", **split)


def test_a_tensor_in_two_files_is_told(saved):
    files = saved("stacked")
    with pytest.raises(ValueError, match=r"files must have experts\.\w+ once, got it twice"):
        resolve_expert_weights([*files, files[0]], "stacked")
