"""Softmax over retrieved keys, against the softmax of a sorted row of scores in float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kit
from attention import dispatch, masks, retrieved

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


def test_hulls_are_the_scan():
  """Output, mass and gradients, in float64; heads that share keys; the worst keys as the best ones
  of a negative scale.
  """

  def run(implementation, g, *qkv):
    attend = functools.partial(
      retrieved.attend, mask=masks.causal(), top_k=4, scale=-1.5, implementation=implementation
    )
    out, back, mass = jax.vjp(attend, *qkv, has_aux=True)
    return out, mass, *back(g)

  case = kit.Case(B=1, T=300, S=300, N=2, K=1, H=2, h=3)
  with kit.double():
    inputs = kit.to_double(case.inputs())
    g = jnp.asarray(np.random.default_rng(0).normal(size=(1, 300, 2, 3)))
    hulls, scan = (jax.jit(functools.partial(run, form))(g, *inputs) for form in ("hulls", "scan"))
  for name, a, b in zip(("out", "mass", "dq", "dk", "dv"), hulls, scan, strict=True):
    kit.assert_close(name, a, b, "float32" if name == "mass" else "float64")


def test_work_that_nobody_asked_for():
  """On hulls no row of all scores, unless for the mass; and no scan sorts a row to its end."""
  q, k, v = kit.Case(B=1, T=90, S=90, N=1, K=1, H=2, h=3).inputs()

  def text(implementation, outputs):
    attend = functools.partial(
      retrieved.attend, mask=masks.causal(), top_k=4, scale=1.0, implementation=implementation
    )
    return jax.jit(lambda *qkv: attend(*qkv)[:outputs]).lower(q, k, v).compile().as_text()

  row = re.compile(r"\[[\d,]*90,90\]\S* exponential")
  assert row.search(text("hulls", 2)) and not row.search(text("hulls", 1))
  assert "TopK" in text("scan", 2) and " sort(" not in text("scan", 2)


def test_which_one_runs():
  """Long calls of planar heads, where both sides are long, go to hulls."""
  x = lambda T, H=2: jax.ShapeDtypeStruct((1, T, 1, H), jnp.float32)

  def chosen(T, S, H=2, top_k=8, mask=None):
    mask = masks.everything() if mask is None else mask
    call = retrieved.Call(x(T, H), x(S, H), x(S), mask, top_k, 1.0)
    return dispatch.choose(None, retrieved.IMPLEMENTATIONS, call)

  assert chosen(2**13, 2**13) == chosen(2**13, 2**13, mask=masks.causal()) == "hulls"
  assert chosen(2**13, 2**13, top_k=9) == chosen(2**11, 2**11, top_k=1) == "scan"
  assert chosen(2**20, 2**20, top_k=33) == chosen(1, 2**20) == chosen(2**13, 2**13, H=3) == "scan"
  with pytest.raises(NotImplementedError, match="top_k is at most 256, not 257"):
    dispatch.choose(
      "hulls",
      retrieved.IMPLEMENTATIONS,
      retrieved.Call(x(9), x(9), x(9), masks.causal(), 257, 1.0),
    )
