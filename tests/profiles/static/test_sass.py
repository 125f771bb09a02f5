"""The hot loops of SASS, as nvdisasm prints it, shortened."""

from profiles.static.sass_loop import summarise_sass


def listing(*lines: str) -> str:
    """Lines as nvdisasm prints them: plain labels, instructions after their addresses."""
    text, address = ["        .section .text.kernel", ".text.kernel:"], 0
    for line in lines:
        if line.startswith("."):
            text.append(line)
        else:
            text.append(f"        /*{address:04x}*/              {line} ;")
            address += 16
    return "\n".join(text)


TRAP = [".L_x_9:", "BRA `(.L_x_9)", "NOP"]  # after the end of every kernel
ATTENTION = listing(
    "S2R R0, SR_CTAID.X",
    ".L_x_1:",  # the persistent loop
    "LDG.E R2, desc[UR4][R2.64]",
    ".L_x_2:",  # over a large tile's pages
    "LDGSTS.E.BYPASS.128 [R4], desc[UR4][R6.64]",
    "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24",
    "MUFU.EX2 R8, R8",
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "@!P1 BRA `(.L_x_2)",
    ".L_x_3:",  # and a small one's
    "LDGSTS.E.BYPASS.128 [R4], desc[UR4][R6.64]",
    "HMMA.16816.F32.BF16 R24, R4, R6, R24",
    "HMMA.16816.F32.BF16 R28, R4, R8, R28",
    "@!P2 BRA `(.L_x_3)",
    "@P0 BRA `(.L_x_4)",  # forward
    "STG.E.128 desc[UR4][R2.64], R24",
    ".L_x_4:",
    "@!P3 BRA `(.L_x_1)",
    "EXIT",
    *TRAP,
)


def test_hottest_loop():
    """Guards the choice: no outer loop, no forward branch, no trap; wgmma before mma."""
    found = summarise_sass(ATTENTION)
    assert found.loop == {"wgmma": 1, "copy 16": 1, "MUFU": 1, "barrier": 1, "other": 1}
    assert found.mix["mma"] == 2 and found.mix["load 4"] == 1
    assert found.instructions == sum(found.mix.values()) == 17
    expected = "4 other instructions per product in the loop, 1 MUFU, 1 barriers"
    assert found.look_at == expected
    only_small = ATTENTION.replace("HGMMA.64x64x16.F32.BF16", "FFMA")
    assert summarise_sass(only_small).loop == {"mma": 2, "copy 16": 1, "other": 1}


def test_every_loop_with_products():
    """Guards what the baseline has: all loops, in the order of the code."""
    wgmma, mma = summarise_sass(ATTENTION).loops
    assert wgmma["wgmma"] == 1 and mma["mma"] == 2
    assert [sum(mix.values()) for mix in (wgmma, mma)] == [5, 4]
    assert summarise_sass(listing("HMMA.16816 R24, R4, R6, R24", "EXIT", *TRAP)).loops == []


def test_barrier_waits_are_not_loops_around_others():
    """Guards tensor copies: their waits spin after the kernel's end and branch back into a loop."""
    found = summarise_sass(
        listing(
            ".L_x_1:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR21], R5", "@!P0 BRA `(.L_x_3)",
            ".L_x_2:", "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, gsb0",
            "@P1 BRA `(.L_x_1)", "@!P0 EXIT", "BRA `(.L_x_1)",
            ".L_x_3:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR21], R5", "@!P0 BRA `(.L_x_3)",
            "BRA `(.L_x_2)", *TRAP,
        )
    )  # fmt: skip
    assert [sum(mix.values()) for mix in found.loops] == [4]


def test_waits_for_products():
    """Guards the count: only waits until no wgmma is pending, not those that leave some running."""
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x{}"
    loop = ("HGMMA.64x64x16.F32 R24, gdesc[UR8], R24, gsb0", wait.format(0), wait.format(1))
    found = summarise_sass(
        listing(".L_x_1:", *loop, "DEPBAR.LE SB0, 0x4", "@P0 BRA `(.L_x_1)", *TRAP)
    )
    assert found.loop == {"wgmma": 1, "wgmma wait": 1, "copy wait": 1, "other": 2}


def test_loads_decide_without_products():
    """Guards memory-bound kernels: the loop that loads most bytes."""
    found = summarise_sass(
        listing(
            ".L_x_1:", "LDG.E R1, [R2]", "LDG.E R1, [R2+0x4]", "@P0 BRA `(.L_x_1)",
            ".L_x_2:", "LDG.E.128 R4, [R2]", "FADD R4, R4, R5", "@P0 BRA `(.L_x_2)",
            "EXIT", *TRAP,
        )
    )  # fmt: skip
    assert found.loop == {"load 16": 1, "other": 2}
    assert found.look_at == "1 loads among 3 instructions of the loop: all in flight?"


def test_what_to_look_at():
    """Guards the order of remarks: spills, then narrow loads, each with its place."""
    narrow = ["LDG.E.64 R2, [R2]", "LDG.E.U16 R3, [R2]", "LDG.E.128 R4, [R6]"]
    straight = summarise_sass(listing(*narrow, "EXIT", *TRAP))
    assert straight.loop is None
    narrow_loads = "narrow loads in straight-line code: 1 load 16, 1 load 8, 1 load 1, 2"
    assert straight.look_at == narrow_loads
    spilling = listing("STL [R1], R4", ".L_x_1:", *narrow, "LDL R4, [R1]", "BRA `(.L_x_1)", *TRAP)
    assert summarise_sass(spilling).look_at == "1 of 2 spills are in the loop"
    few = ["LDG.E.128 R4, [R6]"] * 10 + ["LDG.E R3, [R2]"]
    assert "all in flight?" in summarise_sass(listing(*few, "EXIT")).look_at
