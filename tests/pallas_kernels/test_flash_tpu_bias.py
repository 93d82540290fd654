"""The gradient of a bias of every form, in the interpreter, against the equation in float64."""

import jax
import pytest

import flash_kit
import kit
from pallas_kernels import flash_tpu


@pytest.mark.parametrize("form", [(2, 2, 160, 200), (1, 1, 1, 200), (1, 2, 160, 1)])
def test_every_form(form, monkeypatch):
  """What the bias lacks is summed, whatever it lacks."""
  case = kit.Case(B=2, T=160, S=200, N=2, K=1, H=16, h=16)
  bias = kit.normal(jax.random.key(1), *form)
  with flash_kit.tpu_interpreter(monkeypatch):
    # A sum over keys of dS is what is left of terms that cancel.
    flash_kit.check(
      flash_tpu, flash_kit.Problem(case, flash_kit.causal(3), bias=bias, cap=2.0), factor=2.0
    )
