"""What can be learned: a name for each task, and the one function that makes them."""

import ast
import inspect
from collections.abc import Callable, Mapping

from attention.dispatch import suggest
from experiments.tasks import copy, hmm, induction, recall, selective_copy, text
from experiments.tasks.task import Task as Task

TASKS: Mapping[str, Callable[..., Task]] = {
  "bytes": text.make,
  "copy": copy.make,
  "selective_copy": selective_copy.make,
  "induction": induction.make,
  "recall": recall.make,
  "hmm": hmm.make,
}


def make_task(name: str, *, seq_len: int, seed: int, data: text.DataOptions) -> Task:
  """The task of that name.

  Args:
    name: A key of `TASKS`; options follow after colons, as in "recall:pairs=8:vocab_size=1024".
    seq_len: Length of a record.
    seed: Selects the records of a generated task.
    data: Which text the task bytes reads.

  Raises:
    ValueError: An unknown name or option, or data and lengths that do not fit the task.
  """
  base, *settings = name.split(":")
  if base not in TASKS:
    raise ValueError(f"task {base!r} is unknown; {suggest(base, TASKS)}")
  make = TASKS[base]
  known = inspect.signature(make).parameters
  options = {key: value for key, value in known.items() if value.default is not value.empty}
  given = dict(_parse(base, setting, options) for setting in settings)
  if "data" in known:
    return make(seq_len=seq_len, seed=seed, data=data)
  if data.path:
    raise ValueError(
      f"data.path={data.path!r} is for the task bytes; the task {base} makes its own data"
    )
  return make(seq_len=seq_len, seed=seed, **given)


def _parse(
  task: str, setting: str, options: Mapping[str, inspect.Parameter]
) -> tuple[str, int | float | bool]:
  """One "name=value" as a name and a value of its option's type."""
  key, _, text_value = setting.partition("=")
  if key not in options:
    raise ValueError(
      f"task {task} has no option {key!r}; "
      + (suggest(key, options) if options else "it has no options")
    )
  try:
    value = ast.literal_eval(text_value)
  except (ValueError, SyntaxError):
    value = None
  default = options[key].default
  wanted = int if default is None else type(default)
  if type(value) is int and wanted is float:
    value = float(value)
  if type(value) is not wanted:
    raise ValueError(f"task {task}: {key} must be of type {wanted.__name__}, got {text_value!r}")
  return key, value
