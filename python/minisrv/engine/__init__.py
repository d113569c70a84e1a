"""The model: weights, KV cache, attention, sampling. The only package that imports torch."""

import os

# OpenMP reads this when torch is loaded. Its threads spin while they wait for the next parallel
# region, by default for most of a time slice: when another process wanted a core, a decode step on
# two cores took 360 ms instead of 7. Without spinning, a step takes twice as long on an idle
# machine. This value is just enough to bridge the gap between two operators.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
