"""What kernels for Hopper GPUs are made of: tiles in registers, matrix products, rings of buffers,
whose turn it is.

A kernel runs on the chip or in the interpreter, and the two differ in `product`, `add_products`,
`two_products` and `product_behind` alone (`on_chip`). The interpreter has no accumulator that
begins with a value and no left operand in registers, and its race detector does not watch wgmma.
So there the operands are read by ordinary loads, which it does watch: who fills a ring, who reads
it, and what orders them is checked as it runs on the chip.

What the compiler taught (ptxas 13.5):

- a value that becomes the next product's left operand must not be made while the product that reads
  the last one runs, or every wgmma is serialized (C7513);
- a tile whose place does not change in a loop has its descriptors hoisted out of it, two registers
  per 16 columns, and spills the accumulators of wide heads: see `unhoisted`. `positions` that are
  computed do the same, and descriptors that products share (`hopper_parts.Fresh`);
- loads of what later lines need are begun early, and fill registers: a barrier between them, which
  `commit_smem` is, keeps them apart;
- one value too many anywhere spills one that lives everywhere, and who feeds, with 24 registers,
  reads it from memory too;
- `setmaxnreg` takes effect unless ptxas compiles relocatable code (`-c`, C7504); 240 and 24
  registers of three warpgroups are the 168 of each at the start.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tuned

Array = jax.Array

ROWS = 64
"""The rows of a warpgroup's tile: those of one wgmma."""

TILE = plgpu.Layout.WGMMA
"""Where a warpgroup's registers hold a tile, ..."""
ROW, COLUMN = TILE.reduce(1), TILE.reduce(0)
"""... one value per row of it, one per column."""

MAX_WIDTH = 256
"""The widest head: a wgmma has at most 256 columns."""

MAX_BLOCKS = 65535
"""Of every axis of CUDA's grids but the first."""


REDUCTION = 512
"""Bytes of shared memory for sums across warps; sums along rows need none, sums of 64 columns twice
as many.
"""


class Plan(NamedTuple):
  """How a pass is cut."""

  warpgroups: int
  """That compute; one more feeds them. Each has `ROWS` rows of the block."""
  others: int
  """How many of the other axis one step takes."""
  stages: tuple[int, int]
  """Steps whose operands are in shared memory or on the way, of the first ring and the second."""
  registers: int = 240
  """Of a thread that computes: 2 x 240 + 24 and 3 x 160 + 32 are what 512 threads' worth allow."""
  feeder: int = 24
  """Registers of a thread that feeds."""

  @property
  def rows(self) -> int:
    """The rows of a block."""
    return self.warpgroups * ROWS


def tuned_plan(plan: Plan, what: str, dtype: Any, H: int, h: int) -> Plan:
  """The plan with what was measured to be faster on an H200, if anything was."""
  return plan._replace(**tuned.look_up("h200", what, dtype=dtype, H=H, h=h))


def padded(width: int) -> int:
  """The next head width that a swizzled bulk copy and wgmma can take."""
  return -(-width // 32) * 32


def slice_width(width: int) -> int:
  """The columns of one swizzled tile of rows this wide."""
  return 64 if width % 64 == 0 else 32


def matrix(rows: int, width: int, dtype: Any, most: int = 64) -> Callable[[int], Any]:
  """How many matrices there are -> the shared memory that bulk copies write and wgmma reads, which
  wants the swizzled tiles of both operands equally wide: `most` columns at most.
  """
  size = jnp.dtype(dtype).itemsize
  columns = min(slice_width(width), most, 128 // size)
  transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(size * columns))
  return lambda count: plgpu.SMEM((count, rows, width), dtype, transforms=transforms)


def matrices(many: int, rows: int, width: int, dtype: Any) -> Callable[[int], Any]:
  """The same of several matrices that one step takes: `count many rows width`."""
  one = matrix(rows, width, dtype)(1)
  return lambda count: plgpu.SMEM((count, many, rows, width), dtype, transforms=one.transforms)


def numbers(length: int) -> Callable[[int], Any]:
  """How many rows of float32 there are -> the shared memory."""
  return lambda count: plgpu.SMEM((count, length), jnp.float32)


def pick(array: Any, *index: Any) -> tuple[Any, ...]:
  """The index, with 0 where the array has one entry for all."""
  return tuple(0 if size == 1 else i for size, i in zip(array.shape, index, strict=False))


def unhoisted(index: Array | int, step: Array | int) -> Any:
  """The index as it is, in a form that a compiler cannot know to be the same in every step (of less
  than 2^28). The descriptors and addresses of what it names are then made where they are needed, in
  uniform registers, and not kept through the loop in those that accumulators need.

  A loop whose bound the compiler knows, if only as at most 8, has steps that it knows to be small:
  bounds must come from memory. And of a step t n + j, n a power of two, it would see that the upper
  bits are those of t, the same in every step of the loop over j; hence three times the step.
  """
  return index + lax.shift_right_logical(3 * step, 30)


def write_positions(smem) -> None:
  """0 to 63, for `positions`; what writes them reads them."""
  smem[...] = plgpu.broadcasted_iota(jnp.int32, smem.shape, dimension=0, layout=ROW)
  plgpu.commit_smem()


def positions(smem) -> tuple[Array, Array]:
  """(row, column) of every element of a tile of 64 x 64. If a thread computed its own they would be
  kept through loops, in some forty registers.
  """
  shape = (ROWS, ROWS)
  row = along(plgpu.load(smem, layout=ROW), 0, shape)
  return row, along(plgpu.load(smem, layout=COLUMN, optimized=False), 1, shape)


def zeros(rows: int, columns: int) -> Array:
  """A tile of zeros."""
  return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), TILE)


def row_of(value: Any) -> Array:
  """The same float32 for every row of a tile."""
  return plgpu.layout_cast(jnp.broadcast_to(jnp.float32(value), (ROWS,)), ROW)


def along(x: Array, axis: int, shape: tuple[int, ...]) -> Array:
  """A value per row (axis 0) or per column (1), as a tile."""
  return lax.broadcast_in_dim(x, shape, (axis,))


def store(x: Array, smem, gmem) -> None:
  """A tile to global memory by way of shared memory, which may take it slice by slice."""
  rows, width = smem.shape
  for first in range(0, x.shape[1], width):
    smem[...] = x[:, first : first + width]
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem, gmem.at[:, pl.ds(first, width)])
    plgpu.wait_smem_to_gmem(0)


class Ring(NamedTuple):
  """Buffers in shared memory that bulk copies fill and that are used in turn. First the types of
  scratch, then the refs.
  """

  buffers: tuple[Any, ...]
  here: Any
  free: Any

  @classmethod
  def of(cls, users: int, stages: int, *buffers: Callable[[int], Any]) -> "Ring":
    """A ring of `stages` entries, whose every entry `users` warpgroups give back."""
    types = [buffer(stages) for buffer in buffers]
    copies = sum(x.shape[1] if len(x.shape) == 4 else 1 for x in types)
    here = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
    free = plgpu.Barrier(num_arrivals=users, num_barriers=stages)
    return cls(tuple(types), here, free)

  def slot(self, step: Array | int) -> Array | int:
    """Where a step's entry lies."""
    stages = self.buffers[0].shape[0]
    if stages == 1:
      return unhoisted(jnp.int32(0), step)
    return step & (stages - 1) if stages & (stages - 1) == 0 else lax.rem(step, stages)

  def fill(self, step: Array, *sources: Any) -> None:
    """Starts the copies of a step, once its entry is free. A buffer of several matrices takes a
    tuple of sources.
    """
    slot = self.slot(step)
    free = self.free.at[slot]
    pl.when(step >= self.buffers[0].shape[0])(lambda: plgpu.barrier_wait(free))
    for source, buffer in zip(sources, self.buffers, strict=True):
      several = isinstance(source, tuple)
      for i, one in enumerate(source if several else (source,)):
        to = buffer.at[slot, i] if several else buffer.at[slot]
        plgpu.copy_gmem_to_smem(one, to, self.here.at[slot])

  def drain(self, steps: Array) -> None:
    """Waits until the last entries of `steps` are given back."""
    first = jnp.maximum(steps - self.buffers[0].shape[0], 0)
    wait = lambda step, _: plgpu.barrier_wait(self.free.at[self.slot(step)])
    lax.fori_loop(first, steps, wait, None)

  def take(self, step: Array | int) -> tuple[Any, ...]:
    """The entry of a step, when it is here."""
    slot = self.slot(step)
    plgpu.barrier_wait(self.here.at[slot])
    return tuple(buffer.at[slot] for buffer in self.buffers)

  def at(self, step: Array | int) -> tuple[Any, ...]:
    """The entry of a step that was taken already."""
    return tuple(buffer.at[self.slot(step)] for buffer in self.buffers)

  def give(self, step: Array | int) -> None:
    """This warpgroup needs the entry no more."""
    plgpu.barrier_arrive(self.free.at[self.slot(step)])


class Turns(NamedTuple):
  """Whose turn it is to fill the tensor cores: while one warpgroup's products run, the others do
  their softmax.
  """

  barriers: Any
  me: Array
  count: int

  def start(self) -> None:
    """The last hands the first turn to the first."""
    pl.when(self.me == self.count - 1)(lambda: plgpu.barrier_arrive(self.barriers.at[0]))

  def wait(self) -> None:
    """Until it is my turn."""
    plgpu.barrier_wait(self.barriers.at[self.me])

  def give(self) -> None:
    """To the next."""
    plgpu.barrier_arrive(self.barriers.at[lax.rem(self.me + 1, self.count)])

  def end(self) -> None:
    """The first takes the turn that nobody needs any more: who waits at a barrier must have seen
    all of its phases when it goes.
    """
    pl.when(self.me == 0)(lambda: plgpu.barrier_wait(self.barriers.at[0]))


def product(a_smem, b_smem, start: Array | None = None, *, on_chip: bool) -> Any:
  """a b^T of two tiles in shared memory, added to `start`."""
  return multiply(a_smem, b_smem, start, b_t=True, on_chip=on_chip)


def multiply(
  a_smem, b_smem, start: Array | None = None, *, a_t=False, b_t=False, on_chip: bool
) -> Any:
  """a b of two tiles in shared memory, either of them transposed, added to `start`. In the
  interpreter both are read by ordinary loads: its race detector watches those and not wgmma.
  """
  if not on_chip:
    a, b = a_smem[...].astype(jnp.float32), b_smem[...].astype(jnp.float32)
    plgpu.commit_smem()
    total = jnp.dot(a.T if a_t else a, b.T if b_t else b)
    return total if start is None else start + total

  def run(acc_ref):
    plgpu.wgmma(acc_ref, a_smem.T if a_t else a_smem, b_smem.T if b_t else b_smem)
    return acc_ref[...] if start is None else None

  if start is None:
    shape = a_smem.shape[1 if a_t else 0], b_smem.shape[0 if b_t else 1]
    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))
  return pl.run_state(run)(plgpu.ACC.init(start))


def add_products(*sums: tuple[Array, Array, Any], on_chip: bool) -> tuple[Any, ...]:
  """acc + p v of every (acc, p, v): p in registers, v in shared memory."""
  if not on_chip:
    total = tuple(
      acc + jnp.dot(p.astype(jnp.float32), v_smem[...].astype(jnp.float32))
      for acc, p, v_smem in sums
    )
    plgpu.commit_smem()
    return total

  def run(refs):
    for ref, (_, p, v_smem) in zip(refs, sums, strict=True):
      plgpu.wgmma(ref, p, v_smem)

  return tuple(pl.run_state(run)(tuple(plgpu.ACC.init(acc) for acc, _, _ in sums)))


def two_products(
  a_smem, b_smem, c_smem, d_smem, *, first, then, apart: bool = False, on_chip: bool
):
  """then(first(a b^T), c d^T), the second product behind `first`; `apart`, after it: the sums of
  the second then take no registers while `first` runs.
  """
  if apart or not on_chip:
    x = first(product(a_smem, b_smem, on_chip=on_chip))
    return then(x, product(c_smem, d_smem, on_chip=on_chip))

  def run(ab_ref, cd_ref):
    plgpu.wgmma(ab_ref, a_smem, b_smem.T)
    plgpu.wgmma(cd_ref, c_smem, d_smem.T)
    x = first(plgpu.wgmma_accumulator_load(ab_ref, wait_n=1))
    return then(x, cd_ref[...])

  acc = plgpu.ACC((a_smem.shape[0], b_smem.shape[0]), jnp.float32)
  return pl.run_scoped(run, acc, acc)


def product_behind(
  q_smem, k_smem, acc, p, v_smem, state, *, update, issued=None, start=None, on_chip: bool
) -> tuple[Any, Any]:
  """(update(start + q k^T), acc + p v), the second product behind the update of the first. `state`
  has the structure of what `update` returns; `issued` runs when both are on their way.

  What `update` returns must not be the p of the next call: its registers would be written while
  this product still reads them, and ptxas then serializes every wgmma (C7513).
  """
  if not on_chip:
    s = product(q_smem, k_smem, start, on_chip=False)
    (acc,) = add_products((acc, p, v_smem), on_chip=False)
    if issued is not None:
      issued()
    return update(s), acc

  def run(refs):
    s_ref, acc_ref, *state_refs = refs
    plgpu.wgmma(s_ref, q_smem, k_smem.T)
    plgpu.wgmma(acc_ref, p, v_smem)
    if issued is not None:
      issued()
    new = update(plgpu.wgmma_accumulator_load(s_ref, wait_n=1))
    for ref, x in zip(state_refs, new, strict=True):
      ref[...] = x

  s = zeros(q_smem.shape[0], k_smem.shape[0]) if start is None else start
  _, acc, *state = pl.run_state(run)((plgpu.ACC.init(s), plgpu.ACC.init(acc), *state))
  return tuple(state), acc


def specialize(plan: Plan, warpgroup: Array, *, compute, feed) -> None:
  """The first warpgroups compute; the last feeds them, and gives them its registers."""

  @pl.when(warpgroup < plan.warpgroups)
  def _():
    plgpu.set_max_registers(plan.registers, action="increase")
    compute()

  @pl.when(warpgroup == plan.warpgroups)
  def _():
    plgpu.set_max_registers(plan.feeder, action="decrease")
    feed()


def launch(name: str, body, plan: Plan, *, grid: dict[str, int], out_type: Any, scratch: Any):
  """`plgpu.kernel` with one block of warpgroups per point of the grid. Of CUDA's axes the first has
  the grid's last, of any length; the second and the third, which has those before the last two, may
  have `MAX_BLOCKS`.
  """
  return plgpu.kernel(
    body,
    out_type=out_type,
    grid=tuple(grid.values()),
    grid_names=tuple(grid),
    num_threads=plan.warpgroups + 1,
    thread_name="warpgroup",
    kernel_name=name,
    compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=REDUCTION),
    scratch_types={"scratch": scratch},
  )


ALONE = plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=2 * REDUCTION)


def launch_alone(
  name: str, body, grid: dict[str, int], out_type: Any, scratch: Any = (), params: Any = ALONE
):
  """`plgpu.kernel` with one warpgroup per point of the grid, which feeds itself."""
  return plgpu.kernel(
    body,
    out_type=out_type,
    grid=tuple(grid.values()),
    grid_names=tuple(grid),
    kernel_name=name,
    compiler_params=params,
    scratch_types={"scratch": scratch},
  )
