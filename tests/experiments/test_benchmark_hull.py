"""The benchmark of hard-max heads at toy size, and that it refuses wrong answers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import benchmark
from experiments.benchmarks import hull, targets


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
  """The results of the toy suite, and the path of its picture."""
  out = tmp_path_factory.mktemp("hull") / "toy.json"
  assert benchmark.main(["benchmark", "--suite=hull-toy", "--check", f"--out={out}"]) == 0
  return json.loads(out.read_text()), out.with_suffix(".png")


def test_everyone_is_measured_and_drawn(toy):
  results, picture = toy
  rows = {targets.key(row) for row in results["times"]}
  one = {f"{who}, circle/step/{n}" for who in ("hull", "scan") for n in (256, 1024)}
  many = {f"4 hulls{on}, gaussian/step/{n}" for on in ("", " on 2 cores") for n in (256, 1024)}
  best = {f"{who}, best 8/forward/256" for who in ("hulls", "scan")}
  assert rows == one | many | best | {"bulk/forward/1024", "scan/forward/1024"}
  assert set(results["errors"]) == {"hull, circle", "bulk"}
  assert all(0 <= error <= hull.TOLERANCE for error in results["errors"].values())
  assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_wrong_answer_is_refused(monkeypatch):
  monkeypatch.setattr(hull, "_one_head", lambda *_: [])
  monkeypatch.setattr(hull, "_regret", lambda _: 1e-3)
  monkeypatch.setattr(hull, "_together", lambda *_: [])
  monkeypatch.setattr(hull, "_bulk", lambda _: ([], []))
  monkeypatch.setattr(hull, "_top_k", lambda _: [])
  with pytest.raises(RuntimeError, match="hull, circle is wrong: its regret is 0.001"):
    hull.measure("hull-toy", {}, lambda _: None)


def test_regret_counts_from_the_best_key_that_may_be_read():
  q, k = np.array([[1, 1]] * 3), np.array([[1, 0], [0, 2], [5, 5]])
  assert hull._lost(q, k, np.array([0, 1, 2])) == 0
  assert hull._lost(q, k, np.array([0, 0, 2])) == pytest.approx(1 / 10)


def test_a_scan_reads_the_mean_of_the_best_keys_of_an_array_each_coordinate():
  """Two keys tie for the first query. No pass of the loop reads keys or values in pairs."""
  q, k = jnp.array([[1.0, 0], [0, 1]]), jnp.array([[2.0, 0], [2, 1], [1, 3]])
  v = jnp.array([[1.0, 10], [3, 30], [7, 70]])
  np.testing.assert_array_equal(hull.scan(q, k, v), [[2, 20], [7, 70]])
  (loop,) = (e for e in jax.make_jaxpr(hull.scan)(q, k, v).eqns if e.primitive.name == "scan")
  assert {x.aval.shape for x in loop.params["jaxpr"].jaxpr.invars} == {(2,), (3,)}


@pytest.mark.parametrize("family", ["gaussian", "circle", "parabola", "parabola, shuffled"])
def test_streams_are_what_their_names_say(family):
  _, k, _ = hull.Stream(family, 2, 64).make(jnp.int32(0), 64)
  x, y = np.asarray(k)[0].T
  if family == "circle":
    np.testing.assert_allclose(x**2 + y**2, 1, rtol=1e-5)
  elif family != "gaussian":
    np.testing.assert_array_equal(4 * y, -(x**2))
    assert len(np.unique(x[0])) == 64
    assert (np.diff(x[0]) > 0).all() == (family == "parabola")
