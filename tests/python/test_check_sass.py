"""The check on the Hopper kernels' machine code finds what it is there for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from repository import load_script

check_sass = load_script("scripts/check_sass.py")


def sass(*instructions: str, name: str = "_Z6kernelv") -> str:
    """As cuobjdump prints it: an encoding follows every instruction."""
    lines = [f"\t\tFunction : {name}", '\t.headerflags\t@"EF_CUDA_SM90"']
    for i, instruction in enumerate(instructions):
        lines.append(f"        /*{16 * i:04x}*/                   {instruction} ;  /* 0x00000000ff017624 */")
    return "\n".join(lines)


def loop(*extra: str) -> list[str]:
    """A prologue instruction, then a loop at 0x10 with a product and what else there is."""
    return ["MOV R1, c[0x0][0x28]", *extra, "IGMMA.64x128x32.S8.S8 R24, R96, gdesc[UR4], R24, gsb0", "@!P0 BRA 0x10"]


def test_clean_code_passes() -> None:
    kernels, problems = check_sass.check(sass(*loop("R2UR UR8, R6", "UTMALDG.2D [UR16], [UR8], desc[UR6]")))
    assert (kernels, problems) == (1, [])


def test_a_copy_in_a_loop_over_threads_is_found() -> None:
    code = ["@P0 ELECT P1, URZ, PT", "UTMALDG.2D [UR16], [UR8], desc[UR6]", "@P0 BRA.U.ANY 0x0", *loop()]
    code[-1] = "@!P0 BRA 0x40"
    _, problems = check_sass.check(sass(*code))
    assert len(problems) == 1
    assert "1 loops over a warp's threads" in problems[0]


def test_the_way_back_from_a_wait_is_no_loop() -> None:
    """A wait that takes longer stands behind the loop and returns into it, past the products before it."""
    most = check_sass.MOST_MOVES
    code = [*loop(*moves(10, most + 1)), "EXIT", f"BRA {16 * (most + 2):#x}"]
    _, problems = check_sass.check(sass(*code))
    assert problems == [f"_Z6kernelv has {most + 1} R2UR in its loop of products, {most} at most are expected"]


def moves(first: int, count: int) -> list[str]:
    """As many moves to uniform registers, from this one on; one of them conditional."""
    return [f"{'@P3 ' if i == 1 else ''}R2UR UR{first + i}, R{6 + i}" for i in range(count)]


def test_addresses_in_registers_of_threads_are_found() -> None:
    most = check_sass.MOST_MOVES
    assert check_sass.check(sass(*loop(*moves(10, most)))) == (1, [])
    _, problems = check_sass.check(sass(*loop(*moves(10, most + 1))))
    assert problems == [f"_Z6kernelv has {most + 1} R2UR in its loop of products, {most} at most are expected"]


# The product's descriptor is in UR4 and UR5.
@pytest.mark.parametrize("register, found", [(3, False), (4, True), (5, True), (6, False), (40, False)])
def test_a_descriptor_from_registers_of_threads_is_found(register: int, found: bool) -> None:
    _, problems = check_sass.check(sass(*loop(*moves(register, 1))))
    expected = "_Z6kernelv moves descriptors of products from registers of threads (R2UR) in their loop"
    assert problems == ([expected] if found else [])


def test_moves_outside_the_smallest_loop_of_products_do_not_count() -> None:
    # The outer loop (of tiles) begins at 0x10 with three moves, two of a descriptor; the inner one at 0x40.
    code = [*loop(*moves(4, 3))[:-1], "@!P0 BRA 0x40", "@P2 BRA 0x10"]
    assert check_sass.check(sass(*code)) == (1, [])


def test_mma_sync_counts_as_a_product_and_other_kernels_do_not() -> None:
    mma = sass("IMMA.16832.S8.S8 R40, R40.ROW, R32.reuse.COL, R44", "@P0 BRA 0x0", "EXIT")
    other = sass("FADD R1, R2, R3", "@P0 BRA.U.ANY 0x0", "EXIT", name="_Z5otherv")
    assert check_sass.check(mma + "\n" + other) == (1, [])


def test_a_kernel_without_a_loop_is_reported() -> None:
    _, problems = check_sass.check(sass("IMMA.16832.S8.S8 R40, R40.ROW, R32.COL, R44", "EXIT"))
    assert len(problems) == 1
    assert "no loop of products" in problems[0]


def test_a_build_without_cuda_has_nothing_to_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "compile_commands.json").write_text(json.dumps([{"directory": "/", "file": "a.cpp", "output": "a.o"}]))
    assert check_sass.main([str(tmp_path)]) == 0
    assert "nothing to check" in capsys.readouterr().out


def test_a_folder_that_is_no_build_is_refused(tmp_path: Path) -> None:
    assert check_sass.main([str(tmp_path)]) == 2
