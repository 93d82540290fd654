"""Where results come from."""

import re

import jax
import pytest

from experiments import provenance


def test_versions_and_a_commit():
  found = provenance.environment(("jax", "no-such-package"))
  assert found["versions"]["jax"] == jax.__version__
  assert found["versions"]["no-such-package"] is None
  assert found["date"].endswith("+00:00")
  assert found["commit"] is None or re.fullmatch(r"[0-9a-f]{12,}\+?", found["commit"])


def test_no_git_no_commit(monkeypatch):
  monkeypatch.setattr(provenance.shutil, "which", lambda name: None)
  assert provenance.commit() is None


@pytest.mark.parametrize("packages", [(), ("numpy",)])
def test_python_is_always_told(packages):
  assert set(provenance.environment(packages)["versions"]) == {"python", *packages}
