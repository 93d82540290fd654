"""Checkpoints of a run: written in the background, whole or not at all, restored onto any mesh.

A checkpoint is a flat dictionary, "params/blocks/0/..." -> array, and a page about it (its
configuration, the data's hash, versions). The position in the data needs no file: it is the step.
`sizes.json`, written once a checkpoint is complete, lets a damaged one be told before it is read.
Orbax is used only here.
"""

import gc
import itertools
import json
import logging
import pathlib
from collections.abc import Callable
from contextlib import contextmanager, suppress
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from experiments.flags import UserError


def names(tree: Any) -> dict[str, Any]:
  """The leaves of a tree by path: "params/blocks/0/mlp/up" -> leaf."""
  pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}


def like(state: Any, sharding: jax.sharding.Sharding | None = None) -> Any:
  """The shapes, types and shardings of a state, or one sharding for all: what to restore."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), state
  )


class Checkpoints:
  """The checkpoints in one folder. Every process of a run calls every method.

  A `reader` touches nothing: the run that writes there may be alive. Who writes must be alone in
  the folder; its first save waits until what a kill left unfinished is swept away.
  """

  def __init__(self, folder: str | pathlib.Path, *, keep: int = 3, reader: bool = False):
    self.folder = pathlib.Path(folder).resolve()
    self._keep, self._reader = keep, reader
    self._open = self._new()
    self._writing: int | None = None

  def _new(self) -> Any:
    policy: Any = ocp.training.preservation_policies.LatestN(self._keep)
    with _quiet(), _one_sentence(f"{self.folder} cannot be opened for checkpoints"):
      return ocp.training.Checkpointer(
        str(self.folder), preservation_policy=policy, cleanup_tmp_directories=not self._reader
      )

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    if error is None:
      self.close()
    else:  # what is being written may still be completed; a second error would hide the first
      with _quiet(), suppress(UserError):
        self.close()

  def close(self) -> None:
    """Waits until everything is written, and releases the folder."""
    try:
      self.wait()
    finally:
      with _quiet():  # what `wait` has raised it would log once more
        self._open.close()

  @property
  def steps(self) -> list[int]:
    """Steps of the complete checkpoints, oldest first."""
    return [found.step for found in self._open.checkpoints]

  def save(self, step: int, state: Any, about: dict[str, Any]) -> None:
    """Starts writing `state`, which may be donated at once.

    Waits for the write before it, and reports that one's failure.

    Raises:
      UserError: the disk is full, or the folder cannot be written. Older checkpoints stay.
    """
    self.wait()
    if step in self.steps:
      return
    with self._failure(step):
      self._open.save_async(step, names(state), force=True, custom_metadata=about)
    self._writing = step

  def wait(self) -> None:
    """Returns once the last `save` is complete on disk; raises what it raised."""
    step, self._writing = self._writing, None
    if step is None:
      return
    with self._failure(step):
      self._open.wait()
      if jax.process_index() == 0:
        self._record_sizes(step)

  @contextmanager
  def _failure(self, step: int):
    try:
      with _quiet():
        yield
    except Exception as error:
      older = [s for s in self.steps if s != step]
      rest = f"the newest complete one is of step {older[-1]}" if older else "there is none yet"
      raise UserError(
        f"the checkpoint of step {step} could not be written to {self.folder} ({_reason(error)}); "
        f"{rest}"
      ) from error

  def _record_sizes(self, step: int) -> None:
    folder = self.folder / str(step)
    sizes = {str(f.relative_to(folder)): f.stat().st_size for f in folder.rglob("*") if f.is_file()}
    partial = folder / "sizes.json.partial"
    partial.write_text(json.dumps(sizes))
    partial.replace(folder / "sizes.json")

  def damage(self, step: int) -> str | None:
    """What is wrong with the files of a checkpoint, in words, or None."""
    folder = self.folder / str(step)
    try:
      sizes = json.loads((folder / "sizes.json").read_text())
    except FileNotFoundError:
      sizes = {}  # killed between the two: the checkpoint itself is complete
    except ValueError:
      return "sizes.json is cut short"
    for name, size in sizes.items():
      file = folder / name
      there = file.stat().st_size if file.exists() else None
      if there != size:
        return (
          f"{name} is missing" if there is None else f"{name} has {there} bytes instead of {size}"
        )
    return None if self.about(step) else "its metadata cannot be read"

  def check_files(self, step: int) -> None:
    """Raises Damaged if a file of the checkpoint is not what was written."""
    if reason := self.damage(step):
      raise Damaged(f"the checkpoint of step {step} in {self.folder} is damaged ({reason})")

  def about(self, step: int) -> dict[str, Any]:
    """The page that was saved with a checkpoint; empty if it cannot be read."""
    with _quiet():
      try:
        return self._open.metadata(step).custom_metadata or {}
      except Exception:  # orbax raises whatever its parsers raise; `damage` says which file it is
        return {}

  def restore(self, step: int, target: Any) -> Any:
    """The state of `step`, in the shapes and shardings of `target` (see `like`).

    Raises:
      UserError: the checkpoint is of another model.
      Damaged: its files cannot be read.
    """
    self.check_files(step)
    wanted = names(target)
    try:
      with _quiet():
        self._check_shapes(step, wanted)
        leaves = self._open.load(step, wanted)
    except UserError:
      raise
    except Exception as error:
      raise Damaged(
        f"the checkpoint of step {step} in {self.folder} is damaged ({_reason(error)})"
      ) from error
    return jax.tree.unflatten(jax.tree.structure(target), [leaves[name] for name in wanted])

  def _check_shapes(self, step: int, wanted: dict[str, Any]) -> None:
    there: Any = self._open.metadata(step).metadata
    if there is None:
      raise Damaged(
        f"the checkpoint of step {step} in {self.folder} has lost the list of its arrays"
      )
    where = f"the checkpoint of step {step} in {self.folder}"
    for name, leaf in wanted.items():
      if name not in there:
        raise UserError(f"{where} has no {name}: it is of another model; give another --workdir")
      shape = tuple(there[name].shape)
      if shape != tuple(leaf.shape):
        raise UserError(
          f"{where} holds {name} of shape {shape}, and this model's is {tuple(leaf.shape)}; "
          "give another --workdir"
        )
    if extra := set(there) - set(wanted):
      raise UserError(f"{where} also holds {min(extra)}, which this model does not have")

  def restore_newest(
    self,
    target: Any,
    *,
    check: Callable[[dict[str, Any]], None] = lambda about: None,
    tell: Callable[[str], None] = print,
    set_aside: bool = False,
  ) -> tuple[int, Any]:
    """The newest checkpoint that can be read: (step, state).

    Args:
      target: see `restore`.
      check: called with the page about a checkpoint before it is read; raises to refuse it.
      tell: called with one line of text for each damaged checkpoint that is passed over.
      set_aside: rename damaged ones to <step>.damaged (the next time <step>-2.damaged), so that
        their steps can be written again.

    Raises:
      UserError: there is none, or it is of another model.
    """
    if not self.steps:
      raise UserError(f"{self.folder} holds no checkpoint")
    reason, passed = "", set()
    while left := [step for step in self.steps if step not in passed]:
      step = left[-1]
      try:
        self.check_files(step)
        check(self.about(step))
        return step, self.restore(step, target)
      except Damaged as error:
        reason = str(error)
      passed.add(step)
      if self._reader and not (self.folder / str(step)).exists():
        self._open.reload()  # deleted by the run that writes there: it has newer ones
        continue
      tell(f"warning: {reason}; trying the one before it")
      if set_aside:
        self._set_aside(step)
    raise UserError(f"{reason}, and no other can be read")

  def _set_aside(self, step: int) -> None:
    if jax.process_index() == 0:
      names = (f"{step}-{n}.damaged" if n > 1 else f"{step}.damaged" for n in itertools.count(1))
      free = next(name for name in names if not (self.folder / name).exists())
      (self.folder / str(step)).rename(self.folder / free)
    self._open.reload()


class Damaged(UserError):
  """A checkpoint whose files cannot be read."""


def _reason(error: BaseException) -> str:
  """The innermost cause of an error, on one line: its beginning, and its end with the reason."""
  while error.__cause__ is not None:
    error = error.__cause__
  text = " ".join(str(error).split()) or type(error).__name__
  return text if len(text) <= 200 else f"{text[:60]} ... {text[-130:]}"


@contextmanager
def _one_sentence(what: str):
  try:
    yield
  except OSError as error:
    raise UserError(f"{what}: {error}") from error


@contextmanager
def _quiet():
  """Keeps the storage layers' log of an error from the terminal: we say it in one sentence."""
  before = logging.root.manager.disable
  logging.disable(logging.CRITICAL)
  try:
    yield
  except Exception:
    gc.collect()  # asyncio logs a task's unread exception when the task is collected
    raise
  finally:
    logging.disable(before)
