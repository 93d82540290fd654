"""The runs of these tests, here and in processes of their own, share what XLA compiled: most of
them train one small model again.
"""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

SETTINGS = {
  "jax_persistent_cache_min_compile_time_secs": 0,
  "jax_persistent_cache_min_entry_size_bytes": -1,
}


@pytest.fixture(scope="session")
def compiled(tmp_path_factory, worker_id):
  """The folder of what is compiled: one for all workers of a run, gone with its other folders."""
  base = tmp_path_factory.getbasetemp()
  folder = (base if worker_id == "master" else base.parent) / "compiled"
  folder.mkdir(exist_ok=True)
  return str(folder)


@pytest.fixture(autouse=True, scope="module")
def share_what_is_compiled(compiled):
  """Turns the cache on for a file's tests and what they start, and off after them."""
  settings = SETTINGS | {"jax_compilation_cache_dir": compiled}
  with pytest.MonkeyPatch.context() as patch:
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
      jax.config.update(name, value)
      patch.setenv(name.upper(), str(value))
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
