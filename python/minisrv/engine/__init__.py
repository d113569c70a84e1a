"""The model: weights, KV cache, attention, sampling. All that needs torch is here."""

import os

# OpenMP reads this when torch is loaded. By default its threads spin while they wait, for most of
# a time slice: where the frontend or anything else wants a core, a decode step on two cores took
# 360 ms instead of 7.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
