"""The table of errors: what it counts, and that it would see a wrong implementation."""

import json
import re

import numpy as np
import pytest

from experiments import linear_errors
from experiments.flags import UserError


def test_a_table_of_few_tokens(tmp_path, capsys):
  out = tmp_path / "errors.json"
  flags = ["--cases=documents", "--implementations=chunked", "--tokens=40", f"--out={out}"]
  assert linear_errors.main(["linear_errors", *flags]) == 0
  results = json.loads(out.read_text())
  assert len(results["rows"]) == 5 * 2
  assert {row["tokens"] for row in results["rows"]} == {40}
  for row in results["rows"]:
    names = {"out", "state", "dq", "dk", "dv", "d_state"}
    names |= {"dg"} if row["decay"] != "none" else set()
    assert row["errors"].keys() == names | ({"z", "d_z"} if row["normalize"] else set())
    limit = 2e-6 if row["dtype"] == "float32" else linear_errors.ALLOWED_ELSEWHERE
    assert max(row["errors"].values()) < limit, row
    assert max(row["errors"].values()) > 0, "nothing was compared"
  assert "documents      channel" in capsys.readouterr().out


def test_what_is_wrong_is_seen():
  x = linear_errors.make("ordinary", "token", False, "float32", 30)
  expected = linear_errors.truth(x, False)
  wrong = linear_errors.by_op(x | {"g": x["g"] * 1.01}, False, "chunked")
  assert linear_errors.relative(wrong["out"], expected["out"]) > 1e-4


@pytest.mark.parametrize("name", ["z", "d_z"])
def test_a_wrong_normalizer_is_seen(name):
  x = linear_errors.make("ordinary", "none", True, "float32", 30)
  expected = linear_errors.truth(x, True)
  other = {"z": "k", "d_z": "d_z"}[name]
  wrong = linear_errors.by_op(x | {other: x[other] * 1.01}, True, "chunked")
  assert linear_errors.relative(wrong[name], expected[name]) > 1e-4


def test_relative_errors():
  truth = np.array([3.0, -4.0])
  assert linear_errors.relative(truth * 1.01, truth) == pytest.approx(0.01)
  assert linear_errors.relative(np.array([3.0, np.nan]), truth) == np.inf
  assert linear_errors.relative(np.zeros(2), np.zeros(2)) == 0


def test_a_misspelt_case_has_its_sentence():
  with pytest.raises(UserError, match="--cases.*'zero'.*did you mean 'zeros'"):
    linear_errors.main(["linear_errors", "--cases=zero"])


def test_results_that_could_not_be_written_are_refused_before_they_are_measured(monkeypatch):
  monkeypatch.setattr(linear_errors, "rows", None)
  with pytest.raises(UserError, match="--out=a.png must end in .json"):
    linear_errors.main(["linear_errors", "--out=a.png"])


def test_no_example_writes_over_the_committed_results():
  parts = re.findall(r"python -m experiments.linear_errors (.+)", linear_errors.__doc__)
  assert parts and all("--out=" in part for part in parts)
