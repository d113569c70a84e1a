"""The model: weights, KV cache, attention, sampling. All that needs torch is here."""

import os

# OpenMP reads this when torch is loaded. Its threads spin while they wait for the next parallel
# region: for most of a time slice by default, so that where the frontend or anything else wants a
# core, a decode step on two cores took 360 ms instead of 7. Without any spinning the same step
# takes twice as long on an idle machine. This much of it bridges the gap between two operators.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
