"""How a mechanism runs on a chip. A leaf: it imports jax and nothing of ours.

    tiles.py                 the pure maths of one tile, tested on the CPU, called by every kernel
    <mechanism>_hopper.py    one mechanism on Hopper GPUs, by Mosaic GPU (`plgpu.kernel`)
    <mechanism>_tpu.py       one mechanism on TPUs
    tuned/*.json             block sizes per chip, with the jax version, date and commit behind them
    aot.py                   compiles for a chip that is not here, and reads what its compiler says

A kernel takes arrays and ints. Its file says in the docstring how it is built (grid, tiles, what
lives where, who waits for whom) and has `unsupported(...) -> str | None`, the reason why it refuses
a call. The operations of `attention.ops` choose among kernels through `attention.dispatch`; no
kernel imports them.
"""
