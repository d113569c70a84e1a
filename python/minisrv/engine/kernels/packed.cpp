// Products with weights of 4 or 8 bits: x [M, I] times weights [O, I], transposed. `packed.py`
// calls these functions, and documents the weights.
//
// Inputs are rounded to 8 bits, with a scale for each 32 of a row. A group's products are then
// summed as integers, and the sums of the groups as floats, in order:
//     out[m, o] = sum over g of input_scale[m, g] * (scale[o, g] * dot + offset[o, g] * sum(x))
// where dot = sum((value - zero) * x) = sum(value * x) - zero * sum(x). The four inputs of greatest
// magnitude of a row are zero in these sums, and are multiplied as floats: with such an outlier the
// other 31 of its group would be rounded coarsely. (The idea is from LLM.int8(), arXiv:2208.07339.)
// A row does not depend on the other rows, and is the same for any number of rows and threads.
//
// Weights are stored in panels of 16 outputs. A panel is a sequence of blocks of some groups, each
// with its scales first. The values of a block are [words, 16]: a 32-bit word holds one output's
// values for four inputs, or with 4 bits for eight: inputs 4 i .. 4 i + 3 of 32 in the low halves
// of its bytes, 16 + 4 i .. 16 + 4 i + 3 in the high ones.

#include <algorithm>
#include <cmath>
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

constexpr long kPanel = 16;      // outputs
constexpr long kMaxGroups = 16;  // of a block
constexpr long kAhead = 2048;    // bytes of weights that one row fetches ahead of their use
constexpr long kRounded = 32;    // inputs that are rounded with one scale
constexpr long kOutliers = 4;    // inputs of a row that are not rounded
constexpr float kMost = 127, kLeast = 1e-36f;

#ifdef __AVX512VNNI__
constexpr long kLanes = 16, kMaxRows = 8;
#else
constexpr long kLanes = 8, kMaxRows = 4;  // 8 of 16 registers hold sums
#endif
constexpr long kParts = kPanel / kLanes;  // vectors per panel
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef float Floats __attribute__((vector_size(kLanes * 4)));
struct PanelFloats {
  float lanes[kPanel];
};

#if defined __AVX512VNNI__ || defined __AVXVNNI__
constexpr long kBias = 128;  // added to signed values, since these instructions take unsigned ones
#else
constexpr long kBias = 0;
#endif
#if defined __AVX2__ && !defined __AVX512VNNI__ && !defined __AVXVNNI__
constexpr bool kInPairs = true;  // whether small products are summed in 16 bits
#else
constexpr bool kInPairs = false;
#endif

// How the values of the weights are stored.
enum Values { kNibbles, kSmall /* bytes below 16 */, kFew /* bytes from -32 to 32 */, kBytes };
constexpr int kFewMost = 32;

// Keeps a vector in a register. Without it, GCC reads weights again for every row, and adds the
// products of a group at its end, for which it has too few registers.
template <class V>
inline void keep(V& vector) {
#ifdef __AVX2__
  if constexpr (sizeof vector == 32) asm("" : "+x"(vector));
#else
  (void)vector;
#endif
}

// The sums of the products of one group. begin: with the number that is added to each, or for
// small values on AVX2 with its two parts as 16-bit numbers, of the inputs 4 i, 4 i + 1 and of the
// others. add: `w` are four weights of each lane, `x` four inputs; of few values, at most 16 inputs.
template <Values VALUES, bool SIGNED>
struct Dot {
  Ints sum;

#if defined __AVX512VNNI__
  void begin(int32_t start) { sum = Ints{} + start; }
  void add(Words w, Words x) {
    sum = (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
  }
  Ints total() const { return sum; }
#elif defined __AVXVNNI__
  void begin(int32_t start) { sum = Ints{} + start; }
  void add(Words w, Words x) {
    sum = (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, (__m256i)x);
  }
  Ints total() const { return sum; }
#elif defined __AVX2__
  // Pairs of products up to 2 * 15 * 127, 2 * 32 * 127 or 2 * 128 * 127: 8 of the first and 4 of
  // the second are summed in 16 bits, of the last only a single pair fits.
  void begin(int32_t start) { sum = Ints{} + start; }
  void add(Words w, Words x) {
    __m256i magnitude = (__m256i)w, inputs = (__m256i)x;
    if constexpr (SIGNED && (VALUES == kFew || VALUES == kBytes)) {
      magnitude = _mm256_abs_epi8(magnitude);
      inputs = _mm256_sign_epi8(inputs, (__m256i)w);
    }
    const __m256i pairs = _mm256_maddubs_epi16(magnitude, inputs);
    if constexpr (VALUES == kBytes)
      sum += (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    else
      sum = (Ints)_mm256_add_epi16((__m256i)sum, pairs);
    keep(sum);
  }
  Ints total() const {
    if constexpr (VALUES == kBytes) return sum;
    return (Ints)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1));
  }
#else
  void begin(int32_t start) { sum = Ints{} + start; }
  void add(Words w, Words x) {
    for (int shift = 0; shift < 32; shift += 8)
      sum += ((Ints)(w << (24 - shift)) >> 24) * ((Ints)(x << (24 - shift)) >> 24);
  }
  Ints total() const { return sum; }
#endif
};

// `size` bytes, some time before they are read: by one row soon, by more rows usually when they are
// done with a panel.
template <int ROWS>
inline void fetch(const uint8_t* from, long size) {
  for (long i = 0; i < size; i += 64) __builtin_prefetch(from + i, 0, ROWS == 1 ? 3 : 2);
}

inline Words load_words(const uint8_t* from) {
  Words words;
  std::memcpy(&words, from, sizeof words);
  return words;
}

// Four inputs in every lane.
inline Words repeat(const int8_t* x) {
  uint32_t word;
  std::memcpy(&word, x, sizeof word);
  return Words{} + word;
}

inline Floats load_floats(const float* from) {
  Floats floats;
  std::memcpy(&floats, from, sizeof floats);
  return floats;
}

typedef float Floats8 __attribute__((vector_size(32)));
typedef int32_t Ints8 __attribute__((vector_size(32)));

inline void store_floats(float* to, Floats8 floats) { std::memcpy(to, &floats, sizeof floats); }

inline Floats8 load_floats8(const float* from) {
  Floats8 floats;
  std::memcpy(&floats, from, sizeof floats);
  return floats;
}

template <class T>  // int8_t or uint8_t
inline Ints8 load_bytes(const T* from) {
#ifdef __AVX2__
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return (Ints8)(std::is_signed<T>() ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
#else
  typedef T Bytes8 __attribute__((vector_size(8)));
  Bytes8 bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(bytes, Ints8);
#endif
}

inline Floats8 to_floats(Ints8 ints) { return __builtin_convertvector(ints, Floats8); }

// 8 numbers of type float16.
inline Floats8 load_halves(const uint8_t* from) {
#ifdef __F16C__
  return (Floats8)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  Floats8 floats;
  for (int i = 0; i < 8; ++i) {
    uint16_t half;
    std::memcpy(&half, from + 2 * i, sizeof half);
    // As the exponent of a float these bits mean 2^112 times less; NaN and infinity are their own.
    const uint32_t rest = half & 0x7fffu, sign = uint32_t(half & 0x8000u) << 16;
    float value = float_of(rest << 13 | (rest >= 0x7c00u ? 0x7f800000u : 0));
    if (rest < 0x7c00u) value *= 0x1p112f;
    floats[i] = sign ? -value : value;
  }
  return floats;
#endif
}

inline void read_halves(const uint8_t* from, float* to) {
  for (int i = 0; i < kPanel; i += 8) store_floats(to + i, load_halves(from + 2 * i));
}

template <class T>
inline void scale_bytes_by(const float* factors, const T* from, float* to) {
  for (int i = 0; i < kPanel; i += 8)
    store_floats(to + i, load_floats8(factors + i) * to_floats(load_bytes(from + i)));
}

// Scales and offsets of a panel in 6 bits each: 16 bytes with the lower 4 bits of both, and 8 with
// the other bits, of lanes 0 .. 7 in their lower halves, and of lanes 8 .. 15 in their upper ones.
constexpr long kSixBitBytes = 24;

inline void pack_six_bits(const uint8_t* scale, const uint8_t* offset, uint8_t* to) {
  for (int i = 0; i < kPanel; ++i) to[i] = uint8_t((scale[i] & 15) | offset[i] << 4);
  for (int i = 0; i < 8; ++i)
    to[16 + i] = uint8_t(scale[i] >> 4 | (offset[i] >> 4) << 2 | (scale[i + 8] >> 4) << 4 |
                         (offset[i + 8] >> 4) << 6);
}

inline void unpack_six_bits(const uint8_t* from, uint8_t* scale, uint8_t* offset) {
  typedef uint8_t Bytes16 __attribute__((vector_size(16)));
  uint64_t upper[2];
  std::memcpy(upper, from + 16, 8);
  upper[1] = upper[0] >> 4;
  Bytes16 low, high;
  std::memcpy(&low, from, sizeof low);
  std::memcpy(&high, upper, sizeof high);
  const Bytes16 scales = (low & 15) | (high << 4 & 48), offsets = low >> 4 | (high << 2 & 48);
  std::memcpy(scale, &scales, sizeof scales);
  std::memcpy(offset, &offsets, sizeof offsets);
}

// Of a block: float16; float16 and such offsets; int8, and 16 super scales as float16; or 6 bits of
// both scales and offsets, and super scales and super offsets as float16.
enum Scales : long { kHalves, kHalvesAndOffsets, kEightBits, kSixBits };

struct Matrix {
  uint8_t* panels;
  long outputs, inputs, bits, group, groups, scales, zero;  // `groups` is that of a block
  long most;  // the greatest magnitude of a value

  long num_panels() const { return (outputs + kPanel - 1) / kPanel; }
  long num_groups() const { return inputs / group; }
  bool has_offsets() const { return scales == kHalvesAndOffsets || scales == kSixBits; }

  long scale_bytes() const {
    switch (scales) {
      case kHalves: return 2 * kPanel;
      case kHalvesAndOffsets: return 4 * kPanel;
      case kEightBits: return (2 + groups) * kPanel;
      default: return 4 * kPanel + groups * kSixBitBytes;
    }
  }

  long value_bytes() const { return groups * group * kPanel * bits / 8; }
  long block_bytes() const { return scale_bytes() + value_bytes(); }
  long panel_bytes() const { return num_groups() / groups * block_bytes(); }

  // What the integer sums lack of those with the numbers that the values stand for, per input.
  int32_t start() const { return int32_t(-zero - (bits == 8 && !has_offsets() ? kBias : 0)); }

  // The scales and offsets of `count` groups of the block at `at`, from its group `first` on.
  void read_scales(const uint8_t* at, long first, long count, PanelFloats* scale,
                   PanelFloats* offset) const {
    const uint8_t *second = at + 2 * kPanel, *third = at + 4 * kPanel;
    switch (scales) {
      case kHalvesAndOffsets: read_halves(second, offset->lanes);
        // fall through
      case kHalves: return read_halves(at, scale->lanes);
      case kEightBits: {
        float super[kPanel];
        read_halves(at, super);
        second += first * kPanel;
        for (long g = 0; g < count; ++g, second += kPanel)
          scale_bytes_by(super, reinterpret_cast<const int8_t*>(second), scale[g].lanes);
        return;
      }
      default: {
        float super[kPanel], super_offset[kPanel];
        read_halves(at, super);
        read_halves(second, super_offset);
        third += first * kSixBitBytes;
        for (long g = 0; g < count; ++g, third += kSixBitBytes) {
          uint8_t scale_lanes[kPanel], offset_lanes[kPanel];
          unpack_six_bits(third, scale_lanes, offset_lanes);
          scale_bytes_by(super, scale_lanes, scale[g].lanes);
          scale_bytes_by(super_offset, offset_lanes, offset[g].lanes);
        }
      }
    }
  }
};

// Sums of 16 rounded inputs: of those at 4 i and 4 i + 1, and of the others.
struct HalfSums {
  int32_t even, odd;
};

// The greatest magnitude, as the bits of a float: these are ordered like the numbers, with infinity
// and then NaN at the end.
inline uint32_t most_of(const float* x) {
#ifdef __AVX2__
  __m256i most = _mm256_setzero_si256();
  for (int i = 0; i < kRounded; i += 8)
    most = _mm256_max_epu32(most, _mm256_and_si256(_mm256_castps_si256(_mm256_loadu_ps(x + i)),
                                                   _mm256_set1_epi32(0x7fffffff)));
  __m128i half = _mm_max_epu32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0x4e));
  return uint32_t(_mm_cvtsi128_si32(_mm_max_epu32(half, _mm_shuffle_epi32(half, 0xb1))));
#else
  uint32_t most = 0;
  for (long i = 0; i < kRounded; ++i) most = std::max(most, bits_of(x[i]) & 0x7fffffffu);
  return most;
#endif
}

// 32 numbers times `factor`, to nearest, ties to even.
inline void round_by(const float* x, float factor, int8_t* to, HalfSums& first, HalfSums& second) {
#ifdef __AVX2__
  __m256i ints[4];
  for (int i = 0; i < 4; ++i)
    ints[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), _mm256_set1_ps(factor)));
  const __m256i low16 = _mm256_packs_epi32(ints[0], ints[1]);
  const __m256i high16 = _mm256_packs_epi32(ints[2], ints[3]);
  const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low16, high16),
                                                    _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bytes);
  __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
  pairs = _mm256_add_epi16(pairs, _mm256_shuffle_epi32(pairs, 0x4e));
  pairs = _mm256_add_epi16(pairs, _mm256_shuffle_epi32(pairs, 0xb1));
  const int low = _mm256_extract_epi32(pairs, 0), high = _mm256_extract_epi32(pairs, 4);
  first = {int16_t(low), low >> 16}, second = {int16_t(high), high >> 16};
#else
  HalfSums sums[2] = {};
  for (long i = 0; i < kRounded; ++i) {
    to[i] = int8_t(std::nearbyint(x[i] * factor));
    (i % 4 < 2 ? sums[i / 16].even : sums[i / 16].odd) += to[i];
  }
  first = sums[0], second = sums[1];
#endif
}

// Rounds 32 numbers with the greatest magnitude `most`. Returns the scale; NaN if they are not all
// finite.
inline float round_some(const float* x, uint32_t most, int8_t* to, HalfSums& first,
                        HalfSums& second) {
  const float largest = float_of(most);
  const bool finite = most < 0x7f800000u;
  if (finite && largest >= kLeast) {
    round_by(x, kMost / largest, to, first, second);
    return largest / kMost;
  }
  std::fill_n(to, kRounded, int8_t(0));
  first = second = {};
  return finite ? 0 : NAN;
}

template <class T>
inline void grow(std::vector<T>& vector, long size) {
  if (long(vector.size()) < size) vector.resize(size);
}

// An input that is not rounded, and where its weights are in a panel: their block and their words,
// in bytes, and their group, in the block and in the row. `one` selects them in a word.
struct Outlier {
  float number;
  uint32_t one;
  int shift;
  long index, block, words, group_of_block, group;

  Outlier() = default;
  Outlier(long index, float number, const Matrix& m)
      : number(number), one(1u << index % 4 * 8), index(index), group(index / m.group) {
    group_of_block = group % m.groups;
    block = group / m.groups * m.block_bytes();
    const long i = index % (m.groups * m.group);
    words = block + m.scale_bytes() + (m.bits == 8 ? i / 4 : i / 32 * 4 + i % 16 / 4) * 4 * kPanel;
    shift = int(m.bits == 8 ? 0 : i % 32 / 16 * 4);
  }
};

// A row as floats, in which outliers become zeros, and the greatest magnitude of each group.
struct Rest {
  std::vector<float> numbers;
  std::vector<uint32_t> most;

  template <class T>
  void read(const T* x, long inputs) {
    grow(numbers, inputs);
    grow(most, inputs / kRounded);
    for (long i = 0; i < inputs; ++i) numbers[i] = load(x[i]);
    for (long g = 0; g < inputs / kRounded; ++g) most[g] = most_of(&numbers[g * kRounded]);
  }

  // Of equal magnitudes the first.
  Outlier take_greatest(const Matrix& matrix) {
    const long inputs = matrix.inputs;
    const auto greatest = std::max_element(most.begin(), most.begin() + inputs / kRounded);
    float* group = &numbers[(greatest - most.begin()) * kRounded];
    const float* found = std::find_if(group, group + kRounded, [&](float number) {
      return (bits_of(number) & 0x7fffffffu) == *greatest;
    });
    const long index = found - numbers.data();
    const float number = std::exchange(numbers[index], 0.f);
    *greatest = most_of(group);
    return {index, number, matrix};
  }
};

// Rounded rows. sums: of the values of a group, as the bits of a float; or if there are no offsets,
// what `Dot` begins with.
struct Inputs {
  std::vector<int8_t> values;     // [M, I]
  std::vector<float> scales;      // [M, G]
  std::vector<uint32_t> sums;     // [M, G]
  std::vector<Outlier> outliers;  // [M, kOutliers]
  long inputs, groups;

  void resize(long rows, const Matrix& matrix) {
    inputs = matrix.inputs, groups = matrix.num_groups();
    grow(values, rows * inputs);
    grow(scales, rows * groups);
    grow(sums, rows * groups);
    grow(outliers, rows * kOutliers);
  }

  template <class T>
  void round(const T* x, long row, const Matrix& matrix) {
    const bool in_pairs = kInPairs && matrix.bits == 4 && !matrix.has_offsets();
    const int32_t factor = matrix.start();
    const auto start = [&](HalfSums half) {
      if (matrix.has_offsets()) return bits_of(float(half.even + half.odd));
      return in_pairs ? uint16_t(factor * half.even) | uint32_t(factor * half.odd) << 16
                      : uint32_t(factor * (half.even + half.odd));
    };
    static thread_local Rest rest;
    rest.read(x + row * inputs, inputs);
    for (long i = 0; i < kOutliers; ++i)
      outliers[row * kOutliers + i] = rest.take_greatest(matrix);
    float* scale = &scales[row * groups];
    uint32_t* sum = &sums[row * groups];
    int8_t* to = &values[row * inputs];
    for (long i = 0; i < inputs; i += kRounded, to += kRounded) {
      HalfSums first, second;
      const float rounded_by =
          round_some(&rest.numbers[i], rest.most[i / kRounded], to, first, second);
      if (matrix.group == kRounded) {
        *scale++ = rounded_by;
        *sum++ = start({first.even + second.even, first.odd + second.odd});
      } else {
        *scale++ = rounded_by, *scale++ = rounded_by;
        *sum++ = start(first), *sum++ = start(second);
      }
    }
  }
};

// Adds `count` groups from `first` on to the sums of ROWS rows; `values` are of these groups.
template <Values VALUES, int GROUP, bool OFFSETS, int ROWS>
inline __attribute__((always_inline)) void add_groups(const uint8_t* values,
                                                      const PanelFloats* scale,
                                                      const PanelFloats* offset, long first,
                                                      long count, long ahead,
                                                      const Inputs& x, long row,
                                                      Floats sums[ROWS][kParts]) {
  constexpr bool halves = VALUES == kNibbles;
  for (long g = 0; g < count; ++g) {
    const int8_t* inputs = &x.values[row * x.inputs + (first + g) * GROUP];
    const float* scales = &x.scales[row * x.groups + first + g];
    const uint32_t* starts = &x.sums[row * x.groups + first + g];
    Dot<VALUES, !OFFSETS> dots[ROWS][kParts];
    Ints firsts[ROWS][kParts];  // of few values, the sums of the first 16 inputs of 32
    constexpr long size = halves ? kPanel * GROUP / 2 : kPanel * GROUP;
    if (VALUES != kSmall)
      fetch<ROWS>(values + ahead + (halves && GROUP == 16 ? g % 2 * size : 0), ahead ? size : 0);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
      for (int p = 0; p < kParts; ++p)
        dots[r][p].begin(OFFSETS ? 0 : int32_t(starts[r * x.groups]));
#pragma GCC unroll 8
    for (int i = 0; i < GROUP / 4; ++i) {
      // Of 32 inputs with 4 bits, the words are read for the low halves and for the high ones.
      const int four = halves && GROUP == 32 ? i / 2 + i % 2 * 4 : i, word = halves ? four % 4 : i;
      const int shift = !halves ? 0 : GROUP == 32 ? four / 4 * 4 : int(g % 2) * 4;
      Words w[kParts];
#pragma GCC unroll 2
      for (int p = 0; p < kParts; ++p) {
        w[p] = load_words(values + (word * kParts + p) * sizeof(Words));
        if (halves) w[p] = w[p] >> shift & 0x0f0f0f0fu;
        keep(w[p]);
      }
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        const Words four_inputs = repeat(inputs + r * x.inputs + 4 * four);
#pragma GCC unroll 2
        for (int p = 0; p < kParts; ++p) dots[r][p].add(w[p], four_inputs);
      }
      if (VALUES == kFew && GROUP == 32 && i == 3)
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
          for (int p = 0; p < kParts; ++p) {
            firsts[r][p] = dots[r][p].total();
            dots[r][p].begin(0);
          }
    }
    if (!halves || GROUP == 32 || g % 2)
      values += (halves ? kPanel * 16 : kPanel * GROUP);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const float sum_of_inputs = OFFSETS ? float_of(starts[r * x.groups]) : 0;
#pragma GCC unroll 2
      for (int p = 0; p < kParts; ++p) {
        Ints total = dots[r][p].total();
        if (VALUES == kFew && GROUP == 32) total += firsts[r][p];
        const long lanes = p * kLanes;
        Floats sum = __builtin_convertvector(total, Floats) * load_floats(scale[g].lanes + lanes);
        if (OFFSETS) sum += sum_of_inputs * load_floats(offset[g].lanes + lanes);
        sums[r][p] += scales[r * x.groups] * sum;
      }
    }
  }
}

// A panel's scales as floats, and its values of 4 bits as bytes, for more than kMaxRows rows.
struct Unpacked {
  bool has_scales;
  std::vector<PanelFloats> scale, offset;  // of all groups
  std::vector<uint8_t> values;

  void read_scales(const Matrix& matrix, const uint8_t* at) {
    const long groups = matrix.num_groups();
    grow(scale, groups);
    grow(offset, groups);
    for (long g = 0; g < groups; g += matrix.groups, at += matrix.block_bytes())
      matrix.read_scales(at, 0, matrix.groups, &scale[g], &offset[g]);
  }

  void read_values(const Matrix& matrix, const uint8_t* at) {
    grow(values, kPanel * matrix.inputs);
    fetch<kMaxRows>(at + matrix.panel_bytes(), matrix.panel_bytes());
    uint8_t* to = values.data();
    for (long g = 0; g < matrix.num_groups(); g += matrix.groups, at += matrix.block_bytes()) {
      const uint8_t* from = at + matrix.scale_bytes();
      const long size = matrix.value_bytes();
      constexpr long half = 16 * kPanel;  // bytes of 16 inputs
      for (long i = 0; i < size; i += half, to += 2 * half)
        for (long j = 0; j < half; ++j) to[j] = from[i + j] & 15, to[half + j] = from[i + j] >> 4;
    }
  }
};

struct Product {
  const Matrix& matrix;
  const float* bias;  // or null
  void* out;          // floats if `float_out`, else bf16
  bool float_out;
  long ahead;  // bytes between the weights that are used and those that are fetched

  // Adds an input that is not rounded, times its weights in a panel.
  template <Values VALUES, bool OFFSETS>
  void add_outlier(const Outlier& x, long panel, const Unpacked& unpacked, Floats* sums) const {
    constexpr bool is_signed = (VALUES == kFew || VALUES == kBytes) && !OFFSETS;
    const int32_t zero = int32_t(matrix.zero + (is_signed ? kBias : 0));
    const uint8_t* at = matrix.panels + panel * matrix.panel_bytes();
    const uint8_t* words = at + x.words;
    PanelFloats scale_of_block, offset_of_block;
    const PanelFloats *scale = &scale_of_block, *offset = &offset_of_block;
    if (VALUES == kSmall) words = unpacked.values.data() + x.index / 4 * 4 * kPanel;
    if (unpacked.has_scales) {
      scale = &unpacked.scale[x.group], offset = &unpacked.offset[x.group];
    } else {
      matrix.read_scales(at + x.block, x.group_of_block, 1, &scale_of_block, &offset_of_block);
    }
    for (long p = 0; p < kParts; ++p) {
      Words w = load_words(words + p * sizeof(Words));
      if (VALUES == kNibbles) w = w >> x.shift & 0x0f0f0f0fu;
      Dot<VALUES, !OFFSETS> value;
      value.begin(0);
      value.add(w, Words{} + x.one);
      Floats weights = __builtin_convertvector(value.total() - zero, Floats) *
                       load_floats(scale->lanes + p * kLanes);
      if (OFFSETS) weights += load_floats(offset->lanes + p * kLanes);
      sums[p] += x.number * weights;
    }
  }

  template <Values VALUES, bool OFFSETS, int ROWS>
  void write(Floats sums[ROWS][kParts], const Inputs& x, long row, long panel,
             const Unpacked& unpacked) const {
    const long first = panel * kPanel, count = std::min(kPanel, matrix.outputs - first);
    for (long r = 0; r < ROWS; ++r) {
      for (long i = 0; i < kOutliers; ++i)
        add_outlier<VALUES, OFFSETS>(x.outliers[(row + r) * kOutliers + i], panel, unpacked,
                                     sums[r]);
      float numbers[kPanel];
      std::memcpy(numbers, sums[r], sizeof numbers);
      if (bias != nullptr)
        for (long i = 0; i < count; ++i) numbers[i] += bias[first + i];
      const long at = (row + r) * matrix.outputs + first;
      if (float_out && count == kPanel)
        std::memcpy(static_cast<float*>(out) + at, numbers, sizeof numbers);
      else if (float_out)
        std::copy_n(numbers, count, static_cast<float*>(out) + at);
      else
        for (long i = 0; i < count; ++i) store(static_cast<bf16*>(out)[at + i], numbers[i]);
    }
  }

  // Adds all blocks of a panel to the sums of ROWS rows. Without offsets a group of 32 is a block with
  // its scale as float16: all sizes are known here, and scales stay in registers.
  template <Values VALUES, int GROUP, bool OFFSETS, int ROWS>
  inline __attribute__((always_inline)) void add_blocks(const Inputs& x, long row, long panel,
                                                        const Unpacked& unpacked,
                                                        Floats sums[ROWS][kParts]) const {
    constexpr bool plain = GROUP == 32 && !OFFSETS;
    const uint8_t* at = matrix.panels + panel * matrix.panel_bytes();
    const long fetched = row < kMaxRows ? ahead : 0;  // by the first rows, for all
    const long skip = plain ? 2 * kPanel : matrix.scale_bytes();
    const long groups = plain ? 1 : matrix.groups, size = matrix.block_bytes();
    PanelFloats scale_of_block[plain ? 1 : kMaxGroups], offset_of_block[plain ? 1 : kMaxGroups];
    const PanelFloats *scale = scale_of_block, *offset = offset_of_block;
    for (long g = 0; g < x.groups; g += groups, at += size) {
      fetch<ROWS>(at + fetched, fetched ? skip : 0);
      if (plain)
        read_halves(at, scale_of_block->lanes);
      else if (unpacked.has_scales)
        scale = &unpacked.scale[g], offset = &unpacked.offset[g];
      else
        matrix.read_scales(at, 0, groups, scale_of_block, offset_of_block);
      add_groups<VALUES, GROUP, OFFSETS, ROWS>(at + skip, scale, offset, g, groups, fetched, x,
                                               row, sums);
    }
  }

  // ROWS rows of a panel, from its blocks, or unpacked.
  template <Values VALUES, int GROUP, bool OFFSETS, int ROWS>
  void tile(const Inputs& x, long row, long panel, const Unpacked& unpacked) const {
    for (long r = 0; r < ROWS; ++r) {
      const long at = (row + r) * matrix.outputs + panel * kPanel;
      __builtin_prefetch(static_cast<uint8_t*>(out) + at * (float_out ? 4 : 2), 1);
    }
    Floats sums[ROWS][kParts] = {};
    if constexpr (VALUES == kSmall) {
      add_groups<VALUES, GROUP, OFFSETS, ROWS>(unpacked.values.data(), unpacked.scale.data(),
                                               unpacked.offset.data(), 0, x.groups, 0, x, row,
                                               sums);
    } else {
      add_blocks<VALUES, GROUP, OFFSETS, ROWS>(x, row, panel, unpacked, sums);
    }
    write<VALUES, OFFSETS, ROWS>(sums, x, row, panel, unpacked);
  }

  template <Values VALUES, int GROUP, bool OFFSETS, int ROWS = kMaxRows>
  void any_rows(long count, const Inputs& x, long row, long panel, const Unpacked& from) const {
    if (count == ROWS) return tile<VALUES, GROUP, OFFSETS, ROWS>(x, row, panel, from);
    if constexpr (ROWS > 1) any_rows<VALUES, GROUP, OFFSETS, ROWS - 1>(count, x, row, panel, from);
  }

  // Rows first .. last of a panel, in blocks of about the same size.
  template <Values VALUES, int GROUP, bool OFFSETS>
  void rows(const Inputs& x, long first, long last, long panel, const Unpacked& from) const {
    const long blocks = (last - first + kMaxRows - 1) / kMaxRows;
    for (long i = 0; i < blocks; ++i) {
      const long row = first + (last - first) * i / blocks;
      const long count = first + (last - first) * (i + 1) / blocks - row;
      any_rows<VALUES, GROUP, OFFSETS>(count, x, row, panel, from);
    }
  }

  template <Values VALUES>
  void rows_of(const Inputs& x, long first, long last, long panel, const Unpacked& from) const {
    const bool wide = matrix.group == 32;
    if (matrix.has_offsets())
      wide ? rows<VALUES, 32, true>(x, first, last, panel, from)
           : rows<VALUES, 16, true>(x, first, last, panel, from);
    else
      wide ? rows<VALUES, 32, false>(x, first, last, panel, from)
           : rows<VALUES, 16, false>(x, first, last, panel, from);
  }

  // Scales in 6 bits take long to read, so all rows share them. With many rows it is worth the time
  // to unpack 4 bits.
  void panel(const Inputs& x, long first, long last, long panel, Unpacked& space) const {
    const bool unpacks = matrix.bits == 4 && last - first > 6 * kMaxRows;
    const uint8_t* at = matrix.panels + panel * matrix.panel_bytes();
    space.has_scales = unpacks || (matrix.scales == kSixBits && last - first > kMaxRows);
    if (space.has_scales) space.read_scales(matrix, at);
    if (unpacks) {
      space.read_values(matrix, at);
      return rows_of<kSmall>(x, first, last, panel, space);
    }
    if (matrix.bits == 4) return rows_of<kNibbles>(x, first, last, panel, space);
    if constexpr (kInPairs)
      if (matrix.most <= kFewMost) return rows_of<kFew>(x, first, last, panel, space);
    rows_of<kBytes>(x, first, last, panel, space);
  }
};

template <class T>
void multiply(const T* x, Product product, long rows, int threads) {
  constexpr long piece = 1 << 20;     // multiplications, some 10 us; of one row, 4 times fewer
  constexpr long parallel = 1 << 19;  // multiplications that are worth waking threads
  constexpr long chunk = 96;          // rows, whose inputs fit in the L2 cache
  if (rows == 0) return;
  const Matrix& matrix = product.matrix;
  static thread_local Inputs space;
  Inputs& inputs = space;  // of this thread, for all
  inputs.resize(rows, matrix);
#pragma omp parallel for num_threads(threads) if (rows * matrix.inputs > parallel / 16)
  for (long row = 0; row < rows; ++row) inputs.round(x, row, matrix);
  const long panels = matrix.num_panels();
  const long panel_work = std::clamp(rows, 4L, chunk) * matrix.inputs * kPanel;
  const long group = std::clamp(piece / panel_work, 1L, panels / (4 * threads) + 1);
  const long groups = (panels + group - 1) / group, chunks = (rows + chunk - 1) / chunk;
  const long blocks = (rows + kMaxRows - 1) / kMaxRows;
  // While several rows are computed, all of the thread's next panel can be fetched.
  product.ahead = rows > 1 && group > 1 ? matrix.panel_bytes() : kAhead;
#pragma omp parallel num_threads(threads) if (panels * kPanel * rows * matrix.inputs > parallel)
  {
    static thread_local Unpacked unpacked;
#pragma omp for schedule(dynamic)
    for (long task = 0; task < groups * chunks; ++task) {
      const long begin = task % groups * group, i = task / groups;
      const long first = blocks * i / chunks * kMaxRows;
      const long last = std::min(rows, blocks * (i + 1) / chunks * kMaxRows);
      for (long panel = begin; panel < std::min(panels, begin + group); ++panel)
        product.panel(inputs, first, last, panel, unpacked);
    }
  }
}

// Transposes a part of the rows of a panel to [count, 16], from [outputs, width] elements of SIZE
// bytes. Returns the end.
template <int SIZE>
uint8_t* interleave(const void* from, long width, long start, long count, long first, long outputs,
                    uint8_t* to) {
  for (long i = 0; i < count; ++i)
    for (long o = first; o < first + kPanel; ++o, to += SIZE) {
      if (o < outputs)
        std::memcpy(to, static_cast<const uint8_t*>(from) + (o * width + start + i) * SIZE, SIZE);
      else
        std::memset(to, 0, SIZE);
    }
  return to;
}

// The parts of a PackedMatrix (packed.py).
struct Parts {
  const void *values, *scales, *super_scales, *offsets, *super_offsets;
};

void pack_block(const Matrix& m, const Parts& parts, long panel, long block, uint8_t* to) {
  const long first = panel * kPanel, all = m.num_groups(), group = block * m.groups;
  const bool super = m.scales == kEightBits || m.scales == kSixBits;
  const long supers = super ? all / m.groups : all, at = super ? block : group;
  const void* scales = super ? parts.super_scales : parts.scales;
  const void* offsets = super ? parts.super_offsets : parts.offsets;
  to = interleave<2>(scales, supers, at, 1, first, m.outputs, to);
  if (m.has_offsets()) to = interleave<2>(offsets, supers, at, 1, first, m.outputs, to);
  if (m.scales == kEightBits)
    to = interleave<1>(parts.scales, all, group, m.groups, first, m.outputs, to);
  if (m.scales == kSixBits)
    for (long g = group; g < group + m.groups; ++g, to += kSixBitBytes) {
      uint8_t scale[kPanel], offset[kPanel];
      interleave<1>(parts.scales, all, g, 1, first, m.outputs, scale);
      interleave<1>(parts.offsets, all, g, 1, first, m.outputs, offset);
      pack_six_bits(scale, offset, to);
    }
  const long words = m.groups * m.group * m.bits / 32;
  uint8_t* end = interleave<4>(parts.values, m.inputs * m.bits / 32, block * words, words, first,
                               m.outputs, to);
  if (m.bits == 8 && !m.has_offsets())
    for (; to < end; ++to) *to = uint8_t(*to + kBias);
}

// One output's numbers, as floats.
void unpack_row(const Matrix& m, long output, float* to) {
  const long panel = output / kPanel, lane = output % kPanel;
  const uint8_t* at = m.panels + panel * m.panel_bytes();
  const int zero = int(m.zero + (m.bits == 8 && !m.has_offsets() ? kBias : 0));
  PanelFloats scale[kMaxGroups], offset[kMaxGroups];
  for (long done = 0; done < m.inputs; at += m.block_bytes()) {
    m.read_scales(at, 0, m.groups, scale, offset);
    for (long i = 0; i < m.groups * m.group; ++i, ++done) {
      const long inner = m.bits == 8 ? i : i / 32 * 16 + i % 16;
      uint8_t byte = at[m.scale_bytes() + (inner / 4 * kPanel + lane) * 4 + inner % 4];
      if (m.bits == 4) byte = i % 32 < 16 ? byte & 15 : byte >> 4;
      const int value = m.bits == 8 && !kBias ? int8_t(byte) : byte;
      const float product = scale[i / m.group].lanes[lane] * float(value - zero);
      to[done] = m.has_offsets() ? product + offset[i / m.group].lanes[lane] : product;
    }
  }
}

template <class T>
void unpack_rows(const Matrix& m, const int64_t* ids, T* out, long rows, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * m.inputs > 8192)
  for (long row = 0; row < rows; ++row) {
    std::vector<float> numbers(m.inputs);
    unpack_row(m, ids[row], numbers.data());
    for (long i = 0; i < m.inputs; ++i) store(out[row * m.inputs + i], numbers[i]);
  }
}

}  // namespace

// The instructions that multiply. `minisrv doctor` prints them.
extern "C" const char* instructions() {
#if defined __AVX512VNNI__
  return "AVX-512 VNNI";
#elif defined __AVXVNNI__
  return "AVX-VNNI";
#elif defined __AVX2__
  return "AVX2";
#else
  return "the compiler's own vectors";
#endif
}

extern "C" long packed_bytes(const Matrix* m) { return m->num_panels() * m->panel_bytes(); }

// The parts of a matrix to its panels.
extern "C" void pack(const Matrix* m, const Parts* parts, int threads) {
#pragma omp parallel for num_threads(threads)
  for (long panel = 0; panel < m->num_panels(); ++panel)
    for (long block = 0; block < m->num_groups() / m->groups; ++block)
      pack_block(*m, *parts, panel, block,
                 m->panels + panel * m->panel_bytes() + block * m->block_bytes());
}

// x [rows, inputs], plus the bias: [rows, outputs]; each is floats or bf16.
extern "C" void multiply(const Matrix* m, const void* x, long float_in, const float* bias,
                         void* out, long float_out, long rows, int threads) {
  const Product product{*m, bias, out, float_out != 0, kAhead};
  if (float_in)
    multiply(static_cast<const float*>(x), product, rows, threads);
  else
    multiply(static_cast<const bf16*>(x), product, rows, threads);
}

// The numbers of some outputs: [rows, inputs], as floats or as bf16.
extern "C" void lookup(const Matrix* m, const int64_t* ids, void* out, long float_out, long rows,
                       int threads) {
  if (float_out)
    unpack_rows(*m, ids, static_cast<float*>(out), rows, threads);
  else
    unpack_rows(*m, ids, static_cast<bf16*>(out), rows, threads);
}
