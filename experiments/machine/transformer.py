"""The machine as a transformer: two layers, 12 wide, every weight written down here.

    token    what a step did: (next, address, address^2, value), integers in float32
    prompt   the memory at the start, cell by cell; each token after it is computed

The newest token that names an address tells what is in that cell. A head finds it: its keys lie on
a parabola, (2 a, -a^2), and a query (x, 1) scores 2 a x - a^2 = x^2 - (a - x)^2, which is greatest
at a = x; of equals the latest is read. All heads of a layer share the keys and values.

    layer 1  three heads fetch the instruction: a, b, c = memory[next], [next + 1], [next + 2]
             MLP: b^2, as relu(b) b
    layer 2  two heads read x = memory[a] and y = memory[b]
             MLP: the jump, [y - x <= 0] (c - next - 3), as the difference of two products, for
             relu(1 - d) - relu(-d) is 1 for an integer d <= 0 and else 0
    token    (next + 3 + jump, b, b^2, y - x)

Every number is an integer below 2^24, if words and addresses are below 4095 (`subleq`).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from attention import hull
from attention.ops import hardmax

ONE, NEXT, ADDRESS, SQUARE, VALUE, A, B, C, X, Y, B_SQUARED, JUMP = range(12)
"""Places in the residual stream; the tokens' four stand behind a one."""
WIDTH, TOKEN = 12, 4

Attend = Callable[[int, Array, Array, Array], Array]
"""From a layer's number, q, k, v to what its heads read."""


class Layer(NamedTuple):
  """Heads of width 2 over one key and value head, and a gated MLP."""

  q: Float[Array, "D N 2"]
  k: Float[Array, "D 1 2"]
  v: Float[Array, "D 1 1"]
  out: Float[Array, "N 1 D"]
  gate: Float[Array, "D F"]
  up: Float[Array, "D F"]
  down: Float[Array, "F D"]


class Weights(NamedTuple):
  """All of them."""

  bias: Float[Array, " D"]
  embed: Float[Array, "4 D"]
  layers: tuple[Layer, ...]
  readout: Float[Array, "D 4"]


def _sparse(shape: tuple[int, ...], entries: Mapping[tuple[int, ...], float]) -> Array:
  """An array that is 0 but for these."""
  array = np.zeros(shape, np.float32)
  for place, value in entries.items():
    array[place] = value
  return jnp.asarray(array)


def _reads(queries: Mapping[int, Mapping[int, float]]) -> dict[str, Array]:
  """Heads that read memory: into which place -> the address, as a sum of places."""
  N = len(queries)
  q, out = {}, {}
  for n, (place, address) in enumerate(queries.items()):
    q |= {(source, n, 0): float(weight) for source, weight in address.items()}
    q[ONE, n, 1] = 1.0
    out[n, 0, place] = 1.0
  return {
    "q": _sparse((WIDTH, N, 2), q),
    "k": _sparse((WIDTH, 1, 2), {(ADDRESS, 0, 0): 2.0, (SQUARE, 0, 1): -1.0}),
    "v": _sparse((WIDTH, 1, 1), {(VALUE, 0, 0): 1.0}),
    "out": _sparse((N, 1, WIDTH), out),
  }


def compile_weights() -> Weights:
  """The weights."""
  fetch = Layer(
    **_reads({A: {NEXT: 1}, B: {NEXT: 1, ONE: 1}, C: {NEXT: 1, ONE: 2}}),
    gate=_sparse((WIDTH, 1), {(B, 0): 1}),
    up=_sparse((WIDTH, 1), {(B, 0): 1}),
    down=_sparse((1, WIDTH), {(0, B_SQUARED): 1}),
  )
  distance = {C: 1, NEXT: -1, ONE: -3}
  read = Layer(
    **_reads({X: {A: 1}, Y: {B: 1}}),
    gate=_sparse((WIDTH, 2), {(ONE, 0): 1, (X, 0): 1, (Y, 0): -1, (X, 1): 1, (Y, 1): -1}),
    up=_sparse((WIDTH, 2), {(place, f): w for place, w in distance.items() for f in (0, 1)}),
    down=_sparse((2, WIDTH), {(0, JUMP): 1, (1, JUMP): -1}),
  )
  return Weights(
    bias=_sparse((WIDTH,), {(ONE,): 1}),
    embed=_sparse((TOKEN, WIDTH), {(i, NEXT + i): 1 for i in range(TOKEN)}),
    layers=(fetch, read),
    readout=_sparse(
      (WIDTH, TOKEN),
      {
        **{(NEXT, 0): 1, (ONE, 0): 3, (JUMP, 0): 1},
        **{(B, 1): 1, (B_SQUARED, 2): 1, (Y, 3): 1, (X, 3): -1},
      },
    ),
  )


_einsum = functools.partial(jnp.einsum, precision="highest")


def transformer(
  weights: Weights, tokens: Float[Array, "*T 4"], attend: Attend
) -> Float[Array, "*T 4"]:
  """The tokens that follow these: any transformer's forward pass, without normalization."""
  x = _einsum("...i,id->...d", tokens, weights.embed)
  x = x + jnp.broadcast_to(weights.bias, x.shape)
  for i, layer in enumerate(weights.layers):
    q, k, v = (_einsum("...d,dnh->...nh", x, w) for w in (layer.q, layer.k, layer.v))
    x = x + _einsum("...nh,nhd->...d", attend(i, q, k, v), layer.out)
    gate, up = (_einsum("...d,df->...f", x, w) for w in (layer.gate, layer.up))
    x = x + _einsum("...f,fd->...d", jax.nn.relu(gate) * up, layer.down)
  return _einsum("...d,di->...i", x, weights.readout)


def parallel(
  weights: Weights, tokens: Float[Array, "B T 4"], implementation: str | None = None
) -> Float[Array, "B T 4"]:
  """What follows each token of whole traces, all at once."""

  def attend(i: int, q: Array, k: Array, v: Array) -> Array:
    del i
    return hardmax.hardmax_attention(
      q, k, v, ties="latest", is_causal=True, implementation=implementation
    )

  return transformer(weights, tokens, attend)


class Cache(NamedTuple):
  """What remembers the keys and values of one layer."""

  init_state: Callable[..., Any]
  step: Callable[..., tuple[Any, Array]]


CACHES: Final[Mapping[str, Cache]] = {
  "hull": Cache(functools.partial(hull.init_state, ties="latest"), hull.step),
  "dense": Cache(hardmax.init_state, functools.partial(hardmax.step, ties="latest")),
}
"""Name -> cache: a search in a tree, or a look at every key."""


class Decoder(NamedTuple):
  """A machine that has read some tokens: a state for each layer, and the token that comes next."""

  states: tuple[Any, ...]
  token: Float[Array, "B 4"]


def start(weights: Weights, cache: str, max_length: int, batch: int = 1) -> Decoder:
  """A decoder that has read nothing, with room for `max_length` tokens."""
  states = tuple(
    CACHES[cache].init_state(
      batch,
      num_heads=layer.q.shape[1],
      num_kv_heads=layer.k.shape[1],
      head_dim=layer.q.shape[2],
      value_dim=layer.v.shape[2],
      max_length=max_length,
    )
    for layer in weights.layers
  )
  return Decoder(states, jnp.zeros((batch, TOKEN)))


@functools.partial(jax.jit, static_argnames="cache", donate_argnames="decoder")
def decode(
  weights: Weights,
  decoder: Decoder,
  given: Float[Array, "T B 4"],
  is_given: Bool[Array, "T B"],
  *,
  cache: str,
) -> tuple[Decoder, Float[Array, "T B 4"]]:
  """T tokens more, those that are given and else those that the transformer computes.

  One compiled loop; the decoder is donated, and its states change in place.

  Returns: the decoder after them, and the tokens.
  """

  def one(decoder: Decoder, x: tuple[Array, Array]) -> tuple[Decoder, Array]:
    token = jnp.where(x[1][:, None], x[0], decoder.token)
    states = list(decoder.states)

    def attend(i: int, q: Array, k: Array, v: Array) -> Array:
      states[i], out = CACHES[cache].step(states[i], q, k, v)
      return out

    following = transformer(weights, token, attend)
    return Decoder(tuple(states), following), token

  return jax.lax.scan(one, decoder, (given, is_given))


def resumed(weights: Weights, tokens: Float[Array, "T 4"], max_length: int) -> Decoder:
  """A decoder with dense caches that has read all tokens but the last, which comes next: keys and
  values are put where reading would have put them, since both layers' depend on the token alone.
  """
  past = tokens[:-1, None]
  x = _einsum("tbi,id->tbd", past, weights.embed)
  x = x + jnp.broadcast_to(weights.bias, x.shape)
  room = ((0, 0), (0, max_length - past.shape[0]), (0, 0), (0, 0))

  def state(layer: Layer) -> Any:
    k, v = (jnp.pad(_einsum("tbd,dnh->btnh", x, w), room) for w in (layer.k, layer.v))
    return hardmax.State(k, v, jnp.full((1,), past.shape[0], jnp.int32))

  return Decoder(tuple(state(layer) for layer in weights.layers), tokens[-1:])


def prompt(image: tuple[int, ...]) -> Float[np.ndarray, "P 4"]:
  """A memory as tokens; the program begins at 0."""
  cells = np.arange(len(image))
  columns = [np.zeros_like(cells), cells, cells**2, np.asarray(image)]
  return np.stack(columns, axis=-1).astype(np.float32)
