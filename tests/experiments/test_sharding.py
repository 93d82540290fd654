"""Meshes: every way to spread a run over devices gives the losses of one device."""

import json
import socket

import jax
import numpy as np
import pytest
import runs

from experiments import learning, metrics, safety, sharding, train
from experiments.config import Config, DistributedConfig, MeshConfig
from experiments.data import pipeline
from experiments.flags import UserError
from experiments.model import make_model
from experiments.tasks import make_task


def losses(config: Config, steps: int = 5) -> list[float]:
  """The loss of each step, by the parts that a run is made of."""
  task = make_task(config.task, seq_len=config.seq_len, seed=config.seed, data=config.data)
  mesh = sharding.make_mesh(config.mesh)
  share, found = sharding.rows(mesh, config.batch_size), []
  data = pipeline.batches(task.train, batch_size=config.batch_size, seed=config.seed)
  with sharding.use(mesh):
    model = make_model(config, task.vocab_size)
    state, step = learning.init_state(config, model), learning.make_step(config, model)
    for _ in range(steps):
      state, measured = step(state, sharding.place(mesh, next(data), share))
      found.append(float(measured.loss_sum) / float(measured.weight))
  return found


# A learning rate at which a wrong gradient shows in the next loss.
ACTIVE = {"optim__lr": 0.02, "optim__warmup": 0, "optim__schedule": "constant"}

MESHES = {
  "all": MeshConfig(data=1, fsdp=2, tensor=2, sequence=2),
  "data and fsdp": MeshConfig(data=2, fsdp=2, tensor=2),
}


@pytest.fixture(scope="module")
def one_device():
  known = {}

  def find(attention: str, **changes) -> list[float]:
    key = (attention, *changes)
    if key not in known:
      known[key] = losses(runs.tiny("unused", attention=attention, **ACTIVE, **changes))
    return known[key]

  return find


@pytest.mark.parametrize("mesh", MESHES)
def test_losses_on_a_mesh_are_those_of_one_device(mesh, one_device):
  found = losses(runs.tiny("unused", **ACTIVE, **axes(MESHES[mesh])))
  np.testing.assert_allclose(found, one_device("softmax"), rtol=1e-5)
  assert found[0] - found[-1] > 0.1  # it learns: the comparison is of gradients too


@pytest.mark.parametrize("attention", ["gated_linear,softmax:window=8"])
def test_other_mechanisms_on_all_axes_at_once(attention, one_device):
  more = {"model__short_convolution": 3, "optim__accumulate": 2}
  found = losses(runs.tiny("unused", attention=attention, **ACTIVE, **axes(MESHES["all"]), **more))
  np.testing.assert_allclose(found, one_device(attention, **more), rtol=2e-5)


def axes(mesh: MeshConfig) -> dict[str, int]:
  return {f"mesh__{axis}": getattr(mesh, axis) for axis in sharding.AXES}


def test_parameters_are_spread_over_fsdp_and_tensor():
  config = runs.tiny("unused", mesh__fsdp=2, mesh__tensor=2)
  mesh = sharding.make_mesh(config.mesh)
  with sharding.use(mesh):
    state = learning.init_state(config, make_model(config, 24))
  wide = [leaf for leaf in jax.tree.leaves(state.params) if leaf.ndim > 1]
  spread = [leaf for leaf in wide if leaf.addressable_shards[0].data.size * 4 == leaf.size]
  assert len(spread) >= 0.9 * len(wide)
  moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim > 1]
  assert sum(not leaf.sharding.is_fully_replicated for leaf in moments) >= 0.9 * len(moments)


def test_an_impossible_mesh_names_both_numbers():
  with pytest.raises(
    UserError, match=r"--mesh\.data=16 x --mesh\.tensor=2 needs 32 .* there are 8"
  ):
    sharding.make_mesh(MeshConfig(data=16, tensor=2))


def test_devices_asked_for_too_late_are_told():
  with pytest.raises(UserError, match="cpu_devices=3 comes too late"):
    sharding.start(MeshConfig(cpu_devices=3), DistributedConfig())


def test_several_processes_need_a_coordinator():
  with pytest.raises(UserError, match="coordinator"):
    sharding.start(MeshConfig(), DistributedConfig(processes=2))


def test_a_batch_lies_where_the_mesh_says():
  mesh = sharding.make_mesh(MeshConfig(data=2, sequence=4))
  rows = np.arange(4 * 8, dtype=np.int32).reshape(4, 8)
  placed = sharding.place(mesh, {"inputs": rows}, sharding.rows(mesh, 4))["inputs"]
  np.testing.assert_array_equal(placed, rows)
  assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 2)}


def test_each_process_places_its_own_rows():
  mesh = sharding.make_mesh(MeshConfig(data=4))
  whole = np.arange(8 * 3).reshape(8, 3)
  # What a process of two does with rows 4 to 7: the blocks that lie outside are not asked of it.
  with pytest.raises((ValueError, RuntimeError)):
    sharding.place(mesh, {"x": whole[4:]}, sharding.Rows(1, 2))


@pytest.mark.parametrize("mesh", [{"mesh__data": 2, "mesh__tensor": 2}, {"mesh__sequence": 4}])
def test_two_processes_are_one_run(tmp_path, mesh):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  ours = dict(ACTIVE, steps=4, log__sample_every=2, **mesh)
  processes = [
    runs.spawn(
      runs.command(
        runs.tiny(
          tmp_path / "two",
          **ours,
          mesh__cpu_devices=2,
          distributed__coordinator=f"127.0.0.1:{port}",
          distributed__processes=2,
          distributed__process_id=number,
        )
      )
    )
    for number in range(2)
  ]
  for process in processes:
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
  train.train(runs.tiny(tmp_path / "one", **ours, mesh__cpu_devices=0), safety.Stop())
  two, one = ([r for r in metrics.read(tmp_path / name) if "loss" in r] for name in ("two", "one"))
  assert [r["kind"] for r in metrics.read(tmp_path / "two")].count("sample") == 2
  assert [(r["kind"], r["step"]) for r in two] == [(r["kind"], r["step"]) for r in one]
  np.testing.assert_allclose([r["loss"] for r in two], [r["loss"] for r in one], rtol=1e-5)
  (start,) = [r for r in metrics.read(tmp_path / "two") if r["kind"] == "start"]
  assert (start["processes"], start["devices"]) == (2, 4)
  assert json.loads((tmp_path / "two" / "config.json").read_text())["mesh"]["cpu_devices"] == 2
  # One process goes on from what two have written.
  resumed = runs.tiny(tmp_path / "two", **{**ours, "steps": 6})
  assert train.train(resumed, safety.Stop()) == 0
