"""What the tests of the flash kernels share: a mask lowered by hand, and the oracle in float64."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

import kit
from attention import masks
from attention.masks import Mask, Span
from pallas_kernels import flash, flash_tpu, tiles


@contextlib.contextmanager
def tpu_interpreter(monkeypatch: Any, block: tuple[int, int] = (128, 128)) -> Iterator[None]:
  """TPU kernels run on the CPU: copies that race are errors, fresh memory is NaN. And in blocks so
  small that a short text has many.
  """
  monkeypatch.setattr(flash_tpu, "_most", lambda width, dtype: (block,) * 3)
  params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
  with pltpu.force_tpu_interpret_mode(params):
    yield


class Lowered(NamedTuple):
  """A mask as kernels read it: a rule of tiles, and the arrays that it reads."""

  mask: Mask
  rule: Callable[..., jax.Array]
  q_info: tuple[jax.Array, ...] = ()
  k_info: tuple[jax.Array, ...] = ()
  dense: tuple[jax.Array, ...] = ()


def dense(mask: Mask, T: int, S: int) -> Lowered:
  """Any mask, held as an array."""
  return Lowered(mask, lambda q_idx, k_idx, q, k, dense: dense[0], dense=(mask.as_array(T, S),))


def by_index(mask: Mask, rule: Callable[[jax.Array, jax.Array], jax.Array]) -> Lowered:
  """A mask of positions alone."""
  return Lowered(mask, lambda q_idx, k_idx, *_: rule(q_idx, k_idx))


def segments(query: jax.Array, key: jax.Array, *, causal: bool) -> Lowered:
  """Packed documents, their ids read as rows and columns."""
  mask = masks.segments(query, key)

  def rule(q_idx, k_idx, q_info, k_info, dense):
    same = q_info[0] == k_info[0]
    return same & (k_idx <= q_idx) if causal else same

  return Lowered(mask & masks.causal() if causal else mask, rule, (query,), (key,))


def visits(mask: Mask, T: int, S: int, block: tuple[int, int], *, by_key=False) -> flash.Visits:
  """The visits of a mask, full blocks first; what is not visited is filled with nonsense."""
  block_q, block_k = block
  T, S = (-(-length // side) * side for length, side in zip((T, S), block, strict=True))
  some, every = mask.block(Span.blocks(T, block_q), Span.blocks(S, block_k))
  state = np.where(every, 0, np.where(some, 1, 2))
  state = state.swapaxes(2, 3) if by_key else state
  order = np.argsort(state, axis=-1, kind="stable").astype(np.int32)
  full, active = ((state < limit).sum(-1, dtype=np.int32) for limit in (1, 2))
  order = np.where(np.arange(order.shape[-1]) < active[..., None], order, 2**30)
  return flash.Visits(*map(jnp.asarray, (order, full, active)))


def causal(offset: int = 0) -> Lowered:
  """`masks.causal`."""
  return by_index(masks.causal(offset), lambda q, k: k <= q + offset)


def window(left: int, right: int) -> Lowered:
  """`masks.sliding_window`."""
  mask = masks.sliding_window(left, right)
  return by_index(mask, lambda q, k: (q - left <= k) & (k <= q + right))


class Problem(NamedTuple):
  """One call, forward and backward."""

  case: kit.Case
  mask: Lowered
  bias: jax.Array | None = None
  alibi_slopes: jax.Array | None = None
  sinks: jax.Array | None = None
  rate: float = 0.0
  cap: float | None = None
  logits: float = 1.0
  """How many times larger the queries are than usual."""

  def inputs(self) -> dict[str, jax.Array]:
    """What it is differentiated by, and the gradients that come back, by name."""
    c, make = self.case, kit.keys(3)
    q, k, v = c.inputs()
    d_out = kit.normal(next(make), c.B, c.T, c.N, c.h).astype(c.dtype)
    d_lse = kit.normal(next(make), c.B, c.N, c.T)
    modifiers = {"bias": self.bias, "alibi_slopes": self.alibi_slopes, "sinks": self.sinks}
    modifiers = {name: x for name, x in modifiers.items() if x is not None}
    q = q * jnp.asarray(self.logits, q.dtype)
    return {"q": q, "k": k, "v": v, "d_out": d_out, "d_lse": d_lse} | modifiers

  @property
  def seeds(self) -> jax.Array | None:
    """One per row and head, where there is dropout."""
    B, N = self.case.B, self.case.N
    return None if not self.rate else jnp.arange(B * N, dtype=jnp.int32).reshape(B, N) * 77 - 9

  def kept(self) -> np.ndarray:
    """What dropout keeps, `B N T S`."""
    c = self.case
    if self.seeds is None:
      return np.ones((c.B, c.N, c.T, c.S), bool)
    q_idx, k_idx = (jax.lax.broadcasted_iota(jnp.int32, (c.T, c.S), axis) for axis in (0, 1))
    keep = lambda seed: tiles.keep(seed, q_idx, k_idx, rate=self.rate)
    return np.asarray(jax.vmap(keep)(self.seeds.reshape(-1)).reshape(c.B, c.N, c.T, c.S))


def oracle(problem: Problem) -> dict[str, np.ndarray]:
  """out, lse and every gradient, by the equation and automatic differentiation in float64."""
  c = problem.case
  allowed = np.broadcast_to(problem.mask.mask.as_array(c.T, c.S), (c.B, c.N, c.T, c.S))
  kept = problem.kept() / (1.0 - problem.rate)
  distance = np.abs(np.arange(c.T)[:, None] - np.arange(c.S)[None]).astype(np.float64)

  def attend(x):
    k, v = (jnp.repeat(x[name], c.N // c.K, axis=2) for name in "kv")
    s = jnp.einsum("btnh,bsnh->bnts", x["q"], k) * c.H**-0.5
    s = s if problem.cap is None else problem.cap * jnp.tanh(s / problem.cap)
    s = s + x["bias"] if "bias" in x else s
    if "alibi_slopes" in x:
      s = s - x["alibi_slopes"][None, :, None, None] * distance[None, None]
    s = jnp.where(allowed, s, -jnp.inf)
    sink = jnp.full(c.N, -jnp.inf) if "sinks" not in x else x["sinks"]
    sink = jnp.broadcast_to(sink[None, :, None, None], (*s.shape[:3], 1))
    m = jax.lax.stop_gradient(jnp.maximum(s.max(-1, keepdims=True), sink))
    m = jnp.where(m == -jnp.inf, 0.0, m)
    p, total = jnp.exp(s - m), jnp.exp(sink - m)
    total = total + p.sum(-1, keepdims=True)
    empty = total == 0.0
    total = jnp.where(empty, 1.0, total)
    out = jnp.einsum("bnts,bsnh->btnh", p / total * kept, v)
    return out, jnp.where(empty, -jnp.inf, m + jnp.log(total))[..., 0]

  @jax.jit
  def differentiate(x, d_out, d_lse):
    (out, lse), pull = jax.vjp(attend, x)
    (gradients,) = pull((d_out, jnp.where(lse == -jnp.inf, 0.0, d_lse)))
    return {"out": out, "lse": lse} | {f"d_{name}": g for name, g in gradients.items()}

  x = problem.inputs()
  with kit.double():
    x = kit.to_double(x)
    d_out, d_lse = x.pop("d_out"), x.pop("d_lse")
    return {name: np.asarray(g) for name, g in differentiate(x, d_out, d_lse).items()}


def run(kernel: Any, problem: Problem, inputs=None, *, traced: bool = False):
  """out, lse and every gradient of a kernel (a module), by name. `traced`: visits under jit."""
  c, x = problem.case, problem.inputs() if inputs is None else inputs
  lowered = problem.mask
  extras = flash.Extras(
    problem.bias, problem.alibi_slopes, problem.sinks, problem.seeds, *lowered[2:]
  )
  q, k, v, d_out, d_lse = (x[name] for name in ("q", "k", "v", "d_out", "d_lse"))
  rule = lowered.rule
  settings = flash.Settings(c.H**-0.5, problem.cap, problem.rate, rule)
  shapes = (q.shape, k.shape, v.shape, q.dtype, settings)
  assert kernel.unsupported(q, k, v, extras, settings) is None

  def visited(block, by_key=False):
    mask = lowered.mask if c.S % block[1] == 0 else lowered.mask & masks.prefix(c.S)
    return visits(mask, c.T, c.S, block, by_key=by_key)

  def bounded(q_idx, k_idx, *rest):
    return rule(q_idx, k_idx, *rest) & (k_idx < c.S)

  settings = settings._replace(rule=bounded)
  blocks = kernel.blocks(*shapes)
  known = (
    visited(blocks.forward), visited(blocks.d_query), visited(blocks.d_key, by_key=True)
  )  # fmt: skip

  def both(x, *given):
    forward, *backward = given or known
    q, k, v, d_out, d_lse = (x[name] for name in ("q", "k", "v", "d_out", "d_lse"))
    out, m, l = kernel.forward(q, k, v, extras, settings, forward)
    rows = flash.gradients_of_rows((out, m, l), d_out, d_lse, extras)
    gradients = kernel.backward(q, k, v, *rows, extras, settings, *backward)
    return out, flash.log_sum_exp(m, l), rows, gradients

  out, lse, rows, gradients = jax.jit(both)(x, *(known if traced else ()))
  assert out.dtype == v.dtype and lse.dtype == jnp.float32
  names = ("d_q", "d_k", "d_v", "d_bias", "d_alibi_slopes")
  found = {"out": out, "lse": lse} | dict(zip(names, gradients, strict=True))
  if problem.sinks is not None:
    found["d_sinks"] = flash.d_sinks(problem.sinks, rows)
  return {name: x for name, x in found.items() if x is not None}


def check(kernel: Any, problem: Problem, **tolerance) -> dict[str, jax.Array]:
  """That a kernel's results are the oracle's, by name."""
  found, want = run(kernel, problem), oracle(problem)
  assert found.keys() == want.keys()
  for name, x in found.items():
    kit.assert_close(name, x, want[name], problem.case.dtype, **tolerance)
  return found
