"""The Hopper kernels, interpreted with their barriers, rings and warpgroups and a race detector that
fails on a race, against softmax attention in float64.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import kit
from attention import masks
from attention.masks import Span
from pallas_kernels import flash_hopper, tiles
from pallas_kernels.flash import Extras, Settings, Visits


class Call(NamedTuple):
  """A call, and how its mask is lowered: to a rule of positions and infos, or to an array."""

  case: kit.Case
  mask: masks.Mask
  rule: object = None
  extras: Extras = Extras()
  logit_cap: float | None = None
  dropout_rate: float = 0.0
  seed: int = 0
  amplify: float = 1.0

  def inputs(self):
    q, k, v = self.case.inputs(self.seed)
    return (q * self.amplify, k, v)

  @property
  def settings(self):
    rule = self.rule or (lambda q_idx, k_idx, q_info, k_info, dense: dense[0])
    return Settings(self.case.H**-0.5, self.logit_cap, self.dropout_rate, rule)

  @property
  def dense(self):
    return self.mask.as_array(self.case.T, self.case.S)

  @property
  def given(self):
    extras = self.extras
    return extras if self.rule else extras._replace(dense=(self.dense,))

  def keep(self):
    """Dropout's bits, `B N T S`."""
    at = [jnp.arange(n, dtype=jnp.int32) for n in (self.case.T, self.case.S)]
    shape = (*self.extras.dropout_seeds.shape, self.case.T, self.case.S)
    spread = lambda x, *axes: jax.lax.broadcast_in_dim(x, shape, axes)
    seeds, q_idx, k_idx = spread(self.extras.dropout_seeds, 0, 1), spread(at[0], 2), spread(at[1], 3)
    return tiles.keep(seeds, q_idx, k_idx, rate=self.dropout_rate)


def visits(mask, T, S, blocks):
  """(by query, by key) in these blocks."""
  if S % blocks[1]:
    mask = mask & masks.prefix(S)
  some, every = map(np.asarray, mask.block(Span.blocks(T, blocks[0]), Span.blocks(S, blocks[1])))

  def one(some, every):
    state = np.where(every, 0, np.where(some, 1, 2))
    order = np.argsort(state, axis=-1, kind="stable").astype(np.int32)
    count = lambda limit: jnp.asarray((state < limit).sum(-1).astype(np.int32))
    return Visits(jnp.asarray(order), count(1), count(2))

  return one(some, every), one(some.swapaxes(2, 3), every.swapaxes(2, 3))


def oracle(call: Call, q, k, v, extras: Extras, dtype=jnp.float64):
  """(out, lse) as the equations stand."""
  T, S, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
  k, v = (jnp.repeat(x, group, 2) for x in (k, v))
  score = jnp.einsum("btnh,bsnh->bnts", q, k) * call.settings.scale
  if call.logit_cap is not None:
    score = call.logit_cap * jnp.tanh(score / call.logit_cap)
  if extras.bias is not None:
    score = score + extras.bias
  if extras.alibi_slopes is not None:
    distance = jnp.abs(jnp.arange(T)[:, None] - jnp.arange(S)[None]).astype(dtype)
    score = score - extras.alibi_slopes[None, :, None, None] * distance[None, None]
  score = jnp.where(call.dense, score, -jnp.inf)
  if extras.sinks is not None:
    sinks = jnp.broadcast_to(extras.sinks[None, :, None, None], (*score.shape[:3], 1))
    score = jnp.concatenate([score, sinks], -1)
  empty = (score == -jnp.inf).all(-1)
  lse = jax.nn.logsumexp(jnp.where(empty[..., None], 0.0, score), axis=-1)
  p = jnp.where(empty[..., None], 0.0, jnp.exp(score - lse[..., None]))[..., :S]
  if extras.dropout_seeds is not None:
    p = jnp.where(call.keep(), p / (1.0 - call.dropout_rate), 0.0)
  return jnp.einsum("bnts,bsnh->btnh", p, v), jnp.where(empty, -jnp.inf, lse)


@functools.partial(jax.jit, static_argnums=0)
def _interpreted(settings, q, k, v, extras, d_out, d_lse, visits):
  forward, d_query, d_key = visits
  kernel = functools.partial(flash_hopper.forward, on_chip=False)
  out, lse = kernel(q, k, v, extras, settings, forward)
  delta = jnp.einsum("btnh,btnh->bnt", *(x.astype(jnp.float32) for x in (d_out, out))) - d_lse
  lse_or_none = jnp.where(lse == -jnp.inf, jnp.inf, lse)
  given = q, k, v, d_out, lse_or_none, delta, extras, settings, d_query, d_key
  gradients = flash_hopper.backward(*given, on_chip=False)
  names = ("dq", "dk", "dv", "d_bias", "d_slopes")
  return {"out": out, "lse": lse} | dict(zip(names, gradients, strict=True))


def run(call: Call, q, k, v, d_out, d_lse):
  """The results by name, from the interpreter."""
  T, S = q.shape[1], k.shape[1]
  blocks = flash_hopper.blocks(q.shape, k.shape, v.shape, q.dtype, call.settings)
  by_block = [visits(call.mask, T, S, b) for b in blocks]
  chosen = by_block[0][0], by_block[1][0], by_block[2][1]
  assert flash_hopper.unsupported(q, k, v, call.given, call.settings) is None
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
    return _interpreted(call.settings, q, k, v, call.given, d_out, d_lse, chosen)


def expected(call: Call, q, k, v, d_out, d_lse):
  """The results by name, in float64."""
  with kit.double():
    given = kit.to_double(call.given)
    inputs = (*kit.to_double((q, k, v)), given.bias, given.alibi_slopes)

    def f(q, k, v, bias, slopes):
      return oracle(call, q, k, v, given._replace(bias=bias, alibi_slopes=slopes))

    (out, lse), pull = jax.vjp(f, *inputs)
    gradients = pull((kit.to_double(d_out), kit.to_double(d_lse)))
  names = ("dq", "dk", "dv", "d_bias", "d_slopes")
  return {"out": out, "lse": lse} | dict(zip(names, gradients, strict=True))


def cotangents(q, v):
  """Of the output and of the log-sum-exp."""
  make = kit.keys(7)
  d_out = jax.random.normal(next(make), (*q.shape[:3], v.shape[-1])).astype(v.dtype)
  return d_out, jax.random.normal(next(make), (q.shape[0], q.shape[2], q.shape[1]))


def check(call: Call):
  """Every result by name. The slopes' gradient is a sum of T S terms that cancel."""
  q, k, v = call.inputs()
  got, want = (f(call, q, k, v, *cotangents(q, v)) for f in (run, expected))
  for name, x in want.items():
    if x is None:
      assert got[name] is None, name
    else:
      factor = 4.0 if name == "d_slopes" else 1.0
      kit.assert_close(name, got[name], x, "bfloat16", factor=factor)


def causal(offset, S):
  return lambda q_idx, k_idx, q_info, k_info, dense: (k_idx <= q_idx + offset) & (k_idx < S)


def half(**sizes):
  return kit.Case(**({"B": 1, "N": 2, "K": 1, "H": 64, "h": 64} | sizes), dtype="bfloat16")


_IDS = jnp.asarray(np.repeat([[0, 1, 2, 3], [5, 5, 1, 0]], [40, 97, 11, 12], axis=1), jnp.int32)
_N = functools.partial(jax.random.normal, jax.random.key(3))


def _documents(q_idx, k_idx, q_info, k_info, dense):
  near = (k_idx <= q_idx) & (k_idx >= q_idx - 50) & (k_idx < 160)
  return near & (q_info[0] == k_info[0])


CALLS = {
  "causal": Call(half(T=200, S=200, N=4, K=2), masks.causal(), causal(0, 200)),
  "offset, widths, cap": Call(
    half(T=70, S=150, H=96, h=32), masks.causal(80), causal(80, 150), logit_cap=5.0
  ),
  "documents, window, sinks": Call(
    half(B=2, T=160, S=160, H=32, h=64),
    masks.segments(_IDS) & masks.sliding_window(50),
    _documents,
    Extras(q_info=(_IDS,), k_info=(_IDS,), sinks=_N((2,)) * 2),
  ),
  "prefix or chunked, bias of every head": Call(
    half(B=2, T=70, S=97), masks.prefix(20) | masks.chunked(32), extras=Extras(bias=_N((1, 2, 70, 97)))
  ),
  "bias of keys, slopes": Call(
    half(B=2, T=97, S=70), masks.sliding_window(30, 40),
    extras=Extras(bias=_N((2, 1, 1, 70)), alibi_slopes=jnp.array([0.5, 0.05])),
  ),
  "dropout": Call(
    half(T=130, S=130), masks.causal(), causal(0, 130),
    Extras(dropout_seeds=jnp.array([[3, 4]], jnp.int32)), dropout_rate=0.3,
  ),
  "empty rows, large logits": Call(
    half(T=260, S=70), masks.lengths(query=jnp.array([100], jnp.int32)) & masks.causal(-3), amplify=40.0
  ),
  "widest": Call(half(T=70, S=130, N=1, H=256, h=256), masks.causal(60), causal(60, 130)),
  "wide keys": Call(half(T=130, S=70, N=1, H=192, h=128), masks.causal(), causal(0, 70)),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_results_and_gradients(name):
  check(CALLS[name])
