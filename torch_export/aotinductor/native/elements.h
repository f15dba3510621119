// Elements of tensors as float32 and back, and e to the power of a vector of them.
#pragma once

#include <algorithm>
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

// Read `count` elements of a floating-point dtype as float32.
inline void load_floats(const void* from, int32_t dtype, int64_t count, float* to) {
  const auto* halves = static_cast<const uint16_t*>(from);
  int64_t i = 0;
  if (dtype == kFloat32) {
    std::copy_n(static_cast<const float*>(from), count, to);
    return;
  }
  if (dtype == kBfloat16) {
    for (; i < count; i++) to[i] = from_bfloat16(halves[i]);
  }
#if defined(__x86_64__)
  for (; i + 8 <= count; i += 8) {  // compilers don't find this instruction by themselves
    const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(eight));
  }
#endif
  for (; i < count; i++) to[i] = from_float16(halves[i]);
}

// Write them, rounded to the nearest.
inline void store_floats(const float* from, int64_t count, void* to, int32_t dtype) {
  auto* halves = static_cast<uint16_t*>(to);
  int64_t i = 0;
  if (dtype == kFloat32) {
    std::copy_n(from, count, static_cast<float*>(to));
    return;
  }
  if (dtype == kBfloat16) {
    for (; i < count; i++) halves[i] = to_bfloat16(from[i]);
  }
#if defined(__x86_64__)
  for (; i + 8 <= count; i += 8) {
    const __m128i eight = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(halves + i), eight);
  }
#endif
  for (; i < count; i++) halves[i] = to_float16(from[i]);
}

// Less work than this is done before a second thread has begun: some 50 microseconds.
constexpr double kOneThreadOperations = 4e6;

inline int64_t rounded_up(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

// Vectors of float32 and of the integers that hold their bits.
using Float8 = float __attribute__((vector_size(32)));
using Int8 = int32_t __attribute__((vector_size(32)));

// At any address: a copy of the bytes is not made with one load by every compiler.
using LooseFloat8 = float __attribute__((vector_size(32), aligned(4), may_alias));
inline Float8 load_float8(const float* from) { return *reinterpret_cast<const LooseFloat8*>(from); }
inline void store_float8(float* to, Float8 lanes) { *reinterpret_cast<LooseFloat8*>(to) = lanes; }

inline float sum_of(Float8 lanes) {
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) +
         ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

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
