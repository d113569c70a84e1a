// All layers of a step of decodes in one call: the functions of the other two files in the order in
// which the layers call them one by one, without the way through Python between them.
//
// Activations are floats. Shapes: T tokens, C hidden size, H query heads, K key-value heads, D head
// size, F intermediate size.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace {

// Of cpu.cpp, for float and the type of the cache, and of packed.cpp.
struct Functions {
  void (*add_rms_norm)(float* x, const float* delta, const float* weight, float* out, long rows,
                       long size, float eps, int threads);
  void (*silu_and_mul)(const float* gate_up, float* out, long rows, long size, int threads);
  void (*norm_rotate_store)(float* qkv, const float* q_weight, const float* k_weight,
                            const float* cos, const float* sin, const int64_t* slots, void* keys,
                            void* values, long tokens, long heads, long kv_heads, long size,
                            float eps, int threads);
  void (*decode_attention)(const float* q, long q_stride, const void* keys, const void* values,
                           const int32_t* page_table, long columns, const int32_t* rows,
                           const int32_t* kv_lens, long shared, float* out, long batch, long heads,
                           long kv_heads, long size, long page_size, float scale, int threads);
  void (*multiply)(const void* matrix, const void* x, long float_in, const float* bias, void* out,
                   long float_out, long rows, int threads);
};

// Matrices of packed.cpp with the same inputs, whose outputs are side by side.
struct Projection {
  static constexpr long kMost = 3;
  const void* matrices[kMost];  // null from the first that is not there
  const float* biases[kMost];   // each may be null
  long outputs[kMost];
};

struct Layer {
  const float *input_norm, *post_norm, *q_norm, *k_norm;  // the last two may be null
  void *keys, *values;                                    // of the cache
  Projection qkv, out, gate_up, down;
};

struct Sizes {
  long hidden, heads, kv_heads, head_size, features, page_size;
  float norm_eps, head_norm_eps, scale;
};

// As in decode_attention; x [T, C] is changed in place.
struct Step {
  float* x;
  const float *cos, *sin;
  const int64_t* slots;
  const int32_t *page_table, *rows, *kv_lens;
  long tokens, columns, shared;
};

struct Space {
  std::vector<float> normed, qkv, attention, delta, gate_up, features, part;

  static float* grow(std::vector<float>& numbers, long size) {
    if (numbers.size() < size_t(size)) numbers.resize(size);
    return numbers.data();
  }
};

void project(const Functions& call, const Projection& projection, const float* x, float* out,
             long tokens, Space& space, int threads) {
  const auto multiply = [&](long i, float* to) {
    call.multiply(projection.matrices[i], x, 1, projection.biases[i], to, 1, tokens, threads);
  };
  long count = 0, width = 0;
  while (count < Projection::kMost && projection.matrices[count] != nullptr)
    width += projection.outputs[count++];
  for (long i = 0, first = 0; i < count; first += projection.outputs[i++]) {
    if (count == 1 || tokens == 1) {
      multiply(i, out + first);
      continue;
    }
    const long outputs = projection.outputs[i];
    float* part = Space::grow(space.part, tokens * outputs);
    multiply(i, part);
    for (long t = 0; t < tokens; ++t)
      std::copy_n(part + t * outputs, outputs, out + t * width + first);
  }
}

}  // namespace

extern "C" void run_layers(const Functions* functions, const Layer* layers, long num_layers,
                           const Sizes* sizes, const Step* step, int threads) {
  const Functions& call = *functions;
  const Sizes& size = *sizes;
  static thread_local Space space;
  const long tokens = step->tokens, q_width = size.heads * size.head_size;
  const long qkv_width = q_width + 2 * size.kv_heads * size.head_size;
  float* normed = Space::grow(space.normed, tokens * size.hidden);
  float* qkv = Space::grow(space.qkv, tokens * qkv_width);
  float* attention = Space::grow(space.attention, tokens * q_width);
  float* delta = Space::grow(space.delta, tokens * size.hidden);
  float* gate_up = Space::grow(space.gate_up, tokens * 2 * size.features);
  float* features = Space::grow(space.features, tokens * size.features);
  for (long i = 0; i < num_layers; ++i) {
    const Layer& layer = layers[i];
    call.add_rms_norm(step->x, i ? delta : nullptr, layer.input_norm, normed, tokens, size.hidden,
                      size.norm_eps, threads);
    project(call, layer.qkv, normed, qkv, tokens, space, threads);
    call.norm_rotate_store(qkv, layer.q_norm, layer.k_norm, step->cos, step->sin, step->slots,
                           layer.keys, layer.values, tokens, size.heads, size.kv_heads,
                           size.head_size, size.head_norm_eps, threads);
    call.decode_attention(qkv, qkv_width, layer.keys, layer.values, step->page_table, step->columns,
                          step->rows, step->kv_lens, step->shared, attention, tokens, size.heads,
                          size.kv_heads, size.head_size, size.page_size, size.scale, threads);
    project(call, layer.out, attention, delta, tokens, space, threads);
    call.add_rms_norm(step->x, delta, layer.post_norm, normed, tokens, size.hidden, size.norm_eps,
                      threads);
    project(call, layer.gate_up, normed, gate_up, tokens, space, threads);
    call.silu_and_mul(gate_up, features, tokens, size.features, threads);
    project(call, layer.down, features, delta, tokens, space, threads);
  }
  for (long i = 0; i < tokens * size.hidden; ++i) step->x[i] += delta[i];
}
