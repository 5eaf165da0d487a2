"""The gate that reads compiled code: opcodes, and instructions against the committed figures, for
head dimension 128 in bfloat16.
"""

from dataclasses import replace

import pytest
from sla2_kernels.compile import compile_kernel, find_nvrtc, nvrtc_version
from sla2_kernels.gate import gate_code
from sla2_kernels.kernels import Geometry, spec_of
from sla2_kernels.sass import Loop, code_of, parse

from benchmarks import sass_figures

# A kernel of two nested loops, as nvdisasm writes it. The branch to .L_x_3 jumps over 16 FMULs, the
# inner loop is .L_x_4 with two products; what follows EXIT comes back, or fills the end.
FMUL = "        /*{:04x}*/                   FMUL R0, R0, R1 ;"
SASS = f"""
//--------------------- .text.nested     --------------------------
.text.nested:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 BRA `(.L_x_3) ;
{chr(10).join(map(FMUL.format, range(48, 304, 16)))}
.L_x_3:
.L_x_4:
        /*0130*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0140*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0150*/               @P1 BRA `(.L_x_4) ;
        /*0160*/                   IMMA.16832.S8.S8 R4, R8, R12, R4 ;
        /*0170*/               @P2 BRA `(.L_x_1) ;
        /*0180*/                   EXIT ;
        /*0184*/                   FADD R0, R0, R1 ;
        /*0188*/                   BRA `(.L_x_1) ;
.L_x_5:
        /*0190*/                   BRA `(.L_x_5);
        /*01a0*/                   NOP;
"""


def test_code_is_counted_by_hand():
    code = parse(SASS)["nested"]
    assert code.instructions == 1 + 2 + 16 + 5 + 1 + 2
    assert code.loop == Loop(instructions=7, rare=16, tensor=3, inner=(3, 2))
    assert (code.count("HMMA"), code.count("LDG.E.128"), code.count("NOP")) == (2, 1, 0)


def test_an_opcode_that_lacks_and_one_too_many_are_told():
    spec = spec_of("sla2_sparse_fwd", "sm_90a", Geometry(head_dim=128))
    wrong = replace(spec, opcodes=("HMMA", "QMMA"), never=("LDG.E.128",))
    assert gate_code(wrong, parse(SASS)["nested"]) == [
        f"{spec.label} sm_90a: no QMMA in its code, expected some",
        f"{spec.label} sm_90a: 1 LDG.E.128 in its code, expected none",
    ]


# `make test-full` looks at the two that have the tile plan of another one: see FAST_MMA in mix.cuh.
ALIKE = ("sm_86", "sm_100a")


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "arch",
    [pytest.param(a, marks=pytest.mark.slow) if a in ALIKE else a for a in sass_figures.ARCHS],
)
def test_code_is_what_specs_and_committed_figures_say(arch):
    committed = sass_figures.read()
    specs = sass_figures.specs_of(arch)
    lines = [
        line
        for spec in specs
        for line in gate_code(spec, code_of(compile_kernel(spec))[spec.entry])
    ]
    assert lines == [], "\n".join(lines)
    if committed["nvrtc"] != nvrtc_version(find_nvrtc()):
        pytest.skip(f"the figures are those of NVRTC {committed['nvrtc']}")
    found = {sass_figures.name_of(spec): sass_figures.figures_of(spec) for spec in specs}
    assert found.keys() == committed["figures"][arch].keys()
    grown = {
        f"{name} {key}": (found[name][key], figure)
        for name, figures in committed["figures"][arch].items()
        for key, figure in figures.items()
        if key in ("loop", "instructions", "registers")
        and abs(found[name][key] - figure) > max(2, 0.03 * figure)
    }
    assert grown == {}, "python -m benchmarks.sass_figures writes the new ones"
