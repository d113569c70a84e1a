// Products with weights of 4 or 8 bits: x [M, I] times weights [O, I], transposed. `packed.py` calls
// these functions, and documents the weights.
//
// Inputs are rounded to 8 bits, with a scale for each 32 of a row. A group's products are then summed
// as integers, and the sums of the groups as floats, in order:
//     out[m, o] = sum over g of input_scale[m, g] * (scale[o, g] * dot + offset[o, g] * sum(x))
// where dot = sum((value - zero) * x) = sum(value * x) - zero * sum(x). A row does not depend on the
// other rows, and is the same for any number of rows and threads.
//
// Weights are stored in panels of 16 outputs. A panel is a sequence of blocks of some groups, each
// with its scales first. The values of a block are [words, 16]: a 32-bit word holds one output's
// values for four inputs, or with 4 bits for eight: inputs 4 i .. 4 i + 3 of 32 in the low halves of
// its bytes, 16 + 4 i .. 16 + 4 i + 3 in the high ones.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "bf16.h"

namespace {

constexpr long kPanel = 16;      // outputs
constexpr long kMaxGroups = 16;  // of a block
constexpr long kRounded = 32;    // inputs that are rounded with one scale
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

// How the values of the weights are stored.
enum Values { kNibbles, kSmall /* bytes below 16 */, kBytes };

// The sums of the products of one group. add: `w` are four weights of each lane, `x` four inputs.
// The number that is added to the sum is given at both
// ends, as only one of them uses it.
template <Values VALUES>
struct Dot {
  Ints sum;

#if defined __AVX512VNNI__
  void begin(int32_t start) { sum = Ints{} + start; }
  void add(Words w, Words x) {
    sum = (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
  }
  Ints total(int32_t) const { return sum; }
#elif defined __AVXVNNI__
  void begin(int32_t start) { sum = Ints{} + start; }
  void add(Words w, Words x) {
    sum = (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, (__m256i)x);
  }
  Ints total(int32_t) const { return sum; }
#elif defined __AVX2__
  // 16 pairs of products up to 2 * 15 * 127 or 2 * 128 * 127: a group's sum of the small ones fits in
  // 16 bits, and of the large ones only a single pair.
  void begin(int32_t) { sum = Ints{}; }
  void add(Words w, Words x) {
    if constexpr (VALUES == kBytes) {
      const __m256i magnitude = _mm256_abs_epi8((__m256i)w);
      const __m256i pairs =
          _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8((__m256i)x, (__m256i)w));
      sum += (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    } else {
      sum = (Ints)_mm256_add_epi16((__m256i)sum, _mm256_maddubs_epi16((__m256i)w, (__m256i)x));
    }
  }
  Ints total(int32_t start) const {
    if constexpr (VALUES == kBytes) return sum + start;
    return (Ints)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1)) + start;
  }
#else
  void begin(int32_t start) { sum = Ints{} + start; }
  void add(Words w, Words x) {
    for (int shift = 0; shift < 32; shift += 8)
      sum += ((Ints)(w << (24 - shift)) >> 24) * ((Ints)(x << (24 - shift)) >> 24);
  }
  Ints total(int32_t) const { return sum; }
#endif
};

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

inline Ints8 load_bytes(const uint8_t* from) {
#ifdef __AVX2__
  return (Ints8)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
  typedef uint8_t Bytes8 __attribute__((vector_size(8)));
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
    const uint32_t word = rest << 13 | (rest >= 0x7c00u ? 0x7f800000u : 0);
    float value;
    std::memcpy(&value, &word, sizeof value);
    if (rest < 0x7c00u) value *= 0x1p112f;
    floats[i] = sign ? -value : value;
  }
  return floats;
#endif
}

// Of a block: float16; float16 and such offsets; int8, and 16 super scales as float16; or 6 bits of
// both scales and offsets, and super scales and super offsets as float16.
enum Scales : long { kHalves, kHalvesAndOffsets, kEightBits, kSixBits };

struct Matrix {
  uint8_t* panels;
  long outputs, inputs, bits, group, groups, scales, zero;  // `groups` is that of a block

  long num_panels() const { return (outputs + kPanel - 1) / kPanel; }
  long num_groups() const { return inputs / group; }
  bool has_offsets() const { return scales == kHalvesAndOffsets || scales == kSixBits; }

  long scale_bytes() const {
    switch (scales) {
      case kHalves: return 2 * kPanel;
      case kHalvesAndOffsets: return 4 * kPanel;
      case kEightBits: return (2 + groups) * kPanel;
      default: return 4 * kPanel + groups * kPanel * 12 / 8;
    }
  }

  long value_bytes() const { return groups * group * kPanel * bits / 8; }
  long block_bytes() const { return scale_bytes() + value_bytes(); }
  long panel_bytes() const { return num_groups() / groups * block_bytes(); }

  // What the integer sums lack of those with the numbers that the values stand for, per input.
  int32_t start() const { return int32_t(-zero - (bits == 8 && !has_offsets() ? kBias : 0)); }

  // The scales and offsets of the block at `at`, for its groups.
  void read_scales(const uint8_t* at, PanelFloats* scale, PanelFloats* offset) const {
    for (int i = 0; i < kPanel; i += 8) {
      const Floats8 first = load_halves(at + 2 * i);
      const uint8_t *sums = at + 2 * kPanel, *packed = at + 4 * kPanel;
      switch (scales) {
        case kHalvesAndOffsets: store_floats(offset[0].lanes + i, load_halves(sums + 2 * i));
        // fall through
        case kHalves: store_floats(scale[0].lanes + i, first); break;
        case kEightBits:
          for (long g = 0; g < groups; ++g, sums += kPanel)
            store_floats(scale[g].lanes + i, first * to_floats(load_bytes(sums + i) << 24 >> 24));
          break;
        default: {
          const Floats8 second = load_halves(sums + 2 * i);
          for (long g = 0; g < groups; ++g, packed += 24) {
            const Ints8 low = load_bytes(packed + i), high = load_bytes(packed + 16) >> (i / 2);
            store_floats(scale[g].lanes + i, first * to_floats((low & 15) | (high & 3) << 4));
            store_floats(offset[g].lanes + i, second * to_floats(low >> 4 | (high & 12) << 2));
          }
        }
      }
    }
  }
};

// Rounded rows. sums: of the values of a group, times `Matrix::start` if there are no offsets.
struct Inputs {
  std::vector<int8_t> values;  // [M, I]
  std::vector<float> scales;   // [M, G]
  std::vector<int32_t> sums;   // [M, G]
  long inputs, groups;

  void resize(long rows, const Matrix& matrix) {
    inputs = matrix.inputs, groups = matrix.num_groups();
    values.resize(rows * inputs);
    scales.resize(rows * groups);
    sums.resize(rows * groups);
  }

  template <class T>
  void round(const T* x, long row, const Matrix& matrix) {
    const long group = matrix.group, per_scale = kRounded / group;
    const int32_t factor = matrix.has_offsets() ? 1 : matrix.start();
    for (long first = 0; first < inputs; first += kRounded) {
      int8_t* to = &values[row * inputs + first];
      const float scale = round_some(x + row * inputs + first, to);
      for (long i = 0; i < per_scale; ++i) {
        const long at = row * groups + first / group + i;
        int32_t sum = 0;
        for (long j = 0; j < group; ++j) sum += to[i * group + j];
        scales[at] = scale;
        sums[at] = factor * sum;
      }
    }
  }

  // Returns the scale; NaN if not all numbers are finite.
  template <class T>
  static float round_some(const T* x, int8_t* to) {
    float numbers[kRounded];
    uint32_t magnitudes[kRounded], most = 0;
    for (long i = 0; i < kRounded; ++i) numbers[i] = load(x[i]);
    std::memcpy(magnitudes, numbers, sizeof numbers);
    // Ordered like the numbers, with infinity and then NaN at the end.
    for (long i = 0; i < kRounded; ++i) most = std::max(most, magnitudes[i] & 0x7fffffffu);
    float largest;
    std::memcpy(&largest, &most, sizeof largest);
    const bool finite = most < 0x7f800000u;
    if (!finite || largest < kLeast) {
      std::fill_n(to, kRounded, int8_t(0));
      return finite ? 0 : NAN;
    }
    const float inverse = kMost / largest;
    for (long i = 0; i < kRounded; ++i) to[i] = int8_t(std::nearbyint(numbers[i] * inverse));
    return largest / kMost;
  }
};

// Adds `count` groups from `first` on to the sums of ROWS rows; `values` are of these groups.
template <Values VALUES, int GROUP, bool OFFSETS, int ROWS>
inline __attribute__((always_inline)) void add_groups(const uint8_t* values,
                                                      const PanelFloats* scale,
                                                      const PanelFloats* offset, long first,
                                                      long count, const Inputs& x, long row,
                                                      Floats sums[ROWS][kParts]) {
  constexpr bool halves = VALUES == kNibbles;
  for (long g = 0; g < count; ++g) {
    const int8_t* inputs = &x.values[row * x.inputs + (first + g) * GROUP];
    const float* scales = &x.scales[row * x.groups + first + g];
    const int32_t* starts = &x.sums[row * x.groups + first + g];
    Dot<VALUES> dots[ROWS][kParts];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
      for (int p = 0; p < kParts; ++p)
        dots[r][p].begin(OFFSETS ? 0 : starts[r * x.groups]);
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
      }
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        const Words four_inputs = repeat(inputs + r * x.inputs + 4 * four);
#pragma GCC unroll 2
        for (int p = 0; p < kParts; ++p) dots[r][p].add(w[p], four_inputs);
      }
    }
    if (!halves || GROUP == 32 || g % 2)
      values += (halves ? kPanel * 16 : kPanel * GROUP);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const int32_t start = starts[r * x.groups];
#pragma GCC unroll 2
      for (int p = 0; p < kParts; ++p) {
        const Ints total = dots[r][p].total(OFFSETS ? 0 : start);
        Floats sum = __builtin_convertvector(total, Floats) * load_floats(scale[g].lanes + p * kLanes);
        if (OFFSETS) sum += float(start) * load_floats(offset[g].lanes + p * kLanes);
        sums[r][p] += scales[r * x.groups] * sum;
      }
    }
  }
}

// A panel of 4 bits with its scales as floats and its values as bytes, for many rows.
struct Unpacked {
  std::vector<PanelFloats> scale, offset;  // of all groups
  std::vector<uint8_t> values;

  void read(const Matrix& matrix, const uint8_t* at) {
    const long groups = matrix.num_groups();
    scale.resize(groups);
    offset.resize(matrix.has_offsets() ? groups : 0);
    values.resize(kPanel * matrix.inputs);
    uint8_t* to = values.data();
    for (long g = 0; g < groups; g += matrix.groups, at += matrix.block_bytes()) {
      matrix.read_scales(at, &scale[g], offset.data() + (offset.empty() ? 0 : g));
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

  template <int ROWS>
  void write(const Floats sums[ROWS][kParts], long row, long panel) const {
    float numbers[ROWS][kPanel];
    std::memcpy(numbers, sums, sizeof numbers);
    const long first = panel * kPanel, count = std::min(kPanel, matrix.outputs - first);
    for (long r = 0; r < ROWS; ++r) {
      if (bias != nullptr)
        for (long i = 0; i < count; ++i) numbers[r][i] += bias[first + i];
      const long at = (row + r) * matrix.outputs + first;
      if (float_out)
        std::copy_n(numbers[r], count, static_cast<float*>(out) + at);
      else
        for (long i = 0; i < count; ++i) store(static_cast<bf16*>(out)[at + i], numbers[r][i]);
    }
  }

  // ROWS rows of a panel, from its blocks, or unpacked.
  template <Values VALUES, int GROUP, bool OFFSETS, int ROWS>
  void tile(const Inputs& x, long row, long panel, const Unpacked& unpacked) const {
    Floats sums[ROWS][kParts] = {};
    if constexpr (VALUES == kSmall) {
      add_groups<VALUES, GROUP, OFFSETS, ROWS>(unpacked.values.data(), unpacked.scale.data(),
                                               unpacked.offset.data(), 0, x.groups, x, row, sums);
    } else {
    const uint8_t* at = matrix.panels + panel * matrix.panel_bytes();
    const long skip = matrix.scale_bytes(), size = matrix.block_bytes(), groups = matrix.groups;
    PanelFloats scale[kMaxGroups], offset[kMaxGroups];
    for (long g = 0; g < x.groups; g += groups, at += size) {
      matrix.read_scales(at, scale, offset);
      add_groups<VALUES, GROUP, OFFSETS, ROWS>(at + skip, scale, offset, g, groups, x, row, sums);
    }
    }
    write<ROWS>(sums, row, panel);
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

  // With many rows it is worth the time to unpack 4 bits first.
  void panel(const Inputs& x, long first, long last, long panel, Unpacked& space) const {
    constexpr long many = 4 * kMaxRows;
    if (matrix.bits == 8) return rows_of<kBytes>(x, first, last, panel, space);
    if (last - first < many) return rows_of<kNibbles>(x, first, last, panel, space);
    space.read(matrix, matrix.panels + panel * matrix.panel_bytes());
    rows_of<kSmall>(x, first, last, panel, space);
  }
};

template <class T>
void multiply(const T* x, const Product& product, long rows, int threads) {
  constexpr long piece = 1 << 18;  // multiplications, some 10 us
  constexpr long chunk = 96;       // rows, whose inputs fit in the L2 cache
  const Matrix& matrix = product.matrix;
  static thread_local Inputs space;
  Inputs& inputs = space;  // of this thread, for all
  inputs.resize(rows, matrix);
#pragma omp parallel for num_threads(threads) if (rows * matrix.inputs > piece / 8)
  for (long row = 0; row < rows; ++row) inputs.round(x, row, matrix);
  const long panels = matrix.num_panels();
  const long panel_work = std::min(rows, chunk) * matrix.inputs * kPanel;
  const long group = std::max(1L, piece / panel_work);
  const long groups = (panels + group - 1) / group, chunks = (rows + chunk - 1) / chunk;
#pragma omp parallel num_threads(threads) if (panels * panel_work > 2 * piece)
  {
    static thread_local Unpacked unpacked;
#pragma omp for schedule(dynamic)
    for (long task = 0; task < groups * chunks; ++task) {
      const long begin = task % groups * group, i = task / groups;
      const long first = rows * i / chunks, last = rows * (i + 1) / chunks;
      for (long panel = begin; panel < std::min(panels, begin + group); ++panel)
        product.panel(inputs, first, last, panel, unpacked);
    }
  }
}

// Transposes a part of the rows of a panel to [count, 16], from [outputs, width] elements of SIZE bytes.
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

inline void pack_six_bits(const uint8_t* scale, const uint8_t* offset, uint8_t* to) {
  for (int i = 0; i < kPanel; ++i) to[i] = uint8_t((scale[i] & 15) | offset[i] << 4);
  for (int i = 0; i < 8; ++i)
    to[16 + i] = uint8_t(scale[i] >> 4 | (offset[i] >> 4) << 2 | (scale[i + 8] >> 4) << 4 |
                         (offset[i + 8] >> 4) << 6);
}

void pack_block(const Matrix& m, const Parts& parts, long panel, long block, uint8_t* to) {
  const long first = panel * kPanel, all = m.num_groups(), group = block * m.groups;
  const bool super = m.scales == kEightBits || m.scales == kSixBits;
  const long supers = super ? all / m.groups : all, at = super ? block : group;
  to = interleave<2>(super ? parts.super_scales : parts.scales, supers, at, 1, first, m.outputs, to);
  if (m.has_offsets())
    to = interleave<2>(super ? parts.super_offsets : parts.offsets, supers, at, 1, first, m.outputs,
                       to);
  if (m.scales == kEightBits)
    to = interleave<1>(parts.scales, all, group, m.groups, first, m.outputs, to);
  if (m.scales == kSixBits)
    for (long g = group; g < group + m.groups; ++g, to += 24) {
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
    m.read_scales(at, scale, offset);
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
extern "C" void multiply(const Matrix* m, const void* x, long float_in, const float* bias, void* out,
                         long float_out, long rows, int threads) {
  const Product product{*m, bias, out, float_out != 0};
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
