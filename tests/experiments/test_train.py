"""Training: the step against its definition; runs killed, stopped, resumed, mistaken and lost."""

import dataclasses
import json
import math
import os
import random
import signal
import time
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs

import kit
from experiments import config as configs
from experiments import evaluate, flags, learning, metrics, safety, train
from experiments.checkpoint import Checkpoints
from experiments.config import Config, GuardConfig, OptimConfig
from experiments.data import pipeline
from experiments.flags import UserError
from experiments.learning import TrainState
from experiments.model import Model, make_model
from experiments.tasks import make_task


class StopAt(safety.Stop):
  """Asks for the end once `step` is reached, as SIGTERM would."""

  def __init__(self, step: int):
    self.step, self.signal = step, None

  def asked(self, step: int) -> bool:
    self.signal = signal.SIGTERM if step >= self.step else None
    return self.signal is not None


def final(workdir) -> dict[str, np.ndarray]:
  """The arrays of the newest checkpoint of a run, as they lie on disk."""
  with Checkpoints(workdir / "checkpoints") as checkpoints:
    step = checkpoints.steps[-1]
    there = checkpoints._open.metadata(step).metadata
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {k: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=here) for k, m in there.items()}
    return {name: np.asarray(x) for name, x in checkpoints.restore(step, target).items()}


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
  assert left.keys() == right.keys()
  for name in left:
    np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def one_step(**changes: Any) -> tuple[Config, Model, TrainState, Any]:
  """What one step takes: the batch is of numpy arrays, to be changed at will."""
  config = runs.tiny("unused", **changes)
  task = make_task(config.task, seq_len=config.seq_len, seed=0, data=config.data)
  model = make_model(config, task.vocab_size)
  batch = next(pipeline.batches(task.train, batch_size=config.batch_size, seed=0))
  return config, model, learning.init_state(config, model), batch


# ---- the step --------------------------------------------------------------------------------


def test_token_losses_are_the_log_softmax_of_the_target():
  logits = np.random.default_rng(0).normal(0, 30, (2, 5, 7)).astype(np.float32)
  targets = np.array([[0, 6, 3, 3, 1], [2, 2, 5, 0, 6]], np.int32)
  exact = logits.astype(np.float64)
  shifted = exact - exact.max(-1, keepdims=True)
  expected = np.log(np.exp(shifted).sum(-1)) - np.take_along_axis(
    shifted, targets[..., None], -1
  ).squeeze(-1)
  kit.assert_close(
    "losses", learning.token_losses(jnp.asarray(logits), jnp.asarray(targets)), expected
  )


def test_accumulating_pieces_is_one_big_batch_even_if_pieces_weigh_differently():
  results = []
  for pieces in (1, 2, 4):
    config, model, state, batch = one_step(optim__accumulate=pieces, optim__lr=0.1)
    batch["weights"] = np.random.default_rng(1).uniform(size=batch["weights"].shape) ** 4
    batch["weights"][:5] = 0.0
    batch["weights"] = batch["weights"].astype(np.float32)
    state, measured = learning.make_step(config, model)(state, batch)
    results.append((state.params, measured))
  for params, measured in results[1:]:
    kit.assert_trees_close(measured, results[0][1], factor=3)
    # Adam divides by the gradient's own size, which makes its smallest elements' last bits visible.
    kit.assert_trees_close(params, results[0][0], factor=100)


def test_the_gradient_is_of_the_mean_over_scored_tokens():
  config, model, state, batch = one_step(optim__clip=0.0)
  batch["weights"][:, 8:] = 0.0
  first = jnp.asarray(batch["inputs"])

  def loss(params):
    logits = jax.nn.log_softmax(model(params, first))
    picked = jnp.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    return -picked[:, :8].mean()

  value, grads = jax.jit(jax.value_and_grad(loss))(state.params)
  norm = math.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
  _, measured = learning.make_step(config, model)(state, batch)
  assert float(measured.loss_sum / measured.weight) == pytest.approx(float(value), rel=1e-5)
  assert float(measured.grad_norm) == pytest.approx(norm, rel=1e-4)
  assert float(measured.weight) == 64


def test_dropout_is_a_function_of_seed_and_step():
  def loss_at(step, seed=0):
    config, model, state, batch = one_step(model__dropout=0.5)
    config = dataclasses.replace(config, seed=seed)
    state = state._replace(step=jnp.int32(step))
    return float(learning.make_step(config, model)(state, batch)[1].loss_sum)

  assert loss_at(3) == loss_at(3)
  assert len({loss_at(3), loss_at(4), loss_at(3, seed=1)}) == 3


def test_pieces_of_a_batch_drop_differently():
  """Two equal pieces, scored by a model of nothing but its dropout."""
  ids, weights = jnp.ones((1, 2, 3), jnp.int32), jnp.ones((1, 2, 3))
  piece = {"inputs": ids, "targets": ids, "weights": weights}
  noise = lambda scale, inputs, dropout_key: scale * jax.random.normal(dropout_key, (2, 3, 5))

  def losses(pieces):
    cut = {name: jnp.repeat(x, pieces, axis=0) for name, x in piece.items()}
    return learning._gradient(noise, jnp.float32(1.0), cut, jax.random.key(0))[1]

  assert abs(float(losses(2) - 2 * losses(1))) > 0.1


def test_averaged_parameters_follow_their_recurrence():
  config, model, state, batch = one_step(optim__ema=0.15, optim__lr=0.05)
  step = learning.make_step(config, model)
  expected = jax.tree.map(np.asarray, state.params)
  for number in range(2):
    state, _ = step(state, batch)
    d = min(0.15, (1 + number) / (10 + number))  # 0.1, then the 0.15 asked for
    expected = jax.tree.map(
      lambda e, p, d=d: np.float64(d) * e + (1 - d) * np.asarray(p, np.float64),
      expected,
      state.params,
    )
  kit.assert_trees_close(state.ema, expected)
  assert state.best_params is state.ema


def test_bfloat16_computes_nearly_the_same_and_keeps_float32_parameters():
  found = []
  for dtype in ("float32", "bfloat16"):
    config, model, state, batch = one_step(model__dtype=dtype)
    state, measured = learning.make_step(config, model)(state, batch)
    found.append(float(measured.loss_sum))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
  assert found[0] != found[1] and found[1] == pytest.approx(found[0], rel=0.01)


def test_weight_decay_spares_vectors():
  optimizer = learning.make_optimizer(OptimConfig(lr=0.1, warmup=0, weight_decay=0.5), 10)
  params = {"matrix": jnp.ones((2, 2)), "vector": jnp.ones(2)}
  with jax.numpy_dtype_promotion("standard"):
    nothing = jax.tree.map(jnp.zeros_like, params)
    updates: Any = optimizer.update(nothing, optimizer.init(params), params)[0]
  assert float(updates["matrix"][0, 0]) == pytest.approx(-0.1 * 0.5)
  assert float(updates["vector"][0]) == 0.0


def test_updates_are_adamw_by_hand():
  """Loshchilov and Hutter 2017, algorithm 2, of clipped gradients; the rate doubles once it is
  warm.
  """
  config = OptimConfig(
    lr=0.1, warmup=1, schedule="constant", b1=0.8, b2=0.6, weight_decay=0.5, clip=1.0
  )
  optimizer = learning.make_optimizer(config, 10)
  x = np.array([[2.0, -3.0, 1.0]])
  params, m, s = {"x": jnp.asarray(x, jnp.float32)}, 0.0, 0.0
  state = optimizer.init(params)
  for t, g in enumerate([np.array([[0.5, -2.0, 1e-8]]), np.array([[-1.5, -2.0, 3e-8]])], 1):
    with jax.numpy_dtype_promotion("standard"):
      updates: Any = optimizer.update({"x": jnp.asarray(g, jnp.float32)}, state, params)
    params, state = optax.apply_updates(params, updates[0]), updates[1]
    g = g / np.linalg.norm(g)
    m, s = 0.8 * m + 0.2 * g, 0.6 * s + 0.4 * g**2
    direction = m / (1 - 0.8**t) / (np.sqrt(s / (1 - 0.6**t)) + 1e-8)
    x = x - 0.05 * t * (direction + 0.5 * x)
    kit.assert_close(f"after {t}", params["x"], x)


@pytest.mark.parametrize(
  ("kind", "expected"),
  [
    ("constant", {0: 0.1, 9: 1.0, 50: 1.0, 99: 1.0}),
    ("cosine", {9: 1.0, 54: 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 45 / 91)), 100: 0.1}),
    ("wsd", {0: 0.1, 50: 1.0, 80: 1.0, 90: 0.55, 100: 0.1}),
  ],
)
def test_schedules(kind, expected):
  rate = learning.schedule(OptimConfig(lr=1.0, schedule=kind, warmup=9, final=0.1, decay=0.2), 100)
  for step, value in expected.items():
    assert float(np.asarray(rate(step))) == pytest.approx(value, abs=1e-6), step


def test_a_short_run_warms_up_for_half_of_it_at_most():
  rate = learning.schedule(OptimConfig(lr=1.0, warmup=100), 4)
  assert [float(np.asarray(rate(s))) for s in range(3)] == pytest.approx([1 / 3, 2 / 3, 1.0])


# ---- the guard -------------------------------------------------------------------------------


def test_guard_tells_a_jump_at_the_second_step():
  guard = safety.Guard(GuardConfig(jump=1.0))
  assert guard.verdict(5.0, 1.0) is None
  assert "jumped to 6.5 from a recent median of 5" in str(guard.verdict(6.5, 1.0))


def test_guard_lets_a_loss_fall_and_wobble_and_tells_a_jump():
  guard = safety.Guard(GuardConfig(jump=1.0, window=4))
  assert all(guard.verdict(loss, 1.0) is None for loss in (5.0, 5.9, 4.0, 3.0, 3.5, 2.0, 1.0, 3.2))
  assert "2.6" in str(guard.verdict(3.8, 1.0))
  assert safety.Guard(GuardConfig(jump=0.0)).verdict(1e9, 1.0) is None


@pytest.mark.parametrize("values", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan)])
def test_guard_tells_what_is_no_number(values):
  assert safety.Guard(GuardConfig(jump=0.0)).verdict(*values) is not None


# ---- runs ------------------------------------------------------------------------------------

FULL = {
  "model__dropout": 0.1,
  "optim__ema": 0.5,
  "optim__accumulate": 2,
  "log__sample_every": 4,
  "attention": "linear,softmax",
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("undisturbed")
  assert train.train(runs.tiny(workdir, **FULL), safety.Stop()) == 0
  return workdir


def test_a_run_leaves_everything_to_look_at(undisturbed):
  rows = metrics.read(undisturbed)
  kinds = {
    kind: [row["step"] for row in rows if row["kind"] == kind]
    for kind in ("start", "train", "valid", "sample", "event")
  }
  assert kinds == {
    "start": [0],
    "train": [1, 2, 3, 4, 5, 6],
    "valid": [3, 6],
    "sample": [4, 6],
    "event": [],
  }
  assert rows[0]["devices"] == 1 < jax.device_count()
  *_, last = trained = [row for row in rows if row["kind"] == "train"]
  assert [row["lr"] for row in trained[:3]] == pytest.approx([1e-3, 2e-3, 3e-3])  # warming up
  assert last["tokens_per_second"] > 0 and 0 < last["mfu"] < 1 and last["seconds_left"] == 0
  assert last["bits"] == pytest.approx(last["loss"] / math.log(2))
  assert last["memory_bytes"] > 1e7
  for name in ("config.json", "flags.txt", "data_card.json", "report.html", "samples.jsonl"):
    assert (undisturbed / name).stat().st_size > 0
  assert sorted(int(p.name) for p in (undisturbed / "checkpoints").iterdir()) == [2, 4, 6]
  assert final(undisturbed)["step"] == 6


def test_a_sample_is_written_by_the_averaged_parameters(tmp_path, monkeypatch):
  by = []
  generate = lambda model, params, *prompts, **how: by.append(params) or np.zeros((1, 4), np.int32)
  monkeypatch.setattr(train.generate, "generate", generate)
  hands = types.SimpleNamespace(write=lambda *row, **more: None, tell=lambda text: None)
  task = types.SimpleNamespace(prompt=[1], decode=str)
  run: Any = types.SimpleNamespace(
    mesh=None, task=task, config=Config(), model=None, folder=tmp_path, out=hands, display=hands
  )
  train.write_sample(run, 1, TrainState(jnp.int32(1), "last", None, "averaged"))
  assert by == ["averaged"]


def test_the_same_command_again_says_that_it_is_done(undisturbed, capsys):
  before = final(undisturbed)
  assert train.train(runs.tiny(undisturbed, **FULL), safety.Stop()) == 0
  assert "has done 6 of --steps=6 already" in capsys.readouterr().err
  same(final(undisturbed), before)


@pytest.mark.parametrize("at", [0, 3])
def test_stopped_and_resumed_is_undisturbed_bit_for_bit(undisturbed, tmp_path, at, capsys):
  config = runs.tiny(tmp_path, **FULL)
  assert train.train(config, StopAt(at)) == 0
  assert f"step {at} is saved" in capsys.readouterr().err
  assert train.train(config, safety.Stop()) == 0
  same(final(tmp_path), final(undisturbed))
  learned = lambda folder: [
    (r["step"], r["loss"]) for r in metrics.read(folder) if r["kind"] in ("train", "valid")
  ]
  assert learned(tmp_path) == learned(undisturbed)


def test_a_damaged_checkpoint_is_passed_over(undisturbed, tmp_path, capsys):
  config = runs.tiny(tmp_path, **FULL)
  train.train(config, StopAt(4))
  victim = next((tmp_path / "checkpoints" / "4" / "state" / "d").iterdir())
  victim.write_bytes(victim.read_bytes()[:50])
  assert train.train(config, safety.Stop()) == 0
  told = capsys.readouterr().err
  assert "step 4" in told and "damaged" in told and "resumed from step 2" in told
  assert (tmp_path / "checkpoints" / "4.damaged").is_dir()
  same(final(tmp_path), final(undisturbed))


def test_only_damaged_checkpoints_do_not_start_a_run_over(tmp_path):
  config = runs.tiny(tmp_path, steps=2)
  train.train(config, safety.Stop())
  before = (tmp_path / "metrics.jsonl").read_bytes()
  (tmp_path / "checkpoints" / "2" / "state" / "_METADATA").write_text("")
  for _ in range(2):
    with pytest.raises(UserError, match="damaged"):
      train.train(config, safety.Stop())
  assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_resuming_otherwise_says_what_differs(undisturbed, capsys):
  changed = runs.tiny(undisturbed, **{**FULL, "log__every": 2, "steps": 5})
  assert train.train(changed, safety.Stop()) == 0
  told = capsys.readouterr().err
  assert "--log.every=2 (was 1)" in told and "--steps=5 (was 6)" in told
  saved = (undisturbed / "config.json").read_bytes()
  for change, words in [
    ({"optim__lr": 0.5}, r"--optim\.lr=0\.5 \(was 0\.003\).*--workdir"),
    ({"model__width": 64}, r"--model\.width=64 \(was 32\)"),
    ({"seed": 1}, r"--seed=1 \(was 0\)"),
    ({"attention": "softmax"}, r"--attention=softmax \(was linear,softmax\)"),
  ]:
    with pytest.raises(UserError, match=words):
      train.train(runs.tiny(undisturbed, **{**FULL, **change}), safety.Stop())
  assert (undisturbed / "config.json").read_bytes() == saved


def test_other_data_than_the_checkpoint_s_is_refused(tmp_path):
  text = tmp_path / "text.txt"
  text.write_text("one two three four five six seven\n" * 300)
  config = runs.tiny(tmp_path / "run", task="bytes", data__path=str(text), steps=2)
  train.train(config, safety.Stop())
  text.write_text("something else altogether\n" * 300)
  with pytest.raises(UserError, match="data changed"):
    train.train(dataclasses.replace(config, steps=4), safety.Stop())
  with pytest.raises(UserError, match="data changed"):
    evaluate.main(["evaluate", f"--workdir={tmp_path / 'run'}"])
  assert evaluate.load(str(tmp_path / "run"), data=False).step == 2  # who writes does not score


def test_a_loss_that_is_lost_stops_the_run_and_is_never_saved(tmp_path, monkeypatch):
  """The fourth update ruins the state; the fifth step's loss tells."""
  rate = lambda updates: jnp.where(updates < 3, 1e-3, 1e25)
  monkeypatch.setattr(learning, "schedule", lambda config, steps: rate)
  config = runs.tiny(tmp_path, optim__clip=0.0, steps=50, checkpoint__every=1, guard__jump=2.0)
  with pytest.raises(UserError) as caught:
    train.train(config, safety.Stop())
  text = str(caught.value)
  (event,) = [row for row in metrics.read(tmp_path) if row["kind"] == "event"]
  step = event["step"]
  assert step == 5 and "the last good checkpoint is of step 3 in" in text
  assert f"stopped at step {step}" in text and f"batch is number {step - 1} of seed 0" in text
  assert f"records {8 * (step - 1)} to {8 * step - 1}" in text and "\n" not in text
  assert event["message"] == text
  with Checkpoints(tmp_path / "checkpoints") as checkpoints:
    assert max(checkpoints.steps) < step


def test_a_full_disk_at_the_report_is_one_sentence(undisturbed, monkeypatch):
  def full(workdir):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(train.report, "write", full)
  with pytest.raises(UserError, match="done and saved.*No space left"):
    train.train(runs.tiny(undisturbed, **FULL), safety.Stop())


def test_a_sample_that_cannot_be_kept_is_one_sentence(tmp_path, monkeypatch):
  monkeypatch.setattr(metrics, "SAMPLES", "absent/samples.jsonl")
  monkeypatch.setattr(train.generate, "generate", lambda *_, **__: np.zeros((1, 4), np.int32))
  with pytest.raises(UserError, match="absent"):
    train.train(runs.tiny(tmp_path, **{**FULL, "log__sample_every": 1}), safety.Stop())


def test_stopping_keeps_the_row_that_was_not_due(undisturbed, tmp_path):
  config = runs.tiny(tmp_path, **{**FULL, "log__every": 100, "log__sample_every": 0})
  assert train.train(config, StopAt(3)) == 0
  (row,) = [row for row in metrics.read(tmp_path) if row["kind"] == "train"]
  losses = [row["loss"] for row in metrics.read(undisturbed) if row["kind"] == "train"]
  assert row["step"] == 3 and row["loss"] == pytest.approx(np.mean(losses[:3]), rel=1e-5)


def test_a_full_disk_ends_the_run_with_a_sentence(tmp_path, monkeypatch):
  config = runs.tiny(tmp_path)
  train.train(config, StopAt(2))
  good = final(tmp_path)

  def full(self, step, state, about):
    with self._failure(step):
      raise OSError(28, "No space left on device")

  monkeypatch.setattr(Checkpoints, "save", full)
  with pytest.raises(UserError, match="step 4 .*No space left.*complete one is of step 2"):
    train.train(config, safety.Stop())
  monkeypatch.undo()
  same(final(tmp_path), good)


MISTAKES = {
  "mechanism": (["--attention=sofmax"], ["softmax"]),
  "option": (["--attention=softmax:windw=3"], ["window"]),
  "value": (["--attention=softmax:window=0"], ["--attention=softmax:window=0", "at least 1"]),
  "task": (["--task=hm"], ["hm"]),
  "mesh": (["--mesh.data=16", "--batch_size=16"], ["16", "8"]),
  "no such data": (["--task=bytes", "--data.path=/nowhere/*.txt"], ["/nowhere/*.txt"]),
  "empty data": (["--task=bytes", "--data.path={}/empty.txt"], ["empty"]),
  "short text": (["--task=bytes", "--data.path={}/short.txt"], ["33"]),
  "workdir is a file": (["--workdir={}/empty.txt"], ["empty.txt"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_sentence(name, tmp_path):
  (tmp_path / "empty.txt").write_text("")
  (tmp_path / "short.txt").write_text("too short")
  arguments, words = MISTAKES[name]
  where = runs.command(runs.tiny(tmp_path / "run"))[2:]
  with pytest.raises(UserError) as caught:
    train.main([*where, *(argument.format(tmp_path) for argument in arguments)])
  text = str(caught.value)
  assert all(word in text for word in words), text
  assert "\n" not in text
  assert not (tmp_path / "run" / "checkpoints" / "2").exists()


# ---- processes -------------------------------------------------------------------------------


def wait_for(workdir, step: int, process) -> None:
  for _ in range(3000):
    if any(row["kind"] == "train" and row["step"] >= step for row in metrics.read(workdir)):
      return
    assert process.poll() is None, process.communicate()
    time.sleep(0.05)
  raise AssertionError("the run does not get on")


def test_sigterm_saves_and_exits_0(tmp_path):
  config = runs.tiny(tmp_path, steps=100_000, checkpoint__every=0, evaluation__every=0)
  process = runs.spawn(runs.command(config))
  wait_for(tmp_path, 3, process)
  process.send_signal(signal.SIGTERM)
  _, error = process.communicate(timeout=120)
  assert process.returncode == 0 and "is saved" in error and "Traceback" not in error, error
  step = int(final(tmp_path)["step"])
  last = max(row["step"] for row in metrics.read(tmp_path) if row["kind"] == "train")
  assert step >= last >= 3


@pytest.mark.slow
def test_killed_at_random_and_resumed_is_undisturbed_bit_for_bit(tmp_path):
  changes = {"steps": 60, "checkpoint__every": 3, "evaluation__every": 20, "log__every": 2}
  config = runs.tiny(tmp_path / "killed", **changes)
  chance = random.Random(0)
  for number in range(3):
    process = runs.spawn(runs.command(config))
    wait_for(tmp_path / "killed", 18 * number + 2, process)
    time.sleep(chance.random() * 0.3)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
  process = runs.spawn(runs.command(config))
  _, error = process.communicate(timeout=300)
  assert process.returncode == 0, error
  calm = dataclasses.replace(config, workdir=str(tmp_path / "calm"))
  process = runs.spawn(runs.command(calm))
  _, error = process.communicate(timeout=300)
  assert process.returncode == 0, error
  same(final(tmp_path / "killed"), final(tmp_path / "calm"))
  steps = [r["step"] for r in metrics.read(tmp_path / "killed") if r["kind"] == "train"]
  assert steps == list(range(2, 61, 2))


def test_a_mistake_at_the_terminal_has_no_traceback(tmp_path):
  process = runs.spawn([*runs.command(runs.tiny(tmp_path)), "--attention=linar"])
  _, error = process.communicate(timeout=120)
  assert process.returncode == 1 and "Traceback" not in error
  assert error.count("error:") == 1 and "linear" in error


def test_configuration_is_kept_as_given(undisturbed):
  config = configs.load(str(undisturbed))
  assert flags.leaves(config)["attention"][0] == "linear,softmax"
  assert json.loads((undisturbed / "data_card.json").read_text())["name"] == "hmm"
