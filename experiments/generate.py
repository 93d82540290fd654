"""Continues a prompt with a trained model: prefill, then one compiled loop of decoding steps.

python -m experiments.generate --workdir=runs/bytes --prompt="def " --tokens=200 --temperature=0.8
"""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments import evaluate, flags
from experiments.flags import blame_user, knob
from experiments.model import Model, Params


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
  """How the next token is drawn from the logits; the filters act in this order."""

  temperature: float = knob(0.8, "Divides the logits; 0 takes the likeliest token.", "[0, inf)")
  top_k: int = knob(0, "Keep the k likeliest tokens; 0 keeps all.", "[0, inf)")
  top_p: float = knob(
    1.0, "Keep the likeliest tokens, as many as reach this probability together.", "(0, 1]"
  )


def keep_likeliest(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
  """The logits, with -inf for the tokens that top-k and top-p leave out.

  top-p keeps a token if those before it, likeliest first, sum to less than p among what top-k has
  kept. The likeliest token always stays; of equal ones the first goes first.
  """
  order = jnp.argsort(-logits, axis=-1, stable=True)
  ranked = jnp.take_along_axis(logits, order, axis=-1)
  rank = jnp.arange(logits.shape[-1])[None]
  if 0 < sampling.top_k < logits.shape[-1]:
    ranked = jnp.where(rank < sampling.top_k, ranked, -jnp.inf)
  if sampling.top_p < 1:
    p = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(p, axis=-1) - p
    # A top_p that float32 rounds to 0 is above no sum.
    ranked = jnp.where((before < sampling.top_p) | (rank == 0), ranked, -jnp.inf)
  back = jnp.argsort(order, axis=-1)
  return jnp.take_along_axis(ranked, back, axis=-1)


def sample(logits: Float[Array, "B V"], key: jax.Array, sampling: Sampling) -> Int[Array, " B"]:
  """One token per row, drawn as `sampling` says."""
  if sampling.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  # So that the coldest draw is the likeliest token too: no quotient overflows, none is 0 / 0.
  below = logits - jnp.max(logits, axis=-1, keepdims=True)
  temperature = max(sampling.temperature, float(jnp.finfo(logits.dtype).tiny))
  kept = keep_likeliest(below / temperature, sampling)
  return jax.random.categorical(key, kept, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("model", "max_length"))
def _prefill(
  model: Model,
  params: Params,
  tokens: Int[Array, "B T"],
  lengths: Int[Array, " B"],
  max_length: int,
) -> tuple[Any, Float[Array, "B V"]]:
  """The decoding state after each row's prompt, and the logits of what follows it."""
  decoder = model.bind(params)
  state = decoder.init_state(tokens.shape[0], max_length)
  state, logits = decoder.prefill(state, tokens, lengths)
  last = (lengths - 1)[:, None, None]
  return state, jnp.take_along_axis(logits, last, axis=1)[:, 0]


@functools.partial(
  jax.jit, static_argnames=("model", "sampling", "count"), donate_argnames=("state", "logits")
)
def _decode(
  model: Model,
  params: Params,
  state: Any,
  logits: Float[Array, "B V"],
  key: jax.Array,
  sampling: Sampling,
  count: int,
) -> tuple[Any, Float[Array, "B V"], Int[Array, "B n"]]:
  """`count` tokens, and in the place of what was given the state and the logits after them."""
  decoder = model.bind(params)

  def turn(carry, key):
    state, logits = carry
    tokens = sample(logits, key, sampling)
    return decoder.step(state, tokens), tokens

  (state, logits), tokens = jax.lax.scan(turn, (state, logits), jax.random.split(key, count))
  return state, logits, tokens.T


def generate(
  model: Model,
  params: Params,
  prompts: Sequence[Sequence[int]],
  *,
  tokens: int,
  sampling: Sampling | None = None,
  key: jax.Array | None = None,
) -> Int[np.ndarray, "B n"]:
  """Continues each prompt by `tokens` tokens. Prompts may be of any lengths from 1 on.

  Raises:
    ValueError: a prompt is empty or holds a token that is none, or no token is asked for.
  """
  vocabulary = model.config.vocab_size
  if tokens < 1:
    raise ValueError(f"tokens={tokens} must be at least 1")
  for prompt in prompts:
    if not prompt:
      raise ValueError("a prompt is empty: the model needs one token to continue from")
    if not 0 <= min(prompt) <= max(prompt) < vocabulary:
      raise ValueError(f"a prompt holds tokens outside 0..{vocabulary - 1}: {list(prompt)[:8]}")
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  padded = np.zeros((len(prompts), max(lengths)), np.int32)
  for row, prompt in zip(padded, prompts, strict=True):
    row[: len(prompt)] = prompt
  room = padded.shape[1] + tokens
  state, logits = _prefill(model, params, padded, lengths, room)
  key = jax.random.key(0) if key is None else key
  *_, written = _decode(model, params, state, logits, key, sampling or Sampling(), tokens)
  return np.asarray(written)


def printable(text: str) -> str:
  """The text, with a replacement character for what would steer a terminal."""
  return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
  """The flags of this program."""

  workdir: str = knob("runs/bytes", "Folder of the run.")
  prompt: str = knob("", "Text to continue; empty is the task's own.")
  tokens: int = knob(200, "Tokens to write.", "[1, inf)")
  temperature: float = knob(0.8, "Divides the logits; 0 takes the likeliest token.", "[0, inf)")
  top_k: int = knob(0, "Draw among the k likeliest tokens; 0 is all.", "[0, inf)")
  top_p: float = knob(
    1.0, "Draw among the likeliest tokens that reach this probability together.", "(0, 1]"
  )
  seed: int = knob(0, "Seed of the draws.", "[0, 4294967295]")
  num: int = knob(1, "Continuations to write.", "[1, inf)")

  def __post_init__(self):
    flags.check_bounds(self)


def main(argv: Sequence[str]) -> None:
  """The program."""
  options = flags.parse(argv, Options(), doc=__doc__ or "")
  run = evaluate.load(options.workdir, data=False)
  with blame_user((ValueError, NotImplementedError)):
    prompt = run.task.encode(options.prompt) if options.prompt else list(run.task.prompt)
    total = len(prompt) + options.tokens
    if total > run.config.seq_len:
      print(
        f"note: {total} tokens in all, and the model was trained on {run.config.seq_len}",
        file=sys.stderr,
      )
    written = generate(
      run.model,
      run.params,
      [prompt] * options.num,
      tokens=options.tokens,
      sampling=Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p),
      key=jax.random.key(options.seed),
    )
  for number, row in enumerate(written, 1):
    if options.num > 1:
      print(f"--- {number} of {options.num}")
    print(printable(run.task.decode(prompt + row.tolist())))


if __name__ == "__main__":
  flags.run_main(main)
