"""Checkpoints: whole or not at all, told when damaged, restored onto another mesh."""

import os
import pathlib
import signal
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import kit
from experiments.checkpoint import Checkpoints, Damaged, like, names
from experiments.flags import UserError


class State(NamedTuple):
  step: jax.Array
  params: Any
  ema: Any = None


def make(seed: int, width: int = 16) -> State:
  key = jax.random.key(seed)
  layers = {i: {"w": jax.random.normal(jax.random.fold_in(key, i), (width, 8))} for i in range(2)}
  return State(jnp.int32(seed), {"layers": layers, "bias": jnp.zeros(3, jnp.bfloat16)})


def fill(folder, *steps: int, keep: int = 3) -> None:
  with Checkpoints(folder, keep=keep) as checkpoints:
    for step in steps:
      checkpoints.save(step, make(step), {"config": {"step": step}})


def equal(left: State, right: State) -> None:
  jax.tree.map(np.testing.assert_array_equal, left, right)


def test_names_are_paths():
  assert list(names(make(0))) == ["step", "params/bias", "params/layers/0/w", "params/layers/1/w"]


def test_what_is_saved_is_restored_bitwise_with_its_page(tmp_path):
  fill(tmp_path, 1, 2)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps == [1, 2]
    equal(checkpoints.restore(1, like(make(0))), make(1))
    assert checkpoints.about(2) == {"config": {"step": 2}}
    step, state = checkpoints.restore_newest(like(make(0)))
  assert step == 2
  equal(state, make(2))


def test_only_the_newest_are_kept(tmp_path):
  fill(tmp_path, 1, 2, 3, 4, keep=2)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps == [3, 4]


def test_saving_a_step_again_leaves_it_alone(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, make(1), {"a": 1})
    checkpoints.save(1, make(7), {"a": 2})
    checkpoints.wait()
    equal(checkpoints.restore(1, like(make(0))), make(1))


def test_state_may_be_donated_straight_after_saving(tmp_path):
  state, expected = make(1), jax.tree.map(np.array, make(1))
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, {"a": 1})
    jax.block_until_ready(
      jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state)
    )
    checkpoints.wait()
    equal(checkpoints.restore(1, like(make(0))), expected)


def test_an_empty_folder_is_one_sentence(tmp_path):
  with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match="holds no checkpoint"):
    checkpoints.restore_newest(like(make(0)))


def test_another_shape_names_the_array_and_both_shapes(tmp_path):
  fill(tmp_path, 1)
  with (
    Checkpoints(tmp_path) as checkpoints,
    pytest.raises(UserError, match=r"params/layers/0/w of shape \(16, 8\).* \(4, 8\)"),
  ):
    checkpoints.restore_newest(like(make(0, width=4)))


def test_another_structure_names_what_is_missing_and_what_is_too_much(tmp_path):
  fill(tmp_path, 1)
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(UserError, match="has no ema"):
      checkpoints.restore(1, like(make(0)._replace(ema=jnp.zeros(2))))
    with pytest.raises(UserError, match="also holds params/bias"):
      checkpoints.restore(1, like(make(0)._replace(params={"layers": make(0).params["layers"]})))


def files(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(f for f in folder.rglob("*") if f.is_file())


def test_every_file_cut_short_is_noticed_and_the_one_before_is_used(tmp_path):
  fill(tmp_path, 1, 2)
  for file in files(tmp_path / "2"):
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    told: list[str] = []
    with Checkpoints(tmp_path) as checkpoints:
      step, state = checkpoints.restore_newest(like(make(0)), tell=told.append)
    assert step == 1, file
    equal(state, make(1))
    assert len(told) == 1 and "step 2" in told[0] and "damaged" in told[0], file
    file.write_bytes(whole)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.restore_newest(like(make(0)))[0] == 2


def test_a_missing_file_is_noticed(tmp_path):
  fill(tmp_path, 1)
  next((tmp_path / "1" / "state" / "d").iterdir()).unlink()
  with Checkpoints(tmp_path) as checkpoints, pytest.raises(Damaged, match="is missing"):
    checkpoints.restore(1, like(make(0)))


def test_killed_before_the_sizes_were_written_is_still_whole(tmp_path):
  fill(tmp_path, 1)
  (tmp_path / "1" / "sizes.json").unlink()
  with Checkpoints(tmp_path) as checkpoints:
    equal(checkpoints.restore(1, like(make(0))), make(1))


def test_nothing_readable_left_is_one_sentence(tmp_path):
  fill(tmp_path, 1)
  (tmp_path / "1" / "_CHECKPOINT_METADATA").write_text("{")
  with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match="no other can be read"):
    checkpoints.restore_newest(like(make(0)), tell=lambda text: None)


def test_damaged_ones_are_set_aside_and_never_deleted(tmp_path):
  fill(tmp_path, 1, 2)
  victim = files(tmp_path / "2" / "state" / "d")[0]
  victim.write_bytes(b"short")
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.restore_newest(like(make(0)), tell=lambda text: None, set_aside=True)
    assert checkpoints.steps == [1]
    checkpoints.save(2, make(2), {"a": 1})
    checkpoints.wait()
    assert checkpoints.steps == [1, 2]
  aside = tmp_path / "2.damaged" / victim.relative_to(tmp_path / "2")
  assert aside.read_bytes() == b"short"
  with Checkpoints(tmp_path) as checkpoints:
    equal(checkpoints.restore_newest(like(make(0)))[1], make(2))
    files(tmp_path / "2" / "state" / "d")[0].write_bytes(b"again")
    checkpoints.restore_newest(like(make(0)), tell=lambda text: None, set_aside=True)
    assert checkpoints.steps == [1]
  assert aside.read_bytes() == b"short" and (tmp_path / "2-2.damaged").is_dir()


def test_leftovers_of_a_kill_are_swept_away_before_the_next_save(tmp_path):
  fill(tmp_path, 1)
  leftovers = [tmp_path / f"{step}.orbax-checkpoint-tmp" for step in (2, 7)]
  for folder in leftovers:
    folder.mkdir()
    (folder / "part").write_text("x")
  with Checkpoints(tmp_path, reader=True) as checkpoints:  # it may be in the making: a live run's
    assert checkpoints.restore_newest(like(make(0)))[0] == 1
  assert all((folder / "part").exists() for folder in leftovers)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps == [1]
    checkpoints.save(2, make(2), {"a": 1})
  assert not any(folder.exists() for folder in leftovers)
  assert not (tmp_path / "2" / "part").exists()
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.restore_newest(like(make(0)))[0] == 2


def test_a_reader_beside_a_live_run_finds_what_the_run_has_written_since(tmp_path):
  fill(tmp_path, 1, keep=1)
  told = []
  with Checkpoints(tmp_path, reader=True, keep=1) as reader:
    assert reader.steps == [1]
    fill(tmp_path, 2, 3, keep=1)
    step, state = reader.restore_newest(like(make(0)), tell=told.append)
  assert step == 3 and not told
  equal(state, make(3))


def on(axes: dict[str, int], *spec: str | None) -> NamedSharding:
  count = int(np.prod(list(axes.values())))
  mesh = jax.make_mesh(
    tuple(axes.values()),
    tuple(axes),
    axis_types=(AxisType.Explicit,) * len(axes),
    devices=jax.devices()[:count],
  )
  return NamedSharding(mesh, P(*spec))


def test_a_checkpoint_moves_to_another_mesh(tmp_path):
  value = jnp.arange(64.0).reshape(8, 8)
  saved = {"w": jax.device_put(value, on({"data": 4, "tensor": 2}, "data", "tensor"))}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, saved, {"a": 1})
    checkpoints.wait()
    for sharding in (
      on({"data": 2}, None, "data"),
      on({"fsdp": 8}, "fsdp"),
      jax.sharding.SingleDeviceSharding(jax.devices()[3]),
    ):
      (restored,) = checkpoints.restore(1, like(saved, sharding)).values()
      assert restored.sharding == sharding
      kit.assert_same("w", restored, value)


FULL_DISK = """
import resource, signal, sys
import jax.numpy as jnp
from experiments.checkpoint import Checkpoints
from experiments.flags import run_main
def main(argv):
  with Checkpoints(argv[1]) as checkpoints:
    checkpoints.save(1, {"w": jnp.zeros(10)}, {"a": 1})
    checkpoints.wait()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    import jax
    checkpoints.save(2, {"w": jax.random.normal(jax.random.key(0), (100_000,))}, {"a": 1})
run_main(main)
"""


def test_a_full_disk_is_one_sentence_and_older_checkpoints_stay(tmp_path):
  done = runs.spawn([sys.executable, "-c", FULL_DISK, str(tmp_path)])
  _, error = done.communicate(timeout=120)
  assert done.returncode == 1 and "Traceback" not in error, error
  assert "step 2 could not be written" in error and "newest complete one is of step 1" in error
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps == [1]
    target = {"w": jax.ShapeDtypeStruct((10,), jnp.float32, sharding=on({"data": 1}))}
    kit.assert_same("w", checkpoints.restore(1, target)["w"], jnp.zeros(10))


KILLED = """
import sys, jax
from experiments.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1], keep=1000)
for step in range(1, 1000):
  checkpoints.save(step, {"w": jax.random.normal(jax.random.key(step), (2_000_000,))}, {"a": 1})
  print(step, flush=True)
"""


@pytest.mark.parametrize("after", [1, 3])
def test_killed_while_writing_leaves_whole_checkpoints(tmp_path, after):
  process = runs.spawn([sys.executable, "-c", KILLED, str(tmp_path)])
  assert process.stdout is not None
  for line in process.stdout:
    if int(line) == after:
      break
  os.kill(process.pid, signal.SIGKILL)
  process.communicate()
  shape = jax.ShapeDtypeStruct((2_000_000,), jnp.float32, sharding=on({"data": 1}))
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps[: after - 1] == list(range(1, after))  # a save waits for the last
    for step in checkpoints.steps:
      expected = jax.random.normal(jax.random.key(step), (2_000_000,))
      kit.assert_same("w", checkpoints.restore(step, {"w": shape})["w"], expected)
