// Products with bf16 weights, summed in float: x [M, I] times weights [O, I], transposed.
//
// The weights are stored in panels of 16 outputs as [panels, I / 2, 16, 2]: a 32-bit word holds one
// output's weights for two adjacent inputs, which is what the bf16 instruction of AVX-512 takes, and
// which other processors turn into two floats with one operation each. Every output is summed over
// the inputs in their order, so a row's result does not depend on the other rows of the batch.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr long kPanel = 16;  // outputs

#ifdef __AVX512F__
constexpr long kVector = 16, kMaxRows = 8;  // 16 of 32 registers hold sums
#else
constexpr long kVector = 8, kMaxRows = 4;  // 8 of 16; with more, some are spilled
#endif
typedef float Vector __attribute__((vector_size(kVector * 4)));
typedef uint32_t VectorWords __attribute__((vector_size(kVector * 4)));
constexpr long kParts = kPanel / kVector;  // vectors per panel

// Panels that are computed together, so that additions to 8 sums or more overlap.
constexpr int panels_for(int rows) {
  return kVector == 16 ? std::min(8, 16 / rows) : std::max(1, 4 / rows);
}

#ifdef __AVX512BF16__
using Input = uint32_t;  // two bf16
inline void add_products(Vector* sums, const uint32_t* weights, const Input* x) {
  const auto pair = (__m512bh)_mm512_set1_epi32(int(*x));
  sums[0] = (Vector)_mm512_dpbf16_ps((__m512)sums[0], (__m512bh)_mm512_loadu_si512(weights), pair);
}
#else
struct Input {
  float even, odd;
};
#endif

// sums[r][p] = x[r] . panel p, for ROWS rows of x and PANELS panels of `pairs` pairs of inputs each.
template <int ROWS, int PANELS>
void multiply_panels(const Input* x, const uint32_t* weights, long pairs,
                     float sums[ROWS][PANELS * kPanel]) {
  constexpr int parts = PANELS * kParts;
  Vector acc[ROWS][parts] = {};
  for (long i = 0; i < pairs; ++i) {
#ifdef __AVX512BF16__
    for (int p = 0; p < PANELS; ++p)
      for (int r = 0; r < ROWS; ++r)
        add_products(&acc[r][p], weights + (p * pairs + i) * kPanel, x + r * pairs + i);
#else
    Vector even[parts], odd[parts];
#pragma GCC unroll 16
    for (int v = 0; v < parts; ++v) {
      VectorWords words;
      std::memcpy(&words, weights + (v / kParts * pairs + i) * kPanel + v % kParts * kVector,
                  sizeof words);
      even[v] = (Vector)(words << 16);
      odd[v] = (Vector)(words & 0xffff0000u);
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const Input pair = x[r * pairs + i];
#pragma GCC unroll 16
      for (int v = 0; v < parts; ++v) acc[r][v] += pair.even * even[v];
#pragma GCC unroll 16
      for (int v = 0; v < parts; ++v) acc[r][v] += pair.odd * odd[v];
    }
#endif
  }
  std::memcpy(sums, acc, sizeof acc);
}

struct Product {
  const uint32_t* weights;
  const bf16* bias;  // or null
  void* out;         // floats if `float_out`, else bf16
  bool float_out;
  long outputs, pairs;

  template <int ROWS, int PANELS>
  void tile(const Input* x, long row, long panel) const {
    float sums[ROWS][PANELS * kPanel];
    multiply_panels<ROWS, PANELS>(x + row * pairs, weights + panel * pairs * kPanel, pairs, sums);
    const long first = panel * kPanel, count = std::min(PANELS * kPanel, outputs - first);
    for (long r = 0; r < ROWS; ++r) {
      if (bias != nullptr)
        for (long i = 0; i < count; ++i) sums[r][i] += load(bias[first + i]);
      const long at = (row + r) * outputs + first;
      if (float_out)
        std::copy_n(sums[r], count, static_cast<float*>(out) + at);
      else
        for (long i = 0; i < count; ++i) store(static_cast<bf16*>(out)[at + i], sums[r][i]);
    }
  }

  // ROWS rows of the panels begin .. end.
  template <int ROWS>
  void rows(const Input* x, long row, long begin, long end) const {
    constexpr int together = panels_for(ROWS);
    long panel = begin;
    for (; panel + together <= end; panel += together) tile<ROWS, together>(x, row, panel);
    for (; panel < end; ++panel) tile<ROWS, 1>(x, row, panel);
  }

  template <int ROWS = kMaxRows>
  void any_rows(long count, const Input* x, long row, long begin, long end) const {
    if (count == ROWS) return rows<ROWS>(x, row, begin, end);
    if constexpr (ROWS > 1) any_rows<ROWS - 1>(count, x, row, begin, end);
  }

  // Rows first .. last, in blocks of about the same size, of the panels begin .. end. These are few
  // enough to stay in the cache.
  void block(const Input* x, long first, long last, long begin, long end) const {
    const long blocks = (last - first + kMaxRows - 1) / kMaxRows;
    for (long i = 0; i < blocks; ++i) {
      const long row = first + (last - first) * i / blocks;
      any_rows(first + (last - first) * (i + 1) / blocks - row, x, row, begin, end);
    }
  }
};

// 16 words of packed weights from the rows first .. first + 16 of weights [outputs, inputs].
inline void pack_words(const bf16* weights, long outputs, long inputs, long first, long input,
                       uint32_t* to) {
  for (long o = 0; o < kPanel; ++o) {
    to[o] = 0;
    if (first + o < outputs) std::memcpy(to + o, weights + (first + o) * inputs + input, sizeof *to);
  }
}

inline const Input* as_inputs(const bf16* x, long size, std::vector<Input>& space) {
#ifdef __AVX512BF16__
  return reinterpret_cast<const Input*>(x);
#else
  space.resize(size / 2);
  auto* to = reinterpret_cast<float*>(space.data());
#pragma omp simd
  for (long i = 0; i < size; ++i) to[i] = load(x[i]);
  return space.data();
#endif
}

void multiply(const bf16* x, const Product& product, long rows, int threads) {
  constexpr long piece = 1 << 17;  // multiplications, some 10 us
  constexpr long chunk = 96;       // rows, whose inputs fit in the L2 cache
  static thread_local std::vector<Input> space;
  const Input* inputs = as_inputs(x, rows * product.pairs * 2, space);
  const long panels = (product.outputs + kPanel - 1) / kPanel;
  const long panel_work = std::min(rows, chunk) * product.pairs * 2 * kPanel;
  const long together = panels_for(int(std::min(rows, kMaxRows)));
  const long group = std::max(1L, piece / panel_work / together) * together;
  const long groups = (panels + group - 1) / group, chunks = (rows + chunk - 1) / chunk;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (panels * panel_work > 2 * piece)
  for (long task = 0; task < groups * chunks; ++task) {
    const long begin = task % groups * group, first = task / groups * chunk;
    product.block(inputs, first, std::min(rows, first + chunk), begin,
                            std::min(panels, begin + group));
  }
}

}  // namespace

// The instructions that multiply. `minisrv doctor` prints them.
extern "C" const char* instructions() {
#if defined __AVX512BF16__
  return "AVX-512 BF16";
#elif defined __AVX512F__
  return "AVX-512";
#elif defined __AVX2__
  return "AVX2";
#else
  return "the compiler's own vectors";
#endif
}

// weights [outputs, inputs], with an even number of inputs, to panels.
extern "C" void pack_weights(const bf16* weights, uint32_t* packed, long outputs, long inputs,
                             int threads) {
  const long panels = (outputs + kPanel - 1) / kPanel, pairs = inputs / 2;
#pragma omp parallel for num_threads(threads)
  for (long panel = 0; panel < panels; ++panel)
    for (long i = 0; i < pairs; ++i)
      pack_words(weights, outputs, inputs, panel * kPanel, 2 * i,
                 packed + (panel * pairs + i) * kPanel);
}

// x [rows, inputs] times packed weights, plus the bias: [rows, outputs], as floats or as bf16.
extern "C" void multiply_packed(const bf16* x, const uint32_t* packed, const bf16* bias, void* out,
                                long float_out, long rows, long outputs, long inputs,
                                int threads) {
  multiply(x, Product{packed, bias, out, float_out != 0, outputs, inputs / 2}, rows, threads);
}
