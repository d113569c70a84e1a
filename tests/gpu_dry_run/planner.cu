// FlashInfer's planners without a GPU: scheduler.cuh as it is, called the way
// BatchPrefillWithKVCachePlan in its batch_prefill.cu calls it for FA2, and
// BatchDecodeWithPagedKVCachePlan in its batch_decode.cu for decodes on CUDA cores.

#include <flashinfer/attention/scheduler.cuh>

#include <cstring>
#include <exception>
#include <string>

extern "C" int registers_per_thread;  // in cuda_runtime_stub.cpp

namespace flashinfer {

// The planner asks how many programs of its kernel an SM holds. That of decode.cuh takes minutes to
// compile; the stub of the runtime knows its registers.
template <PosEncodingMode POS_ENCODING_MODE, uint32_t num_stages_smem, uint32_t tile_size_per_bdx,
          uint32_t vec_size, uint32_t bdx, uint32_t bdy, uint32_t bdz, typename AttentionVariant,
          typename Params>
__global__ void BatchDecodeWithPagedKVCacheKernel(const __grid_constant__ Params params) {}

}  // namespace flashinfer

namespace {

std::string error_text;

struct Variant {};

template <typename KVElement>
struct Params {
  using DTypeKV = KVElement;
  using IdType = int32_t;
};

template <uint32_t HEAD_DIM, typename KVElement>
void plan_decode_of(size_t* used, void* float_workspace, size_t float_bytes, void* int_workspace,
                    void* pinned, size_t int_bytes, int32_t* page_starts, uint32_t batch_size,
                    uint32_t num_heads, uint32_t num_kv_heads, uint32_t page_size, bool in_graph,
                    flashinfer::DecodePlanInfo& info) {
  using namespace flashinfer;
  DISPATCH_GQA_GROUP_SIZE(num_heads / num_kv_heads, GROUP_SIZE, {
    auto estimate = BatchDecodeWithPagedKVCacheWorkEstimationDispatched<
        GROUP_SIZE, HEAD_DIM, PosEncodingMode::kNone, Variant, Params<KVElement>>;
    cudaError_t status =
        DecodePlanImpl<true, HEAD_DIM, PosEncodingMode::kNone, Variant, Params<KVElement>>(
            used[0], used[1], float_workspace, float_bytes, int_workspace, pinned, int_bytes, info,
            page_starts, batch_size, num_heads, page_size, in_graph, nullptr, estimate);
    if (status != cudaSuccess) throw std::runtime_error("a CUDA call failed");
  })
}

}  // namespace

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

// The same for the kernel that takes `registers` per thread; plan_info: 10 numbers.
int plan_decode(void* float_workspace, size_t float_bytes, void* int_workspace, void* pinned,
                size_t int_bytes, int32_t* page_starts, uint32_t batch_size, uint32_t num_heads,
                uint32_t num_kv_heads, uint32_t head_dim, uint32_t page_size, bool in_graph,
                uint32_t kv_dtype_bytes, uint32_t registers, int64_t* plan_info, size_t* used) {
  flashinfer::DecodePlanInfo info;
  registers_per_thread = registers;
  auto plan = [&](auto planner) {
    planner(used, float_workspace, float_bytes, int_workspace, pinned, int_bytes, page_starts,
            batch_size, num_heads, num_kv_heads, page_size, in_graph, info);
  };
  bool fp8 = kv_dtype_bytes == 1;
  try {
    if (head_dim == 64) {
      plan(fp8 ? plan_decode_of<64, uint8_t> : plan_decode_of<64, uint16_t>);
    } else if (head_dim == 128) {
      plan(fp8 ? plan_decode_of<128, uint8_t> : plan_decode_of<128, uint16_t>);
    } else {
      plan(fp8 ? plan_decode_of<256, uint8_t> : plan_decode_of<256, uint16_t>);
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
