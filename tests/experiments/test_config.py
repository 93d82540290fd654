"""Flags from dataclasses: types, presets, replay, and one sentence for every mistake."""

import dataclasses
import json
import subprocess
import sys
import typing

import jax
import numpy as np
import pytest
import runs

from experiments import config as configs
from experiments import flags, learning
from experiments.config import PRESETS, Config
from experiments.data import pipeline
from experiments.flags import UserError
from experiments.model import make_model
from experiments.tasks import make_task


def parse(*arguments: str) -> Config:
  return configs.from_argv(["train", *arguments], "doc")


def test_nothing_given_is_the_default():
  assert parse() == Config(workdir="runs/bytes")


def test_every_leaf_has_a_flag_with_its_own_type_and_a_help_text():
  for name, (value, field) in flags.leaves(Config()).items():
    assert field.metadata["help"].endswith("."), name
    if typing.get_origin(field.type) is typing.Literal:
      assert value in typing.get_args(field.type), name
    else:
      assert type(value) is field.type, name


def test_flags_reach_their_leaves():
  config = parse("--optim.lr=3e-4", "--log.tensorboard", "--nomodel.tie_embeddings", "--steps", "7")
  assert config.optim.lr == 3e-4
  assert config.log.tensorboard is True
  assert config.model.tie_embeddings is False
  assert config.steps == 7


@pytest.mark.parametrize("name", PRESETS)
def test_preset_changes_defaults_and_the_command_line_wins(name):
  config = parse("--seed=5", f"--preset={name}", "--workdir=w")
  assert config == flags.replace(
    Config(), dict(PRESETS[name]) | {"seed": 5, "preset": name, "workdir": "w"}
  )
  assert (
    parse(f"--preset={name}", "--steps=3").steps == parse("--steps=3", f"--preset={name}").steps
  )


def test_presets_name_leaves_that_exist():
  known = flags.leaves(Config())
  assert [name for preset in PRESETS.values() for name in preset if name not in known] == []


@pytest.mark.parametrize("name", ["griffin", "based", "samba"])
def test_hybrids_are_built_as_published_and_take_a_step(name):
  config = flags.replace(Config(), dict(PRESETS[name]))
  mixers = {"griffin": ["rglru", "rglru", "softmax"], "based": ["taylor", "softmax"]}
  layers = mixers.get(name, ["mamba2", "softmax"])
  small = {"task": "hmm", "seq_len": 16, "batch_size": 2, "model.width": 16, "optim.warmup": 0}
  config = flags.replace(config, {**small, "model.num_layers": len(layers), "steps": 2})
  task = make_task(config.task, seq_len=16, seed=0, data=config.data)
  model = make_model(config, task.vocab_size)
  state, step = learning.init_state(config, model), learning.make_step(config, model)
  assert [block.mixer.mechanism.name for block in model.bind(state.params).blocks] == layers
  batches = pipeline.batches(task.train, batch_size=2, seed=0)
  before = jax.tree.map(np.asarray, state.params)
  state, metrics = step(state, next(batches))
  assert np.isfinite(float(metrics.loss_sum))
  assert all(jax.tree.leaves(jax.tree.map(lambda a, b: (a != b).any(), before, state.params)))


def test_workdir_follows_task_and_attention():
  assert parse("--task=hmm").workdir == "runs/hmm"
  assert (
    parse("--attention=linear,softmax:window=8").workdir == "runs/bytes-linear-softmax-window=8"
  )


def test_flags_file_replays_a_run(tmp_path):
  config = parse(
    "--preset=smoke", "--optim.lr=0.25", f"--workdir={tmp_path}", "--data.path=a b/*.txt"
  )
  configs.save(config)
  assert parse(f"--flagfile={tmp_path}/flags.txt") == config
  changed = parse(f"--flagfile={tmp_path}/flags.txt", "--seed=9")
  assert changed == dataclasses.replace(config, seed=9)


def test_config_json_round_trips(tmp_path):
  config = parse("--preset=mqar", f"--workdir={tmp_path}", "--mesh.data=2")
  configs.save(config)
  assert configs.load(str(tmp_path)) == config
  assert json.loads((tmp_path / "config.json").read_text())["mesh"]["data"] == 2


def test_config_json_of_another_version_names_what_is_unknown(tmp_path):
  (tmp_path / "config.json").write_text('{"optim": {"learning_rate": 1}}')
  with pytest.raises(UserError, match=r"optim\.learning_rate"):
    configs.load(str(tmp_path))


def test_config_json_cut_short_is_one_sentence(tmp_path):
  (tmp_path / "config.json").write_text('{"optim": {"lr"')
  with pytest.raises(UserError, match="cannot be read"):
    configs.load(str(tmp_path))


@pytest.mark.parametrize("content", ["[]", "null", "3"])
def test_config_json_of_something_else_is_one_sentence(tmp_path, content):
  (tmp_path / "config.json").write_text(content)
  with pytest.raises(UserError, match="cannot be read: .* an object of names and values"):
    configs.load(str(tmp_path))


@pytest.mark.parametrize("kind", [ValueError, OSError, OverflowError, MemoryError])
def test_what_the_user_is_blamed_for(kind):
  with pytest.raises(UserError, match="^here: too much$"), flags.blame_user(what="here: "):
    raise kind("too much")


def test_no_run_is_one_sentence(tmp_path):
  with pytest.raises(UserError, match="holds no run"):
    configs.load(str(tmp_path / "nothing"))


MISTAKES = {
  "--optim.lrr=1": ("optim.lrr", "optim.lr"),
  "--preset=byte": ("'byte'", "bytes"),
  "--optim.lr=fast": ("optim.lr", "'fast'"),
  "--optim.lr=-1": ("optim.lr", "-1"),
  "--optim.lr=nan": ("optim.lr", "nan"),
  "--model.dtype=float8": ("model.dtype", "float8", "bfloat16"),
  "--model.dropout=1": ("model.dropout", "1.0", "[0, 1)"),
  "--batch_size=0": ("batch_size", "0"),
  "--model.num_heads=7": ("model.num_heads=7", "model.width=200"),
  "--model.num_kv_heads=3": ("3", "4"),
  "--optim.accumulate=3": ("accumulate=3", "batch_size="),
  "--mesh.data=3": ("data=3", "sequences"),
  "--mesh.sequence=3": ("3", "4"),
  "--distributed.process_id=2": ("2", "1"),
  "--distributed.processes=3": ("processes=3", "batch_size="),
  "somewhere": ("somewhere",),
  "--flagfile=/nowhere/flags.txt": ("/nowhere/flags.txt",),
}


@pytest.mark.parametrize("argument", MISTAKES)
def test_mistakes_name_the_flag_and_both_values(argument):
  with pytest.raises(UserError) as caught:
    parse("--model.width=200", "--model.num_heads=4", argument)
  text = str(caught.value)
  assert all(word in text for word in MISTAKES[argument]), text
  assert "\n" not in text


def test_bounds_are_intervals():
  check = lambda **values: flags.check_bounds(dataclasses.replace(Config().data, **values))
  check(valid_fraction=0.5)
  for edge in (0.0, 1.0, float("nan")):
    with pytest.raises(ValueError, match=r"\(0, 1\)"):
      check(valid_fraction=edge)


def test_differences_separate_what_matters():
  old = Config(workdir="a")
  new = flags.replace(old, {"workdir": "b", "steps": 9, "optim.lr": 0.5, "log.every": 2})
  harmless, harmful = configs.differences(old, new)
  assert len(harmless) == 2 and len(harmful) == 1
  assert harmful[0] == f"--optim.lr=0.5 (was {old.optim.lr})"


def test_help_is_a_page_of_our_flags():
  with pytest.raises(flags.HelpAsked) as caught:
    parse("--help")
  text = str(caught.value)
  assert all(f"--{name}=" in text for name in flags.leaves(Config()))
  assert "absl" not in text and "stderrthreshold" not in text
  assert len(text.splitlines()) < 150
  assert max(len(line) for line in text.splitlines()) <= 100


def test_program_exits_with_a_sentence_and_no_traceback():
  code = (
    "from experiments import config, flags; flags.run_main(lambda a: config.from_argv(a, '') and 3)"
  )
  run = lambda *a: subprocess.run(
    [sys.executable, "-c", code, *a], cwd=runs.ROOT, capture_output=True, text=True
  )
  bad = run("--optim.lrr=1")
  assert bad.returncode == 1 and "Traceback" not in bad.stderr
  assert len(bad.stderr.strip().splitlines()) == 1
  assert run().returncode == 3
  good = run("--help")
  assert good.returncode == 0 and "--optim.lr=" in good.stdout


def test_a_bug_keeps_its_traceback():
  code = "from experiments import flags; flags.run_main(lambda argv: 1 // 0)"
  done = subprocess.run([sys.executable, "-c", code], cwd=runs.ROOT, capture_output=True, text=True)
  assert done.returncode == 1 and "ZeroDivisionError" in done.stderr and "Traceback" in done.stderr
