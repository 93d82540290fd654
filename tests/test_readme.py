"""README.md: its examples run, its tables are in step, and what it names exists."""

import importlib
import importlib.util
import json
import pathlib
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import variants
from experiments import config, flags, readme
from experiments.flags import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAM = re.compile(r"python -m (experiments\.\w+)(.*?)(?:`|$)", re.MULTILINE)


def test_the_examples_run_and_say_the_truth(capsys):
  blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
  assert len(blocks) >= 3
  names: dict = {}
  expected = []
  for block in blocks:
    exec(compile(block, "README.md", "exec"), names)
    expected.append(names["out"])
  q, k, v = names["q"], names["k"], names["v"]
  document = np.arange(1000) // 300
  distance = np.arange(1000)[:, None] - np.arange(1000)[None]
  mask = (distance >= 0) & (distance <= 128) & (document[:, None] == document[None])
  peer = jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(mask)[None, None])
  np.testing.assert_allclose(expected[1], peer, atol=1e-5)
  printed = capsys.readouterr().out
  assert "##......" in printed and "runs 'tiled'" in printed
  chosen = names["logits"][:, -1:].argmax(-1).astype(jnp.int32)
  parallel = names["model"](jnp.concatenate([names["tokens"], chosen], 1))[:, -1]
  np.testing.assert_allclose(names["next_logits"], parallel, atol=1e-4)


def test_dot_product_attention_is_a_drop_in_as_the_page_says():
  q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 100, 2, 16))
  ours = importlib.import_module("attention").dot_product_attention(q, k, v, is_causal=True)
  np.testing.assert_allclose(ours, jax.nn.dot_product_attention(q, k, v, is_causal=True), atol=1e-5)


def test_the_page_is_in_step_with_variants_and_results():
  assert readme.rewrite(TEXT) == TEXT, "run: python -m experiments.readme"
  for row in variants.table():
    assert f"| `{row.name}` |" in TEXT


@pytest.mark.parametrize("target", re.findall(r"\]\((?!https?:)([^)#]+)", TEXT))
def test_links_lead_somewhere(target):
  assert (ROOT / target).exists()


@pytest.mark.parametrize(
  "target", sorted(set(re.findall(r"(?:^ {4}|`)make ([a-z-]+)", TEXT, re.M)))
)
def test_make_targets_exist(target):
  makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
  assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("command", sorted({m.group(1) for m in PROGRAM.finditer(TEXT)}))
def test_programs_exist(command):
  assert importlib.util.find_spec(command) is not None


@pytest.mark.parametrize(
  "arguments",
  [m.group(2) for m in PROGRAM.finditer(TEXT) if m.group(1) == "experiments.train"]
  + ["--data.path='*.txt'", "--mesh.data=4 --mesh.tensor=2"],
)
def test_training_flags_exist(arguments):
  read = config.from_argv(["train", *shlex.split(arguments, comments=True)], "")
  assert variants.parse(read.attention)
  if arguments.startswith("--"):
    assert f"`{arguments}`" in TEXT


@pytest.mark.parametrize("spec", re.findall(r"--attention=([\w:=,]+)", TEXT))
def test_attention_specs_parse(spec):
  assert variants.parse(spec)


# The program that writes the page.


def results(**more):
  time = {"contender": "tiled", "kind": "forward", "T": 4096, "median": 0.1234, "seconds": []}
  growth = {"contender": "tiled", "kind": "forward+backward", "T": 16384, "growth": 3.2e7}
  target = {"what": "a | b", "bound": "at most 1", "measured": 2.0, "verdict": "missed"}
  lost = {**target, "measured": None, "verdict": "unmeasured"}
  return {
    "environment": {
      "date": "2026-11-22T00:00:00",
      "commit": "abc",
      "command": "python -m experiments.benchmark",
      "cores": 2,
      "processor": "P",
      "versions": {"jax": "0.12.0"},
    },
    "shape": {"B": 1, "N": 8, "H": 64},
    "absent": {"torch": "it is not installed"},
    "times": [time, {**time, "kind": "step"}, {**time, "contender": "far", "T": 7}],
    "memory": [{**growth, "qkvo": 1}],
    "targets": [target, lost],
  } | more


@pytest.fixture
def root(tmp_path):
  folder = tmp_path / "experiments/results"
  folder.mkdir(parents=True)
  (folder / "cpu.json").write_text(json.dumps(results()))
  return tmp_path


def test_numbers_come_from_the_results_alone(root):
  text = readme.measured(root)
  assert "| tiled | 123 ms |  |  |  | 32 MB |" in text
  assert "| far |" not in text  # nothing of it is in a column
  assert "| a \\| b | at most 1 | 2 | missed |" in text
  assert "| at most 1 | not measured | unmeasured |" in text
  assert "torch was absent: it is not installed." in text
  assert "commit abc" in text and "2026-11-22" in text
  assert "cpu.png" in readme.picture(root)


def test_without_results_there_is_no_number_and_no_picture(tmp_path):
  assert not re.search(r"\d", readme.measured(tmp_path).replace("--suite=cpu", ""))
  assert readme.picture(tmp_path) == "" and readme.curve(tmp_path) == ""
  assert readme.recall(tmp_path) == ""


def chip_results():
  """Two cases of a chip, of which one was measured, by two contenders."""
  case = {"mask": "causal", "B": 1, "T": 16384, "N": 16, "H": 128, "case": "causal H=128 T=16384"}
  wide = {**case, "mask": "window 512", "case": "window 512 H=128 T=16384"}
  ours = {**case, "contender": "hopper", "kind": "forward", "tflops": 612.3}
  return {
    "environment": {
      "date": "2026-12-01T00:00:00",
      "commit": "abc",
      "command": "python -m experiments.benchmark --suite=gpu",
      "device": "NVIDIA H200",
      "versions": {"jax": "0.11.2"},
    },
    "dtype": "bfloat16",
    "checks": {"verdict": "failed", "rows": [{}, {}]},
    "absent": {"tokamax": "it is not installed"},
    "cases": [case, wide],
    "times": [ours, {**ours, "kind": "backward", "tflops": 498.7}, {**ours, "contender": "cuDNN"}],
    "unmeasured": {wide["case"]: "the time was up"},
    "targets": [{"what": "650", "bound": "at least 650", "measured": 612.3, "verdict": "missed"}],
  }


def test_numbers_of_a_chip(tmp_path):
  assert readme.chips(tmp_path) == readme.PENDING
  folder = tmp_path / "experiments/results"
  folder.mkdir(parents=True)
  (folder / "h200_softmax.json").write_text(json.dumps(chip_results()))
  text = readme.chips(tmp_path)
  assert "| T=16384 | hopper | cuDNN |" in text
  assert "| causal, H=128 | 612 / 499 | 612 / - |" in text and "| window" not in text
  assert "checks failed (2 run)" in text and "commit abc" in text and "NVIDIA H200" in text
  assert "| 650 | at least 650 | 612 | missed |" in text
  assert "tokamax was absent: it is not installed." in text
  assert "1 of 2 cases were not measured." in text and "h200_softmax.png" not in text
  (folder / "h200_softmax.png").write_bytes(b"")
  assert "h200_softmax.png" in readme.chips(tmp_path)


@pytest.mark.parametrize("what", ["linear", "hardmax"])
def test_other_numbers_of_a_chip(what, tmp_path):
  """In milliseconds, every shape in its line."""
  folder = tmp_path / "experiments/results"
  folder.mkdir(parents=True)
  case = {"case": "token B=1 T=8192 N=96 H=128", "T": 8192}
  ours = {**case, "contender": "hopper", "kind": "forward", "median": 0.000234}
  found = chip_results() | {"cases": [case], "times": [ours], "unmeasured": {}}
  (folder / f"h200_{what}.json").write_text(json.dumps(found))
  text = readme.chips(tmp_path)
  assert "| token B=1 T=8192 N=96 H=128 | 0.234 / - |" in text and "TFLOP/s" not in text


@pytest.mark.parametrize(
  ("argument", "error"), [("--help", flags.HelpAsked), ("--hepl", UserError), ("x", UserError)]
)
def test_what_is_no_command_writes_nothing(argument, error, tmp_path, monkeypatch):
  page = tmp_path / "README.md"
  page.write_text(TEXT.replace("| `softmax` |", "| old |"))
  monkeypatch.setattr(readme, "README", page)
  with pytest.raises(error):
    readme.main(["readme", argument])
  assert "| old |" in page.read_text()
  readme.main(["readme"])
  assert "| old |" not in page.read_text()


def test_rewriting_changes_only_the_blocks_and_only_once(root):
  page = "a\n" + "".join(
    f"<!-- begin {n} -->\nold\n<!-- end {n} -->\nkept\n" for n in readme.BLOCKS
  )
  once = readme.rewrite(page, root)
  assert once.count("kept") == len(readme.BLOCKS) and "old" not in once
  assert readme.rewrite(once, root) == once


@pytest.mark.parametrize("name", list(readme.BLOCKS))
def test_a_lost_marker_is_named(name, root):
  for marker in (f"<!-- begin {name} -->", f"<!-- end {name} -->"):
    for broken in (TEXT.replace(marker, ""), TEXT + marker):
      with pytest.raises(ValueError, match=name):
        readme.rewrite(broken, root)


@pytest.mark.parametrize(
  ("seconds", "text"),
  [(0.733, "733 ms"), (2.169, "2170 ms"), (0.00123, "1.23 ms"), (1e-5, "0.01 ms")],
)
def test_milliseconds(seconds, text):
  assert readme.milliseconds(seconds) == text
