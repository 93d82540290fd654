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
    seeds = self.extras.dropout_seeds[:, :, None, None]
    return tiles.keep(seeds, at[0][:, None], at[1][None], rate=self.dropout_rate)


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
    distance = jnp.abs(jnp.arange(T)[:, None] - jnp.arange(S)).astype(dtype)
    score = score - extras.alibi_slopes[:, None, None] * distance
  score = jnp.where(call.dense, score, -jnp.inf)
  if extras.sinks is not None:
    sinks = jnp.broadcast_to(extras.sinks[:, None, None], (*score.shape[:3], 1))
    score = jnp.concatenate([score, sinks], -1)
  empty = (score == -jnp.inf).all(-1)
  lse = jax.nn.logsumexp(jnp.where(empty[..., None], 0.0, score), axis=-1)
  p = jnp.where(empty[..., None], 0.0, jnp.exp(score - lse[..., None]))[..., :S]
  if extras.dropout_seeds is not None:
    p = jnp.where(call.keep(), p / (1.0 - call.dropout_rate), 0.0)
  return jnp.einsum("bnts,bsnh->btnh", p, v), jnp.where(empty, -jnp.inf, lse)


@functools.partial(jax.jit, static_argnums=0)
def _interpreted(settings, q, k, v, extras, by_query):
  return flash_hopper.forward(q, k, v, extras, settings, by_query, on_chip=False)


def forward(call: Call, q, k, v):
  blocks = flash_hopper.blocks(q.shape, k.shape, v.shape, q.dtype, call.settings)
  by_query, _ = visits(call.mask, q.shape[1], k.shape[1], blocks.forward)
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
    return _interpreted(call.settings, q, k, v, call.given, by_query)


def check(call: Call):
  q, k, v = call.inputs()
  out, lse = forward(call, q, k, v)
  with kit.double():
    want, want_lse = oracle(call, *kit.to_double((q, k, v, call.given)))
  kit.assert_close("out", out, want, "bfloat16")
  kit.assert_close("lse", lse, want_lse, "bfloat16")


def causal(offset, S):
  return lambda q_idx, k_idx, q_info, k_info, dense: (k_idx <= q_idx + offset) & (k_idx < S)


def half(**sizes):
  return kit.Case(**({"B": 1, "N": 2, "K": 1, "H": 64, "h": 64} | sizes), dtype="bfloat16")


CALLS = {
  "causal": Call(half(T=200, S=200), masks.causal(), causal(0, 200)),
  "causal, offset, widths": Call(half(T=70, S=150, H=96, h=32), masks.causal(80), causal(80, 150)),
}


@pytest.mark.parametrize("name", CALLS)
def test_forward(name):
  check(CALLS[name])
