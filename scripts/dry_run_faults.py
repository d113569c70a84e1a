"""Put faults of the GPU path into a copy of the package, one at a time, and name the dry run's test
that fails.

Exits with status 1 if the dry run misses one. Run: python scripts/dry_run_faults.py [NUMBER ...]
"""

from __future__ import annotations

import sys

from seeded_bugs import Bug, report


def dry_run(name: str, model: str = "0.6B") -> list[str]:
    """A file of the dry run, and the model that is enough to find the fault."""
    return [f"tests/gpu_dry_run/{name}.py", "-m", "", "-k", model]


FAULTS = [
    (
        Bug(
            "a CPU tensor in the step",
            "engine/device_runner.py",
            'rows_S = tensors.words["sample_rows"][:size].long()',
            "rows_S = torch.zeros(size, dtype=torch.int64)",
        ),
        dry_run("test_serving"),
    ),
    (
        Bug(
            "a table in int64",
            "engine/step_buffer.py",
            "self.pages = torch.zeros(num_pages, dtype=torch.int32, device=device)",
            "self.pages = torch.zeros(num_pages, dtype=torch.int64, device=device)",
        ),
        dry_run("test_serving"),
    ),
    (
        Bug(
            "a workspace one byte too small",
            "engine/attention/flashinfer_plan.py",
            "torch.zeros(num_bytes, ",
            "torch.zeros(num_bytes - 1, ",
        ),
        dry_run("test_planner"),
    ),
    (
        Bug(
            "the sampler reads a number back",
            "engine/kernels/triton_sample.py",
            "    if capacity:\n",
            "    if biases.count.item():\n",
        ),
        dry_run("test_serving"),
    ),
    (
        Bug(
            "a graph is planned with another page size",
            "engine/attention/flashinfer_plan.py",
            "        page_size,  # page_size\n",
            "        2 * page_size,  # page_size\n",
        ),
        dry_run("test_serving"),
    ),
    (
        Bug(
            "a kernel is specialised on the number of tokens",
            "engine/kernels/triton_rotate.py",
            "BLOCK=triton.next_power_of_2(head_dim // 2)",
            "BLOCK=triton.next_power_of_2(max(num_tokens, head_dim // 2))",
        ),
        dry_run("test_serving"),
    ),
    (
        Bug(
            "a collective on one rank only",
            "engine/parallel/communicator.py",
            "        self._run(self._group.broadcast, [x], options=options)\n",
            "        if self.sharding.rank == 0:\n"
            "            self._run(self._group.broadcast, [x], options=options)\n",
        ),
        dry_run("test_ranks"),
    ),
    (
        Bug(
            "a rank that samples without its graph does so without the padding",
            "engine/device_runner.py",
            "self._sample(logits_SV, step.excess_biases)",
            "self._sample(logits_SV[: step.num_samples], step.excess_biases)",
        ),
        dry_run("test_ranks"),
    ),
    (
        Bug(
            "a graph outlives the communicator",
            "engine/device_runner.py",
            "        self._samplers.clear()\n",
            "",
        ),
        dry_run("test_ranks"),
    ),
    (
        Bug(
            "a sum over the ranks of a tensor that is too large for its memory",
            "engine/parallel/one_shot.py",
            "x.nbytes <= self._memory.nbytes\n",
            "x.nbytes <= 64 * self._memory.nbytes\n",
        ),
        dry_run("test_ranks", "one_launch"),
    ),
    (
        Bug(
            "two launches more per layer",
            "engine/layers/norm.py",
            "self._kernels.add_rms_norm_(x_TC, delta, self.weight.w_C, self.weight.eps)",
            "self._kernels.add_rms_norm_(x_TC, delta, self.weight.w_C, self.weight.eps).clone()",
        ),
        dry_run("test_launches"),
    ),
    (
        Bug(
            "a graph is planned as an eager step",
            "engine/attention/flashinfer_plan.py",
            "        True,  # enable_cuda_graph\n",
            "        False,  # enable_cuda_graph\n",
        ),
        dry_run("test_serving"),
    ),
    (
        Bug(
            "a graph keeps the plan of the step before",
            "engine/attention/decode_kernels.py",
            "        step.kv_lens[:n],\n",
            "        torch.ones_like(step.kv_lens[:n]),\n",
        ),
        dry_run("test_serving"),
    ),
    (
        Bug(
            "a graph for CUDA cores is planned as an eager step",
            "engine/attention/decode_kernels.py",
            "        True,  # enable_cuda_graph\n",
            "        False,  # enable_cuda_graph\n",
        ),
        dry_run("test_serving", "cuda-core"),
    ),
    (
        Bug(
            "a graph for CUDA cores is planned with another page size",
            "engine/attention/decode_kernels.py",
            "        page_size,  # page_size\n",
            "        2 * page_size,  # page_size\n",
        ),
        dry_run("test_serving", "cuda-core"),
    ),
    (
        Bug(
            "XQA gets queries that lie beside keys and values",
            "engine/attention/decode_kernels.py",
            "q_NHD.contiguous().unsqueeze(1)",
            "q_NHD.unsqueeze(1)",
        ),
        dry_run("test_serving", "xqa"),
    ),
    (
        Bug(
            "XQA gets signed lengths",
            "engine/attention/decode_kernels.py",
            "self._kv_lens[:n].view(torch.uint32)",
            "self._kv_lens[:n]",
        ),
        dry_run("test_serving", "xqa"),
    ),
    (
        Bug(
            "results are copied to memory that is not pinned",
            "engine/transfer.py",
            "pin_memory=tensor.is_cuda",
            "pin_memory=False",
        ),
        dry_run("test_serving"),
    ),
    (
        Bug(
            "the words of a step are overwritten before they are copied",
            "engine/step_buffer.py",
            "words, arrays = self._ring[self._next], self._arrays[self._next]",
            "words, arrays = self._ring[0], self._arrays[0]",
        ),
        dry_run("test_serving"),
    ),
    (
        Bug(
            "a kernel does not wait for the one before it",
            "engine/kernels/triton_rotate.py",
            "    begin(PDL)\n",
            "    pass\n",
        ),
        dry_run("test_kernels", "small_model"),
    ),
]

if __name__ == "__main__":
    sys.exit(report(FAULTS))
