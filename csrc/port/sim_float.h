// bfloat16 and float16 on the CPU, rounding to nearest even; NaN stays NaN.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastpo {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

namespace sim {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// Drops the low `count` bits, rounding to nearest even.
inline uint32_t round_off(uint32_t bits, int count) {
  const uint32_t half = 1u << (count - 1);
  return (bits + half - 1 + ((bits >> count) & 1)) >> count;
}

}  // namespace sim

inline float to_float(bfloat16 x) { return sim::float_of(static_cast<uint32_t>(x.bits) << 16); }

inline float to_float(float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return sim::float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x0400u) return sim::float_of(sign | ((magnitude << 13) + (112u << 23)));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
}

template <typename T>
T from_float(float x);

template <>
inline bfloat16 from_float<bfloat16>(float x) {
  const uint32_t bits = sim::bits_of(x);
  if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<uint16_t>(sim::round_off(bits, 16))};
}

template <>
inline float16 from_float<float16>(float x) {
  const uint32_t sign = sim::bits_of(x) >> 16 & 0x8000u;
  const uint32_t magnitude = sim::bits_of(x) & 0x7fffffffu;
  if (x != x) return {static_cast<uint16_t>(sign | 0x7e00u)};
  uint32_t bits;
  if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    bits = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // 2^-14, the smallest normal number
    bits = sim::round_off(magnitude - (112u << 23), 13);
  } else if (magnitude < 0x33000000u) {  // below half of 2^-24
    bits = 0;
  } else {
    const uint32_t exponent = magnitude >> 23;
    bits = sim::round_off((magnitude & 0x7fffffu) | 0x800000u, 126 - static_cast<int>(exponent));
  }
  return {static_cast<uint16_t>(sign | bits)};
}

}  // namespace fastpo
