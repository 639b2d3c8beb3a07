"""Two faults that assemblers make without a warning: that the scans see them, and that no launch of ours has them."""

import json

import pytest
from test_codegen import _compile

from fused_lora.codegen import sass

SCAN = """
import json, sys, torch
from fused_lora.codegen.shipped import Case, compile_case

# float32 by tensor cores
torch.set_float32_matmul_precision("high")
found = []
for sizes, base, adapters, dropout, transposed, stages in json.loads(sys.argv[1]):
    case = Case(90, *sizes, getattr(torch, base), getattr(torch, adapters), dropout, transposed, stages)
    found += [[f"{case}, {row.pass_}", row.resources.miscompiled] for row in compile_case(case, compare=False)]
print(json.dumps(found))
"""
B, H, F = "bfloat16", "float16", "float32"
# M, K, N, R; base; adapters; dropout; transposed adapters; stages of the pipeline
SCANNED = {
    "loads that are not pipelined": [
        ((33, 50, 35, 5), B, B, False, True, None), ((33, 50, 35, 16), H, H, False, False, 1),
        ((300, 51, 35, 20), H, H, False, True, 1), ((8192, 4096, 4096, 32), B, B, False, False, 1),
    ],
    "float32 adapters": [
        ((8192, 4096, 4096, 16), B, F, False, True, None), ((300, 64, 256, 32), H, F, False, True, 2),
        ((16, 123, 64, 20), B, F, False, True, 3), ((300, 123, 64, 16), B, F, False, False, 3),
    ],
    "dropout": [
        ((8192, 4096, 4096, 64), B, B, True, False, None), ((256, 4096, 4096, 64), B, B, True, False, None),
        ((8192, 4096, 256, 16), H, H, True, True, None), ((300, 123, 35, 1), B, F, True, True, 2),
    ],
    "float32": [
        ((8192, 4096, 4096, 16), F, F, True, False, None), ((2048, 1000, 10, 128), F, F, True, True, None),
        ((300, 123, 64, 20), F, F, False, True, None), ((16, 123, 64, 20), F, F, False, False, None),
    ],
    "small M and odd ranks": [
        ((1, 4096, 4096, 16), H, H, False, True, None), ((16, 50, 4096, 100), B, F, False, True, 1),
        ((16, 4096, 4096, 64), B, B, False, False, None),
        ((300, 4096, 64, 100), H, H, False, True, 4), ((129, 64, 123, 3), B, B, True, False, 1),
    ],
}  # fmt: skip


@pytest.mark.parametrize("cases", SCANNED.values(), ids=SCANNED.keys())
def test_no_launch_reads_what_nothing_wrote_or_writes_what_is_still_read(cases):
    found = _compile(SCAN, json.dumps(cases))
    assert len(found) == 3 * len(cases)
    assert [(launch, wrong) for launch, wrong in found if wrong] == []


def code(*lines):
    """As cuobjdump prints it."""
    return sass.parse("\n".join(f"        /*{16 * place:04x}*/  {line} ;" for place, line in enumerate(lines)))


@pytest.mark.parametrize(
    ("lines", "registers"),
    [
        (("UMOV UR4, 0x1", "UIADD3 UR5, UR4, 0x1, URZ", "EXIT"), []),
        (("UIADD3 UR5, UP0, UR4, 0x1, URZ", "EXIT"), ["UR4"]),
        # both descriptors of a wgmma are two registers each; with the first operand in registers there is one
        (("ULDC.64 UR8, c[0x0][0x210]", "HGMMA.64x16x16.F32 R24, gdesc[UR8], R24, gsb0", "EXIT"), ["UR10", "UR11"]),
        (("ULDC.64 UR10, c[0x0][0x210]", "HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0", "EXIT"), []),
        # written on one of two ways, or under a predicate, counts as written
        (("@P0 BRA 0x20", "UMOV UR4, 0x1", "IMAD.U32 R0, RZ, RZ, UR4", "EXIT"), []),
        (("@UP0 UMOV UR4, 0x1", "IMAD.U32 R0, RZ, RZ, UR4", "EXIT"), []),
        # on the other one alone it is not
        (("@P0 BRA 0x30", "UMOV UR4, 0x1", "EXIT", "IMAD.U32 R0, RZ, RZ, UR4", "EXIT"), ["UR4"]),
        # what only a later turn of the loop has written
        (("IMAD.U32 R0, RZ, RZ, UR4", "UMOV UR4, 0x1", "@P0 BRA 0x0", "EXIT"), ["UR4"]),
        # a routine gives back what it writes, and knows what each of its callers has written
        (("UMOV UR4, 0x1", "CALL.REL.NOINC 0x40", "IMAD.U32 R0, RZ, RZ, UR5", "EXIT", "UMOV UR5, UR4",
          "RET.REL.NODEC R2 0x0"), []),
        (("STG.E desc[UR4][R2.64], R0", "EXIT"), ["UR4", "UR5"]),
        (("R2UR UR4, R2", "R2UR UR5, R3", "STG.E desc[UR4][R2.64], R0", "EXIT"), []),
        (("UISETP.GE.AND UP0, UPT, UR6, 0x1, UPT", "EXIT"), ["UR6"]),
        # an index of constants is one register, whatever is read there
        (("ULDC.64 UR8, c[0x0][UR6+0x250]", "UIADD3.64 UR8, UR8, UR10, URZ", "EXIT"), ["UR6", "UR10", "UR11"]),
    ],
)  # fmt: skip
def test_a_uniform_register_that_no_way_has_written_is_found(lines, registers):
    found = sass.unwritten_reads(code(*lines))
    assert [
        name for text in found for name in text.partition(" reads ")[2].partition(", which")[0].split(", ")
    ] == registers


WGMMA = "HGMMA.64x32x16.F32.BF16 R56, R72, gdesc[UR8], R56, gsb0"
OTHER = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0"


@pytest.mark.parametrize(
    ("lines", "wrong"),
    [
        ((WGMMA, "WARPGROUP.DEPBAR.LE gsb0, 0x0", "MOV R72, R1", "EXIT"), False),
        ((WGMMA, "MOV R75, R1", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "EXIT"), True),
        ((WGMMA, "MOV R76, R1", "EXIT"), False),
        # vectors reach further than their name
        ((WGMMA, "LDS.128 R70, [R1]", "EXIT"), True),
        ((WGMMA, "STS.128 [R72], R72", "ISETP.GE.AND P0, PT, R72, 0x1, PT", "EXIT"), False),
        # a wait that leaves a group open retires the one before it
        ((WGMMA, "WARPGROUP.DEPBAR.LE gsb0, 0x1", "MOV R72, R1", "EXIT"), True),
        ((WGMMA, OTHER, "WARPGROUP.DEPBAR.LE gsb0, 0x1", "MOV R72, R1", "EXIT"), False),
        # round the loop
        (("MOV R72, R1", WGMMA, OTHER, "WARPGROUP.DEPBAR.LE gsb0, 0x2", "@P0 BRA 0x0", "EXIT"), True),
        (("MOV R72, R1", WGMMA, OTHER, "WARPGROUP.DEPBAR.LE gsb0, 0x1", "@P0 BRA 0x0", "EXIT"), False),
        # in shared memory there is nothing to overwrite
        ((OTHER, "MOV R24, R1", "EXIT"), False),
    ],
)
def test_a_register_of_a_wgmma_that_is_written_too_early_is_found(lines, wrong):
    assert bool(sass.early_writes(code(*lines))) == wrong
