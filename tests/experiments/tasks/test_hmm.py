"""The source whose entropy is known: is it? Against enumeration, sampling, other algebra."""

import itertools
import math

import numpy as np
import pytest

from experiments.tasks import hmm


def brute_force(source, initial, tokens):
  """P(tokens) as a sum over all paths of hidden states."""
  states = range(len(initial))
  total = 0.0
  for path in itertools.product(states, repeat=len(tokens) + 1):
    p = initial[path[0]]
    for token, here, there in zip(tokens, path[:-1], path[1:], strict=True):
      p *= source.joint[token, here, there]
    total += p
  return total


def leaky():
  """A source of 3 states and 2 tokens that is not unifilar."""
  joint = np.random.default_rng(0).random((2, 3, 3))
  return hmm.HiddenMarkov(joint / joint.sum((0, 2))[None, :, None])


@pytest.mark.parametrize("source", [hmm.source(3), leaky()], ids=["unifilar", "leaky"])
def test_forward_algorithm_equals_the_sum_over_paths(source):
  random = np.random.default_rng(1)
  for initial in (source.stationary, np.eye(3)[1]):
    for _ in range(10):
      tokens = random.integers(source.joint.shape[0], size=5)
      steps = source.log_probs(initial, tokens)
      assert np.exp(steps.sum()) == pytest.approx(brute_force(source, initial, tokens), rel=1e-12)
      assert np.exp(steps[:3].sum()) == pytest.approx(
        brute_force(source, initial, tokens[:3]), rel=1e-12
      )


@pytest.mark.parametrize("source", [hmm.source(2), hmm.source(8), leaky()], ids=str)
def test_probabilities_add_up_and_the_stationary_law_stays(source):
  np.testing.assert_allclose(source.joint.sum((0, 2)), 1.0, rtol=1e-13)
  pi = source.stationary
  assert np.all(pi > 0)
  np.testing.assert_allclose(pi @ source.joint.sum(0), pi, atol=1e-14)
  # By another road: start anywhere, and go on for long.
  far = np.linalg.matrix_power(source.joint.sum(0), 500)[0]
  np.testing.assert_allclose(far, pi, atol=1e-12)


def test_entropy_rate_is_the_growth_of_the_block_entropy():
  # H(X_1..X_n | S_0) grows by exactly h per token when the first state is known and stationary.
  source = hmm.source(2)
  blocks = []
  for length in (1, 2, 3, 4):
    total = 0.0
    for state, weight in enumerate(source.stationary):
      p = np.array(
        [
          np.exp(source.log_probs(np.eye(2)[state], np.array(tokens)).sum())
          for tokens in itertools.product(range(4), repeat=length)
        ]
      )
      assert p.sum() == pytest.approx(1.0, rel=1e-12)
      total -= weight * np.sum(p * np.log(p))
    blocks.append(total)
  rate = source.entropy_rate()
  assert blocks == pytest.approx([rate, 2 * rate, 3 * rate, 4 * rate], rel=1e-12)


def test_ngram_entropies_by_counting_and_in_order():
  source = hmm.source(4)
  unigram, bigram = source.ngram_entropies()
  task = hmm.make(seq_len=500, seed=0, states=4)
  tokens = np.concatenate([task.valid[i]["targets"] for i in range(200)])
  single = np.bincount(tokens, minlength=8) / tokens.size
  assert -np.sum(single * np.log(single)) == pytest.approx(unigram, abs=0.01)
  pairs = np.concatenate(
    [task.valid[i]["targets"][:-1] * 8 + task.valid[i]["targets"][1:] for i in range(200)]
  )
  double = np.bincount(pairs, minlength=64) / pairs.size
  joint = -np.sum(double * np.log(np.where(double > 0, double, 1.0)))
  assert joint - unigram == pytest.approx(bigram, abs=0.02)
  assert source.entropy_rate() < bigram - 0.1 < unigram < math.log(8)


def test_the_closed_form_is_refused_where_it_would_be_wrong():
  assert hmm.source(8).is_unifilar
  assert not leaky().is_unifilar
  with pytest.raises(ValueError, match="only where the source is unifilar"):
    leaky().entropy_rate()


@pytest.mark.parametrize("seq_len", [1, 3, 64])
def test_the_oracle_s_loss_is_the_optimum_at_every_position(seq_len):
  task = hmm.make(seq_len=seq_len, seed=0)
  source = hmm.source()
  count = 40_000 // (seq_len + 10)
  losses = np.array(
    [-hmm.oracle(task.valid[i], source) for i in range(min(count, len(task.valid)))]
  )
  assert task.optimum is not None
  deviation = losses.mean() - task.optimum
  # Losses at different places are not independent; those of different records are.
  error = losses.mean(1).std() / math.sqrt(len(losses))
  assert error < 0.03
  assert abs(deviation) < 4 * error
  for position in (0, seq_len // 2, seq_len - 1):
    here = losses[:, position]
    assert abs(here.mean() - task.optimum) < 4.5 * here.std() / math.sqrt(len(here))


def test_the_oracle_beats_other_readers():
  # A reader that believes in the stationary law at every token scores the unigram entropy.
  task = hmm.make(seq_len=64, seed=0)
  source = hmm.source()
  p = source.stationary @ source.emission
  targets = np.concatenate([task.valid[i]["targets"] for i in range(300)])
  assert -np.log(p[targets]).mean() == pytest.approx(source.ngram_entropies()[0], abs=0.03)
  assert task.baselines["unigram"] == pytest.approx(source.ngram_entropies()[0] / math.log(2))
  assert source.entropy_rate() / math.log(2) < task.baselines["bigram"] < task.baselines["unigram"]


def test_records_announce_the_state_and_score_everything():
  task = hmm.make(seq_len=20, seed=0, states=3)
  starts = []
  for index in range(2000):
    record = task.train[index]
    starts.append(record["inputs"][0] - 6)
    assert record["inputs"][1:].max() < 6 > record["targets"].max()
    assert record["weights"].all()
    np.testing.assert_array_equal(record["inputs"][1:], record["targets"][:-1])
  share = np.bincount(starts, minlength=3) / 2000
  assert share == pytest.approx(hmm.source(3).stationary, abs=0.05)
  assert task.decode([0, 3, 8]) == "a +a =2"


def test_bad_sizes():
  with pytest.raises(ValueError, match="task hmm must be at least 1, got 0"):
    hmm.make(seq_len=0, seed=0)
  with pytest.raises(ValueError, match="hmm:states must be at least 2, got 1"):
    hmm.make(seq_len=4, seed=0, states=1)
  with pytest.raises(ValueError, match="hmm:states must be at most 256, .*; got 3000"):
    hmm.make(seq_len=4, seed=0, states=3000)
