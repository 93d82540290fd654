"""Strict JAX for every test: eight virtual devices, no silent promotion, warnings are errors (see
setup.cfg).
"""

import gc
import os

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# Most of the time of a small test is XLA's, optimizing what runs for a millisecond: here, and in
# the processes that tests start. Benchmarks and `make train` run the optimized code.
jax.config.update("jax_disable_most_optimizations", True)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Python walks through all that JAX has cached whenever it looks for cycles: seldom is enough.
gc.set_threshold(100_000)
