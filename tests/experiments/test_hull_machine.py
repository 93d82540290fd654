"""The compiled machine: token by token it is the interpreter's, whichever cache remembers."""

import contextlib
import functools
import itertools
import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from experiments import hull_machine
from experiments.flags import UserError
from experiments.machine import programs, subleq, transformer
from experiments.machine.programs import PROGRAMS
from experiments.machine.subleq import MachineError, Step, assemble, interpret

T = 448


def steps(image, most=10**6):
  """What is interpreted before the program halts, or asks for what there is not."""
  found = []
  with contextlib.suppress(MachineError):
    for step in itertools.islice(interpret(image), most):
      found.append(step)
  return found


def tokens(image, most=T):
  """(prompt, the tokens that follow it)."""
  prompt = transformer.prompt(tuple(image))
  after = [(s.next, s.address, s.address**2, s.value) for s in steps(image, most)]
  return prompt, np.asarray(after, np.float32)


def random_program(rng):
  """Straight lines and jumps over some data; now and then an instruction writes into another."""
  code, data = 24, 16
  image = []
  for i in range(code):
    a, b = (3 * code + rng.randrange(data) for _ in range(2))
    if rng.random() < 0.15:  # of another instruction's operands move one
      a, b = 3 * code + rng.randrange(4), 3 * rng.randrange(code) + rng.randrange(2)
    image += [a, b, 3 * rng.randrange(code) if rng.random() < 0.4 else 3 * i + 3]
  return [*image[:-1], 0, 0, 1, -1, 0, *(rng.randint(-9, 9) for _ in range(data - 4))]


def far_program():
  """Data in the last cells of the greatest memory, (prompt, rest): cells nobody reads have no
  token.
  """
  text = """
  loop: one  up
        up   down
        down sum
        sum  other
        one  left  halt
        zero zero  loop
  halt: zero zero  halt
  """
  data = {
    "zero": [0],
    "one": [1],
    "up": [40],
    "down": [0],
    "sum": [0],
    "other": [4000],
    "left": [9],
  }
  near = assemble(text, data)
  code, shift = near.labels["zero"], subleq.CELLS - len(near.image)
  words = [w + shift if w >= code else w for w in near.image[:code]]
  image = [*words, *[0] * shift, *near.image[code:]]
  prompt, after = tokens(image)
  return np.concatenate([prompt[:code], prompt[code + shift :]]), after


@functools.cache
def traces():
  """Name -> (prompt, what follows)."""
  found = {name: tokens(programs.make(name, 6).program.image) for name in PROGRAMS}
  found["far"] = far_program()
  rng = random.Random(0)
  for i in range(4):
    image = next(x for x in iter(lambda: random_program(rng), None) if lively(x))
    found[f"random {i}"] = tokens(image)
  return found


def lively(image):
  """Runs for some hundreds of steps, in many places, and rewrites itself."""
  found = steps(image, T)
  return len(found) >= 250 and len({s.next for s in found}) >= 12 and min(found).address < 72


@functools.cache
def decoded(cache):
  """`T B 4`: what the transformer makes of all prompts at once."""
  given, is_given = np.zeros((T, len(traces()), 4), np.float32), np.zeros((T, len(traces())), bool)
  for row, (prompt, _) in enumerate(traces().values()):
    given[: len(prompt), row] = prompt
    is_given[: len(prompt), row] = True
  weights = transformer.compile_weights()
  start = transformer.start(weights, cache, T, batch=len(traces()))
  _, out = transformer.decode(weights, start, jnp.array(given), jnp.array(is_given), cache=cache)
  return np.asarray(out)


@pytest.mark.parametrize("cache", transformer.CACHES)
@pytest.mark.parametrize("name", [*PROGRAMS, "far", "random 0", "random 1", "random 2", "random 3"])
def test_every_step_is_the_interpreters(cache, name):
  prompt, after = traces()[name]
  row = list(traces()).index(name)
  right = np.concatenate([prompt, after])[:T]
  assert len(right) > len(prompt) + 20
  wrong = hull_machine.first_wrong(decoded(cache)[: len(right), row], right)
  assert wrong is None, f"token {wrong}"


def test_the_random_programs_rewrite_themselves():
  for name, (prompt, after) in traces().items():
    if name.startswith("random"):
      assert len(after) >= 250
      assert (after[:, 1] < len(prompt) - 16).any(), f"{name} writes data only"


def small_trace():
  prompt, after = tokens(programs.make("sort", 3).program.image, 80)
  return jnp.asarray(np.concatenate([prompt, after]))[None], len(prompt)


def wrong_tokens(weights, trace, given):
  """Which tokens after the prompt the weights, reading all at once, do not foretell."""
  out = transformer.parallel(weights, trace, "reference")
  return (out[0, given - 1 : -1] != trace[0, given:]).any(-1)


def test_a_trace_is_foretold_at_once_and_no_weight_is_for_show():
  """Of all that are not 0, each set to 0 makes another machine."""
  trace, given = small_trace()
  weights = transformer.compile_weights()
  flat, unravel = ravel_pytree(weights)
  assert isinstance(flat, jax.Array) and flat.dtype == jnp.float32
  used = np.flatnonzero(flat)
  variants = jnp.stack([flat, *(flat.at[i].set(0) for i in used)])
  run = jax.jit(lambda x: jax.lax.map(lambda x: wrong_tokens(unravel(x), trace, given).any(), x))
  wrong = np.asarray(run(variants))
  assert not wrong[0]
  assert wrong[1:].all(), f"not needed: {used[~wrong[1:]]}"


def test_a_dense_cache_resumes_a_trace():
  prompt, after = traces()["sort"]
  trace = np.concatenate([prompt, after])[:T]
  weights = transformer.compile_weights()
  decoder = transformer.resumed(weights, jnp.asarray(trace[:201]), max_length=T)
  one_by_one = transformer.start(weights, "dense", T)
  assert jax.tree.map(jnp.shape, decoder) == jax.tree.map(jnp.shape, one_by_one)
  for layer, state in zip(weights.layers, decoder.states, strict=True):
    assert int(state.length[0]) == 200
    address = state.key[0, :200, 0, 0] / layer.k[transformer.ADDRESS, 0, 0]
    np.testing.assert_array_equal(address, trace[:200, 1])
    np.testing.assert_array_equal(state.value[0, :200, 0, 0], trace[:200, 3])


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("size", [1, 2, 30])
def test_programs_answer_right(name, size):
  for seed in range(3):
    task = programs.make(name, size, seed)
    cells = list(task.program.image)
    for step in interpret(task.program.image):
      cells[step.address] = step.value
    assert task.read(cells) == task.answer


def test_the_interpreter_refuses_what_the_machine_cannot():
  assert list(interpret([3, 4, 0, 7, 7])) == [Step(0, 4, 0)]
  for image, why in {
    (0, 0, 9): "no instruction at 9",
    (9, 0, 0): "asks for cells 9 and 0 of 3",
    (3, 4, 0, -4000, 4000): "makes 8000, beyond 4094",
  }.items():
    with pytest.raises(MachineError, match=why):
      list(interpret(image))


def test_the_assembler_knows_its_labels():
  program = assemble("go: x y # away\n  x x+1 go", {"x": [5, 6], "y": [7]})
  assert program.image == (6, 8, 3, 6, 7, 0, 5, 6, 7)
  assert [program.name(i) for i in (0, 2, 6, 7)] == ["go", "go+2", "x", "x+1"]
  for text, why in {
    "a: a b": "no label 'b'",
    "a: a a\na: a a": "'a' stands twice",
    "a: a": "two or three operands, not 'a: a'",
  }.items():
    with pytest.raises(MachineError, match=why):
      assemble(text, {})


def test_the_command_shows_compares_and_draws(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(hull_machine, "CHUNK", 256)
  out = tmp_path / "machine.json"
  flags = ["--program=parity", "--size=9", f"--out={out}", "--lengths=90,1e2,1e5", "--seconds=1e-9"]
  assert hull_machine.main(["hull_machine", *flags]) == 0
  results = json.loads(out.read_text())
  assert [(row["cache"], row["length"]) for row in results["rows"]] == [
    ("hull", 90), ("hull", 100), ("dense", 90),
  ]  # fmt: skip
  assert all(row["exact"] and row["tokens_per_second"] > 0 for row in results["rows"])
  assert results["program"]["first_wrong"] is None
  assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
  printed = capsys.readouterr().out
  assert "parity of 110111111" in printed
  assert "are the interpreter's; it halted, and its answer is right: 0" in printed


def test_a_trace_shorter_than_every_length_is_measured_at_its_end():
  run = hull_machine.prepare(hull_machine.Options(program="add", size=20))
  assert run.lengths == (len(run.tokens),) and len(run.tokens) < 1000


def test_a_wrong_token_is_found_and_shown():
  run = hull_machine.prepare(hull_machine.Options(program="sort", size=3))
  bad = run.tokens.copy()
  bad[run.cells + 5, 3] += 1
  assert hull_machine.first_wrong(run.tokens, run.tokens) is None
  assert hull_machine.first_wrong(bad, run.tokens) == run.cells + 5
  assert hull_machine.memory(run.tokens)[-3:] == [394, 776, 864]


@pytest.mark.parametrize(
  "flag, why",
  {
    "--program=sorting": "--program 'sorting' is unknown; did you mean 'sort'",
    "--caches=hull,dens": "--caches 'dens' is unknown; did you mean 'dense'",
    "--lengths=1e3,many": "--lengths are numbers with commas, not '1e3,many'",
    "--lengths=1e3,inf": "--lengths are numbers with commas, not '1e3,inf'",
    "--lengths=0,1e3": "--lengths are of 2 tokens at the least, not '0,1e3'",
    "--lengths=-5": "--lengths are of 2 tokens at the least, not '-5'",
    "--size=4090": "--size=4090 numbers are too many: the program takes 4175 cells",
    "--sizes=3": "Unknown command line flag 'sizes'",
  }.items(),
)
def test_what_cannot_be_has_its_sentence(flag, why):
  with pytest.raises(UserError, match=why):
    hull_machine.main(["hull_machine", flag])
