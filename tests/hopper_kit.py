"""Calls of the Hopper kernels, their results in the interpreter and in float64."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

import kit
from attention import lowering, masks
from attention.masks import Span
from pallas_kernels import flash, flash_hopper, tiles
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
    seeds, q_idx, k_idx = (
      spread(self.extras.dropout_seeds, 0, 1),
      spread(at[0], 2),
      spread(at[1], 3),
    )
    return tiles.keep(seeds, q_idx, k_idx, rate=self.dropout_rate)


def visits(mask, T, S, blocks):
  """(by query, by key) in these blocks; a last one that is not whole is mixed."""
  mask = lowering.cut(mask, S, blocks[1])
  q, k = (Span.blocks(-(-n // b) * b, b) for n, b in zip((T, S), blocks, strict=True))
  some, every = map(np.asarray, mask.block(q, k))

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
  out, m, l = kernel(q, k, v, extras, settings, forward)
  rows = flash.gradients_of_rows((out, m, l), d_out, d_lse, extras)
  given = q, k, v, *rows, extras, settings, d_query, d_key
  gradients = flash_hopper.backward(*given, on_chip=False)
  names = ("dq", "dk", "dv", "d_bias", "d_slopes")
  lse = flash.log_sum_exp(m, l)
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
  """The results by name, in float64, and the sum of the sizes of what adds up to `d_slopes`."""
  B, T, N, _ = q.shape

  @jax.jit
  def differentiate(q, k, v, given, d_out, d_lse):
    def f(q, k, v, bias, slopes, scores):
      total = scores if bias is None else scores + bias
      return oracle(call, q, k, v, given._replace(bias=total, alibi_slopes=slopes))

    scores = jnp.zeros((B, N, T, k.shape[1]))
    results, pull = jax.vjp(f, q, k, v, given.bias, given.alibi_slopes, scores)
    return *results, *pull((d_out, d_lse))

  with kit.double():
    inputs = kit.to_double((q, k, v, call.given, d_out, d_lse))
    out, lse, *gradients, d_scores = differentiate(*inputs)
    distance = np.abs(np.arange(T)[:, None] - np.arange(k.shape[1]))
    terms = (np.abs(np.asarray(d_scores)) * distance).sum()
  names = ("dq", "dk", "dv", "d_bias", "d_slopes")
  return {"out": out, "lse": lse} | dict(zip(names, gradients, strict=True)), terms


def cotangents(q, v):
  """Of the output and of the log-sum-exp."""
  make = kit.keys(7)
  d_out = kit.normal(next(make), *q.shape[:3], v.shape[-1]).astype(v.dtype)
  return d_out, kit.normal(next(make), q.shape[0], q.shape[2], q.shape[1])


def check(call: Call):
  """Every result by name. The slopes' gradient is a sum of T S terms that cancel."""
  q, k, v = call.inputs()
  got = run(call, q, k, v, *cotangents(q, v))
  want, terms = expected(call, q, k, v, *cotangents(q, v))
  for name, x in want.items():
    if x is None:
      assert got[name] is None, name
    else:
      least = terms if name == "d_slopes" else 0.0
      kit.assert_close(name, got[name], x, "bfloat16", least=least)


def causal(offset, S):
  """The rule of `masks.causal(offset)` with S keys."""
  return lambda q_idx, k_idx, q_info, k_info, dense: (k_idx <= q_idx + offset) & (k_idx < S)


def half(**sizes):
  """A small case in bfloat16."""
  return kit.Case(**({"B": 1, "N": 2, "K": 1, "H": 64, "h": 64} | sizes), dtype="bfloat16")
