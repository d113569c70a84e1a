// bfloat16 numbers, which are the upper halves of floats.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

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

}  // namespace
