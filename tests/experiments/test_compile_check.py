"""The table of what compilers say: its plan, its counts, its rules, and real rows where it can."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kit
from experiments import compile_check
from experiments.benchmarks import checks, hardmax_checks, linear_checks
from experiments.benchmarks.cases import LinearCase
from experiments.compiling import estimates, linear, rules, shapes, worker
from experiments.compiling.programs import PROGRAMS
from experiments.compiling.shapes import BACKWARD, FORWARD, SHAPES, STEP, Shape
from experiments.flags import UserError
from pallas_kernels import aot

FLOAT32 = "linear-hopper-float32"
SMALL = Shape(what="a test's", T=96, N=4, K=2, H=8, h=16)
SMALLS = {
  "causal": SMALL,
  "window": dataclasses.replace(SMALL, window=20),
  "documents": dataclasses.replace(SMALL, documents=3),
  "both": dataclasses.replace(SMALL, documents=2, window=33),
}


@pytest.mark.parametrize("name", SMALLS)
def test_pairs_and_visits_against_the_mask_itself(name):
  shape = SMALLS[name]
  dense = np.asarray(shapes.mask(shape).as_array(shape.T, shape.T))[0, 0]
  assert shapes.pairs(shape) == dense.sum()
  for block_q, block_k in ((16, 32), (32, 8), (40, 56)):
    some, every = shapes.visits(shape, block_q, block_k)
    for i, j in np.ndindex(some.shape):
      block = dense[i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]
      assert (some[i, j], every[i, j]) == (block.any(), block.all()), (i, j)


def test_trips_of_a_causal_square():
  """4 x 4 blocks: 4 on the diagonal are mixed, 6 below it are full, 6 above it are not visited."""
  shape = dataclasses.replace(SMALL, T=64)
  assert shapes.trips(shape, 16, 16)[:4] == (4 * 6, 4 * 4, 4 * 4, 4 * 16)
  assert shapes.trips(shape, 16, 16, all_steps=False).steps == 4 * 10
  assert shapes.trips(shape, 16, 32).rows == 4 * 4
  assert shapes.trips(shape, 16, 32, by_key=True).rows == 4 * 2


def test_flops_of_both_passes():
  """Two products forward (q k, p v), five backward (q k, do v, and three gradients)."""
  pairs = 96 * 97 // 2
  assert shapes.flops(SMALL, FORWARD) == 2 * 4 * pairs * (8 + 16)
  assert shapes.flops(SMALL, BACKWARD) == 2 * 4 * pairs * (8 + 16 + 8 + 8 + 16)


@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    (["--chips=h20"], "--chips 'h20' is unknown; did you mean 'h200'"),
    (["--shapes=7b_4k,7b_33k"], "--shapes '7b_33k' is unknown; did you mean '7b_32k'"),
    (["--kernels=flush"], "did you mean 'flash'"),
    (["--passes=sideways"], "'sideways' is unknown"),
    (["--chips=,"], "--chips names nothing"),
    (["--kernels=jax-mgpu", "--chips=v5e"], "has nothing for --chips=v5e"),
    (["--jobs=-1"], r"--jobs=-1 is outside \[0, 1024\]"),
    (["--chip=v5e"], "chip"),
    (["--compile=false", "--out=/nowhere/x.json"], "/nowhere/x.json"),
  ],
)
def test_mistakes_get_a_sentence(arguments, sentence, monkeypatch):
  monkeypatch.setattr(aot, "missing", lambda chip: None)
  with pytest.raises(UserError, match=sentence):
    compile_check.main(["compile_check", *arguments])


def test_a_machine_without_compilers_is_told_what_to_install(monkeypatch):
  monkeypatch.setattr(aot, "missing", lambda chip: "libtpu is not installed (pip install it)")
  with pytest.raises(UserError, match=r"v5e: libtpu is not installed \(pip install it\)"):
    compile_check.main(["compile_check", "--chips=v5e"])


@pytest.mark.parametrize(
  ("text", "names"),
  [
    (
      "ours",
      {f"{name}-{chip}" for name in ("ours", "linear", "hardmax") for chip in ("hopper", "tpu")}
      | {FLOAT32},
    ),
    ("linear", {"linear-hopper", FLOAT32, "linear-tpu", "linear-xla"}),
    ("jax-flash,ours-tpu", {"jax-flash", "ours-tpu"}),
    ("flash", {name for name in PROGRAMS if not name.startswith(("linear", "hardmax"))}),
    ("all", set(PROGRAMS)),
  ],
)
def test_programs_by_name_mechanism_or_owner(text, names):
  assert set(compile_check.programs(text)) == names


def test_plan_names_every_setting_once(monkeypatch):
  monkeypatch.setattr(aot, "missing", lambda chip: "no ptxas" if chip.platform == "cuda" else None)
  options = compile_check.Options(chips="h200,v6e", shapes="7b_4k", kernels="flash")
  asked = compile_check.plan(options)
  assert asked.absent["h200"] == "no ptxas"
  assert {job.chip for job in asked.jobs} == {"v6e"} and len(set(asked.jobs)) == len(asked.jobs)
  flash = {name for name, p in PROGRAMS.items() if p.mechanism == "flash"}
  wanted = {n for n in flash if PROGRAMS[n].platform == "tpu" and not PROGRAMS[n].absent}
  assert {job.program for job in asked.jobs} == wanted
  splash = [job for job in asked.jobs if job.program == "jax-splash" and job.kind == FORWARD]
  assert [job.setting for job in splash] == list(
    range(len(PROGRAMS["jax-splash"].settings[FORWARD]))
  )


def test_every_program_of_a_mechanism_has_one_of_ours_to_be_compared_with():
  for program in PROGRAMS.values():
    kin = [
      p
      for p in PROGRAMS.values()
      if (p.mechanism, p.platform) == (program.mechanism, program.platform)
    ]
    assert any(p.ours for p in kin)
    kinds = {
      "flash": {FORWARD, BACKWARD},
      "linear": {FORWARD, BACKWARD, STEP},
      "hardmax": {FORWARD},
    }
    assert set(program.settings) == kinds[program.mechanism] and all(program.settings.values())


def test_programs_meet_the_shapes_of_their_mechanism(monkeypatch):
  monkeypatch.setattr(aot, "missing", lambda chip: None)
  asked = compile_check.plan(compile_check.Options(kernels="ours"))
  for job in asked.jobs:
    assert PROGRAMS[job.program].mechanism == SHAPES[job.shape].mechanism
  linear_jobs = [job for job in asked.jobs if PROGRAMS[job.program].mechanism == "linear"]
  many = sum(shape.mechanism == "linear" for shape in SHAPES.values())
  every_shape = [job for job in linear_jobs if job.program != FLOAT32]
  assert len(every_shape) == len(aot.CHIPS) * many * len((FORWARD, BACKWARD, STEP))
  assert {job.kind for job in asked.jobs if job not in linear_jobs} == {FORWARD, BACKWARD}


def test_rows_of_several_runs_stand_in_one_order():
  """What is compiled anew replaces what was kept, and the order does not tell who came first."""
  old, new = GOOD_TPU | {"seconds": 1.0}, GOOD_TPU | {"seconds": 2.0}
  assert compile_check.merged([old, GOOD_HOPPER], [new]) == [GOOD_HOPPER, new]
  assert compile_check.merged([PEER], [GOOD_HOPPER, new]) == [GOOD_HOPPER, new, PEER]


# Linear attention.


SMALL_LINEAR = LinearCase(B=2, T=300, N=16, H=128, decay="token")


@pytest.mark.parametrize(("decay", "width"), [("token", 1), ("channel", 128)])
def test_bytes_that_must_move(decay, width):
  """Forward q, k, v, out; backward those and the gradients of q, k, v and of the decays."""
  shape, tokens = dataclasses.replace(SMALL_LINEAR, decay=decay), 2 * 300 * 16
  assert shape.moved(FORWARD) == tokens * (4 * 128 * 2 + 4 * width)
  assert shape.moved(BACKWARD) == tokens * (7 * 128 * 2 + 2 * 4 * width)
  state = 2 * 128 * 128 * 4
  assert shape.moved(STEP) == 2 * 16 * (state + 4 * 128 * 2 + 4 * width)
  v5e = aot.CHIPS["v5e"]
  assert shapes.least(shape, FORWARD, v5e) == shape.moved(FORWARD) / v5e.bandwidth


def test_the_floor_is_that_of_the_notes():
  """0.168 ms forward at the registry's first shape on an H200."""
  shape = SHAPES["1x8k_96x128_token"]
  assert shapes.least(shape, FORWARD, aot.CHIPS["h200"]) == pytest.approx(0.168e-3, rel=0.01)


def test_steps_of_our_linear_kernels():
  """Three chunks of 128 of 300 tokens, sixteen heads at once forward and eight backward."""
  (forward,) = linear.build("tpu", SMALL_LINEAR, FORWARD, {}).work
  assert forward.trips == (2 * 3, 0, 2, 2 * 3, True)
  states, gradients = linear.build("tpu", SMALL_LINEAR, BACKWARD, {}).work
  assert states.trips == gradients.trips == (2 * 2 * 3, 0, 2 * 2, 2 * 2 * 3, True)
  (step,) = linear.build("tpu", SMALL_LINEAR, STEP, {}).work
  assert step.trips == (4, 0, 4, 4, False)


def test_long_sequences_are_counted_whole_and_compiled_short():
  shape = dataclasses.replace(SMALL_LINEAR, T=16384)
  built = linear.build("tpu", shape, FORWARD, {})
  assert built.arguments[0].shape[1] == linear.TOKENS and built.work[0].trips.steps == 2 * 128
  for name in ("hopper", "chunked"):
    assert linear.build(name, shape, FORWARD, {}).arguments[0].shape[1] == 16384


LOOP = """HloModule m
%fused.1 (p: f32[8]) -> f32[8] {
  ROOT %add = f32[8] add(%p, %p)
}

%body.2 (t: (s32[])) -> (s32[]) {
  %fusion.1 = f32[8] fusion(%p), calls=%fused.1, backend_config={"estimated_cycles":"30"}
  %copy.1 = f32[8] copy(%p), backend_config={"estimated_cycles":"4"}
}

%condition.3 (t: (s32[])) -> pred[] {
  %constant.7 = s32[]{:T(128)} constant(100)
  ROOT %lt = pred[] compare(%i, %constant.7), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %fusion.9 = f32[8] fusion(%a), calls=%fused.1, backend_config={"estimated_cycles":"500"}
  %while.1 = (s32[]) while(%tuple), condition=%condition.3, body=%body.2, metadata={}
}
"""


def test_what_xla_estimates_is_added_up_turn_by_turn():
  assert estimates.cycles(LOOP) == 500 + 100 * (30 + 4)
  assert estimates.cycles(LOOP.replace("constant(100)", "parameter(1)")) is None


def test_float32_has_heads_that_it_takes(monkeypatch):
  monkeypatch.setattr(aot, "missing", lambda chip: None)
  asked = compile_check.plan(compile_check.Options(kernels=FLOAT32)).jobs
  assert {SHAPES[job.shape].H for job in asked} == {128}


def test_a_token_needs_no_matrix_instruction():
  idle = with_kernel(GOOD_HOPPER, matrix_instructions=0) | {"shape": "1x8k_96x128_token"}
  assert rules.broken([idle | {"kind": STEP}]) == []
  assert "no matrix instruction" in rules.broken([idle])[0]


def test_hard_max_attention_needs_a_kernel_and_no_matrix_instruction():
  """Nor a predicted time, which goes by them; spills count as ever."""
  hard = {"shape": "planar_16k", "kind": FORWARD, "predicted": None}
  for row in (GOOD_HOPPER, GOOD_TPU):
    idle = with_kernel(row, matrix_instructions=0) | hard
    assert rules.broken([idle]) == []
    assert "it has no kernel" in rules.broken([idle | {"kernels": []}])[0]
  spilled = with_kernel(GOOD_HOPPER, matrix_instructions=0, spill_loads=8) | hard
  assert "spills 8 bytes" in rules.broken([spilled])[0]


def test_what_xla_compiles_shows_its_own_estimate(tmp_path, capsys):
  row = PEER | {
    "shape": "1x8k_96x128_token", "program": "linear-xla", "kernels": [], "predicted": None,
    "share": None, "estimated": 0.01224, "temporary": 3 << 20,
  }  # fmt: skip
  out = tmp_path / "x.json"
  out.write_text(json.dumps({"rows": [GOOD_TPU, row], "absent": {}}))
  assert compile_check.main(["compile_check", "--compile=false", f"--out={out}"]) == 0
  assert "XLA's own estimate 12.240 ms, temporary 3 MiB" in capsys.readouterr().out


GOOD_TPU = {
  "chip": "v5e", "shape": "7b_4k", "kind": FORWARD, "program": "ours-tpu", "ours": True,
  "ok": True, "error": None, "seconds": 3.0, "predicted": 1e-3, "share": 0.7,
  "kernels": [
    {
      "name": "flash_forward.1", "program": 1700, "loop": 1600, "hot": [1300, 1400],
      "matrix_busy": 0.9, "vector_filled": 0.6, "matrix_instructions": 3000, "spill_stores": 9,
      "spill_loads": 9, "vmem": 4 << 20, "vmem_spilled": 1 << 20, "seconds": 1e-3,
    }
  ],
}  # fmt: skip
GOOD_HOPPER = GOOD_TPU | {
  "chip": "h200", "program": "ours-hopper",
  "kernels": [
    {
      "name": "entry_0", "registers": 168, "spill_stores": 0, "spill_loads": 0,
      "shared_memory": 200000, "barriers": 9, "setmaxnreg": True, "matrix_instructions": 32,
      "warnings": [],
    }
  ],
}  # fmt: skip
PEER = GOOD_TPU | {"program": "jax-splash", "ours": False, "predicted": 2e-3}


def with_kernel(row, **figures):
  return row | {"kernels": [row["kernels"][0] | figures]}


def test_good_rows_break_nothing():
  assert rules.broken([GOOD_TPU, GOOD_HOPPER, PEER]) == []
  assert rules.broken([GOOD_TPU | {"predicted": 2.01e-3}, PEER]) == []


@pytest.mark.parametrize(
  ("row", "sentence"),
  [
    (GOOD_TPU | {"ok": False, "error": "Boom: out of VMEM", "kernels": []}, "Boom: out of VMEM"),
    (GOOD_TPU | {"kernels": []}, "no matrix instruction"),
    (with_kernel(GOOD_TPU, matrix_instructions=0), "no matrix instruction"),
    (with_kernel(GOOD_HOPPER, matrix_instructions=0), "no matrix instruction"),
    (with_kernel(GOOD_TPU, vmem=200 << 20), "takes 209715200 bytes of 134217728"),
    (with_kernel(GOOD_HOPPER, shared_memory=240000), "takes 240000 bytes of 232448"),
    (with_kernel(GOOD_HOPPER, spill_loads=8), "entry_0 spills 8 bytes"),
    (with_kernel(GOOD_HOPPER, warnings=["wgmma serialized"]), "entry_0: wgmma serialized"),
    (GOOD_TPU | {"predicted": None}, "no time can be predicted"),
    (GOOD_TPU | {"predicted": 2.03e-3}, "predicted 2.030 ms, but jax-splash 2.000 ms"),
  ],
)
def test_each_rule_is_broken_by_its_row(row, sentence):
  (said,) = rules.broken([row, PEER])
  assert sentence in said
  assert said.startswith(f"{row['program']}, forward, 7b_4k, {row['chip']}: ")


def test_peers_may_fail_and_be_slow():
  failed = PEER | {"ok": False, "error": "no", "kernels": [], "predicted": None}
  elsewhere = PEER | {"shape": "h64_4k", "predicted": 1e-9}
  assert rules.broken([GOOD_TPU, failed, elsewhere]) == []


def test_an_explained_warning_is_let_through(monkeypatch):
  monkeypatch.setattr(rules, "EXPLAINED", {"serialized": "the epilogue may wait"})
  assert rules.broken([with_kernel(GOOD_HOPPER, warnings=["wgmma serialized here"])]) == []


def test_the_best_setting_counts():
  slow, fast = {"ok": True, "predicted": 2.0}, {"ok": True, "predicted": 1.0}
  failed, unknown = {"ok": False, "error": "e"}, {"ok": True, "predicted": None}
  assert rules.best_setting([failed, slow, fast, unknown]) is fast
  assert rules.best_setting([failed, unknown]) is unknown
  assert rules.best_setting([{"ok": False, "error": "first"}, failed]) is failed


def test_check_judges_what_a_file_holds(tmp_path, capsys):
  """The tables show every row; --check names the broken one and the chip that is absent."""
  failed = GOOD_HOPPER | {"ok": False, "error": "ptxas died", "kernels": [], "seconds": None}
  rows = [GOOD_TPU, PEER, failed]
  out = tmp_path / "x.json"
  out.write_text(json.dumps({"rows": rows, "absent": {"v6e": "no libtpu", "tokamax-splash": "-"}}))
  arguments = ["compile_check", "--compile=false", f"--out={out}"]
  assert compile_check.main(arguments) == 0
  shown = capsys.readouterr().out
  assert "1300/1400" in shown and "1.000 ms" in shown and "2.000 ms" in shown
  assert "ptxas died" in shown and "v6e was not compiled: no libtpu" in shown
  assert compile_check.main([*arguments, "--check"]) == 1
  said = capsys.readouterr().err
  assert "ours-hopper, forward, 7b_4k, h200: ptxas died" in said
  assert "nothing was compiled for v6e: no libtpu" in said and "tokamax" not in said
  out.write_text(json.dumps({"rows": [GOOD_TPU, PEER], "absent": {}}))
  assert compile_check.main([*arguments, "--check"]) == 0
  out.write_text(json.dumps({"rows": [GOOD_TPU | {"predicted": 9e-3}], "absent": {}}))
  assert compile_check.main([*arguments, "--check"]) == 1  # The committed table has its peers.
  assert "predicted 9.000 ms, but jax-splash 1.080 ms" in capsys.readouterr().err
  out.write_text(json.dumps({"rows": [GOOD_TPU, PEER], "absent": {}}))
  older = tmp_path / "older.json"
  older.write_text(json.dumps({"rows": [PEER | {"predicted": 9e-4}], "absent": {}}))
  assert compile_check.main([*arguments, "--check", f"--against={older}"]) == 1
  assert "but jax-splash 0.900 ms" in capsys.readouterr().err


def test_a_process_that_dies_or_hangs_is_a_row(monkeypatch):
  """Whatever becomes of the compiler's process, its row says so."""
  job = worker.Job("v5e", "jax-flash", FORWARD, "7b_4k", 0)
  real = subprocess.run

  def instead(code):
    def started(command, **rest):
      return real([sys.executable, "-c", code], **rest)

    monkeypatch.setattr(worker.subprocess, "run", started)

  instead("import os, sys; print('F1 Check failed: x > 0', file=sys.stderr); os.abort()")
  found = worker.run(job, 60)
  assert not found["ok"] and found["error"].endswith("signal 6: F1 Check failed: x > 0")
  instead("import time; time.sleep(60)")
  assert worker.run(job, 0.5)["error"] == "it took longer than 0 s"


def test_an_error_is_shortened_and_names_no_folder():
  long = "INTERNAL: Mosaic failed at /home/me/site-packages/jax/x.py:3 " + "x" * 300 + "\nmore"
  short = worker.shortened(long)
  assert len(short) == worker.LONGEST and short.startswith("INTERNAL: Mosaic failed at x.py:3 x")
  assert worker.shortened("") == "no message"


def compiled(chip, program, kind, shape="7b_4k"):
  """A real row, or a skip that says what is not installed."""
  kit.needs_compiler(chip)
  return worker.run(worker.Job(chip, program, kind, shape, 0), 300)


# Bundles of the whole kernel that libtpu 0.0.50 made of jax's kernels when they were first looked
# at, T=4096: a change of a twentieth means another compiler, or a reader that is wrong.
SEEN = {("v5e", "jax-flash"): 1671, ("v6e", "jax-flash"): 1331, ("v5e", "jax-splash"): 2852}


@pytest.mark.parametrize(("chip", "program"), SEEN)
def test_a_real_tpu_row(chip, program):
  """Time and share agree with flops; a mask's half of the blocks is not paid for."""
  row = compiled(chip, program, FORWARD)
  assert row["ok"], row["error"]
  (kernel,) = row["kernels"]
  assert kernel["program"] == pytest.approx(SEEN[chip, program], rel=0.05)
  assert max(kernel["hot"]) < kernel["loop"] < kernel["program"]
  assert 0.3 < kernel["matrix_busy"] <= 1 and 0.3 < kernel["vector_filled"] <= 1
  assert 0.1 < row["share"] < 1
  work = shapes.flops(SHAPES["7b_4k"], FORWARD)
  assert row["predicted"] == pytest.approx(work / (row["share"] * aot.CHIPS[chip].peak))
  clock, heads = aot.CHIPS[chip].clock, SHAPES["7b_4k"].N
  visits = row["predicted"] * clock / max(kernel["hot"]) / heads
  blocks = {"jax-flash": 36, "jax-splash": 20}[program]
  assert blocks < visits < 1.35 * blocks


def test_real_hopper_rows():
  """jax's own kernel: forward as it should be, backward refused with its own words."""
  row = compiled("h200", "jax-mgpu", FORWARD)
  assert row["ok"], row["error"]
  (kernel,) = row["kernels"]
  assert kernel["matrix_instructions"] and kernel["setmaxnreg"] and not kernel["spill_stores"]
  refused = compiled("h200", "jax-mgpu", BACKWARD)
  assert refused["error"].startswith("NotImplementedError: Causal attention not supported")


def test_packed_documents_of_a_7b_model_spill_nothing():
  """What the rule reads of the keys finds registers beside the sums, in all three kernels."""
  row = compiled("h200", "ours-hopper", BACKWARD, "packed_8k")
  assert row["ok"], row["error"]
  spilled = {k["name"]: k["spill_stores"] + k["spill_loads"] for k in row["kernels"]}
  assert len(spilled) == 3 and not any(spilled.values()), spilled


# One of each shape of program; all take a minute.
VARIED = (
  "token, H=256", "a decay of each head", "channel, odd T", "padding",
  "documents, channel, normalized", "everything at once", "one token more, channel, normalized",
  "channel, float32, odd T",
)  # fmt: skip


@pytest.mark.parametrize("name", VARIED)
def test_checks_of_linear_attention_can_be_lowered_for_the_device(name):
  """The same of its checks, whole programs with segments, lengths and states."""
  kit.needs_compiler("h200")
  (check,) = (check for check in linear_checks.CHECKS if check.name == name)
  given = jax.eval_shape(lambda: linear_checks.operands(check))
  results = jax.eval_shape(lambda: linear_checks.cotangents(check))
  aot.lower_for(aot.CHIPS["h200"], linear_checks.program(check, "hopper"), given, results)


@pytest.mark.parametrize("name", ["rows that see nothing", "width 8", "window", "token by token"])
def test_checks_of_hard_max_attention_can_be_lowered_for_the_device(name):
  """And the hull that decodes."""
  kit.needs_compiler("h200")
  (check,) = (check for check in hardmax_checks.CHECKS if check.name == name)
  given = jax.eval_shape(lambda: hardmax_checks.operands(check))
  with kit.pretend("NVIDIA H200", "gpu"):
    aot.lower_for(aot.CHIPS["h200"], hardmax_checks.program(check, "hopper"), given)


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.name)
def test_every_check_of_the_device_can_be_lowered_for_it(check):
  """Odd lengths, every modifier, every mask: what the interpreter forgives, the chip does not."""
  kit.needs_compiler("h200")
  given = jax.eval_shape(lambda: checks.operands(check))
  out = jax.ShapeDtypeStruct((check.B, check.T, check.N, check.h), jnp.float32)
  lse = jax.ShapeDtypeStruct((check.B, check.T, check.N), jnp.float32)
  aot.lower_for(aot.CHIPS["h200"], checks.program(check, "hopper"), given, (out, lse))
