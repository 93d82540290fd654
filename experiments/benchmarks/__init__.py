"""The parts of `python -m experiments.benchmark`: what is timed, how, and what is asked of it.

suites.py         suites as data: which contenders, at which lengths
contenders.py     a contender's name -> the function that is measured, and its right answer
timing.py         rounds in which every contender is timed once, in turn
memory.py         the peak of a fresh process
resident.py       the resident memory of this process; knows nothing of jax
torch_worker.py   PyTorch in a process of its own, and of its own interpreter if need be
hull.py           hard-max heads: decoding on a hull, all queries at once
targets.json      what the numbers must reach; targets.py judges
picture.py        time and memory against length

On a chip:

cases.py          suites as data: masks, shapes, contenders, in the order of what they tell
checks.py         whether our kernel is right on this chip, in a process that may fail
rivals.py         a contender's name and a case -> the programs that are timed
chip.py           the run: checks, turns, the time that there is
chip_picture.py   TFLOP/s against length
tune.py           which block sizes are the fastest; writes pallas_kernels/tuned

Linear attention there:

linear_checks.py   its checks, run as those of softmax attention are
linear_rivals.py   its contenders
torch_linear.py    PyTorch in a process of its own, with flash-linear-attention's kernels
linear_picture.py  milliseconds, shape by shape

And hard-max attention: hardmax_checks.py, hardmax_rivals.py, hardmax_picture.py.
"""
