"""Reports: the page says what the rows say, escaped, whatever state the run is in."""

import json
import math
import os
import pathlib
import re
import subprocess
import sys

import pytest

from experiments import report

ROOT = pathlib.Path(__file__).resolve().parents[2]
HOSTILE = "</pre><script>alert(1)</script> & 'x' \x00 \udc80"


def rows(steps=60, bits=True, **more):
  """A run that goes well: 8 bits down to 2."""
  start = {"kind": "start", "step": 0, "time": 1.79e9, "jax": "0.12.0", "python": "3.12.1"}
  yield {**start, "parameters": 1_832_448, "device": "cpu", "resumed_from": None}
  for step in range(1, steps + 1):
    value = 2 + 6 * math.exp(-step / 8)
    loss = {"loss": value * math.log(2), **({"bits": value} if bits else {})}
    base = {"step": step, "time": 1.79e9 + step, **loss}
    speed = {"tokens_per_second": 1e4 + step, "mfu": 0.25, "memory_bytes": 1.5e9}
    yield {"kind": "train", **base, **speed, "lr": 1e-3, "grad_norm": 1.0, **more}
    if step % 20 == 0:
      yield {"kind": "valid", **base, "tokens": 4096, **more}


def make(folder, rows, *, card=None, config=None, tail=""):
  folder.mkdir(exist_ok=True)
  text = "".join(json.dumps(row) + "\n" for row in rows) + tail
  (folder / "metrics.jsonl").write_text(text)
  if card is not None:
    (folder / "data_card.json").write_text(json.dumps(card))
  if config is not None:
    (folder / "config.json").write_text(json.dumps(config))
  return folder


def page(folder):
  return report.write(folder).read_text("utf-8")


def find(pattern, text):
  """What the pattern finds: its first group, or all of it."""
  found = re.search(pattern, text, re.DOTALL)
  assert found, pattern
  return found.group(found.re.groups and 1)


def words(text):
  """The page without its pictures, markup and line breaks."""
  text = re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)
  return " ".join(re.sub(r"<[^>]*>", " ", text).split())


CARD = {"name": "stdlib", "licence": "PSF-2.0", "sha256": "ab" * 32, "train_bytes": 16_483_221}
CONFIG = {"task": "bytes", "attention": "linear", "steps": 60, "optim": {"lr": 0.003}}
BASELINES = {"kind": "baselines", "unigram": 4.744, "bigram": 3.612, "gzip": 1.944}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A finished run and the words of its page."""
  sample = {"kind": "sample", "step": 60, "text": "def f(): pass", "prompt": "def "}
  folder = tmp_path_factory.mktemp("run")
  make(folder, [*rows(), BASELINES, sample], card=CARD, config=CONFIG)
  return folder, page(folder)


def test_the_page_says_what_the_run_was_and_where_it_ended(finished):
  folder, text = finished
  said = words(text)
  final = f"{2 + 6 * math.exp(-60 / 8):.3f}"
  for what in (
    "linear on bytes",
    "1.83M parameters",
    "60 steps",
    f"{final} bits per byte",
    "25.0%",
  ):
    assert what in said, what
  assert "tokens/s, median 10k" in said and "peak memory 1.5 GB" in said
  assert "wall time 1 min 00 s" in said
  assert "Unfinished" not in said


def test_ours_stands_in_order_among_the_baselines(finished):
  table = find(r'<div class="sheet compare">.*?</table>', finished[1])
  heights = [float(x) for x in re.findall(r'<td class="number">([\d.]+)</td>', table)]
  assert heights == sorted(heights, reverse=True) and len(heights) == 4
  assert {4.744, 3.612, 1.944} < set(heights)
  ours = find(r'<tr class="ours">.*?</tr>', table)
  assert "validation at step 60" in ours and f"{2 + 6 * math.exp(-60 / 8):.3f}" in ours


def test_data_configuration_and_environment_are_all_there(finished):
  said = words(finished[1])
  for what in ("PSF-2.0", "ab" * 32, "16,483,221 (16.5 MB)", "--optim.lr 0.003", "jax 0.12.0"):
    assert what in said, what
  assert "started 2026-09-21" in said and "UTC" in said


def test_the_commands_name_the_run_even_with_a_space_in_its_path(tmp_path):
  folder = make(tmp_path / "my run", rows(3), config={"steps": 50})
  text = page(folder)
  said = words(text)
  quoted = f"'{folder}'".replace("'", "&#x27;")
  for command in ("evaluate", "generate", "report"):
    assert f"python -m experiments.{command} --workdir={quoted}" in said
  # The file names the folder where the run was made, which is another once it was moved.
  assert said.count(f"flags.txt&#x27; --workdir={quoted}") == 2
  assert "--flagfile=&#x27;" in said and "--steps=100" in said
  assert "Unfinished: step 3 of 50" in said


def test_pictures_lie_beside_the_page_and_inside_it(finished):
  folder, text = finished
  for name in ("curves.png", "throughput.png"):
    assert (folder / name).read_bytes().startswith(b"\x89PNG")
  sources = re.findall(r'(?:src|srcset|href)="([^"]{0,30})', text)
  assert len(sources) >= 4
  assert all(source.startswith("data:image/png;base64,") for source in sources)
  assert all(alt for alt in re.findall(r'<img [^>]*alt="([^"]*)"', text))
  assert "unigram 4.74" in find(r'alt="([^"]*)"', text)
  assert not list(folder.glob("*.partial"))


def test_writing_twice_gives_the_same_bytes(finished):
  folder, text = finished
  before = {path.name: path.read_bytes() for path in folder.iterdir()}
  report.write(folder)
  assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_no_text_of_the_run_becomes_markup(tmp_path):
  sample = {"kind": "sample", "step": 1, "text": HOSTILE, "prompt": HOSTILE}
  event = {"kind": "event", "step": 1, "message": HOSTILE, "level": "error"}
  start = {"kind": "start", "step": 0, "time": 0.0, HOSTILE: HOSTILE}
  folder = make(
    tmp_path / "run",
    [start, *list(rows(3))[1:], {**BASELINES, HOSTILE: 3.0}, sample, event],
    card={HOSTILE: {HOSTILE: [HOSTILE]}},
    config={"attention": HOSTILE, "task": HOSTILE, HOSTILE: HOSTILE},
  )
  text = page(folder)
  assert "<script" not in text and "\x00" not in text
  assert text.count("</pre>") == 2  # the sample and the commands: none was closed early


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_run_that_has_hardly_begun(tmp_path, count):
  folder = make(tmp_path / "run", [row for row in rows() if row["kind"] == "train"][:count])
  said = words(page(folder))
  assert ("no loss yet" in said) == (count == 0)
  assert ("on the training split" in said) == (count > 0)
  assert (folder / "curves.png").exists() and (folder / "throughput.png").exists()


def test_a_run_that_went_wrong_says_so(tmp_path):
  broken = [{"kind": "train", "step": s, "time": 0.0, "loss": math.nan} for s in (61, 62)]
  stop = {"kind": "event", "step": 62, "message": "the loss is not a number", "level": "error"}
  folder = make(tmp_path / "run", [*rows(), *broken, stop], config={"steps": 100}, tail='{"kind"')
  said = words(page(folder))
  assert "Step 62: the loss is not a number" in said
  assert "Rows without a finite loss, which the curves leave out: 2" in said
  assert "torn by a crash and left out: 1" in said
  assert "Unfinished: step 62 of 100" in said


def test_a_task_with_a_known_optimum_is_told_in_nats(tmp_path):
  more = {"accuracy": 0.925}
  folder = make(
    tmp_path / "run",
    rows(bits=False, **more),
    card={"name": "recall", "optimum": 0.693},
    config={"task": "recall"},
  )
  said = words(page(folder))
  assert "validation accuracy 92.5%" in said and "nats per token" in said
  assert "optimum no model can do better 0.693" in said
  assert "bits per byte" not in said
  assert (folder / "accuracy.png").exists()


def test_samples_show_the_last_in_full_and_a_few_before(tmp_path):
  told = [{"kind": "sample", "step": s, "text": f"text {s}."} for s in range(1, 101)]
  said = words(page(make(tmp_path / "run", told)))
  assert "text 100." in said and "text 1." in said and "text 99." in said
  assert len(re.findall(r"text \d+\.", said)) == 6


@pytest.mark.parametrize(
  ("seconds", "text"),
  [(0.5, "0.5 s"), (59, "59 s"), (250, "4 min 10 s"), (3599.9, "1 h 00 min"), (7300, "2 h 01 min")],
)
def test_duration(seconds, text):
  assert report.duration(seconds) == text


@pytest.mark.parametrize(
  ("amount", "text"), [(12, "12 B"), (1500, "1.5 kB"), (1.5e6, "1.5 MB"), (2.25e9, "2.25 GB")]
)
def test_size(amount, text):
  assert report.size(amount) == text


@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    (["--workdir=nowhere"], "--workdir=nowhere holds no metrics.jsonl"),
    ([], "--workdir="),
    (["--workdri=x"], "Did you mean"),
  ],
)
def test_the_command_ends_with_one_sentence(arguments, sentence):
  command = [sys.executable, "-m", "experiments.report", *arguments]
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
  assert done.returncode == 1
  assert sentence in done.stderr and "Traceback" not in done.stderr
  assert len(done.stderr.strip().splitlines()) == 1
