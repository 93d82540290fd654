"""Where results come from."""

import os
import re
import sys
import types

import jax
import pytest

from experiments import (
  benchmark,
  compile_check,
  files,
  hardened,
  hull_machine,
  linear_errors,
  mqar,
  provenance,
)
from experiments.flags import UserError


def test_versions_and_a_commit():
  found = provenance.environment(("jax", "no-such-package"))
  assert found["versions"]["jax"] == jax.__version__
  assert found["versions"]["no-such-package"] is None
  assert found["date"].endswith("+00:00")
  assert found["commit"] is None or re.fullmatch(r"[0-9a-f]{12,}\+?", found["commit"])


def test_the_machine_and_the_command(monkeypatch):
  argv = ["a/mqar.py", "--seeds=2"]
  monkeypatch.setattr(sys, "argv", argv)
  spec = types.SimpleNamespace(name="experiments.mqar")
  monkeypatch.setitem(sys.modules, "__main__", types.SimpleNamespace(__spec__=spec))
  found = provenance.environment(())
  assert found["command"] == "python -m experiments.mqar --seeds=2"
  assert found["processor"] and found["cores"] == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
  ("arguments", "shown"),
  [
    (["--suite=cpu", "--torch_python=/else/python", "--out=/else/a.json"], "--suite=cpu "
      "--torch_python=PATH --out=PATH"),
    (["--out", "/else/a.json", "--check"], "--out PATH --check"),
    (["--cases=repeated keys"], "'--cases=repeated keys'"),
    (["--out=a.json"], "--out=a.json"),
  ],
)  # fmt: skip
def test_a_command_hides_this_machine(arguments, shown, monkeypatch):
  spec = types.SimpleNamespace(name="experiments.benchmark")
  monkeypatch.setitem(sys.modules, "__main__", types.SimpleNamespace(__spec__=spec))
  assert provenance.command(arguments) == f"python -m experiments.benchmark {shown}"


def test_results_get_a_folder_before_they_are_measured(tmp_path):
  provenance.prepare(tmp_path / "new" / "folder" / "a.json")
  assert os.listdir(tmp_path / "new" / "folder") == []


@pytest.mark.parametrize(
  ("out", "sentence"),
  [
    ("a.png", "must end in .json, and ends in '.png'"),
    ("a", "must end in .json, and ends in ''"),
    ("folder.json", "is a folder"),
    ("file/a.json", "cannot be written: .*file"),
  ],
)
def test_results_that_could_not_be_written_are_refused(out, sentence, tmp_path):
  (tmp_path / "folder.json").mkdir()
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match=f"--out={tmp_path / out} {sentence}"):
    provenance.prepare(tmp_path / out)


@pytest.mark.parametrize(
  "program", [benchmark, compile_check, hardened, hull_machine, linear_errors, mqar]
)
def test_every_program_asks_where_before_it_measures(program, tmp_path, monkeypatch):
  monkeypatch.setattr(files, "write_results", lambda *_: pytest.fail("it measured"))
  with pytest.raises(UserError, match="must end in .json, and ends in '.txt'"):
    program.main([program.__name__, f"--out={tmp_path / 'a.txt'}"])
  assert not list(tmp_path.iterdir())


def test_no_git_no_commit(monkeypatch):
  monkeypatch.setattr(provenance.shutil, "which", lambda name: None)
  assert provenance.commit() is None


@pytest.mark.parametrize("packages", [(), ("numpy",)])
def test_python_is_always_told(packages):
  assert set(provenance.environment(packages)["versions"]) == {"python", *packages}
