// The small operators of a step on a CPU, each one pass over memory where torch needs several.
// `cpu.py` compiles this file for the machine it runs on and says what each function is given.
//
// Element types are float and bf16; all arithmetic is in float. Shapes: T tokens, B decodes, H query
// heads, K key-value heads, G = H / K, D head size, P tokens a page.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr long kParallelWork = 32768;  // elements; below, waking the other threads costs more

struct bf16 {
  uint16_t bits;
};

inline float load(float x) { return x; }

inline float load(bf16 x) {
  const uint32_t word = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

inline void store(float& to, float value) { to = value; }

// Round to nearest, ties to even.
inline void store(bf16& to, float value) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  const uint32_t rounded = word + 0x7fff + ((word >> 16) & 1);
  to.bits = uint16_t((value != value ? 0x7fc00000u : rounded) >> 16);
}

// 16 floats; the compiler splits them where the machine's registers are smaller.
typedef float Lanes __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
constexpr long kLanes = 16;

inline Lanes load_lanes(const float* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

inline Lanes load_lanes(const bf16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  return (Lanes)(__builtin_convertvector(halves, Words) << 16);
}

inline void store_lanes(float* to, Lanes lanes) { std::memcpy(to, &lanes, sizeof lanes); }

inline void store_lanes(bf16* to, Lanes lanes) {
  const Words words = (Words)lanes;
  const Words rounded = words + 0x7fff + ((words >> 16) & 1);
  const Words quiet_nan = Words{} + 0x7fc00000u;
  const Halves halves = __builtin_convertvector((lanes != lanes ? quiet_nan : rounded) >> 16, Halves);
  std::memcpy(to, &halves, sizeof halves);
}

inline float sum_lanes(Lanes v) {
  v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  return (v[0] + v[1]) + (v[2] + v[3]);
}

// exp(x) for x <= 0: 2^n * p(r), with p the Taylor polynomial on |r| <= ln 2 / 2. Error 2e-7.
inline float exp_negative(float x) {
  x = std::max(x, -87.0f);
  const float n = std::nearbyint(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t word = (int32_t(n) + 127) << 23;
  float power;
  std::memcpy(&power, &word, sizeof power);
  return p * power;
}

template <class T>
float sum_of_squares(const T* x, long size) {
  Lanes squares = {};
  float sum = 0;
  long i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Lanes lanes = load_lanes(x + i);
    squares += lanes * lanes;
  }
  for (; i < size; ++i) sum += load(x[i]) * load(x[i]);
  return sum + sum_lanes(squares);
}

template <class T>
void add_rms_norm(T* x, const T* delta, const T* weight, T* out, long rows, long size, float eps,
                  int threads) {
#pragma omp parallel for num_threads(threads) if (rows * size > kParallelWork)
  for (long row = 0; row < rows; ++row) {
    T* x_row = x + row * size;
    if (delta != nullptr) {
      const T* delta_row = delta + row * size;
#pragma omp simd
      for (long i = 0; i < size; ++i) store(x_row[i], load(x_row[i]) + load(delta_row[i]));
    }
    const float scale = 1.0f / std::sqrt(sum_of_squares(x_row, size) / float(size) + eps);
    T* out_row = out + row * size;
#pragma omp simd
    for (long i = 0; i < size; ++i) store(out_row[i], load(x_row[i]) * scale * load(weight[i]));
  }
}

template <class T>
void silu_and_mul(const T* gate_up, T* out, long rows, long size, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * size > kParallelWork)
  for (long row = 0; row < rows; ++row) {
    const T* gate = gate_up + row * 2 * size;
    const T* up = gate + size;
    T* out_row = out + row * size;
#pragma omp simd
    for (long i = 0; i < size; ++i) {
      const float x = load(gate[i]);
      const float small = exp_negative(-std::fabs(x));
      const float sigmoid = (x < 0 ? small : 1.0f) / (1.0f + small);
      store(out_row[i], x * sigmoid * load(up[i]));
    }
  }
}

// Norm (where there is a weight) and rotate one head: its first half against its second.
template <class T>
void norm_and_rotate(T* head, const T* weight, const T* cos, const T* sin, long size, float eps) {
  const long half = size / 2;
  float scale = 1.0f;
  if (weight != nullptr)
    scale = 1.0f / std::sqrt(sum_of_squares(head, size) / float(size) + eps);
  long i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    Lanes a = load_lanes(head + i) * scale, b = load_lanes(head + i + half) * scale;
    if (weight != nullptr) a *= load_lanes(weight + i), b *= load_lanes(weight + i + half);
    store_lanes(head + i, a * load_lanes(cos + i) + b * load_lanes(sin + i));
    store_lanes(head + i + half, b * load_lanes(cos + i + half) + a * load_lanes(sin + i + half));
  }
  for (; i < half; ++i) {
    float a = load(head[i]) * scale, b = load(head[i + half]) * scale;
    if (weight != nullptr) a *= load(weight[i]), b *= load(weight[i + half]);
    store(head[i], a * load(cos[i]) + b * load(sin[i]));
    store(head[i + half], b * load(cos[i + half]) + a * load(sin[i + half]));
  }
}

template <class T>
void norm_rotate_store(T* qkv, const T* q_weight, const T* k_weight, const T* cos, const T* sin,
                       const int64_t* slots, T* keys, T* values, long tokens, long heads,
                       long kv_heads, long size, float eps, int threads) {
  const long width = (heads + 2 * kv_heads) * size, kv_width = kv_heads * size;
#pragma omp parallel for num_threads(threads) if (tokens * width > kParallelWork)
  for (long token = 0; token < tokens; ++token) {
    T* q = qkv + token * width;
    T* k = q + heads * size;
    const T* cos_row = cos + token * size;
    const T* sin_row = sin + token * size;
    for (long h = 0; h < heads; ++h)
      norm_and_rotate(q + h * size, q_weight, cos_row, sin_row, size, eps);
    for (long h = 0; h < kv_heads; ++h)
      norm_and_rotate(k + h * size, k_weight, cos_row, sin_row, size, eps);
    std::copy_n(k, kv_width, keys + slots[token] * kv_width);
    std::copy_n(k + kv_width, kv_width, values + slots[token] * kv_width);
  }
}

// Lane t of the result is the sum of the lanes of v[t]: neighbours are added in four rounds.
inline Lanes sum_each(Lanes v[kLanes]) {
#define ROUND(step, low, high)                                                     \
  for (long i = 0; i < kLanes; i += 2 * step) {                                    \
    const Lanes a = v[i], b = v[i + step];                                         \
    v[i] = __builtin_shufflevector(a, b, low) + __builtin_shufflevector(a, b, high); \
  }
#define LIST(...) __VA_ARGS__
  ROUND(1, LIST(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
        LIST(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
  ROUND(2, LIST(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
        LIST(2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
  ROUND(4, LIST(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
        LIST(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
  ROUND(8, LIST(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
        LIST(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
#undef ROUND
#undef LIST
  return v[0];
}

// Where the cache of one layer lies: keys and values [pages, P, K, D].
template <class T>
struct Cache {
  const T* keys;
  const T* values;
  long page_bits, kv_heads;  // P = 2^page_bits
};

// 16 rows of one key head from position `first` on, as floats; rows from `end` on repeat the last.
template <class T, int CHUNKS>
void read_tile(const T* base, const Cache<T>& cache, const int32_t* pages, long kv_head, long first,
               long end, Lanes tile[kLanes][CHUNKS]) {
  constexpr long size = CHUNKS * kLanes;
  const auto row_of = [&](long position) {
    position = std::min(position, end - 1);
    const long page = pages[position >> cache.page_bits];
    const long slot = (page << cache.page_bits) + (position & ((1 << cache.page_bits) - 1));
    return base + (slot * cache.kv_heads + kv_head) * size;
  };
  for (long t = 0; t < kLanes; ++t) {
    const T* row = row_of(first + t);
    const T* later = row_of(first + t + kLanes);
    for (long c = 0; c < CHUNKS; ++c) {
      __builtin_prefetch(later + c * kLanes);
      tile[t][c] = load_lanes(row + c * kLanes);
    }
  }
}

// Query rows that read the same key head of the same pages, over positions begin .. end.
// q and out: [rows, D]; lse: [rows]; scores: room for `rows` times the positions rounded up to 16.
template <class T, int CHUNKS>
void attend(const float* q, const Cache<T>& cache, const int32_t* pages, long kv_head, long rows,
            long begin, long end, float scale, float* scores, float* out, float* lse) {
  constexpr long size = CHUNKS * kLanes;
  const long length = end - begin, row_size = (length + kLanes - 1) / kLanes * kLanes;
  Lanes tile[kLanes][CHUNKS];
  for (long first = begin; first < end; first += kLanes) {
    read_tile<T, CHUNKS>(cache.keys, cache, pages, kv_head, first, end, tile);
    for (long r = 0; r < rows; ++r) {
      Lanes products[kLanes];
      for (long t = 0; t < kLanes; ++t) {
        products[t] = load_lanes(q + r * size) * tile[t][0];
        for (long c = 1; c < CHUNKS; ++c)
          products[t] += load_lanes(q + r * size + c * kLanes) * tile[t][c];
      }
      const Lanes sums = sum_each(products) * scale;
      std::memcpy(scores + r * row_size + first - begin, &sums, sizeof sums);
    }
  }
  for (long r = 0; r < rows; ++r) {
    float* row = scores + r * row_size;
    float top = row[0], sum = 0;
#pragma omp simd reduction(max : top)
    for (long t = 0; t < length; ++t) top = std::max(top, row[t]);
#pragma omp simd reduction(+ : sum)
    for (long t = 0; t < length; ++t) sum += row[t] = exp_negative(row[t] - top);
    lse[r] = top + std::log(sum);
    const float share = 1.0f / sum;
#pragma omp simd
    for (long t = 0; t < length; ++t) row[t] *= share;
    std::fill(row + length, row + row_size, 0.0f);
    std::fill_n(out + r * size, size, 0.0f);
  }
  for (long first = begin; first < end; first += kLanes) {
    read_tile<T, CHUNKS>(cache.values, cache, pages, kv_head, first, end, tile);
    for (long r = 0; r < rows; ++r) {
      const float* weights = scores + r * row_size + first - begin;
      Lanes sums[CHUNKS];
      std::memcpy(sums, out + r * size, sizeof sums);
      for (long t = 0; t < kLanes; ++t)
        for (long c = 0; c < CHUNKS; ++c) sums[c] += weights[t] * tile[t][c];
      std::memcpy(out + r * size, sums, sizeof sums);
    }
  }
}

// Attention of one new token a sequence over its pages: q [B, H, D] with `q_stride` elements from one
// token to the next; page_table rows of `columns` pages. The first `shared` positions, whole pages,
// are the same for all sequences: they are read once for 32 query rows.
template <class T, int CHUNKS>
void decode_attention(const T* q, long q_stride, const Cache<T>& cache, const int32_t* page_table,
                      long columns, const int32_t* rows, const int32_t* kv_lens, long shared,
                      T* out, long batch, long heads, float scale, int threads) {
  constexpr long size = CHUNKS * kLanes;
  const long kv_heads = cache.kv_heads, group = heads / kv_heads;
  const long block = shared ? std::max(1L, 32 / group) : 1;
  const long blocks = (batch + block - 1) / block, tasks = blocks * kv_heads;
  const long longest = *std::max_element(kv_lens, kv_lens + batch) - shared + kLanes;
  // The heads of a sequence lie side by side in memory: one thread takes them all, if there is
  // enough to do for the others.
  const long chunk = blocks >= 2 * threads ? kv_heads : 1;
#pragma omp parallel num_threads(threads) if (batch * longest * heads * size > kParallelWork)
  {
    const long most = block * group;
    std::vector<float> queries(most * size), sums(most * size), lse(most);
    std::vector<float> own_sums(group * size), own_lse(group);
    std::vector<float> scores(std::max(most * (shared + kLanes), group * longest));
#pragma omp for schedule(dynamic, chunk)
    for (long task = 0; task < tasks; ++task) {
      const long first = task / kv_heads * block, kv_head = task % kv_heads;
      const long last = std::min(batch, first + block);
      for (long b = first; b < last; ++b) {
        const T* query = q + b * q_stride + kv_head * group * size;
        float* to = queries.data() + (b - first) * group * size;
        for (long i = 0; i < group * size; ++i) to[i] = load(query[i]);
      }
      if (shared)
        attend<T, CHUNKS>(queries.data(), cache, page_table + rows[first] * columns, kv_head,
                          (last - first) * group, 0, shared, scale, scores.data(),
                          sums.data(), lse.data());
      for (long b = first; b < last; ++b) {
        const long row = (b - first) * group;
        attend<T, CHUNKS>(queries.data() + row * size, cache, page_table + rows[b] * columns,
                          kv_head, group, shared, kv_lens[b], scale, scores.data(),
                          own_sums.data(), own_lse.data());
        T* to = out + (b * heads + kv_head * group) * size;
        for (long g = 0; g < group; ++g) {
          const float share = shared ? 1.0f / (1.0f + std::exp(own_lse[g] - lse[row + g])) : 0.0f;
          const float* common = sums.data() + (row + g) * size;
          const float* own = own_sums.data() + g * size;
          for (long d = 0; d < size; ++d)
            store(to[g * size + d], shared ? own[d] + share * (common[d] - own[d]) : own[d]);
        }
      }
    }
  }
}

template <class T>
void decode_attention_of_size(const T* q, long q_stride, const T* keys, const T* values,
                              const int32_t* page_table, long columns, const int32_t* rows,
                              const int32_t* kv_lens, long shared, T* out, long batch, long heads,
                              long kv_heads, long size, long page_size, float scale, int threads) {
  const Cache<T> cache{keys, values, __builtin_ctzl(page_size), kv_heads};
  const auto run = [&](auto kernel) {
    kernel(q, q_stride, cache, page_table, columns, rows, kv_lens, shared, out, batch, heads, scale, threads);
  };
  switch (size) {
    case 16: return run(decode_attention<T, 1>);
    case 32: return run(decode_attention<T, 2>);
    case 64: return run(decode_attention<T, 4>);
    case 80: return run(decode_attention<T, 5>);
    case 96: return run(decode_attention<T, 6>);
    case 128: return run(decode_attention<T, 8>);
  }
}

// The first of the greatest, as index. Of a row with a NaN: the first NaN.
template <class T>
void argmax(const T* x, int64_t* out, long rows, long size, int threads) {
  constexpr long block = 256;
#pragma omp parallel for num_threads(threads) if (rows * size > kParallelWork)
  for (long row = 0; row < rows; ++row) {
    const T* x_row = x + row * size;
    float top = -INFINITY;
    long at = 0;
    for (long first = 0; first < size; first += block) {
      const long last = std::min(size, first + block);
      float best = -INFINITY;
      int nans = 0;
#pragma omp simd reduction(max : best) reduction(| : nans)
      for (long i = first; i < last; ++i) {
        const float value = load(x_row[i]);
        nans |= value != value;
        best = std::max(best, value);
      }
      if (nans) best = NAN;
      if (nans || best > top) top = best, at = first;
      if (nans) break;
    }
    const bool nan = top != top;
    while (at < size - 1 && !(nan ? load(x_row[at]) != load(x_row[at]) : load(x_row[at]) == top))
      ++at;
    out[row] = at;
  }
}

}  // namespace

#define EXPORT(name, T)                                                                           \
  extern "C" void add_rms_norm_##name(T* x, const T* delta, const T* weight, T* out, long rows,   \
                                      long size, float eps, int threads) {                        \
    add_rms_norm(x, delta, weight, out, rows, size, eps, threads);                                \
  }                                                                                               \
  extern "C" void silu_and_mul_##name(const T* gate_up, T* out, long rows, long size,             \
                                      int threads) {                                              \
    silu_and_mul(gate_up, out, rows, size, threads);                                              \
  }                                                                                               \
  extern "C" void norm_rotate_store_##name(                                                       \
      T* qkv, const T* q_weight, const T* k_weight, const T* cos, const T* sin,                   \
      const int64_t* slots, T* keys, T* values, long tokens, long heads, long kv_heads,           \
      long size, float eps, int threads) {                                                        \
    norm_rotate_store(qkv, q_weight, k_weight, cos, sin, slots, keys, values, tokens, heads,      \
                      kv_heads, size, eps, threads);                                              \
  }                                                                                               \
  extern "C" void decode_attention_##name(                                                        \
      const T* q, long q_stride, const T* keys, const T* values, const int32_t* page_table,       \
      long columns, const int32_t* rows, const int32_t* kv_lens, long shared, T* out, long batch, long heads,               \
      long kv_heads, long size, long page_size, float scale, int threads) {                       \
    decode_attention_of_size(q, q_stride, keys, values, page_table, columns, rows, kv_lens,       \
                             shared, out, batch, heads, kv_heads, size,    \
                             page_size, scale, threads);                                          \
  }                                                                                               \
  extern "C" void argmax_##name(const T* x, int64_t* out, long rows, long size, int threads) {    \
    argmax(x, out, rows, size, threads);                                                          \
  }

EXPORT(float32, float)
EXPORT(bfloat16, bf16)
