"""Products of small matrices: against NumPy in float64, and what XLA makes of them on a CPU."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import chips, products

FORMS = {
  products.times: ((3, 5), (5, 4), "bik,bkj->bij"),
  products.times_transposed: ((3, 5), (4, 5), "bik,bjk->bij"),
  products.transposed_times: ((5, 3), (5, 4), "bki,bkj->bij"),
}
BATCH = 2


def operands(form, dtype="float32"):
  x, y, _ = FORMS[form]
  rng = np.random.default_rng(0)
  return [rng.standard_normal((BATCH, *shape)).astype(dtype) for shape in (x, y)]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_it_is_the_product_and_so_are_its_gradients(form, platform, monkeypatch):
  """On a CPU by rules of our own, elsewhere by JAX's."""
  monkeypatch.setattr(chips, "current", lambda: chips.Chip(platform, ""))
  x, y = operands(form)
  subscripts = FORMS[form][2]
  product = lambda x, y: form(x, y, jax.lax.Precision.HIGHEST)
  out, pull = jax.vjp(product, x, y)
  np.testing.assert_allclose(out, np.einsum(subscripts, *operands(form, "float64")), rtol=1e-5)
  d = np.random.default_rng(1).standard_normal(out.shape)
  left, right = subscripts.split("->")[0].split(",")
  dx, dy = pull(jnp.asarray(d, "float32"))
  np.testing.assert_allclose(dx, np.einsum(f"bij,{right}->{left}", d, y), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(dy, np.einsum(f"bij,{left}->{right}", d, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_it_has_a_second_derivative_and_a_batch(form):
  """Those of an einsum, reverse over reverse, under vmap."""
  x, y = (jnp.stack([z, 2 * z]) for z in operands(form))
  plain = lambda x, y: jnp.einsum(FORMS[form][2], x, y, precision="highest")

  def second(product):
    """The gradient of the squared length of a gradient."""
    first = jax.grad(lambda x, y: jnp.sum(jnp.sin(jax.vmap(product)(x, y))), (0, 1))
    return jax.grad(lambda x, y: sum(jnp.sum(d**2) for d in first(x, y)), (0, 1))(x, y)

  for got, want in zip(second(form), second(plain), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_no_product_on_a_cpu_sums_over_rows_of_both():
  """The compiler would fold the transpose into the product, were it free to."""
  x, y = (np.ones((4, 8, 8), "float32") for _ in range(2))

  def all_three(x, y):
    out, pulls = zip(*(jax.vjp(form, x, y) for form in FORMS), strict=True)
    return [pull(jnp.sin(out)) for pull, out in zip(pulls, out, strict=True)]

  text = jax.jit(all_three).lower(x, y).compile().as_text()
  dots = re.findall(r" dot\(.*lhs_contracting_dims=\{(\d)\}.*rhs_contracting_dims=\{(\d)\}", text)
  assert len(dots) == 9
  assert ("1", "1") not in dots
