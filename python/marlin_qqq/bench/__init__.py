"""The benchmark framework behind ``marlin-qqq bench`` and ``python -m marlin_qqq.bench``.

The pieces, in the order a run uses them:

- ``presets``          shapes of the linear layers of well-known models, with their tensor-parallel cuts
- ``problem``          bytes, operations and the floor of one problem
- ``inputs``           random activations and packed weights, enough copies of them to be cold in L2
- ``implementations``  what is timed: our op in its variants, and the baselines
- ``check``            the exact reference; nothing is timed before it has been compared
- ``timing``           CUDA graphs over rotating weights, interleaved; wall clock on the CPU
- ``ceilings``         what the same GPU can do at all: read bandwidth, int8 tensor-core rate
- ``results``          the JSON schema;  ``tables``, ``plots``, ``compare`` read it

How the numbers are made, and how to read them: docs/benchmark.md.

Importing this package imports neither torch nor matplotlib.
"""
