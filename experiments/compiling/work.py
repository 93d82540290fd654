"""What an adapter hands to the worker: a function to compile, and how often its kernels run."""

from collections.abc import Callable
from typing import Any, NamedTuple

from pallas_kernels.bundles import Trips


class Work(NamedTuple):
  """A kernel of the pass that is judged."""

  pattern: str
  """A regular expression for the whole of its name, without the number that XLA appends."""
  trips: Trips
  """Over all heads."""
  parallel: bool = True
  """Whether the cores of a device share its grid."""


class Built(NamedTuple):
  """One pass of one program at one shape."""

  function: Callable[..., Any]
  arguments: tuple[Any, ...]
  """ShapeDtypeStructs, or trees of them."""
  work: tuple[Work, ...] = ()
  """The kernels that the pass may consist of."""
  others: str = r".*(fwd|forward|flash_attention|q_sequence_ref).*"
  """Names of kernels that are compiled with it and do not count: its forward pass, index maps. One
  that is neither here nor there makes its time unknown.
  """
  whole: bool = False
  """Whether all of it is XLA's, so that XLA's estimate of it is asked for."""
