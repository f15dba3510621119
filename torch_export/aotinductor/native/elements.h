// Elements of tensors as float32 and back, and e to the power of a vector of them.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "tensor.h"

namespace llama {

inline float from_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

inline uint16_t to_bfloat16(float value) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
}

#if defined(__x86_64__)
inline float from_float16(uint16_t bits) { return _cvtsh_ss(bits); }
inline uint16_t to_float16(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }
#else
inline float from_float16(uint16_t bits) {
  _Float16 half;
  std::memcpy(&half, &bits, sizeof half);
  return static_cast<float>(half);
}
inline uint16_t to_float16(float value) {
  const auto half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}
#endif

inline bool is_floating(int32_t dtype) {
  return dtype == kFloat32 || dtype == kBfloat16 || dtype == kFloat16;
}

// Read `count` elements of `dtype`, `stride` elements apart, as float32.
inline void load_floats(const void* from, int32_t dtype, int64_t stride, int64_t count, float* to) {
  if (dtype == kFloat32) {
    const auto* elements = static_cast<const float*>(from);
    for (int64_t i = 0; i < count; i++) to[i] = elements[i * stride];
    return;
  }
  const auto* elements = static_cast<const uint16_t*>(from);
  int64_t i = 0;
  if (dtype == kBfloat16) {
    if (stride == 1) {
      for (; i < count; i++) to[i] = from_bfloat16(elements[i]);
    }
    for (; i < count; i++) to[i] = from_bfloat16(elements[i * stride]);
    return;
  }
#if defined(__x86_64__)
  if (stride == 1) {  // compilers don't find this instruction in the plain loop
    for (; i + 8 <= count; i += 8) {
      const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(elements + i));
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
    }
  }
#endif
  for (; i < count; i++) to[i] = from_float16(elements[i * stride]);
}

inline void store_floats(const float* from, int64_t count, void* to, int32_t dtype, int64_t stride) {
  if (dtype == kFloat32) {
    auto* elements = static_cast<float*>(to);
    for (int64_t i = 0; i < count; i++) elements[i * stride] = from[i];
    return;
  }
  auto* elements = static_cast<uint16_t*>(to);
  for (int64_t i = 0; i < count; i++) {
    elements[i * stride] = dtype == kBfloat16 ? to_bfloat16(from[i]) : to_float16(from[i]);
  }
}

// Vectors of float32 and of the integers that hold their bits.
using Float8 = float __attribute__((vector_size(32)));
using Int8 = int32_t __attribute__((vector_size(32)));

// Return e^x in each lane, within 1 unit in the last place; 0, infinity and NaN where float32 has
// them.
template <class Floats, class Ints>
inline __attribute__((always_inline)) Floats exponential(Floats x) {
  // NaN stays NaN: both comparisons are false for it
  x = x > 90.0f ? Floats{} + 90.0f : x;
  x = x < -105.0f ? Floats{} - 105.0f : x;
  // x = powers * ln 2 + rest; adding 1.5 * 2^23 rounds to an integer, in the low bits of the sum
  const Floats shifted = x * 1.44269504f + 12582912.0f;
  const Floats powers = shifted - 12582912.0f;
  const Floats rest = (x - powers * 0.693359375f) + powers * 2.12194440e-4f;
  // the series of (e^r - 1 - r) / r^2 fitted over |r| <= ln 2 / 2
  Floats series = rest * 1.989100068e-4f + 1.393365896e-3f;
  series = series * rest + 8.333310917e-3f;
  series = series * rest + 4.166646484e-2f;
  series = series * rest + 1.666666668e-1f;
  series = series * rest + 5.000000013e-1f;
  const Floats value = (series * rest * rest + rest) + 1.0f;
  // 2^powers as two factors: one alone leaves float32's range before the result does
  const Ints whole = (Ints)shifted - (Ints)(Floats{} + 12582912.0f);
  const Ints half = whole >> 1;
  return value * (Floats)((half + 127) << 23) * (Floats)((whole - half + 127) << 23);
}

}  // namespace llama
