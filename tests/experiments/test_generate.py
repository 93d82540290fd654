"""Decoding: greedy is the parallel model's argmax; the filters are those of the textbook."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import flags, generate, safety, train
from experiments.generate import Sampling, keep_likeliest
from experiments.model import make_model

GREEDY = Sampling(temperature=0.0)


def model_of(attention: str, **changes):
  config = runs.tiny("unused", attention=attention, model__short_convolution=3, **changes)
  model = make_model(config, 24)
  # Scaled up, so that the likeliest token is likeliest by far and depends on the past.
  params = jax.tree.map(lambda x: 3 * x, model.init(jax.random.key(1)))
  return model, params


# Each mixer's prefill and steps are asked by its own test; here, each kind of state.
KINDS = ("mamba2", "rglru", "linear,softmax:window=4")


@pytest.mark.parametrize("attention", KINDS)
def test_greedy_is_the_argmax_of_the_parallel_model_at_every_position(attention):
  model, params = model_of(attention)
  prompts = [[1, 2, 3, 4, 5], [7], [9, 8, 7]]
  written = generate.generate(model, params, prompts, tokens=11, sampling=GREEDY)
  assert written.shape == (3, 11)
  whole = np.zeros((3, 16), np.int32)  # what stands after a row changes nothing in it
  for tokens, prompt, row in zip(whole, prompts, written, strict=True):
    tokens[: len(prompt) + 11] = [*prompt, *row]
  likeliest = np.argmax(jax.jit(lambda params, tokens: model(params, tokens))(params, whole), -1)
  for found, prompt, row in zip(likeliest, prompts, written, strict=True):
    np.testing.assert_array_equal(found[len(prompt) - 1 :][:11], row)
  assert len(set(written.ravel().tolist())) > 3


def test_the_same_key_writes_the_same_and_another_does_not():
  model, params = model_of("softmax")
  write = lambda seed: generate.generate(
    model, params, [[1, 2]], tokens=12, sampling=Sampling(temperature=3.0), key=jax.random.key(seed)
  ).tolist()
  assert write(0) == write(0) != write(1)


def textbook(logits: np.ndarray, k: int, p: float) -> set[int]:
  """The tokens that top-k, then top-p, keep, in float64 and in Python."""
  order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: k or None]
  odds = np.exp(logits[order].astype(np.float64) - logits.max())
  odds /= odds.sum()
  kept, reached = set(), 0.0
  for token, probability in zip(order, odds, strict=True):
    if p < 1 and reached >= p:
      break
    kept.add(token)
    reached += probability
  return kept


@settings(deadline=None, max_examples=40)
@given(
  seed=st.integers(0, 10**6),
  k=st.sampled_from([0, 1, 3, 9]),
  p=st.sampled_from([0.05, 0.4, 0.77, 1.0]),
)
def test_filters_keep_what_the_textbook_keeps(seed, k, p):
  logits = np.random.default_rng(seed).normal(0, 2, (3, 9)).astype(np.float32)
  kept = np.asarray(keep_likeliest(jnp.asarray(logits), Sampling(top_k=k, top_p=p)))
  for row, out in zip(logits, kept, strict=True):
    chosen = {i for i in range(9) if np.isfinite(out[i])}
    assert chosen == textbook(row, k, p)
    np.testing.assert_array_equal(out[list(chosen)], row[list(chosen)])


def test_equal_tokens_go_by_index_and_one_always_stays():
  flat = jnp.zeros((1, 6))
  assert (
    np.isfinite(keep_likeliest(flat, Sampling(top_k=2)))[0].tolist() == [True] * 2 + [False] * 4
  )
  assert np.isfinite(keep_likeliest(flat, Sampling(top_p=1e-9)))[0].sum() == 1


@pytest.mark.parametrize(
  "sampling",
  [Sampling(temperature=1e-38), Sampling(temperature=1e-300), Sampling(top_p=1e-300)],
)
def test_the_coldest_draw_is_the_likeliest(sampling):
  logits = jnp.array([[1.0, 2.0, 5.0, 3.0]])
  assert generate.sample(logits, jax.random.key(0), sampling).tolist() == [2]


def test_more_than_all_tokens_are_all():
  logits = jnp.arange(6.0)[None]
  assert np.isfinite(keep_likeliest(logits, Sampling(top_k=99_999_999_999))).all()


def test_draws_follow_the_probabilities():
  logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
  draw = lambda sampling: (
    np.bincount(
      jax.vmap(lambda key: generate.sample(logits, key, sampling)[0])(
        jax.random.split(jax.random.key(0), 4000)
      ),
      minlength=4,
    )
    / 4000
  )
  np.testing.assert_allclose(draw(Sampling(temperature=1.0)), [0.5, 0.3, 0.15, 0.05], atol=0.03)
  np.testing.assert_allclose(
    draw(Sampling(temperature=1.0, top_k=2)), [0.625, 0.375, 0, 0], atol=0.03
  )
  squared = np.array([0.25, 0.09, 0.0225, 0.0025])
  np.testing.assert_allclose(draw(Sampling(temperature=0.5)), squared / squared.sum(), atol=0.03)


@pytest.mark.parametrize(
  ("prompts", "tokens", "words"),
  [([[]], 3, "empty"), ([[1, 99]], 3, "99"), ([[1], [-1]], 3, "-1"), ([[1]], 0, "tokens=0")],
)
def test_bad_prompts_are_told(prompts, tokens, words):
  model, params = model_of("softmax")
  with pytest.raises(ValueError, match=words):
    generate.generate(model, params, prompts, tokens=tokens)


def test_the_program_continues_a_prompt(tmp_path, capsys):
  train.train(runs.tiny(tmp_path, steps=2), safety.Stop())
  capsys.readouterr()
  where = ["generate", f"--workdir={tmp_path}", "--tokens=5"]
  generate.main([*where, "--temperature=0"])
  first = capsys.readouterr().out
  generate.main([*where, "--temperature=0", "--seed=4"])
  assert capsys.readouterr().out == first
  generate.main([*where, "--prompt==3 a b", "--num=2", "--top_k=3", "--top_p=0.9"])
  out = capsys.readouterr().out
  assert out.count("=3 a b") == 2 and "--- 2 of 2" in out
  generate.main([*where, "--prompt==3", "--tokens=40"])
  assert "trained on 32" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("argument", "words"),
  [
    ("--prompt=nonsense", "nonsense"),
    ("--top_p=0", "top_p"),
    ("--tokens=0", "tokens"),
    ("--workdir=nowhere/at/all", "holds no run"),
  ],
)
def test_mistakes_are_one_sentence(tmp_path_factory, argument, words):
  folder = tmp_path_factory.getbasetemp() / "one_run"
  if not folder.exists():
    train.train(runs.tiny(folder, steps=2), safety.Stop())
  with pytest.raises(flags.UserError, match=words):
    generate.main(["generate", f"--workdir={folder}", argument])
