"""The report of a run: one page that says what was trained, how well it did, and how to go on.

    python -m experiments.report --workdir=runs/first

reads what the run wrote (`metrics.jsonl`, `config.json`, `data_card.json`) and writes
`report.html`, a single file without scripts that opens anywhere, and the same pictures as PNG files
beside it. Equal inputs give equal bytes: the page knows no clock and no random number. A run that
was killed, resumed, or never validated has a report too.
"""

import dataclasses
import datetime
import os
import pathlib
import shlex
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import figures, files, flags, page
from experiments.figures import Series, number
from experiments.flags import knob
from experiments.history import Row, Run, finite, read, step
from experiments.page import Html, element


def write(workdir: str | os.PathLike[str]) -> pathlib.Path:
  """Writes `report.html` and the pictures into a workdir; returns the path of the page.

  Raises:
    ValueError: if the workdir holds no metrics.jsonl.
  """
  run = read(workdir)
  pictures = draw(run)
  folder = pathlib.Path(workdir)
  for name, images in pictures.items():
    files.replace(folder / f"{name}.png", images["light"])
  files.replace(folder / "report.html", render(run, pictures).encode("utf-8"))
  return folder / "report.html"


_TRACES: Mapping[str, tuple[str, str, float]] = {
  "accuracy": ("accuracy", "Accuracy on the validation split", 1.0),
  "throughput": ("tokens_per_second", "Tokens per second", 1.0),
  "gradient": ("grad_norm", "Gradient norm, before clipping", 1.0),
  "memory": ("memory_bytes", "Peak memory, MB", 1e-6),
  "schedule": ("lr", "Learning rate", 1.0),
}


def draw(run: Run) -> dict[str, dict[str, bytes]]:
  """The pictures of a run: name -> theme -> PNG. Only what the run measured is drawn."""
  pictures: dict[str, dict[str, bytes]] = {}
  for mode, theme in figures.THEMES.items():
    label = f"{run.unit.capitalize()}, lower is better"
    figure = figures.curves(
      run.series(run.train), run.series(run.valid), run.lines, label=label, theme=theme
    )
    pictures.setdefault("curves", {})[mode] = figures.png(figure)
    for name, (key, label, factor) in _TRACES.items():
      steps, values = run.series(run.valid if name == "accuracy" else run.train, key)
      if (values.size < 2 and name != "throughput") or (name == "accuracy" and run.in_bits):
        continue
      if name == "memory" and values.size and values.max() >= 1e9:
        label, factor = "Peak memory, GB", 1e-9
      speed = name == "throughput"
      trace = figures.trace(
        Series(steps, values * factor),
        label=label,
        theme=theme,
        width=6.4 if name == "accuracy" else 4.2,
        median=speed,
        from_zero=speed or name == "memory",
      )
      pictures.setdefault(name, {})[mode] = figures.png(trace)
  return pictures


def render(run: Run, pictures: Mapping[str, Mapping[str, bytes]]) -> str:
  """The page."""
  name = f"{_setting(run, 'attention') or 'attention'} on {_setting(run, 'task') or 'a task'}"
  return page.document(
    f"{name}: report of a run",
    element("header", element("h1", name), summary(run), facts(run)),
    alerts(run),
    section("Learning", learning(run, pictures), comparison(run)),
    section("A sample of what it writes", samples(run)),
    section("How it ran", running(run, pictures)),
    section("Go on from here", commands(run)),
    section("Data", page.rows(_pairs(run.card, skip=("baselines", "optimum")))),
    section("Environment", page.rows(environment(run))),
    section(
      "Configuration",
      element("details", element("summary", "Every setting"), page.rows(configuration(run))),
    ),
    element("footer", "Written by experiments.report from what the run recorded."),
  )


def section(title: str, *body: object) -> Html:
  """A titled part of the page; nothing where its body is empty."""
  content = [part for part in body if part and "<table><tbody></tbody></table>" not in str(part)]
  return element("section", element("h2", title), page.join(content)) if content else Html("")


def summary(run: Run) -> Html:
  """The run in one sentence."""
  parts: list[object] = ["A model"]
  parameters = finite(run.start, "parameters")
  if parameters is not None:
    parts = ["A model of ", element("strong", f"{number(parameters)} parameters")]
  parts += [" with ", element("strong", _setting(run, "attention") or "unnamed"), " attention"]
  parts += [" learned ", element("strong", _setting(run, "task") or "its task")]
  parts += [" for ", element("strong", f"{run.steps:,} steps")]
  if run.seconds:
    parts.append(f" in {duration(run.seconds)}")
  if run.final is None:
    parts.append("; it has measured no loss yet.")
  else:
    split, _, value = run.final
    what = f"{value:.3f} {run.unit}"
    parts += [" and ends at ", element("strong", what), f" on the {split} split."]
  return element("p", *parts, class_="lead")


def facts(run: Run) -> Html:
  """The numbers to remember."""
  entries: list[tuple[str, str]] = []
  if run.final is not None:
    entries.append((f"{run.final[0]} {run.unit}", f"{run.final[2]:.3f}"))
  accuracy = run.series(run.valid, "accuracy").values
  if accuracy.size and not run.in_bits:
    entries.append(("validation accuracy", f"{accuracy[-1]:.1%}"))
  speed = run.series(run.train, "tokens_per_second").values
  if speed.size:
    entries.append(("tokens/s, median", number(statistics.median(speed.tolist()))))
  mfu = run.series(run.train, "mfu").values
  if mfu.size:
    entries.append(("model-flops utilization", f"{statistics.median(mfu.tolist()):.1%}"))
  memory = run.series(run.train, "memory_bytes").values
  if memory.size:
    entries.append(("peak memory", size(float(memory.max()))))
  if run.seconds:
    entries.append(("wall time", duration(run.seconds)))
  cells = [
    element("div", element("dt", name), element("dd", value), class_=None if i else "first")
    for i, (name, value) in enumerate(entries)
  ]
  return element("dl", *cells, class_="facts") if cells else Html("")


def alerts(run: Run) -> Html:
  """What a reader must know before believing the curves."""
  notes: list[object] = []
  planned = finite(run.config, "steps")
  if planned is not None and run.steps < planned:
    notes.append(
      f"Unfinished: step {run.steps:,} of {int(planned):,}. Resume it by the command below."
    )
  lost = sum(run.quality(row) != run.quality(row) for row in (*run.train, *run.valid))
  if lost:
    notes.append(f"Rows without a finite loss, which the curves leave out: {lost}.")
  if run.unreadable:
    notes.append(f"Lines of metrics.jsonl torn by a crash and left out: {run.unreadable}.")
  for row in run.events:
    text = row.get("message") or row.get("event") or row.get("text") or row.get("name")
    if text and (row.get("level") in ("error", "warning") or row.get("stopped")):
      notes.append(f"Step {step(row):,}: {text}")
  return page.join(element("p", note, class_="alert") for note in notes)


def learning(run: Run, pictures: Mapping[str, Mapping[str, bytes]]) -> Html:
  """The curves, with the words that a picture cannot say."""
  names = ", ".join(f"{line.name} {line.value:.2f}" for line in run.lines)
  final = run.final
  alt = f"Loss in {run.unit} against the step"
  alt += f", ending at {final[2]:.2f} ({final[0]})" if final else ", nothing measured yet"
  alt += f"; lines: {names}" if names else ""
  caption = "Bold: validation. Light: training, every logged step and its running mean."
  if run.baselines:
    caption += " Dashed: simpler models on the same validation split."
  if not run.valid:
    caption = "Training: every logged step and its running mean. Nothing was validated yet."
  body = [page.picture(pictures["curves"], alt=alt, caption=caption, width=1280, height=780)]
  if "accuracy" in pictures:
    alt = "Accuracy on the validation split against the step"
    body.append(page.picture(pictures["accuracy"], alt=alt, width=1280, height=460))
  return page.join(body)


def comparison(run: Run) -> Html:
  """Ours beside the baselines, worst first, with bars."""
  if run.final is None or not run.lines:
    return Html("")
  split, at, value = run.final
  ours = f"this run, {split} at step {at:,}"
  entries = sorted([(line.value, line.name) for line in run.lines] + [(value, ours)], reverse=True)
  widest = max(max(entry[0] for entry in entries), 1e-9)
  lines = []
  for height, name in entries:
    bar = element("div", class_="bar", style=f"width:{100 * max(height, 0) / widest:.1f}%")
    about = element("small", _ABOUT[name].format(noun=run.noun)) if name in _ABOUT else ""
    cells = (
      element("th", name, about, scope="row"),
      element("td", f"{height:.3f}", class_="number"),
      element("td", bar, class_="room"),
    )
    lines.append(element("tr", *cells, class_="ours" if name == ours else None))
  head = element(
    "tr", element("th", "Model"), element("th", run.unit, class_="number"), element("th", "")
  )
  table = element("table", element("thead", head), element("tbody", *lines))
  return element("div", table, class_="sheet compare")


_ABOUT: Mapping[str, str] = {
  "chance": "all answers alike",
  "unigram": "each {noun} by its frequency",
  "bigram": "each {noun} given the one before",
  "gzip": "the held-out text, compressed",
  "optimum": "no model can do better",
}


def samples(run: Run) -> Html:
  """The last sample in full, and a few earlier ones to see it learn."""
  told = [row for row in run.samples if isinstance(row.get("text"), str)]
  if not told:
    return Html("")
  earlier = told[:-1]
  if len(earlier) > 5:
    earlier = [earlier[round(i * (len(earlier) - 1) / 4)] for i in range(5)]
  parts: list[object] = [_sample(told[-1])]
  if earlier:
    shown = [_sample(row) for row in earlier]
    parts.append(element("details", element("summary", "Earlier in the run"), page.join(shown)))
  return page.join(parts)


def _sample(row: Row) -> Html:
  text, prompt = str(row["text"]).lstrip("\n"), str(row.get("prompt") or "").lstrip("\n")
  content: tuple[object, ...] = (text,)
  if prompt and text.startswith(prompt):
    content = (element("span", prompt, class_="prompt"), text.removeprefix(prompt))
  return page.join([element("h3", f"step {step(row):,}"), element("pre", *content)])


def running(run: Run, pictures: Mapping[str, Mapping[str, bytes]]) -> Html:
  """Speed, memory, gradient norm and learning rate against the step."""
  shown = []
  for name in ("throughput", "gradient", "memory", "schedule"):
    if name in pictures and run.series(run.train, _TRACES[name][0]).steps.size:
      alt = f"{_TRACES[name][1]} against the step"
      shown.append(page.picture(pictures[name], alt=alt, width=840, height=460))
  return element("div", *shown, class_="pair") if shown else Html("")


def commands(run: Run) -> Html:
  """The exact commands that resume, lengthen, evaluate and sample this run."""
  folder = shlex.quote(run.workdir)
  flagfile = f"--flagfile={shlex.quote(os.path.join(run.workdir, 'flags.txt'))}"
  flagfile += f" --workdir={folder}"  # the file names the folder where the run was made
  planned = int(finite(run.config, "steps") or run.steps)
  prompt = " --prompt='def '" if run.noun == "byte" else ""
  lines = (
    ("resume where it stopped; a finished run is left as it is", f"train {flagfile}"),
    ("train twice as long", f"train {flagfile} --steps={2 * planned}"),
    ("evaluate the last checkpoint", f"evaluate --workdir={folder}"),
    ("write with it", f"generate --workdir={folder}{prompt}"),
    ("draw this page again", f"report --workdir={folder}"),
  )
  texts = [
    element(
      "span", element("span", f"# {what}", class_="remark"), f"\npython -m experiments.{line}"
    )
    for what, line in lines
  ]
  return element("pre", Html("\n\n".join(texts)), class_="commands")


def environment(run: Run) -> list[tuple[str, object]]:
  """Where and with what the run was made: all that its last start recorded."""
  skip = ("kind", "step", "time", "baselines", "bits", "optimum", "config")
  pairs = [(name.removeprefix("versions, "), value) for name, value in _pairs(run.start, skip)]
  time = finite(run.start, "time")
  if time is not None:
    moment = datetime.datetime.fromtimestamp(time, datetime.UTC)
    pairs.append(("started", f"{moment:%Y-%m-%d %H:%M} UTC"))
  if len(run.starts) > 1:
    pairs.append(("starts", f"{len(run.starts)} (resumed {len(run.starts) - 1} times)"))
  return pairs


def configuration(run: Run) -> list[tuple[str, object]]:
  """Every setting, by the name of its flag."""
  return [(element("code", f"--{name}"), value) for name, value in _flat(run.config)]


def _pairs(values: Mapping[str, Any], skip: Sequence[str] = ()) -> list[tuple[str, object]]:
  kept = {name: value for name, value in values.items() if name not in skip and value is not None}
  return [(name.replace("_", " ").replace(".", ", "), value) for name, value in _flat(kept)]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, object]]:
  """Leaves of a nested object as (dotted name, text); long lists are cut."""
  leaves: list[tuple[str, object]] = []
  for name, value in values.items():
    if isinstance(value, dict):
      leaves += _flat(value, f"{prefix}{name}.")
    else:
      leaves.append((f"{prefix}{name}", _text(name, value)))
  return leaves


def _text(name: str, value: object) -> str:
  if isinstance(value, list):
    shown = ", ".join(_text("", item) for item in value[:12])
    return f"{shown}, and {len(value) - 12} more" if len(value) > 12 else shown
  if isinstance(value, bool) or value is None:
    return {True: "yes", False: "no", None: "none"}[value]
  if isinstance(value, int) and abs(value) >= 10_000:
    return f"{value:,} ({size(value)})" if name.endswith("bytes") else f"{value:,}"
  if isinstance(value, float):
    return number(value, 4) if abs(value) >= 1e6 else f"{value:.6g}"
  return str(value) if value != "" else "(empty)"


def _setting(run: Run, name: str) -> str:
  value = run.config.get(name) or run.start.get(name)
  return str(value) if value else ""


def duration(seconds: float) -> str:
  """Seconds for people: 250 is `4 min 10 s`."""
  if seconds < 60:
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def size(amount: float) -> str:
  """Bytes for people, in powers of 1000: 1500000 is `1.5 MB`."""
  for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
    if amount >= factor:
      return f"{amount / factor:.3g} {unit}"
  return f"{amount:.0f} B"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReportConfig:
  """Which run to report on."""

  workdir: str = knob("", "Folder of the run to report on.")


def main(argv: Sequence[str]) -> None:
  """Reads --workdir, writes the report and prints where it is."""
  config = flags.parse(argv, ReportConfig(), doc=__doc__ or "")
  if not config.workdir:
    raise flags.UserError("say which run to report on: --workdir=runs/bytes")
  with flags.blame_user():
    print(write(config.workdir))


if __name__ == "__main__":
  flags.run_main(main)
