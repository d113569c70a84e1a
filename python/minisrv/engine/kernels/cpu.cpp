// The small operators of a step on a CPU; each makes one pass over memory where torch makes several.
// `cpu.py` compiles this file for the machine it runs on and documents the arguments.
//
// Element types are float and bf16; all arithmetic is in float. Shapes: T tokens, B decodes, H query
// heads, K key-value heads, G = H / K, D head size, P tokens per page.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr long kParallelWork = 32768;  // elements; with fewer, waking threads costs more than it saves

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

inline void convert(float& to, float value) { to = value; }
inline void convert(float& to, bf16 value) { to = load(value); }
inline void convert(bf16& to, bf16 value) { to = value; }

// 16 floats; the compiler splits them if the machine's registers are smaller.
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

// exp(x) for x <= 0, as 2^n * p(r) with the Taylor polynomial p on |r| <= ln 2 / 2. Error 2e-7.
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

// Normalise one head (if there is a weight), then rotate its first half against its second.
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

// Lane t of the result is the sum of the lanes of v[t], added pairwise in four rounds.
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

// The cache of one layer: keys and values [pages, P, K, D].
template <class T>
struct Cache {
  const T* keys;
  const T* values;
  long page_bits, kv_heads;  // P = 2^page_bits
};

// 16 rows of one key head, positions `first` and up, as floats. Rows at `end` and beyond repeat the
// last one.
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

// scores[r][t] = q[r] . tile[t], for a few rows: the 16 products of a row are reduced together.
template <int CHUNKS>
void score_few(const float* q, long rows, const Lanes tile[kLanes][CHUNKS], float scale,
               float* scores, long row_size) {
  for (long r = 0; r < rows; ++r) {
    const float* query = q + r * CHUNKS * kLanes;
    Lanes products[kLanes];
    for (long t = 0; t < kLanes; ++t) {
      products[t] = load_lanes(query) * tile[t][0];
      for (long c = 1; c < CHUNKS; ++c) products[t] += load_lanes(query + c * kLanes) * tile[t][c];
    }
    store_lanes(scores + r * row_size, sum_each(products) * scale);
  }
}

// The same for many rows: the tile is transposed, so that a lane is a key, and four rows are
// computed together.
template <int CHUNKS>
void score_many(const float* q, long rows, const Lanes tile[kLanes][CHUNKS], float scale,
                float* scores, long row_size) {
  constexpr long size = CHUNKS * kLanes, step = 4;
  Lanes turned[size];
  for (long d = 0; d < size; ++d)
    for (long t = 0; t < kLanes; ++t) turned[d][t] = tile[t][d / kLanes][d % kLanes];
  for (long r = 0; r < rows; r += step) {
    const float* query[step];
    for (long i = 0; i < step; ++i) query[i] = q + std::min(r + i, rows - 1) * size;
    Lanes sums[step] = {};
    for (long d = 0; d < size; ++d)
      for (long i = 0; i < step; ++i) sums[i] += query[i][d] * turned[d];
    for (long i = 0; i < step; ++i)
      store_lanes(scores + std::min(r + i, rows - 1) * row_size, sums[i] * scale);
  }
}

// Softmax in place over the first `length` of `row_size` scores; the others become 0. Returns the
// logarithm of the sum of exponentials.
inline float softmax(float* row, long length, long row_size) {
  float top = row[0], sum = 0;
#pragma omp simd reduction(max : top)
  for (long t = 0; t < length; ++t) top = std::max(top, row[t]);
#pragma omp simd reduction(+ : sum)
  for (long t = 0; t < length; ++t) sum += row[t] = exp_negative(row[t] - top);
  const float share = 1.0f / sum;
#pragma omp simd
  for (long t = 0; t < length; ++t) row[t] *= share;
  std::fill(row + length, row + row_size, 0.0f);
  return top + std::log(sum);
}

// out += the weighted sum of the rows of the tile.
template <int CHUNKS>
void add_values(const float* weights, const Lanes tile[kLanes][CHUNKS], float* out) {
  Lanes even[CHUNKS] = {}, odd[CHUNKS];
  std::memcpy(odd, out, sizeof odd);
  for (long t = 0; t < kLanes; t += 2)
    for (long c = 0; c < CHUNKS; ++c) {
      even[c] += weights[t] * tile[t][c];
      odd[c] += weights[t + 1] * tile[t + 1][c];
    }
  for (long c = 0; c < CHUNKS; ++c) store_lanes(out + c * kLanes, even[c] + odd[c]);
}

// Attention of query rows that share a key head and pages, over positions begin .. end. Row r sees
// positions below first_end + r / group: the G rows of a query position see one position more than
// those of the previous one. q and out: [rows, D]; lse: [rows]; scores: space for [rows, number of
// positions rounded up to 16].
template <class T, int CHUNKS>
void attend(const float* q, const Cache<T>& cache, const int32_t* pages, long kv_head, long rows,
            long group, long begin, long first_end, long end, float scale, float* scores,
            float* out, float* lse) {
  constexpr long size = CHUNKS * kLanes;
  const long row_size = (end - begin + kLanes - 1) / kLanes * kLanes;
  const auto first_row = [&](long position) {
    return std::max(0L, (position + 1 - first_end) * group);
  };
  Lanes tile[kLanes][CHUNKS];
  for (long first = begin; first < end; first += kLanes) {
    read_tile<T, CHUNKS>(cache.keys, cache, pages, kv_head, first, end, tile);
    const long r = first_row(first);
    const auto score = rows - r < 8 ? score_few<CHUNKS> : score_many<CHUNKS>;
    score(q + r * size, rows - r, tile, scale, scores + r * row_size + first - begin, row_size);
  }
  for (long r = 0; r < rows; ++r) {
    const long length = std::min(end, first_end + r / group) - begin;
    lse[r] = softmax(scores + r * row_size, length, row_size);
  }
  std::fill_n(out, rows * size, 0.0f);
  for (long first = begin; first < end; first += kLanes) {
    read_tile<T, CHUNKS>(cache.values, cache, pages, kv_head, first, end, tile);
    for (long r = first_row(first); r < rows; ++r)
      add_values<CHUNKS>(scores + r * row_size + first - begin, tile, out + r * size);
  }
}

// The slots of 16 positions, `first` and up; at `end` and beyond, that of the last one.
template <class T>
void find_slots(const T* base, const Cache<T>& cache, long slot_size, const int32_t* pages,
                long first, long end, const T* slots[kLanes]) {
  const long in_page = (1L << cache.page_bits) - 1;
  const auto slot_of = [&](long position) {
    const long page = pages[position >> cache.page_bits];
    return base + ((page << cache.page_bits) + (position & in_page)) * slot_size;
  };
  const bool in_one_page = cache.page_bits >= 4 && first + kLanes <= end;
  for (long t = 0; t < kLanes; ++t)
    slots[t] = in_one_page && t ? slots[0] + t * slot_size
                                : slot_of(std::min(first + t, end - 1));
}

// products[t] = q . slots[t], not yet reduced over lanes.
template <int CHUNKS, class T>
void multiply(const float* q, const T* const slots[kLanes], long offset, Lanes products[kLanes]) {
  for (long t = 0; t < kLanes; ++t) {
    const T* row = slots[t] + offset;
    products[t] = load_lanes(q) * load_lanes(row);
    for (long c = 1; c < CHUNKS; ++c)
      products[t] += load_lanes(q + c * kLanes) * load_lanes(row + c * kLanes);
  }
}

#ifdef __AVX512BF16__
// The same with one instruction per 32 elements: products are exact, sums are in float.
template <int CHUNKS>
void multiply(const bf16* q, const bf16* const slots[kLanes], long offset,
              Lanes products[kLanes]) {
  for (long t = 0; t < kLanes; ++t) {
    const bf16* row = slots[t] + offset;
    __m512 sum = _mm512_setzero_ps();
    for (long d = 0; d < CHUNKS * kLanes; d += 32)
      sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(q + d),
                             (__m512bh)_mm512_loadu_si512(row + d));
    products[t] = (Lanes)sum;
  }
}
template <class T, int CHUNKS>
using Query = std::conditional_t<std::is_same_v<T, bf16> && CHUNKS % 2 == 0, bf16, float>;
#else
template <class T, int CHUNKS>
using Query = float;
#endif

// Attention of one new token over positions begin .. end: G query rows for each of the key heads
// first_head .. first_head + num. The heads of a slot are adjacent, so pages are read once, in memory
// order, with prefetching. q and out: [num, G, D]; lse: [num, G]; scores: space for [num * G, number
// of positions rounded up to 16].
template <class T, int CHUNKS>
void attend_to_own(const Query<T, CHUNKS>* q, const Cache<T>& cache, const int32_t* pages,
                   long first_head, long num, long group, long begin, long end, float scale,
                   float* scores, float* out, float* lse) {
  constexpr long size = CHUNKS * kLanes, line = 64 / sizeof(T);
  const long row_size = (end - begin + kLanes - 1) / kLanes * kLanes;
  const long slot_size = cache.kv_heads * size;
  const T* slots[kLanes];
  const T* later[kLanes];
  const auto read = [&](const T* base, const auto& use) {
    find_slots(base, cache, slot_size, pages, begin, end, later);
    for (long first = begin; first < end; first += kLanes) {
      std::copy_n(later, kLanes, slots);
      if (first + kLanes < end) {
        find_slots(base, cache, slot_size, pages, first + kLanes, end, later);
        for (long t = 0; t < kLanes; ++t)
          for (long d = 0; d < num * size; d += line) __builtin_prefetch(later[t] + d);
      }
      for (long h = 0; h < num; ++h) use(first - begin, h);
    }
  };
  read(cache.keys + first_head * size, [&](long at, long h) {
    for (long r = h * group; r < (h + 1) * group; ++r) {
      Lanes products[kLanes];
      multiply<CHUNKS>(q + r * size, slots, h * size, products);
      store_lanes(scores + r * row_size + at, sum_each(products) * scale);
    }
  });
  for (long r = 0; r < num * group; ++r)
    lse[r] = softmax(scores + r * row_size, end - begin, row_size);
  std::fill_n(out, num * group * size, 0.0f);
  read(cache.values + first_head * size, [&](long at, long h) {
    Lanes tile[kLanes][CHUNKS];
    for (long t = 0; t < kLanes; ++t)
      for (long c = 0; c < CHUNKS; ++c) tile[t][c] = load_lanes(slots[t] + h * size + c * kLanes);
    for (long r = h * group; r < (h + 1) * group; ++r)
      add_values<CHUNKS>(scores + r * row_size + at, tile, out + r * size);
  });
}

// Merge attention over further positions into `out` and `lse`, weighted by sums of exponentials.
inline void merge(const float* more_out, const float* more_lse, long rows, long size, float* out,
                  float* lse) {
  for (long r = 0; r < rows; ++r) {
    const float share = 1.0f / (1.0f + std::exp(lse[r] - more_lse[r]));
    for (long d = r * size; d < (r + 1) * size; ++d) out[d] += share * (more_out[d] - out[d]);
    const float top = std::max(lse[r], more_lse[r]);
    lse[r] = top + std::log1p(std::exp(-std::fabs(lse[r] - more_lse[r])));
  }
}

// The queries of `count` tokens for one key head as floats, [count, G, D].
template <class T>
void read_queries(const T* q, long q_stride, long count, long width, float* to) {
  for (long i = 0; i < count; ++i)
    for (long d = 0; d < width; ++d) to[i * width + d] = load(q[i * q_stride + d]);
}

// Attention of decodes over their shared prefix: the first `shared` positions, which are whole pages.
// These are read once per 32 query rows. q: [B, H, D] with a stride of `q_stride` elements between
// tokens; sums: [B, H, D]; lse: [B, H].
template <class T, int CHUNKS>
void attend_to_shared(const T* q, long q_stride, const Cache<T>& cache, const int32_t* pages,
                      long shared, long batch, long heads, float scale, int threads, float* sums,
                      float* lse) {
  constexpr long size = CHUNKS * kLanes;
  const long kv_heads = cache.kv_heads, group = heads / kv_heads;
  const long block = std::max(1L, 32 / group), blocks = (batch + block - 1) / block;
  const bool parallel = batch * shared * heads * size > kParallelWork;
#pragma omp parallel num_threads(threads) if (parallel)
  {
    const long most = block * group;
    std::vector<float> queries(most * size), out(most * size), log_sums(most);
    std::vector<float> scores(most * (shared + kLanes));
#pragma omp for schedule(dynamic)
    for (long task = 0; task < blocks * kv_heads; ++task) {
      const long first = task / kv_heads * block, head = task % kv_heads * group;
      const long count = std::min(block, batch - first);
      read_queries(q + first * q_stride + head * size, q_stride, count, group * size,
                   queries.data());
      attend<T, CHUNKS>(queries.data(), cache, pages, head / group, count * group, group, 0,
                        shared, shared, scale, scores.data(), out.data(), log_sums.data());
      for (long b = 0; b < count; ++b) {
        std::copy_n(&out[b * group * size], group * size,
                    sums + ((first + b) * heads + head) * size);
        std::copy_n(&log_sums[b * group], group, lse + (first + b) * heads + head);
      }
    }
  }
}

// Attention of one new token per sequence over its pages. q: [B, H, D] with a stride of `q_stride`
// elements between tokens; page_table: rows of `columns` pages. The first `shared` positions, which
// are whole pages, are the same for all sequences.
template <class T, int CHUNKS>
void decode_attention(const T* q, long q_stride, const Cache<T>& cache, const int32_t* page_table,
                      long columns, const int32_t* rows, const int32_t* kv_lens, long shared,
                      T* out, long batch, long heads, float scale, int threads) {
  constexpr long size = CHUNKS * kLanes;
  const long kv_heads = cache.kv_heads, group = heads / kv_heads;
  std::vector<float> shared_sums(shared ? batch * heads * size : 0);
  std::vector<float> shared_lse(shared ? batch * heads : 0);
  if (shared)
    attend_to_shared<T, CHUNKS>(q, q_stride, cache, page_table + rows[0] * columns, shared, batch,
                                heads, scale, threads, shared_sums.data(), shared_lse.data());
  const long longest = *std::max_element(kv_lens, kv_lens + batch) - shared + kLanes;
  // A task is all heads of a sequence if that gives enough tasks, otherwise a single head.
  const long num = batch >= 2 * threads ? kv_heads : 1, parts = kv_heads / num;
#pragma omp parallel num_threads(threads) if (batch * longest * heads * size > kParallelWork)
  {
    const long width = num * group * size;
    std::vector<Query<T, CHUNKS>> queries(width);
    std::vector<float> sums(width), lse(num * group), scores(num * group * longest);
#pragma omp for schedule(dynamic)
    for (long task = 0; task < batch * parts; ++task) {
      const long b = task / parts, head = task % parts * num * group;
      const T* from = q + b * q_stride + head * size;
      for (long d = 0; d < width; ++d) convert(queries[d], from[d]);
      attend_to_own<T, CHUNKS>(queries.data(), cache, page_table + rows[b] * columns, head / group,
                               num, group, shared, kv_lens[b], scale, scores.data(), sums.data(),
                               lse.data());
      const long at = b * heads + head;
      if (shared)
        merge(&shared_sums[at * size], &shared_lse[at], num * group, size, sums.data(),
              lse.data());
      for (long d = 0; d < width; ++d) store(out[at * size + d], sums[d]);
    }
  }
}

// Causal attention of a prefill chunk: `tokens` positions, `start` and up, whose keys and values are
// already in the pages. q: [tokens, H, D] with a stride of `q_stride` elements between tokens. Blocks
// of queries process the positions in segments, so that the scores stay in the L2 cache.
template <class T, int CHUNKS>
void prefill_attention(const T* q, long q_stride, const Cache<T>& cache, const int32_t* pages,
                       long start, long tokens, T* out, long heads, float scale, int threads) {
  constexpr long size = CHUNKS * kLanes, segment = 1024, rows = 64;
  const long kv_heads = cache.kv_heads, group = heads / kv_heads;
  const long block = std::max(1L, rows / group), blocks = (tokens + block - 1) / block;
  const long longest = std::min(start + tokens, segment + block) + kLanes;
#pragma omp parallel num_threads(threads) if (tokens * (start + tokens) * heads * size > kParallelWork)
  {
    const long most = block * group;
    std::vector<float> queries(most * size), sums(most * size), lse(most), scores(most * longest);
    std::vector<float> more_sums(most * size), more_lse(most);
#pragma omp for schedule(dynamic)
    for (long task = 0; task < blocks * kv_heads; ++task) {
      // The last blocks see the most positions, so they are scheduled first.
      const long first = (blocks - 1 - task / kv_heads) * block, kv_head = task % kv_heads;
      const long count = std::min(block, tokens - first), first_head = kv_head * group * size;
      const long all_see = start + first + 1, end = start + first + count;
      read_queries(q + first * q_stride + first_head, q_stride, count, group * size,
                   queries.data());
      for (long begin = 0; begin < end;) {
        const bool is_last = begin + segment >= all_see;  // so that every row sees part of it
        const long cut = is_last ? end : begin + segment;
        attend<T, CHUNKS>(queries.data(), cache, pages, kv_head, count * group, group, begin,
                          is_last ? all_see : cut, cut, scale, scores.data(),
                          begin ? more_sums.data() : sums.data(),
                          begin ? more_lse.data() : lse.data());
        if (begin)
          merge(more_sums.data(), more_lse.data(), count * group, size, sums.data(), lse.data());
        begin = cut;
      }
      for (long i = 0; i < count; ++i) {
        T* to = out + (first + i) * heads * size + first_head;
        for (long d = 0; d < group * size; ++d) store(to[d], sums[i * group * size + d]);
      }
    }
  }
}

#define FOR_EACH_SIZE(kernel, ...)                \
  switch (size) {                                 \
    case 16: return kernel<T, 1>(__VA_ARGS__);    \
    case 32: return kernel<T, 2>(__VA_ARGS__);    \
    case 64: return kernel<T, 4>(__VA_ARGS__);    \
    case 80: return kernel<T, 5>(__VA_ARGS__);    \
    case 96: return kernel<T, 6>(__VA_ARGS__);    \
    case 128: return kernel<T, 8>(__VA_ARGS__);   \
  }

template <class T>
void decode_attention_of_size(const T* q, long q_stride, const T* keys, const T* values,
                              const int32_t* page_table, long columns, const int32_t* rows,
                              const int32_t* kv_lens, long shared, T* out, long batch, long heads,
                              long kv_heads, long size, long page_size, float scale, int threads) {
  const Cache<T> cache{keys, values, __builtin_ctzl(page_size), kv_heads};
  FOR_EACH_SIZE(decode_attention, q, q_stride, cache, page_table, columns, rows, kv_lens, shared,
                out, batch, heads, scale, threads)
}

template <class T>
void prefill_attention_of_size(const T* q, long q_stride, const T* keys, const T* values,
                               const int32_t* pages, long start, long tokens, T* out, long heads,
                               long kv_heads, long size, long page_size, float scale,
                               int threads) {
  const Cache<T> cache{keys, values, __builtin_ctzl(page_size), kv_heads};
  FOR_EACH_SIZE(prefill_attention, q, q_stride, cache, pages, start, tokens, out, heads, scale,
                threads)
}

}  // namespace

#include "product.h"

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
      long columns, const int32_t* rows, const int32_t* kv_lens, long shared, T* out, long batch, \
      long heads, long kv_heads, long size, long page_size, float scale, int threads) {           \
    decode_attention_of_size(q, q_stride, keys, values, page_table, columns, rows, kv_lens,       \
                             shared, out, batch, heads, kv_heads, size, page_size, scale,         \
                             threads);                                                            \
  }                                                                                               \
  extern "C" void prefill_attention_##name(                                                       \
      const T* q, long q_stride, const T* keys, const T* values, const int32_t* pages,            \
      long start, long tokens, T* out, long heads, long kv_heads, long size, long page_size,      \
      float scale, int threads) {                                                                 \
    prefill_attention_of_size(q, q_stride, keys, values, pages, start, tokens, out, heads,        \
                              kv_heads, size, page_size, scale, threads);                         \
  }

EXPORT(float32, float)
EXPORT(bfloat16, bf16)

// Set logits to -inf where the mask of a sample has a zero: bit i of word w is token 32 w + i.
extern "C" void mask_logits(float* logits, const int32_t* samples, const uint32_t* masks, long rows,
                            long words, long size, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * size > kParallelWork)
  for (long row = 0; row < rows; ++row) {
    float* x = logits + samples[row] * size;
    for (long first = 0; first < size; first += 32) {
      const uint32_t mask = masks[row * words + first / 32];
      if (mask == ~uint32_t(0)) continue;
      const long count = std::min(size - first, 32l);
#pragma omp simd
      for (long i = 0; i < count; ++i) x[first + i] = mask >> i & 1 ? x[first + i] : -INFINITY;
    }
  }
}

// Index of the first maximum of each row; of the first NaN if there is one.
extern "C" void argmax(const float* x, int64_t* out, long rows, long size, int threads) {
  constexpr long block = 256;
#pragma omp parallel for num_threads(threads) if (rows * size > kParallelWork)
  for (long row = 0; row < rows; ++row) {
    const float* x_row = x + row * size;
    float top = -INFINITY;
    long at = 0;
    for (long first = 0; first < size; first += block) {
      const long last = std::min(size, first + block);
      float best = -INFINITY;
      int nans = 0;
#pragma omp simd reduction(max : best) reduction(| : nans)
      for (long i = first; i < last; ++i) {
        nans |= x_row[i] != x_row[i];
        best = std::max(best, x_row[i]);
      }
      if (nans) best = NAN;
      if (nans || best > top) top = best, at = first;
      if (nans) break;
    }
    const bool nan = top != top;
    while (at < size - 1 && !(nan ? x_row[at] != x_row[at] : x_row[at] == top)) ++at;
    out[row] = at;
  }
}

namespace {

inline bool all_zero(const int16_t* x, long count) {
  if (count < 32) return std::all_of(x, x + count, [](int16_t value) { return value == 0; });
  uint64_t words[8], any = 0;
  std::memcpy(words, x, sizeof words);
  for (uint64_t word : words) any |= word;
  return any == 0;
}

}  // namespace

// Repetition, frequency and presence penalties. counts: rows of how often each token was output, -1
// if it occurs only in the prompt. factors: the three penalties, each for all samples. Few tokens
// occur: the logits of the others are not read, and those of a block are fetched ahead of their use.
extern "C" void penalize(float* logits, const int16_t* counts, const int64_t* samples,
                         const int64_t* rows, const float* factors, long num, long size,
                         int threads) {
  constexpr long block = 4096, step = 32;
  const long parts = (size + block - 1) / block, work = num * size / 16;  // most are only skimmed
#pragma omp parallel for num_threads(threads) if (work > kParallelWork)
  for (long task = 0; task < num * parts; ++task) {
    const long i = task / parts, first = task % parts * block, end = std::min(size, first + block);
    const float repetition = factors[i], frequency = factors[num + i];
    const float presence = factors[2 * num + i];
    const int16_t* times = counts + rows[i] * size;
    float* x = logits + samples[i] * size;
    long found[block / step], num_found = 0;
    for (long at = first; at < end; at += step) {
      if (all_zero(times + at, std::min(step, end - at))) continue;
      __builtin_prefetch(x + at, 1);
      __builtin_prefetch(x + at + step - 1, 1);
      found[num_found++] = at;
    }
    for (long n = 0; n < num_found; ++n) {
      const long last = std::min(end, found[n] + step);
#pragma omp simd
      for (long t = found[n]; t < last; ++t) {
        const float given = x[t], outputs = times[t] > 0 ? times[t] : 0;
        const float repeated = given > 0 ? given / repetition : given * repetition;
        const float value = repeated - outputs * frequency - (outputs > 0 ? presence : 0);
        x[t] = times[t] ? value : given;
      }
    }
  }
}
