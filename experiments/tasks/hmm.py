"""A hidden Markov source whose entropy rate is known exactly: evaluation tested against the truth.

    state (hidden)    3    3   4   2   2   3 ...
    inputs           =3   +b   c  +a  +f ...
    targets               +b   c  +a  +f   d ...
    scored                 ^   ^   ^   ^   ^

In state s the source emits token x with probability p(x | s) and goes to state f(s, x). The state
is never seen after the first token, which announces it, but it can be followed: the source is
*unifilar* (the state and the token fix the next state). A reader who follows it predicts with
p(. | s), and no reader does better. So with pi the stationary distribution of the states, from
which the first is drawn, the loss of a perfect model at every single position, in expectation, is

    h = sum_s pi(s) H(p(. | s))         H the entropy; h is the entropy rate

exactly, at any sequence length. Here there are S states and 2 S tokens. Token x < S ("jump", a
letter) leads to state x; token S + j ("advance", a letter with +) leads to state s + 1 mod S. To
know the state is to look back to the last jump and count the advances since. Every state orders the
tokens in its own way and gives its r-th favorite, r = 1, 2, ..., probability ~ r^-(1 + s/4).

`oracle` is the forward algorithm, which knows nothing of unifilarity: exact log-probabilities of a
record's targets. Unigram and bigram entropies, also exact, are the baselines.

Source: Shannon, "A Mathematical Theory of Communication" (1948), section 7 (the entropy of a source
with states); "unifilar": Ash, "Information Theory" (1965), chapter 6; forward algorithm: Rabiner,
"A Tutorial on Hidden Markov Models" (1989), equations 19 to 21.
"""

import bisect
import dataclasses
import math
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

from experiments.data.source import Record
from experiments.tasks.task import (
  Task,
  Vocabulary,
  check_count,
  generated_task,
  letters,
)

MOST_STATES = 256
"""Their transitions, by token, are 268 MB."""


@dataclasses.dataclass(frozen=True)
class HiddenMarkov:
  """A source with hidden states that emits on its transitions.

  Attributes:
    joint: joint[x, s, t] = P(token x and next state t | state s).
  """

  joint: Float[np.ndarray, "V S S"]

  @cached_property
  def stationary(self) -> Float[np.ndarray, " S"]:
    """pi with pi A = pi, where A is the transition matrix of the states."""
    transitions = self.joint.sum(0)
    count = transitions.shape[0]
    # One of the equations pi (A - 1) = 0 follows from the others; sum pi = 1 takes its place.
    system = transitions.T - np.eye(count)
    system[-1] = 1.0
    return np.linalg.solve(system, np.eye(count)[-1])

  @cached_property
  def emission(self) -> Float[np.ndarray, "S V"]:
    """p(x | s)."""
    return self.joint.sum(2).T

  @property
  def is_unifilar(self) -> bool:
    """Whether state and token fix the next state."""
    return bool(np.all((self.joint > 0).sum(2) <= 1))

  def entropy_rate(self) -> float:
    """sum_s pi(s) H(p(. | s)), in nats per token.

    Raises:
      ValueError: The source is not unifilar, and the formula would be a lower bound only.
    """
    if not self.is_unifilar:
      raise ValueError("the entropy rate has this closed form only where the source is unifilar")
    return float(self.stationary @ _entropy(self.emission))

  def ngram_entropies(self) -> tuple[float, float]:
    """H(X1) and H(X2 | X1) of the stationary source, in nats: the best uni- and bigram models."""
    single = self.stationary @ self.emission
    # P(x, y) = sum_{s, t} pi(s) joint[x, s, t] p(y | t)
    double = np.einsum("s,xst,ty->xy", self.stationary, self.joint, self.emission)
    first = float(_entropy(single))
    return first, float(_entropy(double.ravel())) - first

  def log_probs(
    self, initial: Float[np.ndarray, " S"], tokens: Int[np.ndarray, " T"]
  ) -> Float[np.ndarray, " T"]:
    """log P(x_t | x_1 ... x_{t-1}) by the forward algorithm, from `initial` P(state)."""
    belief = np.asarray(initial, np.float64)
    out = np.empty(len(tokens))
    for t, token in enumerate(tokens):
      forward = belief @ self.joint[token]
      probability = forward.sum()
      out[t] = np.log(probability)
      belief = forward / probability
    return out


def _entropy(p: Float[np.ndarray, "*rows V"]) -> Float[np.ndarray, "*rows"]:
  """-sum p log p over the last axis; 0 log 0 = 0."""
  return -np.sum(p * np.log(np.where(p > 0, p, 1.0)), axis=-1)


def source(states: int = 8) -> HiddenMarkov:
  """The source of this module's docstring.

  Raises:
    ValueError: Fewer than two states, or more than MOST_STATES.
  """
  check_count(states, 2, what="hmm:states")
  if states > MOST_STATES:
    raise ValueError(
      f"hmm:states must be at most {MOST_STATES}, for S of them need an array of 2 S^3 numbers; "
      f"got {states}"
    )
  tokens = 2 * states
  joint = np.zeros((tokens, states, states))
  for state in range(states):
    # x -> 3 s - x is a permutation of the tokens; the favorite, 3 s mod 2 S, differs by state.
    rank = 1.0 + (3 * state - np.arange(tokens)) % tokens
    p = rank ** -(1.0 + state / 4.0)
    p /= p.sum()
    for token in range(tokens):
      following = token if token < states else (state + 1) % states
      joint[token, state, following] = p[token]
  return HiddenMarkov(joint)


def oracle(record: Record, hidden: HiddenMarkov) -> Float[np.ndarray, " T"]:
  """log p(target) at each position of a record, in nats, of the perfect predictor.

  Args:
    record: A record of the task.
    hidden: The source that made it: `source(states)`.
  """
  tokens, states, _ = hidden.joint.shape
  announced = int(record["inputs"][0]) - tokens
  return hidden.log_probs(np.eye(states)[announced], record["targets"])


def make(*, seq_len: int, seed: int, states: int = 8) -> Task:
  """The hidden Markov task at `seq_len` tokens.

  Args:
    seq_len: T; every position is scored.
    seed: Selects the records; the source is always the same.
    states: S.

  Raises:
    ValueError: `seq_len` below 1, fewer than two states or more than MOST_STATES.
  """
  check_count(seq_len, 1, what="seq_len for the task hmm")
  hidden = source(states)
  tokens = 2 * states
  first = _staircase(hidden.stationary)
  emit = [_staircase(row) for row in hidden.emission]
  following = hidden.joint.argmax(2).T.tolist()

  def draw(random: np.random.Generator) -> Record:
    uniform = random.random(seq_len + 1).tolist()
    state = bisect.bisect(first, uniform[0])
    announced, emitted = tokens + state, []
    for u in uniform[1:]:
      token = bisect.bisect(emit[state], u)
      emitted.append(token)
      state = following[state][token]
    targets = np.array(emitted, np.int32)
    inputs = np.concatenate([np.array([announced], np.int32), targets[:-1]])
    return {"inputs": inputs, "targets": targets, "weights": np.ones(seq_len, np.float32)}

  unigram, bigram = hidden.ngram_entropies()
  symbols = letters(states)
  names = (*symbols, *(f"+{name}" for name in symbols), *(f"={s}" for s in range(states)))
  return generated_task(
    "hmm",
    draw=draw,
    vocabulary=Vocabulary(names),
    seed=seed,
    description="A unifilar hidden Markov source with a known entropy rate.",
    settings={"seq_len": seq_len, "states": states},
    baselines={"unigram": unigram / math.log(2), "bigram": bigram / math.log(2)},
    optimum=hidden.entropy_rate(),
    bits=True,
  )


def _staircase(p: Float[np.ndarray, " n"]) -> list[float]:
  """Upper ends of the outcomes on [0, 1), but the last: a uniform number bisects to its outcome."""
  return np.cumsum(p)[:-1].tolist()
