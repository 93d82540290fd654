"""The benchmark at toy size from end to end; its clock, its targets and its peers one by one."""

import dataclasses
import io
import json
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from experiments import benchmark
from experiments.benchmarks import contenders, memory, resident, targets, timing, torch_worker
from experiments.benchmarks.suites import SUITES
from experiments.flags import UserError


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
  """The finished toy suite: (its process, the path of its results)."""
  out = tmp_path_factory.mktemp("benchmark") / "toy.json"
  command = [
    sys.executable,
    "-m",
    "experiments.benchmark",
    "--suite=toy",
    "--check",
    f"--out={out}",
  ]
  done = subprocess.run(command, cwd=contenders.ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  return done, out


def test_toy_suite_measures_everyone(toy):
  done, out = toy
  results = json.loads(out.read_text())
  suite = SUITES["toy"]
  rows = {targets.key(row): row for row in results["times"]}
  for name in contenders.names(suite):
    if name in results["absent"]:
      assert results["absent"][name] in done.stdout
      continue
    assert results["errors"][name] < 1e-3
    for T in contenders.lengths(suite, name):
      for kind in ("forward", "forward+backward"):
        row = rows[f"{name}/{kind}/{T}"]
        assert 0 < row["min"] <= row["median"] and len(row["seconds"]) == row["rounds"] >= 2
  assert all(f"{name}/step/{T}" in rows for name, lengths in suite.steps.items() for T in lengths)
  for row in results["memory"]:
    assert row["growth"] >= row["outputs"] > 0 and row["qkvo"] == 4 * 128 * 2 * 8 * 4


def test_toy_suite_says_where_it_ran_and_draws(toy):
  done, out = toy
  text = out.read_text()
  where = json.loads(text)["environment"]
  assert where["versions"]["jax"] and where["cores"] >= 1 and where["processor"] and where["date"]
  assert str(out.parent) not in text, "results are published: they name no folder of this machine"
  assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
  assert "met" in done.stdout and "missed" not in done.stdout


def test_wrong_answers_are_not_timed(monkeypatch):
  wrong = contenders.Contender("tiled", lambda q, k, v: v, contenders.make("tiled").truth)
  monkeypatch.setattr(contenders, "make", lambda name: wrong)
  absent = {}
  torch = contenders.Torch("no such python")
  with pytest.raises(RuntimeError, match="tiled is wrong at T=64"):
    benchmark._refuse_the_wrong(SUITES["toy"], ["tiled"], 64, torch, absent)
  assert benchmark._refuse_the_wrong(SUITES["toy"], ["jax.nn"], 64, torch, absent) == {}
  assert "jax.nn is wrong at T=64: its error is" in absent["jax.nn"]


def test_a_peer_that_fails_while_it_is_timed_costs_nobody_else_a_row(monkeypatch):
  """One whose backward pass raises, and a worker that ended: ours are timed, and they are named."""

  @jax.custom_vjp
  def half(q, k, v):
    return v

  def no(*args):
    raise TypeError("a new signature")

  half.defvjp(lambda *qkv: (half(*qkv), None), no)
  make = contenders.make
  peer = contenders.Contender("jax.nn", half, half)
  monkeypatch.setattr(contenders, "make", lambda name: peer if name == "jax.nn" else make(name))
  absent, group = {}, ["jax.nn", "torch", "tiled"]
  gone = contenders.Torch("no such python")
  rows = benchmark._time_length(SUITES["toy"], group, 64, gone, absent)
  kinds = {name: [row["kind"] for row in rows if row["contender"] == name] for name in group}
  assert kinds == {"jax.nn": ["forward"], "torch": [], "tiled": ["forward", "forward+backward"]}
  assert absent["jax.nn"] == "forward+backward at T=64: TypeError: a new signature"
  assert absent["torch"].startswith("forward at T=64: ")


def test_a_worker_answers_whatever_goes_wrong(monkeypatch, capfd):
  """A line for each request, also for what is no RuntimeError."""
  asked = [{"do": "no such method"}, {"do": "fail"}, {"do": "work"}]

  class Worker:
    def __init__(self, torch):
      self.fail, self.work = {}.popitem, lambda: {"seconds": 1}

  replies = io.StringIO()
  monkeypatch.setattr(torch_worker.os, "fdopen", lambda *args, **options: replies)
  monkeypatch.setattr(torch_worker.os, "dup", lambda fd: fd)
  monkeypatch.setattr(torch_worker.os, "dup2", lambda *fds: None)
  torch = types.SimpleNamespace(set_num_threads=lambda count: None)
  monkeypatch.setattr(torch_worker.importlib, "import_module", lambda name: torch)
  monkeypatch.setattr(torch_worker, "versions", lambda torch: {})
  monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(map(json.dumps, asked))))
  torch_worker.serve(Worker)
  _, *found = map(json.loads, replies.getvalue().splitlines())
  assert "no such method" in found[0]["refused"] and found[1]["refused"].startswith("KeyError: ")
  assert found[2] == {"seconds": 1}


def test_a_step_is_timed_after_as_many_tokens_as_its_row_says(monkeypatch):
  """However short a step is, the cache has room for those in a row, and for few."""
  seen = []

  def timer(step, state, token, room):
    seen.append((state, room))
    return lambda repeats: 1e-6 * repeats

  monkeypatch.setattr(timing, "state_timer", timer)
  suite = dataclasses.replace(SUITES["toy"], steps={"tiled": (64,)})
  (row,) = benchmark._time_steps(suite)
  ((state, room),) = seen
  assert int(state.length[0]) == 64 == row["T"]
  assert 64 + room == state.key.shape[2] <= 64 + 64


def test_a_timed_state_starts_anew_and_stays():
  calls = []

  def step(state, token):
    calls.append(int(state))
    return state + token, state

  run = timing.state_timer(step, jnp.int32(7), [jnp.int32(1)], room=3)
  run(8)
  assert calls == [7, 8, 9, 7, 8, 9, 7, 8]
  run(2)
  assert calls[8:] == [7, 8]


def test_every_target_names_a_row_that_its_suite_measures():
  for name, suite in SUITES.items():
    timed = {f"{who}/step/{T}" for who, lengths in suite.steps.items() for T in lengths}
    heavy = set()
    for kind in ("forward", "forward+backward"):
      timed |= {f"{who}/{kind}/{T}" for who, lengths in suite.lengths.items() for T in lengths}
      heavy |= {f"{who}/{kind}/{T}" for who, lengths in suite.memory.items() for T in lengths}
    for target in targets.load(name):
      assert sum(bound in target for bound in ("at_least", "at_most")) == 1
      assert set(target.get("ratio", ())) <= timed
      assert target.get("memory") in {None, *heavy}
      if "exponent" in target:
        assert sum(row.startswith(target["exponent"] + "/") for row in timed) >= 2


def row(contender, kind, T, *seconds):
  times = timing.Times(list(seconds), 1)
  return {"contender": contender, "kind": kind, "T": T} | times.row()


RESULTS = {
  "absent": {"torch": "torch is not installed"},
  "times": [
    row("a", "forward", 64, 1.0, 2.0, 9.0),
    row("b", "forward", 64, 1.0, 1.0, 1.0),
    row("a", "forward", 128, 8.0, 8.0, 8.0),
  ],
  "memory": [{"contender": "a", "kind": "forward", "T": 64, "growth": 300, "qkvo": 100}],
}


@pytest.mark.parametrize(
  ("asked", "measured", "verdict"),
  [
    ({"ratio": ["a/forward/64", "b/forward/64"], "at_least": 2.0}, 2.0, "met"),
    ({"ratio": ["a/forward/64", "b/forward/64"], "at_least": 2.1}, 2.0, "missed"),
    ({"ratio": ["b/forward/64", "a/forward/64"], "at_most": 0.4}, 0.5, "missed"),
    ({"exponent": "a/forward", "at_most": 2.1}, 2.0, "met"),
    ({"exponent": "a/forward", "at_most": 1.9}, 2.0, "missed"),
    ({"memory": "a/forward/64", "at_most": 3.0}, 3.0, "met"),
    ({"memory": "a/forward/64", "at_most": 2.9}, 3.0, "missed"),
    ({"ratio": ["a/forward/64", "torch/forward/64"], "at_most": 1.0}, None, "unmeasured"),
    ({"memory": "torch/forward/64", "at_most": 1.0}, None, "unmeasured"),
    ({"exponent": "b/forward", "at_most": 1.0}, None, "unmeasured"),
  ],
)
def test_verdicts(asked, measured, verdict):
  judged = targets.judge({"what": "it"} | asked, RESULTS)
  assert judged.verdict == verdict
  assert judged.measured == (None if measured is None else pytest.approx(measured))
  if "torch" in str(asked):
    assert judged.why == "torch is not installed"


def test_spread_is_that_of_rounds():
  ratio = {"what": "it", "ratio": ["a/forward/64", "b/forward/64"], "at_least": 1.0}
  assert targets.judge(ratio, RESULTS).rounds == (1.0, 2.0, 9.0)


def test_check_names_what_is_missed(toy, tmp_path, capsys):
  """Two changes to finished results: --check names both targets and exits 1; without it, 0."""
  results = json.loads(toy[1].read_text())
  for found in results["times"]:
    if targets.key(found) == "tiled/forward/128":
      found |= row("tiled", "forward", 128, *[1e6] * found["rounds"])
  results["memory"] = []
  out = tmp_path / "toy.json"
  out.write_text(json.dumps(results))
  again = ["benchmark", "--suite=toy", "--measure=false", f"--out={out}"]
  assert benchmark.main(again) == 0
  capsys.readouterr()
  assert benchmark.main([*again, "--check"]) == 1
  said = capsys.readouterr().err
  first, second, third = (target["what"] for target in targets.load("toy"))
  assert f"{first} (missed)" in said and f"{second} (unmeasured)" in said and third not in said
  assert [verdict["what"] for verdict in json.loads(out.read_text())["targets"]] == [
    first,
    second,
    third,
  ]


@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    (["--suite=cup"], "did you mean 'cpu'"),
    (["--suit=cpu"], "suit"),
    (["--suite=toy", "--measure=false", "--out=/nowhere/toy.json"], "/nowhere/toy.json"),
    (["--suite=toy", "--out=toy.png"], "--out=toy.png must end in .json, and ends in '.png'"),
    (["--suite=toy", "--out=/dev/null/toy.json"], "--out=/dev/null/toy.json cannot be written"),
  ],
)
def test_mistakes_get_a_sentence(arguments, sentence):
  with pytest.raises(UserError, match=sentence):
    benchmark.main(["benchmark", *arguments])


def test_results_of_another_suite_are_refused(toy):
  with pytest.raises(UserError, match="holds the suite 'toy', not 'cpu'"):
    benchmark.main(["benchmark", "--suite=cpu", "--measure=false", f"--out={toy[1]}"])


@pytest.mark.parametrize("suite", ["toy", "hull-toy", "gpu-toy"])
def test_what_is_no_result_is_refused(suite, tmp_path):
  path = tmp_path / "some.json"
  again = ["benchmark", f"--suite={suite}", "--measure=false", f"--out={path}"]
  path.write_text("[]")
  with pytest.raises(UserError, match=f"some.json holds the suite None, not '{suite}'"):
    benchmark.main(again)
  path.write_text(json.dumps({"suite": suite, "absent": {}}))
  with pytest.raises(UserError, match=f"holds a part of the suite '{suite}': it lacks environment"):
    benchmark.main(again)


def test_turns():
  """Every round times each contender once; odd rounds run backward; short runs are repeated."""
  calls = []

  def fake(name, seconds):
    def run(repeats):
      calls.append((name, repeats))
      return seconds

    return run

  timers = {"quick": fake("quick", 0.001), "slow": fake("slow", 1.0)}
  measured = timing.interleave(timers, 3, least=0.02, most_repeats=50)
  assert calls[:4] == [("quick", 1), ("quick", 1), ("slow", 1), ("slow", 1)]
  there, back = [("quick", 20), ("slow", 1)], [("slow", 1), ("quick", 20)]
  assert calls[4:] == there + back + there
  assert measured["quick"].row() == {
    "median": 0.001,
    "min": 0.001,
    "rounds": 3,
    "repeats": 20,
    "seconds": [0.001] * 3,
  }


@pytest.mark.parametrize(("power", "noise"), [(1.0, 1.0), (2.0, 1.1)])
def test_exponent(power, noise):
  lengths = [2**i for i in range(10, 17)]
  seconds = [1e-6 * T**power * (noise if i % 2 else 1.0) for i, T in enumerate(lengths)]
  assert targets.exponent(lengths, seconds) == pytest.approx(power, abs=0.05)


@pytest.mark.skipif(resident.unsupported() is not None, reason=str(resident.unsupported()))
def test_growth_sees_what_was_held_and_freed():
  code = (
    "from experiments.benchmarks import resident\n"
    "zero = resident.start(); held = bytearray(64 << 20); del held\n"
    "first = resident.growth(zero); zero = resident.start(); print(first, resident.growth(zero))"
  )
  command = [sys.executable, "-c", code]
  done = subprocess.run(command, cwd=contenders.ROOT, capture_output=True, text=True, check=True)
  held, nothing = map(int, done.stdout.split())
  assert 60 << 20 <= held < 80 << 20 and nothing < 8 << 20


@pytest.mark.skipif(resident.unsupported() is not None, reason=str(resident.unsupported()))
def test_growth_sees_memory_that_a_thread_had_before():
  """A thread frees 15 MiB and takes as much again: a new process must give them back between."""
  code = """
from concurrent.futures import ThreadPoolExecutor
from experiments.benchmarks import resident
with ThreadPoolExecutor(1) as pool:
  take = lambda size: pool.submit(lambda: len(bytearray(size << 20))).result()
  take(20), take(15)
  zero = resident.start()
  take(15)
  print(resident.growth(zero))
"""
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=contenders.ROOT,
    env=os.environ | memory.ENVIRONMENT,
    capture_output=True,
    text=True,
    check=True,
  )
  assert 14 << 20 <= int(done.stdout) < 20 << 20


def test_memory_that_cannot_be_is_measured_again_and_then_refused(monkeypatch):
  said, environments = iter([3, 9, 3, 3, 4]), []

  def run(command, env, **options):
    environments.append(env["MALLOC_MMAP_THRESHOLD_"])
    told = json.dumps({"growth": next(said), "outputs": 8})
    return subprocess.CompletedProcess(command, 0, told, "")

  monkeypatch.setattr(memory.subprocess, "run", run)
  suite = dataclasses.replace(SUITES["toy"], memory={"tiled": (128,)})
  monkeypatch.setattr(benchmark, "SUITES", {"toy": suite})
  monkeypatch.setattr(benchmark, "BOTH", "forward")
  absent = {}
  (row,) = benchmark._measure_memory("toy", absent, "")
  assert row["growth"] == 9 and environments == ["131072"] * 5
  assert "grew by 4 bytes in the last of 3 tries" in absent["memory of tiled/forward/128"]
  asked = {"what": "it", "memory": "tiled/forward/128", "at_most": 1.0}
  judged = targets.judge(asked, {"absent": absent, "times": [], "memory": []})
  assert (judged.verdict, judged.why) == ("unmeasured", absent["memory of tiled/forward/128"])


def test_memory_of_a_dense_answer_is_that_of_its_scores():
  """jax.nn at T=128 with 2 heads: its temporaries hold at least one array of [2, 128, 128]."""
  if why := resident.unsupported():
    pytest.skip(why)
  found = memory.measure("toy", "jax.nn", "forward", 128)
  assert found["temporaries"] >= 2 * 128 * 128 * 4
  assert found["outputs"] == 128 * 2 * 8 * 4


@pytest.mark.parametrize("python", ["no such python", "/bin/false"])
def test_a_python_that_does_not_start_is_absent(python):
  with contenders.Torch(python) as torch:
    assert torch.absent is not None and torch.absent.startswith("torch did not start: ")


def test_torch_gives_the_same_answer():
  pytest.importorskip("torch")
  suite = SUITES["toy"]
  with contenders.Torch() as torch:
    torch.load(suite, 128)
    for name, (backend, _) in contenders.IN_TORCH.items():
      if torch.absence(name) is None:
        assert torch.error(name, suite, 128) < 1e-5
        timed = torch.ask("time", kind="forward+backward", repeats=2, backend=backend)
        assert timed["seconds"] > 0
