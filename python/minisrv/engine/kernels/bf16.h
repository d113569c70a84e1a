// bfloat16 numbers, which are the upper halves of floats.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

struct bf16 {
  uint16_t bits;
};

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float load(float x) { return x; }

inline float load(bf16 x) { return float_of(uint32_t(x.bits) << 16); }

inline void store(float& to, float value) { to = value; }

// Round to nearest, ties to even.
inline void store(bf16& to, float value) {
  const uint32_t word = bits_of(value);
  const uint32_t rounded = word + 0x7fff + ((word >> 16) & 1);
  to.bits = uint16_t((value != value ? 0x7fc00000u : rounded) >> 16);
}

}  // namespace
