"""What keeps a run from harm: signals are heard, lost losses noticed, workdirs not shared."""

import collections
import contextlib
import fcntl
import math
import pathlib
import signal
import statistics
import threading
from collections.abc import Generator
from types import FrameType

import jax
from jax.experimental import multihost_utils

from experiments.config import GuardConfig
from experiments.flags import UserError, blame_user


class Stop:
  """Whether somebody asked the run to end: SIGTERM, or Ctrl-C. A second Ctrl-C ends it at once."""

  def __init__(self):
    self.signal: int | None = None
    if threading.current_thread() is not threading.main_thread():
      return  # a notebook's worker: Python hears signals in its main thread only
    signal.signal(signal.SIGINT, self._note)
    if jax.process_count() == 1:
      # With several processes JAX's own service hears SIGTERM, so that all agree on the step.
      signal.signal(signal.SIGTERM, self._note)

  def _note(self, number: int, frame: FrameType | None) -> None:
    del frame
    self.signal = number
    signal.signal(signal.SIGINT, signal.default_int_handler)

  def asked(self, step: int) -> bool:
    """To be called before every step, by every process."""
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
      self.signal = signal.SIGTERM
    return self.signal is not None

  @property
  def exit_code(self) -> int:
    """What the program exits with once the state is saved."""
    return 130 if self.signal == signal.SIGINT else 0


@contextlib.contextmanager
def alone_in(folder: pathlib.Path) -> Generator[None]:
  """Keeps other runs out of a workdir; the system lifts the lock when this process ends, however.

  Raises:
    UserError: another process trains there, or the folder cannot be written.
  """
  if jax.process_index() != 0:
    yield
    return
  with blame_user():
    file = (folder / "lock").open("w")
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise UserError(f"another process trains in {folder}; give another --workdir") from error
    yield


class Guard:
  """Tells a loss that is no number, or has jumped; see `GuardConfig`."""

  def __init__(self, config: GuardConfig):
    self._jump = config.jump
    self._recent: collections.deque[float] = collections.deque(maxlen=config.window)

  def verdict(self, loss: float, grad_norm: float) -> str | None:
    """What is wrong with a step, in words, or None."""
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
      return f"the loss is {loss:g} and the norm of the gradient {grad_norm:g}"
    usual = statistics.median(self._recent) if self._recent else loss
    self._recent.append(loss)
    if self._jump and loss > usual + self._jump:
      jump = f"--guard.jump={self._jump:g}"
      return f"the loss jumped to {loss:.4g} from a recent median of {usual:.4g} ({jump})"
    return None
