"""What is true of drawn attention alone: its frequencies, and what its estimators estimate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
import kit
from attention import masks
from attention.ops import stochastic

DRAWS, T, S = 50_000, 2, 4
GOAL = jnp.asarray([[0.3, -0.6, 1.0], [-0.2, 0.9, 0.1]])


def inputs():
  """Two queries, four keys, one head: sixteen outcomes."""
  make = kit.keys()
  return tuple(kit.normal(next(make), length, width) for length, width in ((T, 3), (S, 3), (S, 3)))


def log_likelihood(out):
  """Of targets given what both queries read; not additive over them."""
  return -((out.sum(0) - GOAL.sum(0)) ** 2).sum() + (out[0] * out[1]).sum()


def call(q, k, v, noise, **options):
  """One row."""
  rows = (x[None, :, None] for x in (q, k, v))
  out, draws = stochastic.stochastic_attention(
    *rows, noise=noise[None, :, None], scale=1.0, return_draws=True, **options
  )
  return out[0, :, 0], draws


@functools.cache
def enumerated():
  """The bound sum_s p(s) log p(y | s), its entropy, and their gradients, from all outcomes."""

  def bound(q, k, v):
    log_p = jax.nn.log_softmax(q @ k.T)
    outcomes = [(a, b) for a in range(S) for b in range(S)]
    p = jnp.stack([jnp.exp(log_p[0, a] + log_p[1, b]) for a, b in outcomes])
    f = jnp.stack([log_likelihood(v[jnp.asarray(outcome)]) for outcome in outcomes])
    return (p * f).sum(), -(jnp.exp(log_p) * log_p).sum()

  value = lambda i: jax.jit(jax.value_and_grad(lambda *x: bound(*x)[i], (0, 1, 2)))(*inputs())
  return value(0), value(1)


@functools.cache
def estimates(baseline, weight=1.0):
  """Each draw's own gradients of q, k and v."""

  def loss(q, k, v, noise):
    out, draws = call(q, k, v, noise)
    return stochastic.reinforce(log_likelihood(out)[None], draws, baseline, weight=weight)

  noise = jax.random.uniform(jax.random.key(1), (DRAWS, T))
  gradients = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2)), (None, None, None, 0)))
  return [-np.asarray(x, np.float64) for x in gradients(*inputs(), noise)]


def deviation(samples):
  """The standard error of their mean."""
  return samples.std(0) / np.sqrt(len(samples))


@pytest.mark.parametrize(("baseline", "excess"), [(0.0, 0.3), (-6.0, 0.1)])
def test_the_mean_estimate_is_the_enumerated_gradient(baseline, excess):
  """Within 4.5 standard errors each, small enough that a factor of 1 + `excess` would be seen."""
  (_, exact), _ = enumerated()
  for name, samples, want in zip("qkv", estimates(baseline), exact, strict=True):
    error, unsure = samples.mean(0) - np.asarray(want, np.float64), deviation(samples)
    assert (np.abs(error) <= 4.5 * unsure).all(), (name, error / unsure)
    assert 4.5 * np.linalg.norm(unsure) <= excess * np.linalg.norm(want), name


def test_a_wrong_factor_would_be_seen():
  (_, exact), _ = enumerated()
  samples = estimates(-6.0, weight=1.25)[0]
  error = samples.mean(0) - np.asarray(exact[0], np.float64)
  assert (np.abs(error) > 4.5 * deviation(samples)).any()


def test_a_baseline_makes_estimates_vary_less():
  (mean, _), _ = enumerated()
  assert -8 < mean < -4  # so that -6 is near
  spread = [np.linalg.norm(estimates(b)[0].std(0)) for b in (0.0, -6.0)]
  assert spread[1] < spread[0] / 2


def test_the_entropy_and_the_moving_average():
  _, (entropy, gradient) = enumerated()

  def loss(q, k, v):
    out, draws = call(q, k, v, jnp.asarray([0.1, 0.7]))
    zero = log_likelihood(out)[None] * 0
    return stochastic.reinforce(zero, draws, 0.0, entropy_weight=0.5), draws

  (value, draws), got = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*inputs())
  kit.assert_close("entropy", -2 * value, entropy)
  kit.assert_close("dq", -2 * got[0], gradient[0])
  kit.assert_close("dk", -2 * got[1], gradient[1])
  q, k, _ = inputs()
  log_p = jax.nn.log_softmax(q @ k.T)
  kit.assert_close("log p", draws.log_prob[0, :, 0], log_p[np.arange(T), draws.index[0, :, 0]])
  assert stochastic.moving_average(-2.0, jnp.asarray([1.0, 3.0])) == pytest.approx(-1.6)


def test_keys_are_drawn_as_often_as_the_softmax_says():
  q, k, v = inputs()
  noise = jax.random.uniform(jax.random.key(2), (DRAWS, T))
  index = jax.jit(jax.vmap(lambda n: call(q, k, v, n)[1].index[0, :, 0]))(noise)
  p = np.asarray(jax.nn.softmax(q @ k.T), np.float64)
  share = np.stack([(np.asarray(index) == s).mean(0) for s in range(S)], -1)
  assert (np.abs(share - p) <= 4.5 * np.sqrt(p * (1 - p) / DRAWS)).all()


def test_straight_through_reads_one_value_and_learns_as_a_softmax():
  q, k, v = inputs()
  noise = jnp.asarray([0.1, 0.7])
  run = lambda x, temperature: call(*x, noise, temperature=temperature)[0]
  hard = jax.jit(lambda *x: run(x, None))(q, k, v)
  assert all((np.asarray(v) == row).all(1).any() for row in np.asarray(hard))

  @jax.jit
  def straight(*x):
    out, back = jax.vjp(lambda *x: run(x, 0.5), *x)
    return out, back(GOAL)

  out, got = straight(q, k, v)
  kit.assert_same("out", out, hard)
  g = stochastic.gumbel(noise, jnp.arange(T)[:, None] - jnp.arange(S)[None])
  soft = lambda q, k: jax.nn.softmax((q @ k.T + g) / 0.5) @ v
  expected = jax.jit(lambda *x: jax.vjp(soft, *x)[1](GOAL))(q, k)
  kit.assert_close("dq", got[0], expected[0])
  kit.assert_close("dk", got[1], expected[1])


def test_without_noise_it_is_softmax_attention():
  q, k, v = kit.Case().inputs()
  out = jax.jit(functools.partial(stochastic.attend, noise=None))(q, k, v)
  kit.assert_close("out", out, attention.dot_product_attention(q, k, v, is_causal=True))


def test_few_rows_at_a_time_and_rows_that_see_nothing(monkeypatch):
  """Blocks give what all rows do; an empty row gives 0 and zero gradients, and no NaN."""
  q, k, v = kit.Case(T=13, S=13).inputs()
  noise = jax.random.uniform(jax.random.key(0), (2, 13, 4))

  def loss(implementation, q, k, v):
    out, draws = stochastic.stochastic_attention(
      q, k, v, masks.causal(-3), noise=noise, temperature=0.7, implementation=implementation,
      return_draws=True,
    )  # fmt: skip
    return (out**2).sum() + draws.log_prob.sum() + draws.entropy.sum(), (out, draws)

  def run(name):
    f = jax.value_and_grad(functools.partial(loss, name), (0, 1, 2), has_aux=True)
    return jax.jit(f)(q, k, v)

  (_, (out, draws)), gradients = run("reference")
  assert not np.asarray(out)[:, :3].any() and (np.asarray(draws.index)[:, :3] == -1).all()
  assert not np.asarray(gradients[0])[:, :3].any()
  monkeypatch.setattr(stochastic, "_SCORES", 5 * 2 * 4 * 13)
  (_, got), blocked = run("rows")
  kit.assert_trees_close(got, (out, draws))
  for name, a, b in zip(("dq", "dk", "dv"), blocked, gradients, strict=True):
    kit.assert_close(name, a, b)


def test_calls_that_are_wrong():
  q, k, v = kit.Case(T=5, S=5).inputs()
  with pytest.raises(ValueError, match=r"noise must be \[B, T, N\] = \[2, 5, 4\], not \[2, 5\]"):
    stochastic.stochastic_attention(q, k, v, noise=jnp.zeros((2, 5)))
  with pytest.raises(ValueError, match="temperature must be greater than 0, not 0"):
    stochastic.stochastic_attention(q, k, v, noise=None, temperature=0)
  attend = functools.partial(stochastic.stochastic_attention, q, k, v, noise=None)
  for shape in ((1, 4), (3, 5), (5,)):
    with pytest.raises(ValueError, match=r"positions must be \[B, T\] = \[2, 5\] or \[1, 5\], not"):
      attend(positions=jnp.zeros(shape, jnp.int32))
  with pytest.raises(ValueError, match=r"mask must broadcast.* = \[2, 4, 5, 5\], not \[4, 5\]"):
    attend(jnp.ones((4, 5), bool))
  with pytest.raises(ValueError, match="array must be bool"):
    attend(jnp.ones((5, 5)))


def test_noise_draws_no_key_that_the_mask_hides(monkeypatch):
  """Not even noise that is infinite, and with it a temperature that is traced; a bool array is a
  mask as well.
  """
  q, k, v = kit.Case(T=6, S=6).inputs()
  noise, allowed = jax.random.uniform(jax.random.key(0), (2, 6, 4)), np.tri(6, dtype=bool)
  plain = stochastic.gumbel
  monkeypatch.setattr(
    stochastic, "gumbel", lambda n, d: jnp.where(d < 0, jnp.inf, plain(n, jnp.maximum(d, 0)))
  )

  def run(name, mask, temperature):
    def loss(q):
      out, draws = stochastic.stochastic_attention(
        q, k, v, mask, noise=noise, temperature=temperature, implementation=name, return_draws=True
      )
      return (out**2).sum(), (out, draws)

    return jax.value_and_grad(loss, has_aux=True)(q)

  (_, expected), dq = jax.jit(functools.partial(run, "reference", masks.causal()))(0.7)
  (_, got), its_dq = jax.jit(functools.partial(run, "rows", jnp.asarray(allowed)))(0.7)
  assert (np.asarray(got[1].index) <= np.arange(6)[None, :, None]).all()
  kit.assert_trees_close(got, expected)
  kit.assert_close("dq", its_dq, dq)


@pytest.mark.parametrize("sizes", [{"B": 0}, {"T": 0}, {"S": 0}], ids=str)
def test_nothing_to_read_or_nobody_to_read_it(sizes):
  q, k, v = kit.Case(**sizes).inputs()
  out, draws = stochastic.stochastic_attention(
    q, k, v, noise=jnp.zeros(q.shape[:3]), return_draws=True
  )
  assert out.shape == (*q.shape[:3], 8) and not np.asarray(out).any()
  assert draws.index.shape == q.shape[:3] and (np.asarray(draws.index) == -1).all()
