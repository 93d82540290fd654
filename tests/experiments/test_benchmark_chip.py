"""The benchmark of a chip, where there is none: its toy suite from end to end, with the XLA form in
the place of the kernel; what it counts, whom it refuses, and what it says when something fails.
"""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import benchmark
from experiments.benchmarks import cases, checks, chip, contenders, rivals, targets, timing, tune
from experiments.benchmarks.cases import CHIP_SUITES, Case
from experiments.flags import UserError
from pallas_kernels import tuned

TOY = CHIP_SUITES["gpu-toy"]
SMALL = Case(mask="causal", B=1, T=64, N=2, H=16)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
  """The finished toy suite: (its process, the path of its results)."""
  out = tmp_path_factory.mktemp("chip") / "toy.json"
  command = [sys.executable, "-m", "experiments.benchmark", "--suite=gpu-toy", "--check"]
  done = subprocess.run(
    [*command, f"--out={out}"], cwd=contenders.ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done, out


def test_the_toy_suite_measures_everyone(toy):
  done, out = toy
  results = json.loads(out.read_text())
  rows = {targets.key(row): row for row in results["times"]}
  for case in TOY.cases:
    for who in (TOY.ours, *TOY.contenders[case.family]):
      if who in results["absent"]:
        assert results["absent"][who] in done.stdout
        continue
      both = []
      for kind in rivals.KINDS:
        row = rows[f"{who}/{kind}/{case.name}"]
        assert row["tflops"] == pytest.approx(case.operations(kind) / row["median"] / 1e12)
        both.append(row["seconds"])
      added = rows[f"{who}/forward+backward/{case.name}"]["seconds"]
      np.testing.assert_allclose(added, np.sum(both, axis=0))
      assert results["errors"][f"{who}/{case.name}"] < 1e-3
  assert results["checks"]["verdict"] == "passed" and results["checks"]["not_run"] == []
  assert [row["name"] for row in results["checks"]["rows"]] == list(TOY.checks or ())
  assert results["unmeasured"] == results["refused"] == {}
  assert "missed" not in done.stdout


def test_the_toy_suite_says_how_and_where_and_draws(toy):
  text = toy[1].read_text()
  results = json.loads(text)
  where = results["environment"]
  assert (
    where["versions"]["jax"]
    and where["date"]
    and where["device"]
    and "jax.vjp" in results["method"]
  )
  assert str(toy[1].parent) not in text
  assert toy[1].with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_failed_checks_fail_the_check(toy, tmp_path, capsys):
  results = json.loads(toy[1].read_text())
  results["checks"] |= {"verdict": "failed"}
  results["checks"]["rows"][0]["failed"] = ["d q is off by 3, allowed is 1"]
  out = tmp_path / "toy.json"
  out.write_text(json.dumps(results))
  again = ["benchmark", "--suite=gpu-toy", "--measure=false", f"--out={out}"]
  assert benchmark.main(again) == 0
  assert "one query: d q is off by 3" in capsys.readouterr().out
  assert benchmark.main([*again, "--check"]) == 1
  assert "checks: failed" in capsys.readouterr().err


# Without a chip.


@pytest.mark.parametrize("flag", ["", "--tune"])
def test_without_a_chip_one_sentence_says_what_is_missing(flag):
  command = [sys.executable, "-m", "experiments.benchmark", "--suite=gpu", *filter(None, [flag])]
  done = subprocess.run(
    command,
    cwd=contenders.ROOT,
    capture_output=True,
    text=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  assert done.returncode == 1 and done.stdout == ""
  (line,) = done.stderr.strip().splitlines()
  assert line.startswith(
    "error: --suite=gpu cannot run here: it needs a Hopper GPU and this is cpu"
  )


@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    (["--suite=gpuu"], "did you mean 'gpu'"),
    (["--suite=cpu", "--tune"], "--tune goes with gpu"),
    (["--suite=gpu", "--limit_s=-1"], "limit_s"),
    (["--suite=gpu-toy", "--tune"], "'tiled' does not look up"),
  ],
)
def test_mistakes_get_a_sentence(arguments, sentence, monkeypatch):
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  with pytest.raises(UserError, match=sentence):
    benchmark.main(["benchmark", *arguments])


@pytest.mark.parametrize(
  ("kind", "name"),
  [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA GH200 480GB", "h200")],
)
def test_files_are_named_after_the_chip(kind, name):
  assert chip.chip_name(kind) == name


# What is counted.

FAMILIES = ("full", "causal", "window 10", "window 100", "documents 8", "documents 30")


@pytest.mark.parametrize("mask", FAMILIES)
def test_pairs_and_masks_are_those_of_the_definition(mask):
  case = Case(mask=mask, B=3, T=70, N=2, H=16)
  ids = case.documents()
  allowed = np.zeros((70, 70), bool)
  for t in range(70):
    for s in range(70):
      behind = {"full": True, "window": 0 <= t - s < 10 ** len(mask.split()[-1][1:])}
      causal = t >= s and (case.family != "documents" or ids[t] == ids[s])
      allowed[t, s] = behind.get(case.family, causal)
  np.testing.assert_array_equal(case.attends(np.arange(70)), allowed)
  lowered = case.lowered(jnp.asarray(ids)[None] if case.family == "documents" else None)
  np.testing.assert_array_equal(np.broadcast_to(lowered.as_array(70, 70)[0, 0], (70, 70)), allowed)
  counted = 3 * 70 * 70 / 2 if mask == "causal" else 3 * allowed.sum()
  assert case.pairs() == counted
  assert case.operations("forward") == 4 * 2 * 16 * counted
  assert case.operations("forward+backward") == 3.5 * case.operations("forward")


def test_the_gpu_suite_is_the_table_that_was_asked_for():
  suite = CHIP_SUITES["gpu"]
  table = [case for case in suite.cases if case.mask in ("full", "causal")]
  assert len(table) == len(set(table)) == 3 * 6 * 2
  assert {case.B * case.T for case in suite.cases} == {16384}
  assert {case.N * case.H for case in suite.cases} == {2048}
  for mean in (1024, 4096):
    case = next(c for c in suite.cases if c.mask == f"documents {mean}")
    lengths = np.unique(case.documents(), return_counts=True)[1]
    assert lengths.sum() == 16384 and 0.4 * mean < lengths.mean() < 2.5 * mean
  names = [case.name for case in suite.cases]
  for target in targets.load("gpu"):
    first = target["ratio"][0] if "ratio" in target else target["rate"]
    rows = [*([first] if isinstance(first, str) else first), *target.get("ratio", [])[1:]]
    for who, kind, name in (row.split("/") for row in rows):
      case = suite.cases[names.index(name)]
      assert kind in (*rivals.KINDS, "forward+backward")
      assert who in (suite.ours, *suite.contenders[case.family])


# Who is refused.


def _run(monkeypatch, cases_, **swapped):
  """The timing of some cases, with some contenders replaced by functions of (q, k, v)."""
  real = rivals.rival

  def rival(name, suite, case):
    return rivals.Rival(swapped[name]) if name in swapped else real(name, suite, case)

  monkeypatch.setattr(rivals, "rival", rival)
  suite = dataclasses.replace(
    TOY, cases=cases_, contenders=dict.fromkeys(TOY.contenders, ("jax_XLA", "jax XLA"))
  )
  results = {
    "absent": {}, "refused": {}, "errors": {}, "times": [],
    "unmeasured": {case.name: "not yet" for case in cases_},
    "checks": {"verdict": "passed", "rows": [], "not_run": []},
  }  # fmt: skip
  saved = []
  save = lambda results: saved.append(json.dumps(results))
  torch = contenders.Torch("no such python")
  chip._time_all(suite, torch, time.monotonic() + 100, results, lambda text: None, save)
  assert len(saved) == len(cases_)
  return results, {targets.key(row) for row in results["times"]}


def test_a_wrong_peer_is_not_timed_and_a_failing_one_says_why(monkeypatch):
  def broken(q, k, v):
    raise NotImplementedError("no such mask")

  results, rows = _run(monkeypatch, (SMALL,), **{"jax XLA": lambda q, k, v: v, "jax_XLA": broken})
  assert {row.split("/")[0] for row in rows} == {"tiled"}
  assert "its answer is wrong" in results["refused"][f"jax XLA/forward/{SMALL.name}"]
  assert results["refused"][f"jax_XLA/backward/{SMALL.name}"] == "NotImplementedError: no such mask"
  assert results["checks"]["verdict"] == "passed" and results["unmeasured"] == {}


def test_a_peer_without_a_backward_pass_is_timed_forward(monkeypatch):
  @jax.custom_vjp
  def half(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)

  def no(*args):
    raise NotImplementedError("not yet")

  half.defvjp(lambda *qkv: (half(*qkv), None), no)
  results, rows = _run(monkeypatch, (SMALL,), **{"jax XLA": half, "jax_XLA": half})
  kinds = {row.split("/")[1] for row in rows if row.startswith("jax XLA")}
  assert kinds == {"forward"}
  assert "not yet" in results["refused"][f"jax XLA/backward/{SMALL.name}"]


def test_ours_is_timed_even_if_wrong_and_the_checks_fail(monkeypatch):
  def late(q, k, v):
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return out.at[:, -1, 0].multiply(jnp.nan)

  results, rows = _run(monkeypatch, (SMALL,), tiled=late, jax_XLA=late)
  assert f"tiled/backward/{SMALL.name}" in rows and f"jax_XLA/forward/{SMALL.name}" not in rows
  assert results["checks"]["verdict"] == "failed"
  assert results["checks"]["rows"][0]["name"] == f"answer at {SMALL.name}"


def test_an_error_counts_against_its_own_row():
  """Averages of many values are small: their rows must not hide behind those of few."""
  truth = np.ones((1, 2, 1, 4), np.float32) * np.array([1.0, 0.01])[None, :, None, None]
  out = truth.copy()
  out[0, 1, 0, 0] = 0.02
  assert rivals.error(out, truth) == pytest.approx(1.0)


def test_what_the_time_does_not_suffice_for_is_listed(monkeypatch):
  monkeypatch.setattr(rivals, "inputs", None)  # nothing may begin
  results = {"unmeasured": {}, "absent": {}, "times": []}
  chip._time_all(TOY, None, time.monotonic() - 1, results, lambda text: None, None)
  assert results["unmeasured"] == {case.name: "the time was up (--limit_s)" for case in TOY.cases}
  verdict = targets.judge(targets.load("gpu-toy")[0], results)
  assert (verdict.verdict, verdict.why) == ("unmeasured", "the time was up (--limit_s)")


def test_a_kernel_that_never_ends_ends_the_program(monkeypatch):
  codes, said = [], []
  monkeypatch.setattr(chip.os, "_exit", codes.append)
  monkeypatch.setattr(chip, "HANG", 0.05)
  with chip.watched("a case", said.append):
    time.sleep(0.5)
  assert codes == [3] and "during a case: a kernel does not end" in said[0]
  with chip.watched("another", said.append):
    pass
  time.sleep(0.2)
  assert len(codes) == 1


def test_each_step_of_progress_has_its_own_time(monkeypatch):
  """Steps that take longer than the limit together are let through; what stops then is named."""
  codes, said = [], []
  monkeypatch.setattr(chip.os, "_exit", codes.append)
  monkeypatch.setattr(chip, "HANG", 1.0)
  with chip.watched("a group", said.append) as progress:
    run = chip.told("one kernel", lambda repeats: time.sleep(0.3), progress)
    for _ in range(4):
      run(1)
    assert codes == []
    time.sleep(1.2)
  assert codes == [3] and "during one kernel: a kernel does not end" in said[0]


def test_every_timed_run_is_progress(monkeypatch):
  told = []
  results = {"refused": {}, "errors": {}, "times": [], "unmeasured": {SMALL.name: ""}, "absent": {}}
  suite = dataclasses.replace(TOY, contenders=dict.fromkeys(TOY.contenders, ()), rounds=2)
  ready = {"tiled": rivals.Ready({"forward": lambda repeats: 1.0}, {"backward": "none"})}
  torch = contenders.Torch("no such python")
  assert chip._time_case(suite, SMALL, ready, torch, results, told.append) == 1
  assert told.count(f"tiled, forward, {SMALL.name}") == 2 + 2


# Checks.


def _judged(**changes):
  """A check's verdict where the answers of the implementation are changed, run by run."""
  check = checks.Check(name="it")
  truth = {"out": np.ones(4, np.float32), "lse": np.array([0.0, -np.inf], np.float32)}
  plain = {"out": truth["out"] + 0.01, "lse": truth["lse"]}
  runs = iter(changes.get("runs", [{}, {}]))
  ours = lambda: plain | next(runs)
  programs = {"truth": (lambda: truth, ()), "plain": (lambda: plain, ()), "ours": (ours, ())}
  return checks.judge(check, programs)["failed"]


def test_an_error_may_be_twice_that_of_xla():
  near, far = (np.full(4, 1.0 + x, np.float32) for x in (0.0209, 0.0215))
  assert _judged() == []
  assert _judged(runs=[{"out": near}] * 2) == []
  (failed,) = _judged(runs=[{"out": far}] * 2)
  assert failed.startswith("out is off by 0.0215, allowed is 0.021")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_no_number_is_no_answer(bad):
  out = np.array([1, 1, bad, 1], np.float32)
  assert "out is off by inf" in _judged(runs=[{"out": out}] * 2)[0]
  lse = np.array([0.0, -1e30], np.float32)
  assert "lse is off by inf" in _judged(runs=[{"lse": lse}] * 2)[0]


def test_a_rerun_must_give_the_same_bits():
  once, again = (np.full(4, 1.01 + x, np.float32) for x in (0.0, 1e-6))
  assert _judged(runs=[{"out": once}, {"out": again}]) == ["out is not the same twice"]


def test_the_checks_cover_what_the_kernel_promises():
  names = [check.name for check in checks.CHECKS]
  assert len(names) == len(set(names))
  assert set(TOY.checks or ()) <= set(names)
  each = checks.CHECKS
  assert {check.dtype for check in each} == {"bfloat16", "float16"}
  assert any(check.N > check.K for check in each) and any(check.h != check.H for check in each)
  assert any(check.T % 2 and check.S % 2 for check in each)
  for field in ("logit_cap", "bias", "padded", "alibi", "sinks", "dropout", "long"):
    assert any(getattr(check, field) for check in each), field


def test_a_check_that_never_answers_is_named_and_the_next_is_tried():
  said = []
  until = time.monotonic() + 60
  found = checks.run("tiled", ["causal", "full", "sinks"], until, said.append, silence=0.1)
  assert found["verdict"] == "failed" and found["not_run"] == ["sinks"]
  assert [row["failed"] for row in found["rows"]] == [["no answer in 0.1 s"]] * 2
  assert said[0] == "check failed: causal: no answer in 0.1 s"


def test_a_process_that_ends_early_is_named():
  found = checks.run("tiled", ["no such check"], time.monotonic() + 60, lambda text: None)
  assert found["verdict"] == "failed"
  assert found["rows"][0]["failed"] == ["its process ended: KeyError: 'no such check'"]


def test_checks_that_do_not_run_are_not_passed():
  found = checks.run("tiled", None, time.monotonic() - 1, lambda text: None)
  assert found["verdict"] == "unfinished" and len(found["not_run"]) == len(checks.CHECKS)


# Targets of a chip.


def row(who, seconds, case="causal", kind="forward", tflops=1.0):
  times = timing.Times(list(seconds), 1).row()
  return {"contender": who, "kind": kind, "case": case, "T": 8, "tflops": tflops} | times


RESULTS = {
  "absent": {"torch": "torch is not installed"},
  "refused": {"far/backward/causal": "it has none"},
  "unmeasured": {"full": "the time was up"},
  "times": [
    row("a", [1.0, 2.0, 4.0], tflops=600.0),
    row("b", [3.0, 3.0, 3.0]),
    row("c", [8.0, 8.0, 8.0]),
  ],
}


A = "a/forward/causal"
ABSENT = ("unmeasured", "torch is not installed")


@pytest.mark.parametrize(
  ("asked", "measured", "verdict", "why"),
  [
    ({"rate": "a/forward/causal", "at_least": 600}, 600.0, "met", ""),
    (
      {"rate": "a/forward/causal", "published": {"tflops": 500}, "at_least": 1.3},
      1.2,
      "missed",
      "",
    ),
    ({"ratio": [["c/forward/causal", "b/forward/causal"], A], "at_least": 2}, 1.5, "missed", ""),
    ({"ratio": [["torch/forward/causal", "c/forward/causal"], A], "at_least": 4}, 4.0, "met", ""),
    ({"ratio": [["torch/forward/causal"], A], "at_least": 1}, None, *ABSENT),
    ({"rate": "far/forward+backward/causal", "at_least": 1}, None, "unmeasured", "it has none"),
    ({"rate": "a/backward/full", "at_least": 1}, None, "unmeasured", "the time was up"),
    ({"rate": "a/step/causal", "at_least": 1}, None, "unmeasured", "there is no row a/step/causal"),
  ],
)  # fmt: skip
def test_verdicts_of_a_chip(asked, measured, verdict, why):
  judged = targets.judge({"what": "it"} | asked, RESULTS)
  assert (judged.verdict, judged.why) == (verdict, why)
  assert judged.measured == (None if measured is None else pytest.approx(measured))


def test_rates_have_the_spread_of_rounds():
  judged = targets.judge({"what": "it", "rate": "a/forward/causal", "at_least": 1}, RESULTS)
  assert judged.rounds == pytest.approx((300.0, 600.0, 1200.0))


# Tuning.


def test_candidates_fit():
  for what in tune.PASSES:
    for H in (64, 128, 256):
      plans = tune.candidates(what, H, H)
      assert plans, (what, H)
      assert all(plan["others"] % 8 == 0 for plan in plans)
  assert {plan["warpgroups"] for plan in tune.candidates("forward", 64, 64)} == {2, 3}
  assert all(plan["others"] < 128 for plan in tune.candidates("forward", 256, 256))
  assert all(plan["others"] <= 64 for plan in tune.candidates("d_key", 256, 256))


def test_the_fastest_right_plan_is_written(monkeypatch, tmp_path):
  """A stand-in for a kernel that is slow, wrong or impossible as its table says."""
  plans = [{"others": 24}, {"others": 16}, {"others": 8}]
  seconds = [3.2, 2.4, 1.6, 0.8]  # its own plan's first
  monkeypatch.setattr(tune, "candidates", lambda what, H, h: plans)
  timed = lambda timers, *_, **__: {i: timing.Times([seconds[i]] * 2, 1) for i in timers}
  monkeypatch.setattr(timing, "interleave", timed)

  def attend(q, k, v, what):
    plan = tuned.look_up("h200", what, dtype=q.dtype, H=16, h=16, causal=True)
    if plan.get("others") == 7:
      raise ValueError("no such block")
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return 2.0 * out if plan.get("others") == 16 else out

  @jax.custom_vjp
  def kernel(q, k, v):
    return attend(q, k, v, "forward")

  def backward(saved, d_out):
    attended = lambda what: jax.vjp(functools.partial(attend, what=what), *saved)[1](d_out)
    return (attended("d_query")[0], *attended("d_key")[1:])

  kernel.defvjp(lambda *qkv: (kernel(*qkv), qkv), backward)
  monkeypatch.setattr(rivals, "rival", lambda *_: rivals.Rival(kernel))
  monkeypatch.setenv("FRUGAL_TUNED", str(tmp_path))
  suite = dataclasses.replace(TOY, cases=(SMALL,))
  where = {"versions": {"jax": "0"}, "date": "2000-01-01", "commit": "c", "device": "d"}
  saved = []
  found = tune.search(suite, 1e9, where, lambda text: None, saved.append)
  assert os.environ["FRUGAL_TUNED"] == str(tmp_path) and len(saved) == 3
  assert [one["what"] for one in found["plans"]] == list(tune.PASSES)
  for one in found["plans"]:
    assert (one["plan"], one["causal"]) == ({"others": 8}, True)
    assert (one["seconds"], one["own_plan_seconds"]) == (0.8, 3.2)
  refused = [(r["what"], r["plan"]) for r in found["tried"] if "differs" in r["refused"]]
  assert refused == [(what, {"others": 16}) for what in tune.PASSES]
  (tmp_path / "h200.json").write_text(json.dumps(found))
  for what in tune.PASSES:
    assert tuned.look_up("h200", what, dtype=jnp.float32, H=16, h=16) == {"others": 8}


def test_the_kernels_own_plan_stays_unless_another_is_worth_it():
  rows = [{"plan": {}, "median": 1.0}, {"plan": {"others": 8}, "median": 0.995}]
  assert tune._ordered(rows)[0]["plan"] == {}
  rows[1]["median"] = 0.9
  assert tune._ordered(rows)[0]["plan"] == {"others": 8}
  assert tune._ordered([rows[0], rows[1] | {"median": None}])[0]["plan"] == {}


# torch.


@pytest.mark.parametrize("mask", ["full", "causal", "window 16", "documents 20"])
def test_torch_attends_as_we_count(mask):
  pytest.importorskip("torch")
  case = Case(mask=mask, B=1, T=64, N=2, H=16)
  with contenders.Torch() as torch:
    ready = rivals.prepare_torch(["torch math", "torch cuDNN"], TOY, case, torch)
    assert ready["torch math"].error < 1e-5
    assert all(ready["torch math"].timers[kind](2) > 0 for kind in rivals.KINDS)
    assert set(ready["torch cuDNN"].refused) == set(rivals.KINDS)


def test_every_part_is_in_the_table_of_contents():
  folder = pathlib.Path(cases.__file__).parent
  contents = (folder / "__init__.py").read_text()
  for path in folder.glob("*.py"):
    assert path.name in contents or path.name == "__init__.py"
