"""The benchmark of linear attention on a chip, where there is none: its toy suite from end to end
with the XLA form in the place of the kernel, what it counts, and whom it refuses.
"""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from experiments import benchmark
from experiments.benchmarks import (
  chip,
  linear_checks,
  linear_rivals,
  rivals,
  targets,
  torch_linear,
)
from experiments.benchmarks.cases import CHIP_SUITES, LinearCase

SUITE, TOY = CHIP_SUITES["gpu-linear"], CHIP_SUITES["gpu-linear-toy"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
  """The finished toy suite: (the code it ended with, the path of its results)."""
  out = tmp_path_factory.mktemp("linear") / "toy.json"
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAX_PLATFORMS", "cpu")
    patch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    code = benchmark.main(["benchmark", "--suite=gpu-linear-toy", "--check", f"--out={out}"])
  return code, out


def test_the_toy_suite_measures_everyone(toy):
  code, out = toy
  results = json.loads(out.read_text())
  rows = {targets.key(row): row for row in results["times"]}
  for case in TOY.cases:
    for who in (TOY.ours, *TOY.contenders[case.family]):
      if who in results["absent"]:
        assert "torch" in results["absent"][who]
        continue
      for kind in rivals.KINDS:
        row = rows[f"{who}/{kind}/{case.name}"]
        assert row["terabytes"] == pytest.approx(case.moved(kind) / row["median"] / 1e12)
      assert f"{who}/forward+backward/{case.name}" in rows
      assert results["errors"][f"{who}/{case.name}"] < 1e-3
  assert code == 0 and results["unmeasured"] == results["refused"] == {}
  assert results["checks"]["verdict"] == "passed" and results["mechanism"] == "linear"
  assert [row["name"] for row in results["checks"]["rows"]] == list(TOY.checks or ())
  assert "TB/s count" in results["method"]
  assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_results_are_judged_and_drawn_again(toy, capsys):
  again = ["benchmark", "--suite=gpu-linear-toy", "--measure=false", f"--out={toy[1]}"]
  assert benchmark.main(again) == 0
  shown = capsys.readouterr().out
  assert shown.startswith("TB/s") and "missed" not in shown


def test_the_suite_is_that_of_the_registry():
  shapes = {(1, 8192, 96, 128), (2, 16384, 16, 128), (4, 4096, 64, 128), (8, 2048, 32, 256)}
  for decay in ("token", "channel"):
    found = [case for case in SUITE.cases if case.decay == decay]
    assert {(case.B, case.T, case.N, case.H) for case in found} == shapes and len(found) == 4
  names = {case.name for case in SUITE.cases}
  asked = targets.load("gpu-linear")
  for target in asked:
    for row in target["ratio"] if "ratio" in target else [target["rate"]]:
      who, kind, case = row.split("/")
      assert case in names and kind in ("forward", "forward+backward")
      assert who in (SUITE.ours, *SUITE.contenders["token"])
  judged = [len([t for t in asked if case in t["what"]]) for case in names]
  # The other library has no heads of 256.
  assert sorted(judged) == [2, 2, 3, 3, 3, 3, 3, 3]


def test_what_a_case_moves_and_what_that_takes_at_most():
  """0.168 ms of 4.8 TB/s, of which 2.5 times is allowed."""
  case = LinearCase(decay="token", B=1, T=8192, N=96, H=128)
  each = 8192 * 96
  assert case.moved("forward") == each * (4 * 128 * 2 + 4)
  assert case.moved("backward") == each * (7 * 128 * 2 + 2 * 4)
  channel = dataclasses.replace(case, decay="channel")
  assert channel.moved("forward+backward") == each * 128 * (11 * 2 + 3 * 4)
  floor = case.moved("forward") / 4.8e12
  assert floor == pytest.approx(0.168e-3, rel=0.01)
  (least,) = {target["at_least"] for target in targets.load("gpu-linear") if "rate" in target}
  assert case.rate("forward", 2.5 * floor)["terabytes"] == pytest.approx(least)


@pytest.mark.parametrize("decay", ["token", "channel"])
def test_the_truth_is_the_recurrence(decay):
  """That of the kernels' tests, in float64."""
  case = LinearCase(decay=decay, B=2, T=33, N=2, H=16)
  given = linear_rivals.inputs(dataclasses.replace(TOY, dtype="float32"), case)
  q, k, v, g, _ = (np.asarray(x, np.float64) for x in given.arrays)
  state = np.zeros((2, 2, 16, 16))
  for t in range(33):
    fade = np.exp(g[:, t])[..., None, None] if decay == "token" else np.exp(g[:, t])[..., None]
    state = fade * state + k[:, t, ..., None] * v[:, t, :, None]
    if t in given.rows:
      out = np.einsum("bnm,bnmh->bnh", q[:, t], state) / 4
      np.testing.assert_allclose(given.truth[:, list(given.rows).index(t)], out, atol=1e-4)


# Who is refused.


def test_absent_peers_say_what_to_install(monkeypatch):
  monkeypatch.setattr(linear_rivals.importlib.util, "find_spec", lambda name: None)
  gone = types.SimpleNamespace(absent="torch is not installed", versions={})
  here = types.SimpleNamespace(absent=None, versions={"fla": None, "devices": 1})
  blind = types.SimpleNamespace(absent=None, versions={"fla": "0.5", "devices": 0})
  absent = lambda who, torch: linear_rivals.absent(who, SUITE, torch)
  assert absent("fla", gone) == "torch is not installed"
  assert "pip install flash-linear-attention" in absent("fla", here)
  assert "need a GPU" in absent("fla", blind)
  assert "pip install --no-deps jax-linear-attention" in absent("jax-linear-attention", gone)
  assert absent("chunked", gone) is None and absent("torch recurrence", blind) is None


@pytest.mark.parametrize(("decay", "kind"), [("token", "simple_gla"), ("channel", "gla")])
def test_the_other_library_is_asked_for_its_kernels(decay, kind, monkeypatch):
  """By the name of its own mechanism, with our scale; its state is left."""
  asked = []

  def op(kind, q, k, v, **options):
    asked.append((kind, options))
    return q, None

  library = types.SimpleNamespace(linear_attention=op)
  monkeypatch.setattr(linear_rivals.importlib, "import_module", lambda name: library)
  case = LinearCase(decay=decay, B=1, T=8, N=1, H=16)
  assert linear_rivals.rival("jax-linear-attention", SUITE, case).attend("q", "k", "v", "g") == "q"
  assert asked == [(kind, {"impl": "mosaic_gpu", "scale": 0.25, "g": "g"})]


def test_a_library_that_fails_is_refused_with_its_words(monkeypatch):
  def gone(name):
    raise ImportError("it wants jax 0.11.2")

  monkeypatch.setattr(linear_rivals.importlib, "import_module", gone)
  case = TOY.cases[0]
  ready = chip._prepared("jax-linear-attention", SUITE, case, None)
  assert ready.refused["forward"] == "ImportError: it wants jax 0.11.2"


class Numbers:
  """As much of torch as its worker of linear attention asks for, of NumPy."""

  float32 = np.float32

  def zeros(self, shape, device):
    del device
    return np.zeros(shape, np.float32)

  def stack(self, arrays, axis):
    return np.stack(arrays, axis)


class Array(np.ndarray):
  """With torch's methods."""

  def exp(self):
    return np.exp(self).view(Array)


@pytest.mark.parametrize("decay", ["token", "channel"])
def test_the_recurrence_of_the_worker(decay):
  """Its equation, with NumPy's arrays in the place of torch's."""
  case = LinearCase(decay=decay, B=2, T=40, N=3, H=8)
  given = linear_rivals.inputs(TOY, case)
  worker = torch_linear.Worker(Numbers())
  worker.use("cpu", "float32", decay)
  worker.inputs = [np.asarray(x, np.float32).view(Array) for x in given.arrays[:4]]
  out = np.asarray(worker.attend("recurrence"))
  assert rivals.error(out[:, given.rows], given.truth) < 1e-4


# Checks.


def test_the_checks_cover_what_the_kernels_promise():
  every = linear_checks.CHECKS
  names = [check.name for check in every]
  assert len(names) == len(set(names)) and set(TOY.checks or ()) <= set(names)
  assert {check.decay for check in every} == {"none", "head", "token", "channel"}
  assert {max(check.M, check.h) for check in every} >= {64, 128, 256}
  assert any(check.Kv > check.Nq for check in every) and any(check.Nq > check.K for check in every)
  assert any(check.T % 2 for check in every) and any(check.M % 64 for check in every)
  for field in ("normalize", "documents", "lengths", "reverse", "harsh", "step"):
    assert any(getattr(check, field) for check in every), field
  for check in every:
    names = jax.eval_shape(lambda check=check: linear_checks.operands(check))
    assert ("log_decay" in names) == (check.decay != "none")


SMALL = dict.fromkeys(("M", "h"), 16) | dict.fromkeys(("Nq", "K", "Kv"), 2)


@pytest.mark.parametrize("name", ["everything at once", "one token more, channel, normalized"])
def test_a_check_of_all_modifiers_passes_where_it_should(name):
  """Of the XLA form: every quantity has a finite truth, and the bound is not for nothing."""
  (check,) = (c for c in linear_checks.CHECKS if c.name == name)
  check = dataclasses.replace(check, T=40, dtype="float32", **SMALL)
  programs = linear_checks.compiled(check, "chunked")
  found = linear_checks.checks.judge(check, programs)
  assert found["failed"] == []
  names = {"out", "kv"} if check.step else {"out", "kv", "z", *(f"d {x}" for x in (
    "q", "k", "v", "kv", "z", "log_decay"))}  # fmt: skip
  assert set(found["quantities"]) == names
  function, given = programs["ours"]
  shifted = lambda *given: function(*given) | {"out": function(*given)["out"] * 1.01}
  wrong = linear_checks.checks.judge(check, programs | {"ours": (shifted, given)})
  assert wrong["failed"][0].startswith("out is off by")
