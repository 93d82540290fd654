"""Feature maps against the kernels that they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kit
from attention import feature_maps
from attention.feature_maps import FeatureMap, favor

NAMES = ("identity", "elu_plus_one", "relu", "taylor", "cosformer", "hedgehog", "favor")


def vectors(seed, T=6, N=2, H=8):
  return kit.normal(jax.random.key(seed), 2, T, N, H)


def scores(phi, q, k):
  """phi(q_i) . phi(k_j) for every pair, in float64 from there on."""
  q, k = phi(q, is_query=True), phi(k, is_query=False)
  return np.einsum("btnm,bsnm->bnts", np.asarray(q, np.float64), np.asarray(k, np.float64))


def products(q, k):
  q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
  return np.einsum("btnh,bsnh->bnts", q, k)


@pytest.mark.parametrize("name", NAMES)
def test_each_is_a_pytree_whose_width_is_as_told_and_whose_tokens_are_alone(name):
  phi = feature_maps.get(name, 8)
  x = vectors(0)
  assert isinstance(phi, FeatureMap)
  assert feature_maps.get(phi, 8) is phi
  for is_query in (True, False):
    run = jax.jit(lambda phi, x, is_query=is_query: phi(x, is_query=is_query))
    features = run(phi, x)
    assert features.shape == (*x.shape[:3], phi.num_features(8))
    later = run(phi, x.at[:, 3:].multiply(100.0))
    kit.assert_same("earlier tokens", later[:, :3], features[:, :3])


def test_a_function_becomes_a_feature_map_and_a_wrong_name_is_told():
  phi = feature_maps.get(lambda x: jnp.concatenate([x, -x], axis=-1), 8)
  assert phi.num_features(8) == 16 and phi(vectors(0), is_query=False).shape[-1] == 16
  assert feature_maps.get(None, 8) is feature_maps.identity
  with pytest.raises(ValueError, match="elu_plus_one.* got 'elu'"):
    feature_maps.get("elu", 8)


def test_elu_plus_one_is_positive_and_smooth_everywhere():
  def f(x):
    return feature_maps.elu_plus_one(x, is_query=True)

  x = jnp.array([-80.0, -20.0, -1.0, 0.0, 1e-6, 2.0, 1e4])
  want = np.where(
    np.asarray(x) > 0,
    np.asarray(x, np.float64) + 1,
    np.exp(np.minimum(np.asarray(x, np.float64), 0)),
  )
  np.testing.assert_allclose(np.asarray(f(x)), want, rtol=1e-6)
  assert np.all(np.asarray(f(x)) > 0)
  slope = np.where(np.asarray(x) > 0, 1.0, want)
  np.testing.assert_allclose(np.asarray(jax.vmap(jax.grad(f))(x)), slope, rtol=1e-6)


def test_taylor_is_the_series_to_second_order():
  q, k = vectors(0), vectors(1)
  s = products(q, k) / np.sqrt(8)
  kit.assert_close("taylor", scores(feature_maps.taylor, q, k), 1 + s + s**2 / 2)
  assert feature_maps.taylor.num_features(16) == 153


def test_cosformer_is_its_kernel_at_any_length_and_offset():
  phi = feature_maps.cosformer(max_length=20)
  q, k = vectors(0), vectors(1)
  near = np.cos(np.pi * (np.arange(6)[:, None] - np.arange(6)) / 40)
  want = products(np.maximum(q, 0), np.maximum(k, 0)) * near
  kit.assert_close("cosformer", scores(phi, q, k), want)
  kit.assert_close("prefix", scores(phi, q[:, :4], k[:, :4]), want[..., :4, :4])
  at = jnp.arange(9, 15)[None].repeat(2, axis=0)
  moved = [phi(x, positions=at, is_query=i == 0) for i, x in enumerate((q, k))]
  kit.assert_close("moved", products(*moved), want)
  with pytest.raises(ValueError, match="room for max_length=5 tokens, got 6"):
    feature_maps.cosformer(5)(q, is_query=True)
  with pytest.raises(ValueError, match="got 0"):
    feature_maps.cosformer(0)


def draws(orthogonal, count=4000, M=8):
  """Estimates of exp(q . k / sqrt(H)) by many draws, [draws pairs], and the truth."""
  # Short vectors: the error of long ones is all in rare draws, and its mean says nothing.
  q, k = vectors(0, T=3, N=1) / 4, vectors(1, T=3, N=1) / 4

  def one(key):
    phi = favor(key, 8, M, orthogonal=orthogonal, rescale_queries=False)
    features = phi(q, is_query=True), phi(k, is_query=False)
    return jnp.einsum("btnm,bsnm->bnts", *features, precision="highest").ravel()

  estimates = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(2), count))
  return np.asarray(estimates, np.float64), np.exp(products(q, k) / np.sqrt(8)).ravel()


def test_favor_is_unbiased_and_orthogonal_draws_err_less():
  errors = {}
  for orthogonal in (True, False):
    estimates, truth = draws(orthogonal)
    spread = estimates.std(axis=0) / np.sqrt(len(estimates))
    assert np.all(np.abs(estimates.mean(axis=0) - truth) < 4.5 * spread), orthogonal
    assert np.all(spread < 0.02 * truth)  # narrow enough for a bias to show
    errors[orthogonal] = np.mean((estimates / truth - 1) ** 2, axis=1)
  gain = errors[False].mean() - errors[True].mean()
  noise = np.sqrt(sum(x.var() / len(x) for x in errors.values()))
  assert gain > 2 * noise, (gain, noise)


def test_favor_directions_are_orthogonal_with_the_lengths_of_gaussians():
  w = np.asarray(favor(jax.random.key(0), 16, 16 * 200).projection, np.float64)
  lengths = np.linalg.norm(w, axis=-1)
  unit = (w / lengths[:, None]).reshape(200, 16, 16)
  np.testing.assert_allclose(
    unit @ unit.swapaxes(1, 2), np.broadcast_to(np.eye(16), unit.shape), atol=1e-5
  )
  assert abs((lengths**2).mean() - 16) < 0.5 and abs((lengths**2).var() - 32) < 5
  assert favor(jax.random.key(0), 16, 21).projection.shape == (21, 16)


@pytest.mark.parametrize("H", [16, 512])
def test_favor_is_finite_for_the_worst_vectors(H):
  phi = favor(jax.random.key(0), H, 8)
  worst = phi.projection * H**0.25  # w . x - |x|^2 / 2 is largest at x = w
  x = jnp.concatenate([worst, 100 * worst, jnp.zeros((1, H))])[None, :, None]
  for is_query in (True, False):
    features = np.asarray(phi(x, is_query=is_query))
    assert np.isfinite(features).all() and features.max() < 1e30
  assert np.all(np.asarray(phi(x, is_query=True)).max(axis=-1) > 0.3)


@pytest.mark.parametrize("H", [16, 512])
def test_favor_of_a_key_is_the_equation_whatever_the_width(H):
  phi = favor(jax.random.key(0), H, 8)
  x = kit.normal(jax.random.key(1), 1, 6, 2, H)
  w, scaled = np.asarray(phi.projection, np.float64), np.asarray(x, np.float64) * H**-0.25
  want = np.exp(scaled @ w.T - (scaled**2).sum(-1, keepdims=True) / 2) / np.sqrt(8)
  np.testing.assert_allclose(phi(x, is_query=False), want, rtol=2e-4)


def test_hedgehog_is_a_pair_of_softmaxes():
  x = np.asarray(vectors(0), np.float64)
  up, down = np.exp(x), np.exp(-x)
  want = np.concatenate([up / up.sum(-1, keepdims=True), down / down.sum(-1, keepdims=True)], -1)
  kit.assert_close("hedgehog", feature_maps.hedgehog(vectors(0), is_query=True), want)
  assert np.isfinite(feature_maps.hedgehog(1e4 * vectors(0), is_query=False)).all()


def test_redrawn_features_need_no_new_program_and_near_softmax_on_average():
  """The draw is an argument: one compiled program takes them all, and their mean error shrinks."""
  q, k = vectors(0, T=8, N=1) / 2, vectors(1, T=8, N=1) / 2
  traces = []

  @jax.jit
  def run(phi):
    traces.append(1)
    score = jnp.einsum(
      "btnm,bsnm->bnts", phi(q, is_query=True), phi(k, is_query=False), precision="highest"
    )
    return score / jnp.sum(score, axis=-1, keepdims=True)

  draws = [np.asarray(run(favor(jax.random.key(i), 8, 64)), np.float64) for i in range(40)]
  assert len(traces) == 1 and np.abs(draws[0] - draws[1]).max() > 1e-3
  weights = np.exp(products(q, k) / np.sqrt(8))
  weights /= weights.sum(-1, keepdims=True)
  error = lambda x: np.sqrt(np.mean((x - weights) ** 2))
  assert error(np.mean(draws, axis=0)) < 0.4 * np.mean([error(x) for x in draws])


def test_rescaled_queries_leave_normalized_weights_alone():
  q, k = vectors(0), vectors(1)
  weights = []
  for rescale in (True, False):
    score = scores(favor(jax.random.key(3), 8, 32, rescale_queries=rescale), q, k)
    weights.append(score / score.sum(-1, keepdims=True))
  kit.assert_close("weights", weights[0], weights[1])


def test_wrong_draws_are_told():
  with pytest.raises(ValueError, match="num_features must be at least 1, got 0"):
    favor(jax.random.key(0), 8, 0)
  with pytest.raises(ValueError, match="head_dim=16, got vectors of width 8"):
    favor(jax.random.key(0), 16, 4)(vectors(0), is_query=True)


@pytest.mark.parametrize("jit", [True, False])
def test_the_draw_by_name_is_the_same_numbers_in_a_trace_and_on_a_mesh(jit):
  x = vectors(0)
  want = feature_maps.get("favor", 8)(x, is_query=False)
  f = lambda x: feature_maps.get("favor", 8)(x, is_query=False)
  mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  cut = jax.shard_map(f, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"))
  kit.assert_close("shard_map", (jax.jit(cut) if jit else cut)(x), want)
