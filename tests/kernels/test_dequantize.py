"""Four-bit weights become what bitsandbytes makes of them, bit for bit."""

import pytest
import torch

from fused_lora.backends.four_bits import CODES, FourBits, plain, random
from fused_lora.backends.triton.launch_dequantize import dequantize_4bit

# whole programs; a last program, block and byte that are not full; an end that fills no word; less than a block
SHAPES = [(64, 128), (72, 104), (41, 123), (3, 10), (1, 1)]
BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
by_nested = pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
by_code = pytest.mark.parametrize("code", CODES)


def assert_same(bits, shape, dtype):
    out = torch.empty(shape, dtype=dtype, device=bits.q.device)
    assert dequantize_4bit(bits, out) is out
    expected = plain(bits, shape, dtype)
    kind = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(out.view(kind), expected.view(kind))


@by_nested
@by_code
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_shape_and_code_is_as_the_format_states(shape, code, nested, dtype, device):
    assert_same(random(shape, device, code, nested), shape, dtype)


@by_nested
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_blocks_of_any_size(blocksize, nested, device):
    for shape in ((70, 128), (41, 123)):
        assert_same(random(shape, device, "nf4", nested, blocksize), shape, torch.bfloat16)


def test_many_scales_of_scales_each_for_its_own_blocks(device):
    # a program's 128 blocks are half of what one absmax2 serves
    shape = (33, 1024)
    assert_same(random(shape, device, blocksize=32), shape, torch.float16)
    with pytest.raises(AssertionError, match="share one absmax2"):
        assert_same(random(shape, device, blocksize=32, blocksize2=64), shape, torch.float16)


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_bytes_that_are_stored_as_another_dtype(storage, device):
    bits = random((64, 128), device)
    assert_same(bits._replace(q=bits.q.view(-1).view(storage).view(-1, 1)), (64, 128), torch.bfloat16)


def test_bytes_that_begin_within_a_word_and_end_with_their_memory(device):
    shape = (64, 128)
    bits = random(shape, device)
    later = torch.empty(bits.q.numel() + 1, dtype=torch.uint8, device=device)[1:].view_as(bits.q)
    assert_same(bits._replace(q=later.copy_(bits.q)), shape, torch.bfloat16)


def test_nothing_beside_the_weight_is_written(device):
    shape = (41, 123)
    around = torch.empty(3 * 41, 123, dtype=torch.bfloat16, device=device)
    bits = random(shape, device)
    dequantize_4bit(bits, around[41:82])
    assert around[:41].isnan().all()
    assert around[82:].isnan().all()
    assert not around[41:82].isnan().any()


def test_one_launch_whatever_the_scales_are(device, launches):
    for nested in (False, True):
        assert_same(random((64, 128), device, double=nested), (64, 128), torch.bfloat16)
    assert len(launches) == 2


def test_a_weight_of_no_elements_needs_none(device, launches):
    out = torch.empty(0, 128, dtype=torch.bfloat16, device=device)
    assert dequantize_4bit(random((0, 128), device, double=False), out).shape == (0, 128)
    assert launches == []


@by_nested
@by_code
@pytest.mark.parametrize(
    ("shape", "blocksizes"),
    # of other blocks than these: bitsandbytes 0.50 takes another block's scale, on a CPU with AVX512, where a row is a
    # multiple of 32 and ends within a block
    [((4, 4096), BLOCKSIZES), ((64, 128), (32, 64)), ((72, 104), (64, 512)), ((41, 123), (64, 4096))],
    ids=str,
)
def test_the_bits_are_those_of_bitsandbytes(shape, blocksizes, code, nested, dtype, device):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(shape, device=device).to(dtype) * 0.02
    # its fallback for odd rows compiles itself, for each shape anew
    with torch.compiler.set_stance("force_eager"):
        made = [functional.quantize_4bit(weight, None, None, blocksize, nested, code) for blocksize in blocksizes]
        expected = [functional.dequantize_4bit(q, state) for q, state in made]
    for blocksize, (q, state), value in zip(blocksizes, made, expected, strict=True):
        bits = FourBits(q, state.code, state.absmax, blocksize)
        if nested:
            two = state.state2
            bits = bits._replace(absmax2=two.absmax, code2=two.code, offset=state.offset, blocksize2=two.blocksize)
        assert torch.equal(state.code.cpu(), torch.tensor(CODES[code]))
        assert torch.equal(plain(bits, shape, dtype), value)
        assert torch.equal(dequantize_4bit(bits, torch.empty_like(weight)), value)
