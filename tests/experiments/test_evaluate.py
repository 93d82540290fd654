"""Evaluation against the truth: sources whose entropy is known, by models that know it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from experiments import config as configs
from experiments import evaluate, flags, metrics, safety, sharding, train
from experiments.config import DataConfig, MeshConfig
from experiments.tasks import hmm, make_task

TASK = make_task("hmm", seq_len=64, seed=3, data=DataConfig())


def oracle(params, inputs):
  """Logits of the perfect predictor: the forward algorithm, on the host."""
  del params
  hidden, states = hmm.source(), 8

  def rows(tokens):
    out = np.full((*tokens.shape, TASK.vocab_size), -1e9, np.float32)
    announced = tokens[:, :1] - 2 * states
    belief = np.where(announced < 0, 1 / states, np.eye(states)[np.maximum(announced[:, 0], 0)])
    for t in range(tokens.shape[1]):
      if t:
        belief = np.einsum("bs,bst->bt", belief, hidden.joint[tokens[:, t]])
        belief /= belief.sum(1, keepdims=True)
      out[:, t, : 2 * states] = np.log(belief @ hidden.emission)
    return out

  shape = jax.ShapeDtypeStruct((*inputs.shape, TASK.vocab_size), jnp.float32)
  return jax.pure_callback(rows, shape, inputs)


def test_the_perfect_model_scores_the_entropy_rate():
  assert TASK.optimum is not None
  score = evaluate.evaluate(
    evaluate.make_scorer(oracle), {}, TASK.valid, batch_size=64, sequences=512
  )
  losses = [-hmm.oracle(TASK.valid[i], hmm.source()).mean() for i in range(512)]
  error = np.std(losses) / math.sqrt(512)
  assert error < 0.01
  assert abs(score.loss - TASK.optimum) < 4 * error
  assert score.bits == pytest.approx(score.loss / math.log(2), rel=1e-12)


def test_the_perfect_model_scores_what_the_forward_algorithm_says_exactly():
  class Few:
    def __len__(self):
      return 21  # not a multiple of the batch: the rest is filled up and must not count

    def __getitem__(self, index, /):
      return TASK.valid[index]

  score = evaluate.evaluate(evaluate.make_scorer(oracle), {}, Few(), batch_size=8)
  truth = -np.mean([hmm.oracle(TASK.valid[i], hmm.source()) for i in range(21)])
  assert score.loss == pytest.approx(truth, rel=1e-5)
  assert score.tokens == 21 * 64


def test_a_uniform_model_scores_the_logarithm_of_the_vocabulary():
  uniform = lambda params, inputs: jnp.zeros((*inputs.shape, 32)) + 7.0
  score = evaluate.evaluate(evaluate.make_scorer(uniform), {}, TASK.valid, batch_size=64)
  assert score.bits == pytest.approx(5.0, abs=1e-6)
  assert score.tokens == len(TASK.valid) * 64


class Weighted:
  """Two records with different numbers of scored tokens, each of a known loss."""

  def __len__(self):
    return 2

  def __getitem__(self, index, /):
    weights = np.zeros(4, np.float32)
    weights[: 1 + 2 * index] = 1.0
    target = np.full(4, index, np.int32)
    return {"inputs": target, "targets": target, "weights": weights}


def test_tokens_weigh_the_same_whatever_batch_they_are_in():
  # Records score 1 token of probability 3/4 and 3 tokens of probability 1/4.
  model = lambda params, inputs: jnp.broadcast_to(
    jnp.log(jnp.array([0.75, 0.25])), (*inputs.shape, 2)
  )
  truth = (-math.log(0.75) - 3 * math.log(0.25)) / 4
  for batch_size in (1, 2, 3):
    score = evaluate.evaluate(evaluate.make_scorer(model), {}, Weighted(), batch_size=batch_size)
    assert score.loss == pytest.approx(truth, rel=1e-6)
    assert (score.tokens, score.accuracy) == (4.0, 0.25)


def test_a_sample_is_the_same_each_time_and_in_whole_batches():
  uniform = lambda params, inputs: jax.nn.one_hot(inputs, TASK.vocab_size)
  run = lambda: evaluate.evaluate(
    evaluate.make_scorer(uniform), {}, TASK.valid, batch_size=8, sequences=20
  )
  assert run() == run()
  assert run().tokens == 24 * 64


def test_a_mesh_scores_what_one_device_scores(tmp_path):
  from experiments.model import make_model

  config = runs.tiny(tmp_path)
  scores = []
  for mesh_config in (MeshConfig(), MeshConfig(data=2, tensor=2)):
    mesh = sharding.make_mesh(mesh_config)
    with sharding.use(mesh):
      model = make_model(config, TASK.vocab_size)
      params = model.init(jax.random.key(0))
    scorer = evaluate.make_scorer(model)
    scores.append(
      evaluate.evaluate(scorer, params, TASK.valid, batch_size=8, sequences=16, mesh=mesh)
    )
  assert scores[1].loss == pytest.approx(scores[0].loss, rel=1e-6)
  assert scores[1].tokens == scores[0].tokens


def test_the_program_scores_a_run_and_appends_a_row(tmp_path, capsys):
  config = runs.tiny(tmp_path, steps=2, optim__ema=0.5, evaluation__final_sequences=0)
  train.train(config, safety.Stop())
  evaluate.main(["evaluate", f"--workdir={tmp_path}"])
  rows = metrics.read(tmp_path)
  final, scored = [row for row in rows if row["kind"] in ("valid", "evaluation")][-2:]
  assert scored["kind"] == "evaluation" and scored["step"] == 2
  assert scored["loss"] == pytest.approx(final["loss"], rel=1e-6)
  assert scored["tokens"] == 4096 * config.seq_len
  assert f"{scored['bits']:.4f} bits" in capsys.readouterr().out
  (tmp_path / metrics.FILE).rename(tmp_path / "aside")
  (tmp_path / metrics.FILE).mkdir()
  with pytest.raises(flags.UserError, match=r"metrics\.jsonl"):
    evaluate.main(["evaluate", f"--workdir={tmp_path}", "--sequences=8"])
  assert "nats per token" in capsys.readouterr().out  # a score that cannot be kept is told


def test_a_run_without_checkpoint_is_one_sentence(tmp_path):
  configs.save(runs.tiny(tmp_path))
  with pytest.raises(flags.UserError, match="no checkpoint"):
    evaluate.main(["evaluate", f"--workdir={tmp_path}"])
