"""The benchmark at toy size from end to end; its clock, its targets and its peers one by one."""

import json
import pathlib
import subprocess
import sys

import pytest

from experiments import benchmark
from experiments.benchmarks import contenders, memory, resident, targets, timing
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
  assert all(row["growth"] >= 0 and row["qkvo"] == 4 * 128 * 2 * 8 * 4 for row in results["memory"])


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
  with pytest.raises(RuntimeError, match="tiled is wrong at T=64"):
    benchmark._refuse_the_wrong(SUITES["toy"], ["tiled"], 64, contenders.Torch("no such python"))


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
  ],
)
def test_mistakes_get_a_sentence(arguments, sentence):
  with pytest.raises(UserError, match=sentence):
    benchmark.main(["benchmark", *arguments])


def test_results_of_another_suite_are_refused(toy):
  with pytest.raises(UserError, match="holds the suite 'toy', not 'cpu'"):
    benchmark.main(["benchmark", "--suite=cpu", "--measure=false", f"--out={toy[1]}"])


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


def test_command_hides_this_machine(monkeypatch):
  folder = pathlib.Path("/somewhere/else")
  monkeypatch.setattr(
    sys, "argv", ["x", "--suite=cpu", f"--torch_python={folder}/python", f"--out={folder}/a.json"]
  )
  shown = benchmark._command()
  assert shown == "python -m experiments.benchmark --suite=cpu --torch_python=PATH --out=PATH"
