"""Four-bit weights become what bitsandbytes makes of them, bit for bit."""

import pytest
import torch

from fused_lora.backends.triton.launch_dequantize import dequantize_4bit
from fused_lora.backends.triton.prepare import FourBits

# of bitsandbytes' documentation: NF4's quantiles; FP4's values in the order of their bits, over their largest
CODES = {
    "nf4": torch.tensor([
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]),
    "fp4": torch.tensor([0.0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3]) / 12,
}  # fmt: skip
# whole programs; a last program, block and byte that are not full; an end that fills no word; less than a block
SHAPES = [(64, 128), (72, 104), (41, 123), (3, 10), (1, 1)]
BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
by_nested = pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
by_code = pytest.mark.parametrize("code", CODES)


def draw(shape, blocksize, code, nested, device="cpu", blocksize2=256):
    """Any bits at all, and scales as weights have them."""
    numel = shape[0] * shape[1]
    blocks = -(-numel // blocksize)
    q = torch.randint(0, 256, (-(-numel // 2), 1), dtype=torch.uint8)
    absmax = torch.rand(blocks) * 0.1 + 0.01
    if not nested:
        return FourBits(*(t.to(device) for t in (q, CODES[code], absmax)), blocksize)
    absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8)
    absmax2 = torch.rand(-(-blocks // blocksize2)) * 0.05
    code2, offset = torch.linspace(-1, 1, 256).pow(3), torch.tensor(0.0731)
    tensors = (q, CODES[code], absmax, absmax2, code2, offset)
    q, table, absmax, absmax2, code2, offset = (t.to(device) for t in tensors)
    return FourBits(q, table, absmax, blocksize, absmax2, code2, offset, blocksize2)


def stated(bits, shape, dtype):
    """The format in plain PyTorch: every step rounded to float32, the last to dtype."""
    numel = shape[0] * shape[1]
    q = bits.q.view(torch.uint8).flatten()
    places = torch.stack((q >> 4, q & 15), dim=1).flatten()[:numel]
    absmax = bits.absmax
    if bits.offset is not None:
        absmax2 = bits.absmax2.repeat_interleave(bits.blocksize2)[: absmax.numel()]
        absmax = bits.code2[absmax.long()] * absmax2
        absmax = absmax + bits.offset
    absmax = absmax.repeat_interleave(bits.blocksize)[:numel]
    return (bits.code[places.long()] * absmax).to(dtype).view(shape)


def assert_same(bits, shape, dtype):
    out = torch.empty(shape, dtype=dtype, device=bits.q.device)
    assert dequantize_4bit(bits, out) is out
    expected = stated(bits, shape, dtype)
    kind = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(out.view(kind), expected.view(kind))


@by_nested
@by_code
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_shape_and_code_is_as_the_format_states(shape, code, nested, dtype, device):
    assert_same(draw(shape, 64, code, nested, device), shape, dtype)


@by_nested
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_blocks_of_any_size(blocksize, nested, device):
    for shape in ((70, 128), (41, 123)):
        assert_same(draw(shape, blocksize, "nf4", nested, device), shape, torch.bfloat16)


def test_many_scales_of_scales_each_for_its_own_blocks(device):
    # a program's 128 blocks are half of what one absmax2 serves
    shape = (33, 1024)
    assert_same(draw(shape, 32, "nf4", True, device), shape, torch.float16)
    with pytest.raises(AssertionError, match="share one absmax2"):
        assert_same(draw(shape, 32, "nf4", True, device, blocksize2=64), shape, torch.float16)


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_bytes_that_are_stored_as_another_dtype(storage, device):
    bits = draw((64, 128), 64, "nf4", True, device)
    assert_same(bits._replace(q=bits.q.view(-1).view(storage).view(-1, 1)), (64, 128), torch.bfloat16)


def test_bytes_that_begin_within_a_word_and_end_with_their_memory(device):
    shape = (64, 128)
    bits = draw(shape, 64, "nf4", True, device)
    later = torch.empty(bits.q.numel() + 1, dtype=torch.uint8, device=device)[1:].view_as(bits.q)
    assert_same(bits._replace(q=later.copy_(bits.q)), shape, torch.bfloat16)


def test_nothing_beside_the_weight_is_written(device):
    shape = (41, 123)
    around = torch.empty(3 * 41, 123, dtype=torch.bfloat16, device=device)
    bits = draw(shape, 64, "nf4", True, device)
    dequantize_4bit(bits, around[41:82])
    assert around[:41].isnan().all()
    assert around[82:].isnan().all()
    assert not around[41:82].isnan().any()


def test_one_launch_whatever_the_scales_are(device, launches):
    for nested in (False, True):
        assert_same(draw((64, 128), 64, "nf4", nested, device), (64, 128), torch.bfloat16)
    assert len(launches) == 2


def test_a_weight_of_no_elements_needs_none(device, launches):
    out = torch.empty(0, 128, dtype=torch.bfloat16, device=device)
    assert dequantize_4bit(draw((0, 128), 64, "nf4", False, device), out).shape == (0, 128)
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
        assert torch.equal(state.code.cpu(), CODES[code])
        assert torch.equal(stated(bits, shape, dtype), value)
        assert torch.equal(dequantize_4bit(bits, torch.empty_like(weight)), value)
