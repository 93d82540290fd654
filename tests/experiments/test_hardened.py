"""Learned soft, run hard: one set of weights, whichever attention reads it."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import hardened, mqar
from experiments.flags import UserError

SMALL = ["--width=8", "--heads=3", "--seq_len=16", "--pairs=2", "--vocab_size=8", "--batch_size=4"]
OPTIONS = hardened.Options(width=8, heads=3, seq_len=16, pairs=2, vocab_size=8)


@functools.cache
def model(name):
  return hardened.make_model(hardened.make_config(OPTIONS), 8, hardened.LAYERS[name])


@functools.cache
def params():
  return jax.jit(model("soft").init)(jax.random.key(0))


@functools.cache
def logits(name, factor):
  tokens = jax.random.randint(jax.random.key(1), (4, 16), 0, 8, jnp.int32)
  run = hardened.decoded(model(name)) if name == "hull" else jax.jit(model(name).__call__)
  return np.asarray(run(hardened.sharpened(params(), factor), tokens))


def test_the_hulls_cache_answers_as_hard_attention_does():
  np.testing.assert_allclose(logits("hull", 1.0), logits("hard", 1.0), rtol=1e-4, atol=1e-5)


def test_hard_attention_knows_no_temperature_and_soft_becomes_hard():
  np.testing.assert_allclose(logits("hard", 1.0), logits("hard", 2.0**17), rtol=1e-4, atol=1e-5)
  apart = lambda factor: np.abs(logits("soft", factor) - logits("hard", 1.0)).max(-1)
  assert (apart(1.0) > 1e-3).mean() > 0.5
  assert (apart(2.0**17) < 1e-4).mean() > 0.9


def test_only_queries_are_sharpened():
  flat = jax.tree_util.tree_leaves_with_path(params())
  sharp = jax.tree.leaves(hardened.sharpened(params(), 3.0))
  changed = [
    jax.tree_util.keystr(path)
    for (path, old), new in zip(flat, sharp, strict=True)
    if not np.array_equal(old, new)
  ]
  assert len(changed) == 2 and all("query" in name for name in changed)


def test_it_cools_in_the_second_part():
  options = hardened.Options(steps=10, hardness=16.0)
  at = [float(hardened.hardness(jnp.int32(step), options)) for step in (0, 2, 3, 4, 10)]
  np.testing.assert_allclose(at, [1, 1, 4, 16, 16], rtol=1e-5)


@pytest.mark.parametrize("steps", [3, 50, 100, 150, 1234, 3000])
def test_the_last_part_begins_after_its_share_of_the_steps(steps):
  """Every step once, however many there are."""
  calls, last = hardened.calls(steps), -(-2 * steps // 5)
  done = [(name, i) for name, first, end in calls for i in range(first, end)]
  assert done == [("soft" if i < last else "through", i) for i in range(steps)]
  assert max(end - first for _, first, end in calls) <= mqar.CHUNK


def test_the_command_trains_hardens_and_decodes(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(mqar, "TRAIN", 9)
  monkeypatch.setattr(mqar, "VALID", 4)
  monkeypatch.setattr(hardened, "ALLOWED", 1.0)
  out = tmp_path / "hardened.json"
  given = ["--steps=3", "--seed=4", "--seeds=2", f"--out={out}"]
  assert hardened.main(["hardened", *SMALL, *given]) == 0
  runs = json.loads(out.read_text())["runs"]
  assert [run["seed"] for run in runs] == [4, 5] and runs[0]["curve"] != runs[1]["curve"]
  for run in runs:
    assert [row["step"] for row in run["curve"]] == [2, 3]
    assert run["accuracy"].keys() == {"soft", "hard", "hull"}
    assert run["accuracy"]["hull"] == run["accuracy"]["hard"]
  assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
  printed = capsys.readouterr().out
  assert "seed 4: right answers soft" in printed and "seed 5: right answers soft" in printed


def test_what_cannot_be_has_its_sentence():
  with pytest.raises(UserError, match="--hardness=0.5 is outside"):
    hardened.main(["hardened", "--hardness=0.5"])
  with pytest.raises(UserError, match="with 20 pairs must be at least 80, got 32"):
    hardened.main(["hardened", "--pairs=20"])
