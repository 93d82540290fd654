"""Time over eight devices equals time on one: outputs, states and every gradient by name."""

import functools
import socket
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kit
from attention import linear_attention
from attention.ops.linear import State

B, T, N, K, H, h = 2, 48, 4, 2, 6, 5
TIME, WHOLE = PartitionSpec(None, "sequence"), PartitionSpec()


def mesh():
  """Eight devices along time."""
  return jax.make_mesh((8,), ("sequence",), axis_types=(AxisType.Auto,))


def call(kind, *, normalize):
  """q, k, v, decays and the state before everything."""
  make = kit.keys(0)
  normal = lambda *shape: jax.random.normal(next(make), shape)
  shape = {"none": None, "head": (N,), "token": (B, T, N), "channel": (B, T, N, H)}[kind]
  q, k, v = normal(B, T, N, H), normal(B, T, K, H), normal(B, T, K, h)
  if normalize:
    q, k = jnp.abs(q), jnp.abs(k)
  arrays = {"q": q, "k": k, "v": v}
  if shape is not None:
    g = -jnp.abs(normal(*shape)) / 8
    arrays["log_decay"] = g if kind == "head" else g.at[:, 11].set(-1e4).at[:, 12].set(0.0)
  arrays["initial_state"] = State(normal(B, N, H, h), jnp.abs(normal(B, N, H)))
  return arrays


def documents():
  """Boundaries inside of a device's six tokens, between two devices, and none over three."""
  ids = np.zeros((B, T), np.int32)
  ids[0, 5:], ids[0, 6:], ids[0, 12:], ids[1, 31:] = 1, 2, 3, 7
  return jnp.asarray(ids)


def results(arrays, ids, cut, stateful, **options):
  """Everything by name; `cut` runs it over eight devices."""

  def run(arrays, ids):
    found = linear_attention(
      **arrays, segment_ids=ids, return_state=stateful, **options,
      axis_name="sequence" if cut else None,
    )  # fmt: skip
    return found if stateful else (found, ())

  if cut:
    where = {
      name: WHOLE if name == "initial_state" or x.ndim == 1 else TIME
      for name, x in arrays.items()
      if name != "initial_state"
    } | ({"initial_state": WHOLE} if "initial_state" in arrays else {})
    given = (where, TIME if ids is not None else None)
    run = jax.shard_map(run, mesh=mesh(), in_specs=given, out_specs=(TIME, WHOLE))

  def loss(arrays):
    out, state = run(arrays, ids)
    return sum(jnp.sin(x).sum() for x in jax.tree.leaves((out, state))), (out, state)

  everywhere = NamedSharding(mesh(), WHOLE) if cut else None
  run_all = jax.jit(jax.value_and_grad(loss, has_aux=True), out_shardings=everywhere)
  (_, found), gradients = run_all(jax.tree.map(np.asarray, arrays))
  return found, gradients


@pytest.mark.parametrize(
  ("kind", "options"),
  [
    ("head", {"reverse": True}),
    ("channel", {"documents": True, "reverse": True}),
    ("none", {"bidirectional": True, "feature_map": "elu_plus_one", "normalize": True}),
    ("token", {"bidirectional": True, "documents": True, "normalize": True}),
  ],
)
def test_eight_devices_are_one(kind, options):
  options = dict(options)
  arrays = call(kind, normalize=options.get("normalize", False))
  stateful = not options.get("bidirectional")
  if not stateful:
    del arrays["initial_state"]
  ids = documents() if options.pop("documents", False) else None
  run = functools.partial(results, arrays, ids, stateful=stateful, **options)
  # Other chunks, another order of sums; two results in float32.
  kit.assert_trees_close(run(cut=True), run(cut=False), factor=4)


def test_a_position_counts_from_the_first_device():
  """cosFormer's features ask where a token stands."""
  arrays = call("none", normalize=True)
  del arrays["initial_state"]
  run = functools.partial(
    results, arrays, None, stateful=True, feature_map="cosformer", normalize=True
  )
  kit.assert_trees_close(run(cut=True), run(cut=False), factor=4)


def test_what_it_cannot_do_has_a_sentence():
  q = jnp.zeros((1, 4, 1, 2))
  with pytest.raises(ValueError, match="lengths counts .* axis_name='sequence'"):
    linear_attention(q, q, q, lengths=jnp.array([2]), axis_name="sequence")
  with pytest.raises(NotImplementedError, match="'reference' .* one device"):
    linear_attention(q, q, q, axis_name="sequence", implementation="reference")


def test_two_processes_are_one_device():
  """Four devices in each; the sums over gloo."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  program = f"import sys; sys.path[:] = {sys.path!r}; import {__name__} as test; "
  calls = [f"test.one_of_two_processes({port}, {number})" for number in range(2)]
  processes = [runs.spawn([sys.executable, "-c", program + call]) for call in calls]
  for process in processes:
    output, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert output.endswith("equal\n")


def one_of_two_processes(port: int, number: int) -> None:
  """What each process of the test above does."""
  jax.config.update("jax_num_cpu_devices", 4)
  jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=number)
  assert jax.device_count() == 8 and jax.local_device_count() == 4
  arrays, ids = call("channel", normalize=True), documents()
  run = functools.partial(results, arrays, np.asarray(ids), stateful=True, normalize=True)
  kit.assert_trees_close(run(cut=True), run(cut=False), factor=4)
  print("equal")
