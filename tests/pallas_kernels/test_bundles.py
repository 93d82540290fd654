"""The reader of TPU schedules: a shortened dump of jax's flash attention, and made-up ones."""

import numpy as np
import pytest

from pallas_kernels import bundles
from pallas_kernels.bundles import Node, Trips

UNITS = """== CAPACTIY:
MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     3     4     2     1     3     3     1     1     2
== UTILIZATION:
"""

# jax's TPU flash attention for the v5e, as libtpu 0.0.50 dumps it, all but 51 of 1641 bundles and
# most of their text cut out; behind the bar is the bundle's line of the other dump.
FLASH = """
= control target key start
LH: loop header
LB: loop body
PF: predicated region fallthrough
= control target key end

    0    :  { %s16227_s0 = inlined_call_oper } | 0 0 0 0 0 0 0 0 0 0
  0x1    :  { %16737 = sst [smem:[#allocatio } | 0 0 0 0 0 0 0 0 0 1
  0x2 LB : > { %16740 = sst [smem: } /* Start region 113 :: Start region 29 */ | 0 0 0 0 0 0 0 0 0 2
  0x3    : > { %16741 = sst [smem:[#allocatio } | 0 0 0 0 0 0 0 0 0 2
  0x4    : > { %302 = sbr.rel (%p9710_p4) target = $region32 } | 0 0 0 0 0 0 0 0 0 2
  0x5    : > { %8321 = dma.hbm_to_vmem [threa } | 0 0 0 0 0 0 0 0 0 1
  0x6    : > { %8327 = dma.hbm_to_vmem [threa } /* End region 29 */ | 0 0 0 0 0 0 0 0 0 1
  0x7    : > { %s304_s2 = sand.u32 (!%p9710_p } | 0 0 0 0 0 0 0 0 0 2
  0x8    : > { %s8014_s9 = sand.u32 (!%p9710_ } /* End region 30 */ | 0 0 0 0 0 0 0 0 0 2
  0x9    : > { %s9773_s20 = scalar_lea.vmem [ } | 0 0 0 0 0 0 0 0 0 1
  0xa    : > { %9470 = dma.done.wait (%p9732_ } | 0 0 0 0 0 1 0 0 0 0
  0xb    : > { %381 = sbr.rel (%p7609_p5) target = $region48 } | 0 0 0 0 0 0 0 0 0 1
  0xc    :  {  } | 0 0 0 0 0 0 0 0 0 0
  0xd    :  {  } | 0 0 0 0 0 0 0 0 0 0
  0xe    :  {  } | 0 0 0 0 0 0 0 0 0 0
  0xf    :  {  } /* End region 46 */ | 0 0 0 0 0 0 0 0 0 0
 0x10    : > { %v9535_v0 = vmov -inf } | 0 0 2 0 0 0 0 0 0 0
 0x11    : > { %382 = vst [vmem:[#allocation3 } | 0 0 0 0 0 0 0 1 0 0
 0x12    : > { %573 = vst [vmem:[#allocation5 } /* End region 47 */ | 0 0 0 0 0 0 0 1 0 0
 0x13 PF : > { %s16757_s2 } /* Start/End empty region 48 :: Start region 49 */ | 0 0 0 0 0 0 0 0 0 1
 0x14    : > { %581 = sbr.rel (%p7614_p9) target = $region52 } | 0 0 0 0 0 0 0 0 0 1
 0x15    :  {  } | 0 0 0 0 0 0 0 0 0 0
 0x16    :  {  } | 0 0 0 0 0 0 0 0 0 0
 0x17    :  {  } | 0 0 0 0 0 0 0 0 0 0
 0x18    :  {  } /* End region 50 */ | 0 0 0 0 0 0 0 0 0 0
 0x19    : > { %v8060_v2 = vld [vmem:[%s9781_ } /* Start region 51 */ | 0 0 2 0 0 3 0 0 0 0
 0x1a    : > { %v8068_v3 = vld [vmem:[%s9781_ } | 0 0 1 0 0 3 0 0 0 0
 0x1b    : > { %2589 = vmax.xlane.f32.xlu1 %v } | 4 1 0 2 0 0 0 0 0 0
 0x1c    : > { %v2411_v45 = vpop.f32.mrf.mxu3 } | 4 2 2 2 0 0 0 0 0 0
 0x1d    : > { %v10262_v47 = vadd.f32 %v2411_ } | 4 2 3 0 0 1 0 0 0 0
 0x1e    : > { %7194 = vst [vmem:[#allocation } /* End region 51 */ | 0 0 0 0 0 0 0 1 0 0
 0x1f PF : > { %s17934_s1 } /* Start/End empty region 52 :: Start region 53 */ | 0 0 0 0 0 0 0 0 0 1
 0x20    : > { %7198 = sbr.rel (%p8000_p12) target = $region56 } | 0 0 0 0 0 0 0 0 0 1
 0x21    :  {  } | 0 0 0 0 0 0 0 0 0 0
 0x22    :  {  } | 0 0 0 0 0 0 0 0 0 0
 0x23    :  {  } | 0 0 0 0 0 0 0 0 0 0
 0x24    :  {  } /* End region 54 */ | 0 0 0 0 0 0 0 0 0 0
 0x25    : > { %v7199_v34 = vld [vmem:[#alloc } | 0 0 0 0 0 3 0 0 0 0
 0x26    : > { %v7201_v14 = vld [vmem:[#alloc } | 0 0 1 0 0 3 0 0 0 0
 0x27    : > { %8309 = vst [vmem:[%s9789_s26 } /* End region 55 */ | 0 0 0 0 0 0 0 1 0 0
 0x28 PF : > { %s17935_s28 = sld [smem:[#all } /* Start/End empty region 56 */ | 0 0 0 0 0 0 0 0 0 2
 0x29    : > { %8316 = dma.vmem_to_hbm [threa } /* End region 31 */ | 0 0 0 0 0 0 0 0 0 1
 0x2a PF : > { %s17938_s29 = sld [smem:[#all } /* Start/End empty region 32 */ | 0 0 0 0 0 0 0 0 0 2
 0x2b    : > { %s17951_s16 = smov %s17941_s10 } | 0 0 0 0 0 0 0 0 0 1
 0x2c    :  { %21 = sbr.rel (!%p16183_p9) target = $region113 } | 0 0 0 0 0 0 0 0 0 1
 0x2d    :  {  } | 0 0 0 0 0 0 0 0 0 0
 0x2e    : > { %s17954_s21 = smov %s17944_s1 } | 0 0 0 0 0 0 0 0 0 1
 0x2f    : > { %s17955_s22 = smov %s17945_s25 } | 0 0 0 0 0 0 0 0 0 1
 0x30    : > { %s17956_s23 = smov %s17946_s11 } /* End region 112 */ | 0 0 0 0 0 0 0 0 0 1
 0x31    :  { %7432 = vsyncpa [#allocation7] } | 0 0 0 0 0 1 0 0 0 0
 0x32    :  { %7440 = vsyncpa [#allocation8 } | 0 0 0 0 0 1 0 0 0 0
"""


def split(text):
  """The two dumps of a text as above: of bundles, of utilization."""
  lines = [line.partition(" | ") for line in text.splitlines()]
  used = [numbers for _, _, numbers in lines if numbers]
  return "\n".join(bundle for bundle, _, _ in lines), UNITS + "\n".join(used) + "\n"


@pytest.fixture(scope="module")
def flash():
  return bundles.parse(*split(FLASH), 4)


def test_loops_and_regions_of_a_real_kernel(flash):
  """The grid loop, the step's body, and in it: start of a row, visit, end of a row."""
  (loop,) = flash.root.children
  (body,) = loop.children
  assert (flash.root.kind, flash.root.bundles) == ("program", 51)
  assert (loop.kind, loop.start, loop.end) == ("loop", 0x2, 0x31)
  assert (body.kind, body.start, body.end) == ("region", 0x9, 0x2A)
  spans = [(node.kind, node.start, node.end) for node in body.children]
  assert spans == [("region", 0x10, 0x13), ("region", 0x19, 0x1F), ("region", 0x25, 0x28)]
  assert sum(node.own for node in flash.root.walk()) == 51


def test_where_the_matrix_unit_works(flash):
  (visit,) = bundles.hot(flash)
  assert (visit.start, visit.bundles) == (0x19, 6)
  assert bundles.hot_loop(flash).bundles == 47
  assert flash.instructions(visit, "MXU") == flash.instructions(flash.root, "MXU") == 12
  assert flash.busy(visit, "MXU") == 0.5
  assert flash.filled(visit, "VALU") == (2 + 1 + 2 + 3) / (6 * 4)
  assert flash.busy(flash.root, "VSTORE:SPILL") == 0.0


def test_time_of_a_real_kernel(flash):
  """10 visits in 16 steps of 4 rows: each part as often as it runs."""
  (loop,) = flash.root.children
  (body,) = loop.children
  start, visit, end = body.children
  want = flash.root.own + 16 * (loop.own + body.own) + 4 * (start.own + end.own) + 10 * visit.own
  assert bundles.cycles(flash, Trips(full=6, mixed=4, rows=4, steps=16)) == want


def schedule(text):
  """From lines `address LB : { instructions } comment | MXU`, eleven other units idle."""
  lines = [line.strip() for line in text.strip().splitlines()]
  return bundles.parse(*split("\n".join(f"{line} 0 0 0 0 0 0 0 0 0" for line in lines)), 0)


TWO_LOOPS = """
0      : { entry } | 0
0x1 LB : { } /* Start region 1 */ | 0
0x2 LB : { } /* Start region 2 */ | 1
0x3    : { sbr.rel (%p1) target = $region2 } | 1
0x4 LB : { } /* Start region 3 */ | 1
0x5    : { } | 2
0x6    : { } | 0
0x7    : { sbr.rel (%p2) target = $region3 } | 1
0x8    : { sbr.rel (!%p3) target = $region1 } | 0
0x9    : { exit } | 0
"""


def test_an_unmasked_and_a_masked_loop():
  """The shorter loop turns for full blocks, the longer for mixed, what is around once a row."""
  program = schedule(TWO_LOOPS)
  assert [node.bundles for node in bundles.hot(program)] == [2, 4]
  assert bundles.hot_loop(program).bundles == 8
  assert bundles.cycles(program, Trips(full=100, mixed=10, rows=5, steps=7)) == 2 + 5 * 2 + 240


BRANCHES = """
0      : { entry } | 0
0x1 LB : { } /* Start region 1 */ | 0
0x2    : { sbr.rel (%p1) target = $region3 } | 0
0x3    : { dot } | 1
0x4    : { dot } | 1
0x5    : { sbr.rel target = $region4 } | 0
0x6    : { dot } /* Start region 3 */ | 1
0x7    : { } /* Start/End empty region 4 */ | 0
0x8    : { sbr.rel (%p2) target = $region1 } | 0
"""


def test_two_sides_of_a_branch():
  """A jump at the end of the first side skips the second: neither holds the other."""
  program = schedule(BRANCHES)
  (loop,) = program.root.children
  assert loop.children == (Node("region", 3, 6), Node("region", 6, 7))
  assert bundles.cycles(program, Trips(full=2, mixed=3, rows=1, steps=9)) == 1 + 9 * 4 + 2 + 3 * 3


def test_a_shape_that_is_not_understood_has_no_time():
  text = TWO_LOOPS.replace("0x9    : { exit } | 0", """0x9 LB : { } /* Start region 5 */ | 3
0xa    : { sbr.rel (%p4) target = $region5 } | 3""")  # fmt: skip
  program = schedule(text)
  assert len(bundles.hot(program)) == 3
  assert bundles.cycles(program, Trips(1, 1, 1, 1)) is None


def test_a_few_matrix_instructions_are_no_hot_spot():
  """A row's start may transpose by the matrix unit: less than a fiftieth of all does not count."""
  text = TWO_LOOPS.replace("0x5    : { } | 2", "0x5    : { } | 400")
  assert [node.bundles for node in bundles.hot(schedule(text))] == [4]


def test_a_program_without_matrix_instructions_is_hot_as_a_whole():
  program = schedule("0  : { } | 0\n0x1  : { } | 0")
  assert bundles.hot(program) == [program.root] == [bundles.hot_loop(program)]


TOKEN = """
0      : { entry } | 0
0x1 LB : { } /* Start region 1 */ | 0
0x2    : { } | 0
0x3    : { sbr.rel (%p1) target = $region1 } | 0
0x4    : { exit } | 0
"""


def test_a_grid_without_matrix_instructions_turns_as_a_loop():
  """As where one token more is nothing but sums: its loop runs once a step."""
  program = schedule(TOKEN)
  (loop,) = program.root.children
  assert bundles.hot(program) == [loop] == [bundles.hot_loop(program)]
  assert bundles.cycles(program, Trips(full=7, mixed=0, rows=7, steps=7)) == 2 + 7 * 3


STARTS = """
0      : { entry } | 0
0x1 LB : { } /* Start region 1 */ | 1
0x2    : { sbr.rel (%p1) target = $region2 } | 0
0x3    : { } | 0
0x4    : { } | 0
0x5    : { } /* Start/End empty region 2 */ | 1
0x6    : { sbr.rel (%p2) target = $region1 } | 0
"""


def test_a_row_may_start_inside_of_what_every_step_runs():
  program, trips = schedule(STARTS), Trips(full=10, mixed=0, rows=2, steps=10)
  assert bundles.cycles(program, trips) == 1 + 10 * 6
  assert bundles.cycles(program, trips._replace(starts_inside=True)) == 1 + 10 * 4 + 2 * 2


def test_delay_slots_belong_to_what_branches():
  text = split(FLASH)
  for slots in (2, 4):
    visit = bundles.tree(text[0], slots).children[0].children[0].children[1]
    assert (visit.start, visit.end) == (0x15 + slots, 0x1F)


@pytest.mark.parametrize(
  ("bundle", "used", "sentence"),
  [
    ("nothing here", UNITS, "holds no bundle"),
    ("0  : { }\n0x2  : { }", UNITS, "bundle 0x2 follows bundle 0x0"),
    ("0  : { }", "MXU\n4\n", "not a dump of utilization"),
    ("0  : { }", UNITS + "0 0 0 0 0 0 0 0 0 0\n" * 2, "1 bundles of 10 units, but .*2, 10"),
  ],
)
def test_other_dumps_are_refused(bundle, used, sentence):
  with pytest.raises(ValueError, match=sentence):
    bundles.parse(bundle, used, 4)


def test_comments_may_run_over_lines():
  """And what they hold is not taken for bundles."""
  text = "0  : { a } /* factor: 1\nsecond: 2 */ } /* Start region 7 */\n0x1  : { b }"
  assert bundles.records(text) == [
    "{ a } /* factor: 1\nsecond: 2 */ } /* Start region 7 */",
    "{ b }",
  ]
  assert np.array_equal(
    bundles.parse(text, UNITS + "1 0 0 0 0 0 0 0 0 0\n" * 2, 4).used[:, 0], [1, 1]
  )
