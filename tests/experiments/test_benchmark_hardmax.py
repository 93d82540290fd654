"""The benchmark of hard-max attention on a chip, where there is none: its toy suite from end to end
with the XLA form in the place of the kernel, and that its checks would notice.
"""

import json

import hardmax_kit
import numpy as np
import pytest

from experiments import benchmark
from experiments.benchmarks import checks, hardmax_checks, hardmax_rivals, rivals, targets
from experiments.benchmarks.cases import CHIP_SUITES

SUITE, TOY = CHIP_SUITES["gpu-hardmax"], CHIP_SUITES["gpu-hardmax-toy"]


def test_the_toy_suite_measures_everyone(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  out = tmp_path / "toy.json"
  given = ["benchmark", "--suite=gpu-hardmax-toy", "--check", f"--out={out}"]
  assert benchmark.main(given) == 0
  results = json.loads(out.read_text())
  rows = {targets.key(row): row for row in results["times"]}
  for case in TOY.cases:
    for who in (TOY.ours, *TOY.contenders[case.family]):
      assert results["errors"][f"{who}/{case.name}"] < 1e-6
      for kind in rivals.KINDS:
        row = rows[f"{who}/{kind}/{case.name}"]
        pairs = case.B * case.N * case.T * (case.T + 1) / 2
        assert row["terapairs"] == pytest.approx(pairs / row["median"] / 1e12)
  assert results["unmeasured"] == results["refused"] == {}
  assert results["checks"]["verdict"] == "passed" and results["mechanism"] == "hardmax"
  assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
  assert capsys.readouterr().out.startswith("Tpairs/s")


def test_targets_name_rows_that_are_measured():
  names = {case.name: SUITE.contenders[case.family] for case in SUITE.cases}
  for target in targets.load("gpu-hardmax"):
    for row in target.get("ratio", [target.get("rate")]):
      who, kind, case = row.split("/")
      assert who in (SUITE.ours, *names[case]) and kind == "forward"


def test_tiles_are_left_out_where_they_would_take_minutes():
  tiled = {case.T for case in SUITE.cases if "tiled" in SUITE.contenders[case.family]}
  assert max(tiled) < 131072 <= max(case.T for case in SUITE.cases)
  assert {case.T for case in SUITE.cases if case.T < 131072} == tiled


def test_the_truth_is_a_scan():
  case = TOY.cases[0]
  given = hardmax_rivals.inputs(TOY, case)
  q, k, v, _ = (np.asarray(x)[1, :, 1] for x in given.arrays)
  expected = hardmax_kit.scan(q, k).average(v)[given.rows]
  np.testing.assert_allclose(given.truth[1, :, 1], expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["causal", "token by token"])
def test_one_wrong_key_is_noticed(name, monkeypatch):
  """The checks' own program, but for the last key, which ours does not see."""
  (check,) = (check for check in hardmax_checks.CHECKS if check.name == name)
  programs = hardmax_checks.compiled(check, "tiled")
  assert checks.judge(check, programs)["failed"] == []
  run, (arrays,) = programs["ours"]
  blind = arrays | {"k": arrays["k"].at[:, -1].set(0.0)}
  arrays = arrays | {"k": arrays["k"].at[:, -1].set(100.0)}
  programs = {who: (run, (arrays,)) for who, (run, _) in programs.items()}
  failed = checks.judge(check, programs | {"ours": (run, (blind,))})["failed"]
  assert any("out is off" in what for what in failed)
