// Blocks of GGUF files, unpacked into the parts of a PackedMatrix. `gguf_packed.py` calls this, and
// has the same for every type, with torch.

#include <cstdint>
#include <cstring>

namespace {

// The tensors of a PackedMatrix; null where it has none.
struct Parts {
  uint8_t *values, *scales, *super_scales, *offsets, *super_offsets;
};

constexpr long kHalf = 2;          // bytes of a float16
constexpr long kGroup = 32;        // inputs
constexpr long kSuperGroup = 256;  // inputs, of the K types

void copy(uint8_t* to, long block, const uint8_t* from, long size) {
  std::memcpy(to + block * size, from, size);
}

// The float16 with its sign changed.
void copy_negative(uint8_t* to, long block, const uint8_t* from) {
  copy(to, block, from, kHalf);
  to[block * kHalf + 1] ^= 0x80;
}

struct Q4_0 {
  static constexpr long kBytes = kHalf + kGroup / 2;
  static void unpack(const uint8_t* from, long block, const Parts& to) {
    copy(to.scales, block, from, kHalf);
    copy(to.values, block, from + kHalf, kGroup / 2);
  }
};

struct Q4_1 {
  static constexpr long kBytes = 2 * kHalf + kGroup / 2;
  static void unpack(const uint8_t* from, long block, const Parts& to) {
    copy(to.scales, block, from, kHalf);
    copy(to.offsets, block, from + kHalf, kHalf);
    copy(to.values, block, from + 2 * kHalf, kGroup / 2);
  }
};

struct Q8_0 {
  static constexpr long kBytes = kHalf + kGroup;
  static void unpack(const uint8_t* from, long block, const Parts& to) {
    copy(to.scales, block, from, kHalf);
    copy(to.values, block, from + kHalf, kGroup);
  }
};

// Q4_K and Q5_K begin with two super scales, and with the scales and the offsets of eight groups in
// 6 bits each: those of the first four, and the lower 4 bits of the others.
constexpr long kScaleBytes = 12, kGroups = 8, kHeadBytes = 2 * kHalf + kScaleBytes;

void unpack_head(const uint8_t* from, long block, const Parts& to) {
  copy(to.super_scales, block, from, kHalf);
  copy_negative(to.super_offsets, block, from + kHalf);
  const uint8_t *first = from + 2 * kHalf, *second = first + 4, *rest = first + 8;
  uint8_t *scales = to.scales + block * kGroups, *offsets = to.offsets + block * kGroups;
  for (long i = 0; i < 4; ++i) {
    scales[i] = first[i] & 63;
    offsets[i] = second[i] & 63;
    scales[4 + i] = (rest[i] & 15) | ((first[i] >> 2) & 48);
    offsets[4 + i] = (rest[i] >> 4) | ((second[i] >> 2) & 48);
  }
}

struct Q4_K {
  static constexpr long kBytes = kHeadBytes + kSuperGroup / 2;
  static void unpack(const uint8_t* from, long block, const Parts& to) {
    unpack_head(from, block, to);
    const uint8_t* low = from + kHeadBytes;
    uint8_t* values = to.values + block * kSuperGroup / 2;
    // Of 64 inputs, the file has the first 32 in the low halves of 32 bytes.
    for (long i = 0; i < kSuperGroup / 2; i += 32)
      for (long j = 0; j < 16; ++j) {
        const uint8_t a = low[i + j], b = low[i + 16 + j];
        values[i + j] = uint8_t((a & 15) | (b << 4));
        values[i + 16 + j] = uint8_t((a >> 4) | (b & 240));
      }
  }
};

struct Q5_K {
  static constexpr long kBytes = kHeadBytes + kSuperGroup / 8 + kSuperGroup / 2;
  static void unpack(const uint8_t* from, long block, const Parts& to) {
    unpack_head(from, block, to);
    const uint8_t *fifth = from + kHeadBytes, *low = fifth + kSuperGroup / 8;
    uint8_t* values = to.values + block * kSuperGroup;
    for (int group = 0; group < kGroups; ++group)
      for (long j = 0; j < kGroup; ++j) {
        const int four = (low[group / 2 * kGroup + j] >> (group % 2 * 4)) & 15;
        values[group * kGroup + j] = uint8_t(four | ((fifth[j] >> group) & 1) << 4);
      }
  }
};

struct Q6_K {
  static constexpr long kScales = kSuperGroup / 16;
  static constexpr long kBytes = kSuperGroup * 3 / 4 + kScales + kHalf;
  static void unpack(const uint8_t* from, long block, const Parts& to) {
    const uint8_t *low = from, *high = from + kSuperGroup / 2, *scales = high + kSuperGroup / 4;
    copy(to.scales, block, scales, kScales);
    copy(to.super_scales, block, scales + kScales, kHalf);
    uint8_t* values = to.values + block * kSuperGroup;
    for (int half = 0; half < 2; ++half, low += 64, high += 32)
      for (int quarter = 0; quarter < 4; ++quarter, values += 32)
        for (long j = 0; j < 32; ++j) {
          const int four = (low[quarter % 2 * 32 + j] >> (quarter / 2 * 4)) & 15;
          values[j] = uint8_t((four | ((high[j] >> (quarter * 2)) & 3) << 4) - 32);
        }
  }
};

template <class Type>
void unpack(const uint8_t* raw, long rows, long blocks, const Parts& to, int threads) {
#pragma omp parallel for num_threads(threads)
  for (long row = 0; row < rows; ++row)
    for (long block = row * blocks; block < (row + 1) * blocks; ++block)
      Type::unpack(raw + block * Type::kBytes, block, to);
}

}  // namespace

// raw: [rows, blocks, bytes of a block]
#define UNPACK(Type)                                                                  \
  extern "C" void unpack_##Type(const uint8_t* raw, long rows, long blocks,           \
                                const Parts* to, int threads) {                       \
    unpack<Type>(raw, rows, blocks, *to, threads);                                    \
  }

UNPACK(Q4_0)
UNPACK(Q4_1)
UNPACK(Q8_0)
UNPACK(Q4_K)
UNPACK(Q5_K)
UNPACK(Q6_K)
