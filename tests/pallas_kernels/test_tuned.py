"""Tables of measured block sizes: what a kernel is told."""

import json
import re

import jax.numpy as jnp
import pytest

from pallas_kernels import flash_hopper, tuned


def entry(what="forward", causal=True, H=128, **plan):
  return {"what": what, "dtype": "bfloat16", "H": H, "h": H, "causal": causal, "plan": plan}


@pytest.fixture
def table(tmp_path, monkeypatch):
  """A folder with one table, where kernels look."""
  plans = [
    entry(causal=False, others=176),
    entry(causal=True, others=128, stages=[2, 1]),
    entry("d_key", causal=False, others=64),
    entry("d_query", H=96, causal=True, warpgroups=3, others=80),
    entry(H=64, causal=True, others=192),
  ]
  (tmp_path / "h200.json").write_text(json.dumps({"plans": plans}))
  monkeypatch.setenv("FRUGAL_TUNED", str(tmp_path))


@pytest.mark.parametrize(
  ("what", "H", "causal", "plan"),
  [
    ("forward", 128, True, {"others": 128, "stages": (2, 1)}),
    ("forward", 128, False, {"others": 176}),
    ("forward", 128, None, {"others": 128, "stages": (2, 1)}),
    ("d_key", 128, None, {"others": 64}),
    ("d_key", 128, True, {}),
    ("d_query", 128, None, {}),
    ("forward", 64, True, {"others": 192}),
    ("forward", 96, None, {}),
  ],
)
def test_the_entry_of_a_call(table, what, H, causal, plan):
  for dtype in (jnp.bfloat16, jnp.dtype("bfloat16")):
    found = tuned.look_up("h200", what, dtype=dtype, H=H, h=H, causal=causal)
    assert found == plan
    hash(tuple(found.items()))


def test_kernels_read_the_table(table):
  """Of their own dtype alone."""
  own, told = (
    flash_hopper.blocks(*[(1, 512, 8, 96)] * 3, dtype, None) for dtype in ("float16", "bfloat16")
  )
  assert own.d_query == (128, 128) and told.d_query == (192, 80)
  assert own._replace(d_query=told.d_query) == told


def test_another_dtype_width_or_chip_has_no_entry(table):
  assert tuned.look_up("h200", "forward", dtype=jnp.float16, H=128, h=128) == {}
  assert tuned.look_up("h200", "forward", dtype=jnp.bfloat16, H=128, h=64) == {}
  assert tuned.look_up("v5p", "forward", dtype=jnp.bfloat16, H=128, h=128) == {}


def test_the_tables_that_we_ship_say_where_they_come_from(monkeypatch):
  monkeypatch.delenv("FRUGAL_TUNED", raising=False)
  for path in sorted(tuned.FOLDER.glob("*.json")):
    table = json.loads(path.read_text())
    assert re.match(r"\d+\.\d+", table["jax"]) and re.match(r"\d{4}-\d\d-\d\d", table["date"])
    assert table["commit"] and "environment" in table
    for one in table["plans"]:
      dtype = jnp.dtype(one["dtype"])
      found = tuned.look_up(
        path.stem, one["what"], dtype=dtype, H=one["H"], h=one["h"], causal=one["causal"]
      )
      assert found.keys() == one["plan"].keys()
