// FlashInfer's planner for its FA2 prefill kernels, without a GPU: scheduler.cuh as it is, called
// the way BatchPrefillWithKVCachePlan in its batch_prefill.cu calls it.

#include <flashinfer/attention/scheduler.cuh>

#include <cstring>
#include <exception>
#include <string>

namespace {
std::string error_text;
}

extern "C" {

const char* plan_error() { return error_text.c_str(); }

// plan_info: 15 numbers. used: bytes of the float and of the int workspace. Neither workspace is
// accessed, except that cudaMemcpyAsync (cuda_runtime_stub.cpp) is called with the second.
// Returns 0, or 1 if FlashInfer has thrown; see plan_error.
int plan_prefill(void* float_workspace, size_t float_bytes, void* int_workspace, void* pinned,
                 size_t int_bytes, int32_t* query_starts, int32_t* page_starts, uint32_t num_rows,
                 uint32_t batch_size, uint32_t num_heads, uint32_t num_kv_heads, uint32_t head_dim,
                 uint32_t page_size, bool in_graph, int32_t window_left, int32_t fixed_split_size,
                 bool disable_split_kv, int64_t num_colocated_ctas, int64_t uniform_q_len,
                 uint32_t kv_dtype_bytes, int64_t* plan_info, size_t* used) {
  flashinfer::PrefillPlanInfo info;
  try {
    cudaError_t status = flashinfer::PrefillPlanImpl<true, int32_t>(
        used[0], used[1], float_workspace, float_bytes, int_workspace, pinned, int_bytes, info,
        query_starts, page_starts, num_rows, batch_size, num_heads, num_kv_heads, head_dim,
        head_dim, page_size, in_graph, 2, window_left, fixed_split_size, disable_split_kv,
        num_colocated_ctas, uniform_q_len, nullptr, kv_dtype_bytes);
    if (status != cudaSuccess) {
      error_text = "a CUDA call failed";
      return 1;
    }
  } catch (std::exception& error) {
    error_text = error.what();
    return 1;
  }
  auto numbers = info.ToVector();
  std::memcpy(plan_info, numbers.data(), numbers.size() * sizeof(int64_t));
  return 0;
}
}
