"""Streams made of streams: blocks keep their size, rows their bytes."""

import functools
from pathlib import Path

import pytest
import torch

from roe_llava.convert import made_tensors
from roe_llava.convert.made_tensors import check_finite_block, in_memory, joined, mean_row, padded_rows, rows
from roe_llava.convert.weights import BLOCK_SIZE

FILE = Path("file")


def stored(tensor):
    return in_memory("x", tensor, FILE)


@functools.cache
def large(dtype=torch.float16):
    """Two blocks and a half, in rows that no block boundary is a multiple of."""
    width = 1000
    count = int(2.5 * BLOCK_SIZE) // (width * torch.finfo(dtype).bits // 8)
    return torch.arange(count * width, dtype=torch.float64).remainder(1000).sub(500).reshape(-1, width).to(dtype)


@pytest.mark.parametrize("start, stop", [(0, 1), (5, 6), (0, 20_000), (8_000, 20_971), (20_970, 20_971)])
def test_rows_are_cut_from_any_place(start, stop):
    tensor = large()
    assert tensor.shape[0] == 20_971
    assert torch.equal(rows("y", stored(tensor), start, stop).load(), tensor[start:stop])


def test_blocks_of_joined_tensors_are_whole_but_the_last():
    tensor = large()
    both = joined("y", [stored(tensor), stored(tensor[:3])])
    sizes = [len(block) for block in both.blocks()]
    assert set(sizes[:-1]) == {BLOCK_SIZE} and sum(sizes) == both.num_bytes
    assert torch.equal(both.load(), torch.cat([tensor, tensor[:3]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_added_rows_are_the_mean(dtype):
    tensor = large(dtype)
    wider = padded_rows(stored(tensor), tensor.shape[0] + 2).load()
    mean = tensor.double().mean(0).to(dtype)
    assert torch.equal(mean_row(stored(tensor)), mean)
    assert torch.equal(wider, torch.cat([tensor, mean[None], mean[None]]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_value_is_found_and_the_largest_good_ones_are_not(dtype, value):
    tensor = torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype)
    tensor[0] = torch.finfo(dtype).min
    tensor[1] = torch.finfo(dtype).tiny / 2
    (block,) = stored(tensor).blocks()
    check_finite_block(stored(tensor), block)
    tensor[2, 4] = value
    (block,) = stored(tensor).blocks()
    with pytest.raises(ValueError, match=r"x in file .* holds NaN or Inf, 1 in the first"):
        check_finite_block(stored(tensor), block)


def test_every_dtype_that_is_checked_has_all_bits_of_its_exponent():
    for name, (kind, mask) in made_tensors.EXPONENTS.items():
        infinite = torch.tensor(float("inf"), dtype=made_tensors.DTYPES[name])
        (block,) = stored(infinite).blocks()
        assert int.from_bytes(block, "little") == mask and len(block) == kind().itemsize
