"""The sweep of recall against state size: what it counts, and that it goes on where it stopped."""

import json
import types

import numpy as np
import pytest

from experiments import mqar
from experiments.flags import UserError

SMALL = ["--width=8", "--seq_len=16", "--pairs=2", "--vocab_size=8", "--batch_size=4", "--steps=2"]


def sweep(out, *more):
  assert mqar.main(["mqar", *SMALL, f"--out={out}", *more]) == 0
  return json.loads(out.read_text())["rows"]


def test_a_finished_point_is_not_run_again(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(mqar, "TRAIN", 9)
  monkeypatch.setattr(mqar, "VALID", 4)
  out = tmp_path / "mqar.json"
  one = sweep(out, "--mechanisms=window", "--points=1")
  assert len(one) == 1
  assert len(one[0]["accuracy"]) == mqar.SEEDS
  assert one[0]["curve"][-1]["step"] == 2
  assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

  ran = []
  monkeypatch.setattr(mqar, "run", lambda p: ran.append(p) or one[0] | p.identity)
  two = sweep(out, "--mechanisms=window", "--points=2")
  assert [point.window for point in ran] == [8]
  assert two[0] == one[0]
  sweep(out, "--mechanisms=window", "--points=2", "--lr=1e-3")
  assert len(ran) == 3, "another learning rate is another run"
  assert "window" in capsys.readouterr().out


def test_more_pairs_than_fit_are_refused_before_anything_runs(tmp_path):
  with pytest.raises(UserError, match="seq_len .* with 20 pairs must be at least 80, got 16"):
    sweep(tmp_path / "mqar.json", "--pairs=20")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", '{"rows": [', "[]"])
def test_results_that_cannot_be_read_are_one_sentence(tmp_path, content):
  path = tmp_path / "mqar.json"
  path.write_text(content)
  with pytest.raises(UserError, match=f"--out={path} cannot be read"):
    sweep(path)
  assert path.read_text() == content


def test_the_last_chunk_is_what_is_left(monkeypatch):
  state = lambda step: types.SimpleNamespace(step=[step])
  later = lambda count, states, *_: (state(states.step[0] + count), [1.0], [0.5])
  monkeypatch.setattr(mqar, "load_data", lambda config: (None, None, 8))
  monkeypatch.setattr(mqar, "programs", lambda config, model: (lambda keys: state(0), later))
  row = mqar.run(mqar.plan(mqar.Options(steps=150))[0])
  assert [point["step"] for point in row["curve"]] == [100, 150]


def test_sizes_are_those_of_decoding_states():
  """Of two layers in float32, worked out by hand."""
  sizes = {(p.mechanism, p.head_dim, p.window): p.state_bytes for p in mqar.plan(mqar.Options())}
  assert sizes["attention", 8, 0] == 2 * 32 * (8 + 8) * 4
  assert sizes["window", 16, 4] == 2 * 4 * (16 + 16) * 4
  assert sizes["Based", 4, 0] == 2 * 15 * (4 + 1) * 4  # 1 + 4 + 10 features, and the normalizer
  assert sizes["GLA", 16, 0] == 2 * 8 * (16 + 1) * 4
  assert sizes["Mamba-2", 4, 0] == 2 * 2 * 8 * (4 + 1) * 4


class Answers:
  """A model that says everywhere what it is told."""

  def __init__(self, answers):
    self.answers = answers

  def __call__(self, params, tokens):
    return np.eye(4, dtype=np.float32)[self.answers]


def test_only_questions_count():
  batch = {
    "inputs": np.array([[1, 2, 1, 0]]),
    "targets": np.array([[0, 0, 2, 3]]),
    "weights": np.array([[0.0, 0.0, 1.0, 1.0]], np.float32),
  }
  half = Answers(np.array([[3, 3, 2, 1]]))
  assert float(mqar.accuracy(half, None, batch)) == 0.5


def test_a_misspelt_mechanism_has_its_sentence():
  with pytest.raises(UserError, match="--mechanisms.*'Bassed'.*did you mean 'Based'"):
    mqar.main(["mqar", "--mechanisms=Bassed"])
