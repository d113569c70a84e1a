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
#include <utility>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "bf16.h"

namespace {

constexpr long kParallelWork = 32768;  // elements; with fewer, waking threads costs more than it saves

inline void convert(float& to, float value) { to = value; }
inline void convert(float& to, bf16 value) { to = load(value); }
inline void convert(bf16& to, bf16 value) { to = value; }
inline void convert(bf16& to, float value) { store(to, value); }

template <class From, class To>
inline void convert(const From* from, long count, To* to) {
  for (long i = 0; i < count; ++i) convert(to[i], from[i]);
}

// One register of floats. Wider vectors than the machine's are split through memory, at a tenth of the
// speed.
#ifdef __AVX512F__
constexpr long kLanes = 16;
#else
constexpr long kLanes = 8;
#endif
typedef float Lanes __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

inline Lanes load_lanes(const float* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

inline Lanes load_lanes(const bf16* from) {
#if defined __AVX2__ && !defined __AVX512F__
  // Both halves of a register get all 8 numbers, and move four of them to the upper halves of words.
  // Zen 1 shifts words at half the speed.
  const __m256i halves =
      _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return (Lanes)_mm256_shuffle_epi8(
      halves, _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7, -1, -1, 8, 9,
                               -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15));
#else
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  return (Lanes)(__builtin_convertvector(halves, Words) << 16);
#endif
}

inline void store_lanes(float* to, Lanes lanes) { std::memcpy(to, &lanes, sizeof lanes); }

inline void store_lanes(bf16* to, Lanes lanes) {
  const Words words = (Words)lanes;
  const Words rounded = words + 0x7fff + ((words >> 16) & 1);
  const Words quiet_nan = Words{} + 0x7fc00000u;
  const Halves halves = __builtin_convertvector((lanes != lanes ? quiet_nan : rounded) >> 16, Halves);
  std::memcpy(to, &halves, sizeof halves);
}

using Indices = std::make_integer_sequence<int, kLanes>;

// v[0], v[1], ... with every index i replaced by i ^ STEP.
template <int STEP, int... I>
inline Lanes exchange(Lanes v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (I ^ STEP)...);
}

template <int STEP = kLanes / 2>
inline float sum_lanes(Lanes v) {
  if constexpr (STEP == 0) return v[0];
  else return sum_lanes<STEP / 2>(v + exchange<STEP>(v, Indices()));
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

template <class T, class C>
void norm_rotate_store(T* qkv, const T* q_weight, const T* k_weight, const T* cos, const T* sin,
                       const int64_t* slots, C* keys, C* values, long tokens, long heads,
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
    convert(k, kv_width, keys + slots[token] * kv_width);
    convert(k + kv_width, kv_width, values + slots[token] * kv_width);
  }
}

// The sums of pairs of lanes STEP apart, those of a and of b by turns.
template <int STEP, int... I>
inline Lanes sum_pairs(Lanes a, Lanes b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I & STEP ? kLanes + I - STEP : I)...) +
         __builtin_shufflevector(a, b, (I & STEP ? kLanes + I : I + STEP)...);
}

// Lane t of the result is the sum of the lanes of v[t], added pairwise.
template <int STEP = 1>
inline Lanes sum_each(Lanes v[kLanes]) {
  if constexpr (STEP < kLanes) {
    for (long i = 0; i < kLanes; i += 2 * STEP)
      v[i] = sum_pairs<STEP>(v[i], v[i + STEP], Indices());
    return sum_each<2 * STEP>(v);
  }
  return v[0];
}

// The cache of one layer: keys and values [pages, P, K, D].
template <class T>
struct Cache {
  const T* keys;
  const T* values;
  long page_bits, kv_heads;  // P = 2^page_bits
};

// Where the slots of kLanes positions begin, `first` and up; at `end` and beyond, that of the last
// position.
template <class T>
void find_slots(const T* base, const Cache<T>& cache, long slot_size, const int32_t* pages,
                long first, long end, const T* slots[kLanes]) {
  const long in_page = (1L << cache.page_bits) - 1;
  const auto slot_of = [&](long position) {
    const long page = pages[position >> cache.page_bits];
    return base + ((page << cache.page_bits) + (position & in_page)) * slot_size;
  };
  const bool in_one_page = kLanes <= in_page + 1 && first + kLanes <= end;
  for (long t = 0; t < kLanes; ++t)
    slots[t] = in_one_page && t ? slots[0] + t * slot_size
                                : slot_of(std::min(first + t, end - 1));
}

// The sum of products of q and k over one register of k.
template <class T>
inline Lanes add_products(Lanes sum, const float* q, const T* k) {
  return sum + load_lanes(q) * load_lanes(k);
}

template <class Q, class T>
constexpr long kStep = kLanes;

#ifdef __AVX512BF16__
// One instruction for 32 elements: products are exact, sums are in float.
inline Lanes add_products(Lanes sum, const bf16* q, const bf16* k) {
  return (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(q),
                                 (__m512bh)_mm512_loadu_si512(k));
}
template <>
constexpr long kStep<bf16, bf16> = 32;
template <class T, class C, int CHUNKS>
using Query = std::conditional_t<
    std::is_same_v<T, bf16> && std::is_same_v<C, bf16> && CHUNKS % 2 == 0, bf16, float>;
#else
template <class T, class C, int CHUNKS>
using Query = float;
#endif

// One query row's products with kLanes keys, summed lane by lane.
struct Products {
  Lanes of_key[kLanes];
};

// The products of one key, the t-th of kLanes, with ROWS rows of q.
template <int CHUNKS, int ROWS, class Q, class T>
void multiply_key(const Q* q, const T* key, long t, Products* products) {
  constexpr long size = CHUNKS * kLanes;
  Lanes sums[ROWS] = {};
#pragma GCC unroll 16
  for (long d = 0; d < size; d += kStep<Q, T>)
    for (long r = 0; r < ROWS; ++r) sums[r] = add_products(sums[r], q + r * size + d, key + d);
  for (long r = 0; r < ROWS; ++r) products[r].of_key[t] = sums[r];
}

constexpr long kTogether = 4;  // values that are added at once

// out[r] += the sum of weights[r][t] * values[t] for ROWS rows and kTogether values. These are at
// values[t] + offset.
template <int CHUNKS, int ROWS, class T>
void add_values(const float* weights, long row_size, const T* const* values, long offset,
                float* out) {
  constexpr long size = CHUNKS * kLanes;
  Lanes w[ROWS][kTogether];
  for (long r = 0; r < ROWS; ++r)
    for (long t = 0; t < kTogether; ++t) w[r][t] = Lanes{} + weights[r * row_size + t];
  for (long d = 0; d < size; d += kLanes) {
    Lanes v[kTogether];
#pragma GCC unroll 4
    for (long t = 0; t < kTogether; ++t) v[t] = load_lanes(values[t] + offset + d);
    for (long r = 0; r < ROWS; ++r) {
      Lanes sum = load_lanes(out + r * size + d);
      for (long t = 0; t < kTogether; ++t) sum += w[r][t] * v[t];
      store_lanes(out + r * size + d, sum);
    }
  }
}

template <class T>
inline void fetch(const T* from, long size) {
  for (long i = 0; i < size; i += 64 / long(sizeof(T))) __builtin_prefetch(from + i);
}

// use(r, number of rows) for rows begin .. end, two at a time.
template <class Use>
inline void for_rows(long begin, long end, const Use& use) {
  for (; begin + 2 <= end; begin += 2) use(begin, std::integral_constant<int, 2>());
  if (begin < end) use(begin, std::integral_constant<int, 1>());
}

// Tiles for many query rows, which are computed kRows at a time with two registers of sums each. The
// rows of a block may be up to kRows - 1 more than are asked for: their places exist, and what is in
// them is not used.
constexpr int kRows = kLanes == 16 ? 12 : 6;
constexpr long kKeyTile = 2 * kLanes, kValueTile = 32;  // positions

// Lane i of v[j] and lane j of v[i] change places.
template <int STEP, int... I>
inline void exchange_blocks(Lanes& a, Lanes& b, std::integer_sequence<int, I...>) {
  const Lanes first = __builtin_shufflevector(a, b, (I & STEP ? kLanes + I - STEP : I)...);
  b = __builtin_shufflevector(a, b, (I & STEP ? kLanes + I : I + STEP)...);
  a = first;
}

template <int STEP = 1>
inline void transpose(Lanes v[kLanes]) {
  if constexpr (STEP < kLanes) {
    for (long i = 0; i < kLanes; ++i)
      if (!(i & STEP)) exchange_blocks<STEP>(v[i], v[i + STEP], Indices());
    transpose<2 * STEP>(v);
  }
}

// kKeyTile rows of one key head as floats, transposed, so that a lane is a key.
template <class T, int CHUNKS>
void read_keys(const T* base, const Cache<T>& cache, const int32_t* pages, long first, long end,
               Lanes keys[CHUNKS * kLanes][2]) {
  const T* rows[kLanes];
  for (long half = 0; half < 2; ++half) {
    const long at = std::min(first + half * kLanes, end - 1);
    find_slots(base, cache, cache.kv_heads * CHUNKS * kLanes, pages, at, end, rows);
    for (long d = 0; d < CHUNKS * kLanes; d += kLanes) {
      Lanes block[kLanes];
      for (long t = 0; t < kLanes; ++t) block[t] = load_lanes(rows[t] + d);
      transpose(block);
      for (long i = 0; i < kLanes; ++i) keys[d + i][half] = block[i];
    }
  }
}

// kValueTile rows of one value head as floats.
template <class T, int CHUNKS>
void read_values(const T* base, const Cache<T>& cache, const int32_t* pages, long first, long end,
                 Lanes values[kValueTile][CHUNKS]) {
  const T* rows[kLanes];
  for (long t = 0; t < kValueTile; ++t) {
    if (t % kLanes == 0)
      find_slots(base, cache, cache.kv_heads * CHUNKS * kLanes, pages,
                 std::min(first + t, end - 1), end, rows);
    for (long c = 0; c < CHUNKS; ++c) values[t][c] = load_lanes(rows[t % kLanes] + c * kLanes);
  }
}

// scores[r][t] = scale * q[r] . keys[t] for rows begin .. end. The products are added in the order of
// `score`, each lane's first and then those sums in pairs, so that a prompt and a decode of the same
// token get the same bits.
template <int CHUNKS>
void score_tile(const float* q, long begin, long end, const Lanes keys[CHUNKS * kLanes][2],
                float scale, float* scores, long row_size) {
  constexpr long size = CHUNKS * kLanes, levels = __builtin_ctzl(kLanes);
  for (long r = begin; r < end; r += kRows) {
    const float* query = q + r * size;
    Lanes pending[levels + 1][kRows][2];  // sums of 1, 2, 4, ... lanes
    for (long lane = 0; lane < kLanes; ++lane) {
      Lanes sums[kRows][2] = {};
      for (long d = lane; d < size; d += kLanes)
#pragma GCC unroll 16
        for (long i = 0; i < kRows; ++i) {
          sums[i][0] += query[i * size + d] * keys[d][0];
          sums[i][1] += query[i * size + d] * keys[d][1];
        }
      long level = 0;
      for (; lane >> level & 1; ++level)
#pragma GCC unroll 16
        for (long i = 0; i < kRows; ++i)
          for (long half = 0; half < 2; ++half) sums[i][half] += pending[level][i][half];
      std::memcpy(pending[level], sums, sizeof sums);
    }
    for (long i = 0; i < kRows; ++i)
      for (long half = 0; half < 2; ++half)
        store_lanes(scores + (r + i) * row_size + half * kLanes, pending[levels][i][half] * scale);
  }
}

// out[r] += the sum of weights[r][t] * values[t] for rows begin .. end.
template <int CHUNKS>
void add_tile(const float* weights, long row_size, const Lanes values[kValueTile][CHUNKS],
              long begin, long end, float* out) {
  constexpr long size = CHUNKS * kLanes, together = CHUNKS % 2 ? 1 : 2;
  for (long r = begin; r < end; r += kRows)
    for (long c = 0; c < CHUNKS; c += together) {
      Lanes sums[kRows][together];
      for (long i = 0; i < kRows; ++i)
        std::memcpy(sums[i], out + (r + i) * size + c * kLanes, sizeof sums[i]);
      for (long t = 0; t < kValueTile; ++t)
#pragma GCC unroll 16
        for (long i = 0; i < kRows; ++i)
#pragma GCC unroll 2
          for (long j = 0; j < together; ++j)
            sums[i][j] += weights[(r + i) * row_size + t] * values[t][c + j];
      for (long i = 0; i < kRows; ++i)
        std::memcpy(out + (r + i) * size + c * kLanes, sums[i], sizeof sums[i]);
    }
}

// Softmax in place over the first `length` of `row_size` scores; the others become 0. Returns the
// logarithm of the sum of exponentials.
inline float softmax(float* row, long length, long row_size) {
  if (length <= 0) {
    std::fill(row, row + row_size, 0.0f);
    return -INFINITY;
  }
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

// Attention of query rows that share a key head and pages, over positions begin .. end. Row r sees
// positions below first_end + r / group: the G rows of a query position see one position more than
// those of the previous one. q and out: [rows + kRows, D]; lse: [rows]; scores: space for
// [rows + kRows, number of positions rounded up to kValueTile].
template <class T, int CHUNKS>
void attend(const float* q, const Cache<T>& cache, const int32_t* pages, long kv_head, long rows,
            long group, long begin, long first_end, long end, float scale, float* scores,
            float* out, float* lse) {
  constexpr long size = CHUNKS * kLanes;
  const long row_size = (end - begin + kValueTile - 1) / kValueTile * kValueTile;
  const auto first_row = [&](long position) {
    return std::max(0L, (position + 1 - first_end) * group);
  };
  Lanes keys[size][2];
  for (long first = begin; first < end; first += kKeyTile) {
    read_keys<T, CHUNKS>(cache.keys + kv_head * size, cache, pages, first, end, keys);
    score_tile<CHUNKS>(q, first_row(first), rows, keys, scale, scores + first - begin, row_size);
  }
  for (long r = 0; r < rows; ++r) {
    const long length = std::min(end, first_end + r / group) - begin;
    lse[r] = softmax(scores + r * row_size, length, row_size);
  }
  std::fill_n(out, rows * size, 0.0f);
  Lanes values[kValueTile][CHUNKS];
  for (long first = begin; first < end; first += kValueTile) {
    read_values<T, CHUNKS>(cache.values + kv_head * size, cache, pages, first, end, values);
    add_tile<CHUNKS>(scores + first - begin, row_size, values, first_row(first), rows, out);
  }
}

// Attention of one new token over positions begin .. end: G query rows for each of the key heads
// first_head .. first_head + num. The heads of a slot are adjacent, so pages are read once, in memory
// order. Slots are fetched some positions ahead, as if all were in one page. q and out: [num, G, D];
// lse: [num, G]; products: space for [num, G]; scores: space for [num, G, number of positions rounded
// up to kLanes].
template <class Q, class T, int CHUNKS>
void attend_to_own(const Q* q, const Cache<T>& cache, const int32_t* pages,
                   long first_head, long num, long group, long begin, long end, float scale,
                   Products* products, float* scores, float* out, float* lse) {
  constexpr long size = CHUNKS * kLanes, ahead = 2;
  const long row_size = (end - begin + kLanes - 1) / kLanes * kLanes;
  const long slot_size = cache.kv_heads * size;
  const T* slots[kLanes];
  for (long first = begin; first < end; first += kLanes) {
    find_slots(cache.keys + first_head * size, cache, slot_size, pages, first, end, slots);
    for (long t = 0; t < kLanes; ++t)
      for (long h = 0; h < num; ++h) {
        const T* key = slots[t] + h * size;
        fetch(key + ahead * slot_size, size);
        for_rows(h * group, (h + 1) * group, [&](long r, auto count) {
          multiply_key<CHUNKS, count>(q + r * size, key, t, products + r);
        });
      }
    for (long r = 0; r < num * group; ++r)
      store_lanes(scores + r * row_size + first - begin, sum_each(products[r].of_key) * scale);
  }
  for (long r = 0; r < num * group; ++r)
    lse[r] = softmax(scores + r * row_size, end - begin, row_size);
  std::fill_n(out, num * group * size, 0.0f);
  for (long first = begin; first < end; first += kLanes) {
    find_slots(cache.values + first_head * size, cache, slot_size, pages, first, end, slots);
    for (long t = 0; t < kLanes; t += kTogether)
      for (long h = 0; h < num; ++h) {
        for (long i = t; i < t + kTogether; ++i)
          fetch(slots[i] + kTogether * slot_size + h * size, size);
        for_rows(h * group, (h + 1) * group, [&](long r, auto count) {
          add_values<CHUNKS, count>(scores + r * row_size + first - begin + t, row_size, slots + t,
                                    h * size, out + r * size);
        });
      }
  }
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
template <class T, class C, int CHUNKS>
void attend_to_shared(const T* q, long q_stride, const Cache<C>& cache, const int32_t* pages,
                      long shared, long batch, long heads, float scale, int threads, float* sums,
                      float* lse) {
  constexpr long size = CHUNKS * kLanes;
  const long kv_heads = cache.kv_heads, group = heads / kv_heads;
  const long block = std::max(1L, 32 / group), blocks = (batch + block - 1) / block;
  const bool parallel = batch * shared * heads * size > kParallelWork;
#pragma omp parallel num_threads(threads) if (parallel)
  {
    const long most = block * group + kRows;
    std::vector<float> queries(most * size), out(most * size), log_sums(most);
    std::vector<float> scores(most * (shared + kValueTile));
#pragma omp for schedule(dynamic)
    for (long task = 0; task < blocks * kv_heads; ++task) {
      const long first = task / kv_heads * block, head = task % kv_heads * group;
      const long count = std::min(block, batch - first);
      read_queries(q + first * q_stride + head * size, q_stride, count, group * size,
                   queries.data());
      attend<C, CHUNKS>(queries.data(), cache, pages, head / group, count * group, group, 0,
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
template <class T, class C, int CHUNKS>
void decode_attention(const T* q, long q_stride, const Cache<C>& cache, const int32_t* page_table,
                      long columns, const int32_t* rows, const int32_t* kv_lens, long shared,
                      T* out, long batch, long heads, float scale, int threads) {
  constexpr long size = CHUNKS * kLanes;
  const long kv_heads = cache.kv_heads, group = heads / kv_heads;
  std::vector<float> shared_sums(shared ? batch * heads * size : 0);
  std::vector<float> shared_lse(shared ? batch * heads : 0);
  if (shared)
    attend_to_shared<T, C, CHUNKS>(q, q_stride, cache, page_table + rows[0] * columns, shared,
                                   batch, heads, scale, threads, shared_sums.data(),
                                   shared_lse.data());
  const long longest = *std::max_element(kv_lens, kv_lens + batch) - shared + kLanes;
  // A task has as many heads of a sequence as leave equal work for all threads. They are adjacent in
  // memory, and longer pieces are read faster.
  const auto is_even = [&](long tasks) { return tasks % threads == 0 || tasks >= 4 * threads; };
  long num = kv_heads;
  while (num > 1 && (kv_heads % num || !is_even(batch * (kv_heads / num)))) --num;
  const long parts = kv_heads / num;
#pragma omp parallel num_threads(threads) if (batch * longest * heads * size > kParallelWork)
  {
    const long width = num * group * size;
    std::vector<Query<T, C, CHUNKS>> queries(width);
    std::vector<float> sums(width), lse(num * group), scores(num * group * longest);
    std::vector<Products> products(num * group);
#pragma omp for schedule(dynamic)
    for (long task = 0; task < batch * parts; ++task) {
      const long b = task / parts, head = task % parts * num * group;
      const T* from = q + b * q_stride + head * size;
      convert(from, width, queries.data());
      attend_to_own<Query<T, C, CHUNKS>, C, CHUNKS>(
          queries.data(), cache, page_table + rows[b] * columns, head / group, num, group, shared,
          kv_lens[b], scale, products.data(), scores.data(), sums.data(), lse.data());
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
template <class T, class C, int CHUNKS>
void prefill_attention(const T* q, long q_stride, const Cache<C>& cache, const int32_t* pages,
                       long start, long tokens, T* out, long heads, float scale, int threads) {
  constexpr long size = CHUNKS * kLanes, segment = 1024, rows = 96;
  const long kv_heads = cache.kv_heads, group = heads / kv_heads;
  const long block = std::max(1L, rows / group), blocks = (tokens + block - 1) / block;
  const long longest = std::min(start + tokens, segment) + kValueTile;
#pragma omp parallel num_threads(threads) if (tokens * (start + tokens) * heads * size > kParallelWork)
  {
    const long most = block * group + kRows;
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
      for (long begin = 0; begin < end; begin += segment) {
        attend<C, CHUNKS>(queries.data(), cache, pages, kv_head, count * group, group, begin,
                          all_see, std::min(end, begin + segment), scale, scores.data(),
                          begin ? more_sums.data() : sums.data(),
                          begin ? more_lse.data() : lse.data());
        if (begin)
          merge(more_sums.data(), more_lse.data(), count * group, size, sums.data(), lse.data());
      }
      for (long i = 0; i < count; ++i) {
        T* to = out + (first + i) * heads * size + first_head;
        for (long d = 0; d < group * size; ++d) store(to[d], sums[i * group * size + d]);
      }
    }
  }
}

#define FOR_EACH_SIZE(kernel, ...)                                \
  switch (size) {                                                 \
    case 16: return kernel<T, C, 16 / kLanes>(__VA_ARGS__);       \
    case 32: return kernel<T, C, 32 / kLanes>(__VA_ARGS__);       \
    case 64: return kernel<T, C, 64 / kLanes>(__VA_ARGS__);       \
    case 80: return kernel<T, C, 80 / kLanes>(__VA_ARGS__);       \
    case 96: return kernel<T, C, 96 / kLanes>(__VA_ARGS__);       \
    case 128: return kernel<T, C, 128 / kLanes>(__VA_ARGS__);     \
  }

template <class T, class C>
void decode_attention_of_size(const T* q, long q_stride, const C* keys, const C* values,
                              const int32_t* page_table, long columns, const int32_t* rows,
                              const int32_t* kv_lens, long shared, T* out, long batch, long heads,
                              long kv_heads, long size, long page_size, float scale, int threads) {
  const Cache<C> cache{keys, values, __builtin_ctzl(page_size), kv_heads};
  FOR_EACH_SIZE(decode_attention, q, q_stride, cache, page_table, columns, rows, kv_lens, shared,
                out, batch, heads, scale, threads)
}

template <class T, class C>
void prefill_attention_of_size(const T* q, long q_stride, const C* keys, const C* values,
                               const int32_t* pages, long start, long tokens, T* out, long heads,
                               long kv_heads, long size, long page_size, float scale,
                               int threads) {
  const Cache<C> cache{keys, values, __builtin_ctzl(page_size), kv_heads};
  FOR_EACH_SIZE(prefill_attention, q, q_stride, cache, pages, start, tokens, out, heads, scale,
                threads)
}

}  // namespace

#include "product.h"

#define EXPORT_OPERATORS(name, T)                                                                  \
  extern "C" void add_rms_norm_##name(T* x, const T* delta, const T* weight, T* out, long rows,    \
                                      long size, float eps, int threads) {                         \
    add_rms_norm(x, delta, weight, out, rows, size, eps, threads);                                 \
  }                                                                                                \
  extern "C" void silu_and_mul_##name(const T* gate_up, T* out, long rows, long size,              \
                                      int threads) {                                               \
    silu_and_mul(gate_up, out, rows, size, threads);                                               \
  }

// C: the type of the cache.
#define EXPORT_ATTENTION(name, T, C)                                                               \
  extern "C" void norm_rotate_store_##name(                                                        \
      T* qkv, const T* q_weight, const T* k_weight, const T* cos, const T* sin,                    \
      const int64_t* slots, C* keys, C* values, long tokens, long heads, long kv_heads,            \
      long size, float eps, int threads) {                                                         \
    norm_rotate_store(qkv, q_weight, k_weight, cos, sin, slots, keys, values, tokens, heads,       \
                      kv_heads, size, eps, threads);                                               \
  }                                                                                                \
  extern "C" void decode_attention_##name(                                                         \
      const T* q, long q_stride, const C* keys, const C* values, const int32_t* page_table,        \
      long columns, const int32_t* rows, const int32_t* kv_lens, long shared, T* out, long batch,  \
      long heads, long kv_heads, long size, long page_size, float scale, int threads) {            \
    decode_attention_of_size(q, q_stride, keys, values, page_table, columns, rows, kv_lens,        \
                             shared, out, batch, heads, kv_heads, size, page_size, scale,          \
                             threads);                                                             \
  }                                                                                                \
  extern "C" void prefill_attention_##name(                                                        \
      const T* q, long q_stride, const C* keys, const C* values, const int32_t* pages, long start, \
      long tokens, T* out, long heads, long kv_heads, long size, long page_size, float scale,      \
      int threads) {                                                                               \
    prefill_attention_of_size(q, q_stride, keys, values, pages, start, tokens, out, heads,         \
                              kv_heads, size, page_size, scale, threads);                          \
  }

EXPORT_OPERATORS(float32, float)
EXPORT_OPERATORS(bfloat16, bf16)
EXPORT_ATTENTION(float32_in_float32, float, float)
EXPORT_ATTENTION(float32_in_bfloat16, float, bf16)
EXPORT_ATTENTION(bfloat16_in_bfloat16, bf16, bf16)

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
