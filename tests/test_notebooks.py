"""Notebooks run from top to bottom in a fresh kernel, and what they print is true."""

import os
import pathlib
import re

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def read(path):
  notebook = nbformat.read(path, as_version=4)
  assert isinstance(notebook, nbformat.NotebookNode)
  return notebook


def printed(notebook):
  """Everything that the cells wrote or evaluated to, as text."""
  parts = []
  for cell in notebook.cells:
    for output in cell.get("outputs", []):
      parts.append(output.get("text") or output.get("data", {}).get("text/plain", ""))
  return "\n".join(parts)


def outputs(notebook):
  return [output for cell in notebook.cells for output in cell.get("outputs", [])]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_kept_without_outputs(path):
  notebook = read(path)
  nbformat.validate(notebook)
  assert not outputs(notebook)
  assert all(cell.get("execution_count") is None for cell in notebook.cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_begins_with_how_to_install_and_does_nothing_where_it_is(path):
  first = next(cell for cell in read(path).cells if cell.cell_type == "code")
  assert "pip" in first.source and 'find_spec("attention") is None' in first.source
  install = "subprocess.run"
  assert install in first.source
  exec(first.source.replace(install, "undefined_on_purpose"), {})


def execute(name):
  """A lesson, executed as a reader would: its folder is where it lies. XLA compiles as it does for
  tests (`conftest.py`), or a third of the time would be its.
  """
  notebook = read(ROOT / f"notebooks/{name}.ipynb")
  path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
  environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "MPLBACKEND": ""}
  client = nbclient.NotebookClient(
    notebook, timeout=600, resources={"metadata": {"path": str(ROOT / "notebooks")}}
  )
  client.execute(env={name: value for name, value in environment.items() if value})
  wrong = [o for o in outputs(notebook) if o.output_type == "error" or o.get("name") == "stderr"]
  assert not wrong
  return notebook


def pictures(notebook):
  return [output for output in outputs(notebook) if "image/png" in output.get("data", {})]


@pytest.mark.slow
def test_quickstart():
  """It draws, what it calls equal is equal, and what it says of what runs is true."""
  notebook = execute("quickstart")
  text = printed(notebook)
  assert len(pictures(notebook)) == 4
  found = re.findall(r"(?:difference|differ by) ([\d.e+-]+)", text)
  assert len(found) == 6
  assert max(map(float, found)) < 1e-4
  assert "dot_product_attention runs 'tiled'" in text  # for a million tokens
  assert "dot_product_attention runs 'xla'" in text  # for 64
  assert "did you mean 'tiled'" in text
  assert "##......\n" in text and "....####" in text
  assert "200 steps, 204,800 bytes" in text and "class " in text  # "two hundred kilobytes"


@pytest.mark.slow
def test_masks_and_kernels():
  """Every claim of the lesson that a number could contradict."""
  notebook = execute("masks_and_kernels")
  text = printed(notebook)
  assert len(pictures(notebook)) == 3
  assert "queries 8..15: full [0], mixed [1]" in text
  assert "the rule is the mask: True" in text
  mebibytes = re.search(r"a million tokens: (\d+) MiB", text)
  assert mebibytes and int(mebibytes[1]) < 64
  for chip, name in (("NVIDIA H200", "hopper"), ("NVIDIA A100-SXM4-80GB", "cudnn"),
                     ("TPU v5 lite", "tpu"), ("here", "tiled")):  # fmt: skip
    assert f"{chip}: dot_product_attention runs {name!r}" in text
  assert "not 'cudnn': its mask would be a T x S array" in text
  differences = [float(x) for x in re.findall(r"difference ([\d.e+-]+)", text)]
  assert len(differences) == 2 and max(differences) < 1e-4
  assert "first fifty queries: 0.0 any NaN: False" in text


@pytest.mark.slow
def test_linear_attention():
  """Every claim of the lesson that a number could contradict, time apart."""
  notebook = execute("linear_attention")
  text = printed(notebook)
  assert len(pictures(notebook)) == 5
  assert float(re.search(r"largest difference ([\d.e+-]+)", text)[1]) < 1e-5
  assert float(re.search(r"running sums is off by ([\d.e+-]+)", text)[1]) > 1e-4
  assert float(re.search(r"ours is off by ([\d.e+-]+)", text)[1]) < 1e-6
  recall = dict(re.findall(r"(\w+(?:, 64)?): ([\d.]+) of 64 pairs", text))
  kinds = ("elu_plus_one", "identity", "taylor", "softmax")
  assert [float(recall[name]) for name in kinds] == sorted(float(recall[name]) for name in kinds)
  assert float(recall["taylor"]) > 2 * float(recall["identity"]) and recall["softmax"] == "1.00"
  sizes = re.findall(r"(\w+), \d+ tokens: ([\d,]+) bytes", text)
  softmax, linear = ([size for name, size in sizes if name == n] for n in ("softmax", "linear"))
  assert len(set(softmax)) == len(linear) == 3 and len(set(linear)) == 1


@pytest.mark.slow
def test_hardmax_in_log_time():
  """Every claim of the lesson that a number could contradict, time apart."""
  notebook = execute("hardmax_in_log_time")
  text = printed(notebook)
  measured = (ROOT / "experiments/results/hull.json").exists()
  assert len(pictures(notebook)) == 6 + measured
  assert float(re.search(r"hard-max differ by ([\d.e+-]+)", text)[1]) < 1e-6
  assert "before the last step is gone: True" in text
  assert int(re.search(r"of 3000 keys (\d+) are kept", text)[1]) < 100
  assert float(re.search(r"scores is lost at most ([\d.e+-]+)", text)[1]) < 1e-5
  for cache in ("hull", "dense"):
    assert re.search(rf"{cache}: \d{{4}} steps, first wrong: None", text)
  numbers = next(line for line in text.splitlines() if re.fullmatch(r"(\d+ ){23}\d+", line))
  assert sorted(map(int, numbers.split())) == [int(x) for x in numbers.split()]
  assert "as they are: 4095 reads [4095]" in text
  assert "as they are: 4100 reads [4099, 4100, 4101]" in text
  assert "minus 4096: 4100 reads [4100]" in text
  assert "further: 8191 reads [8191]" in text and "further: 8196 reads [8195, 8196, 8197]" in text
