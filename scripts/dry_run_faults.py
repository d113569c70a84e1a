"""Put faults of the GPU path into a copy of the package, one at a time, and name the dry run's test
that fails.

Exits with status 1 if the dry run misses one. Run: python scripts/dry_run_faults.py [NUMBER ...]
"""

from __future__ import annotations

import sys

from seeded_bugs import Bug, report

TESTS = ["tests/gpu_dry_run", "-m", "not soak"]

FAULTS = [
    Bug(
        "a CPU tensor in the step",
        "engine/device_runner.py",
        'rows_S = tensors.words["sample_rows"][:size].long()',
        "rows_S = torch.zeros(size, dtype=torch.int64)",
    ),
    Bug(
        "a table in int64",
        "engine/step_buffer.py",
        "self.pages = torch.zeros(num_pages, dtype=torch.int32, device=device)",
        "self.pages = torch.zeros(num_pages, dtype=torch.int64, device=device)",
    ),
    Bug(
        "a workspace one byte too small for 14B",
        "engine/attention/flashinfer.py",
        "_WORKSPACE_BYTES = 128 * 2**20",
        "_WORKSPACE_BYTES = 40 * 335 * 16 * 129 * 4 - 1",
    ),
    Bug(
        "the sampler reads a number back",
        "engine/kernels/triton_sample.py",
        "    if capacity:\n",
        "    if columns.num_suppressed.item():\n",
    ),
    Bug(
        "a graph is planned with another page size",
        "engine/attention/flashinfer.py",
        "            page_size,  # page_size\n",
        "            2 * page_size,  # page_size\n",
    ),
    Bug(
        "a kernel is specialised on the number of tokens",
        "engine/kernels/triton_rotate.py",
        "BLOCK=triton.next_power_of_2(head_dim // 2)",
        "BLOCK=triton.next_power_of_2(max(num_tokens, head_dim // 2))",
    ),
    Bug(
        "a collective on one rank only",
        "engine/parallel/communicator.py",
        "        self._group.broadcast([x], options).wait()\n",
        "        if self.sharding.rank:\n            self._group.broadcast([x], options).wait()\n",
    ),
    Bug(
        "two launches more per layer",
        "engine/layers/norm.py",
        "return self._kernels.add_rms_norm_(x_TC, delta_TC, self._weight, self._eps)",
        "return self._kernels.add_rms_norm_(x_TC, delta_TC, self._weight, self._eps).clone()",
    ),
    Bug(
        "a graph is planned as an eager step",
        "engine/attention/flashinfer.py",
        "            True,  # enable_cuda_graph\n",
        "            False,  # enable_cuda_graph\n",
    ),
    Bug(
        "a graph keeps the plan of the step before",
        "engine/attention/flashinfer.py",
        "                self._replan(wrapper, step)\n",
        "                pass\n",
    ),
    Bug(
        "results are copied to memory that is not pinned",
        "engine/transfer.py",
        "pin_memory=tensor.is_cuda",
        "pin_memory=False",
    ),
    Bug(
        "the words of a step are overwritten before they are copied",
        "engine/step_buffer.py",
        "words, arrays = self._ring[self._next], self._arrays[self._next]",
        "words, arrays = self._ring[0], self._arrays[0]",
    ),
]

if __name__ == "__main__":
    sys.exit(report(FAULTS, TESTS))
