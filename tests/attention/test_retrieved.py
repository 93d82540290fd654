"""Softmax over retrieved keys, against the softmax of a sorted row of scores in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kit
from attention import masks, retrieved

CASE = kit.Case(B=2, T=21, S=21, N=4, K=2, H=5, h=3)


def expected(q, k, v, top_k, scale):
  """Out and mass, one query at a time."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  B, T, N, _ = q.shape
  out, mass = np.zeros((B, T, N, v.shape[-1])), np.zeros((B, T, N))
  for b, t, n in np.ndindex(B, T, N):
    s = k[b, : t + 1, n // 2] @ q[b, t, n] * scale
    p = np.exp(s - s.max())
    best = np.argsort(-s, kind="stable")[:top_k]
    mass[b, t, n] = p[best].sum() / p.sum()
    out[b, t, n] = p[best] @ v[b, best, n // 2] / p[best].sum()
  return out, mass


@pytest.mark.parametrize("top_k", [1, 4, 99])
def test_output_and_mass(top_k):
  q, k, v = CASE.inputs()
  attend = functools.partial(retrieved.attend, mask=masks.causal(), top_k=top_k, scale=1.5)
  out, mass = jax.jit(attend)(q, k, v)
  wanted, wanted_mass = expected(q, k, v, top_k, 1.5)
  kit.assert_close("out", out, wanted)
  kit.assert_close("mass", mass, wanted_mass)
  if top_k == 99:
    kit.assert_close("softmax", out, kit.softmax_attention(q, k, v, np.tri(21) > 0, scale=1.5)[0])


def test_gradients_are_those_of_the_sparse_function():
  """Central differences in float64, in a direction, of every input."""
  q, k, v = CASE.inputs()
  attend = lambda q, k, v: retrieved.attend(q, k, v, masks.causal(), top_k=3, scale=1.0)[0]
  with kit.double():
    inputs = kit.to_double((q, k, v))
    f = jax.jit(lambda *x: (attend(*x) ** 2).sum())
    gradients = jax.jit(jax.grad(lambda *x: (attend(*x) ** 2).sum(), (0, 1, 2)))(*inputs)
    for i, name in enumerate("qkv"):
      way = np.random.default_rng(i).normal(size=inputs[i].shape)
      ends = [f(*inputs[:i], inputs[i] + e * way, *inputs[i + 1 :]) for e in (1e-6, -1e-6)]
      slope = float(ends[0] - ends[1]) / 2e-6
      np.testing.assert_allclose((np.asarray(gradients[i]) * way).sum(), slope, 1e-6, err_msg=name)


def test_a_query_without_keys():
  q, k, v = CASE.inputs()
  attend = lambda q, k, v: retrieved.attend(q, k, v, masks.causal(-5), top_k=3, scale=1.0)
  out, mass = jax.jit(attend)(q, k, v)
  assert not np.asarray(out)[:, :5].any() and not np.asarray(mass)[:, :5].any()
  gradients = jax.jit(jax.grad(lambda *x: attend(*x)[0].sum(), (0, 1, 2)))(q, k, v)
  assert all(np.isfinite(x).all() for x in gradients) and not np.asarray(gradients[0])[:, :5].any()


def test_few_rows_at_a_time(monkeypatch):
  """Blocks of queries give what all of them together do."""
  q, k, v = CASE.inputs()
  run = lambda: jax.jit(lambda q, k: retrieved.retrieve(q, k, masks.causal(), top_k=3, scale=1.0))(
    q, k
  )
  whole = run()
  monkeypatch.setattr(retrieved, "_ROWS", 4 * 2 * 4 * 21)
  for name, a, b in zip(
    ("index", "lse"),
    run(),
    whole,
    strict=True,
  ):
    kit.assert_close(name, a, b)
  assert jnp.asarray(whole[0]).shape == (2, 21, 4, 3)
