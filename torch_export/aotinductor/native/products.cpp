// Products of matrices in float32, bfloat16 and float16, summed in float32.
//
// A tile of sums stays in registers while rows of weights and rows of tokens run past it, both as
// they lie in memory. So a short prompt reads each weight once and nothing is packed, which other
// libraries do and which pays for square matrices alone.

#include <algorithm>
#include <utility>

#include "elements.h"

namespace llama {
namespace {

// Blocks of one task: its weights, tokens and sums stay in the caches of one core. Rows and tokens
// are multiples of every tile's.
constexpr int64_t kBlockRows = 48;
constexpr int64_t kBlockTokens = 48;
constexpr int64_t kBlockDepth = 1024;

struct Floats8 {
  using Element = float;
  using Vector = Float8;
  using Sums = Float8;
  static constexpr int kLanes = 8, kRows = 3, kTokens = 4;
  static Vector load(const float* from) { return load_float8(from); }
  static Sums multiply_add(Sums sums, Vector a, Vector b) { return sums + a * b; }
  static void add_totals(const Sums* totals, float* sums) {
    for (int r = 0; r < kRows; r++) sums[r] += sum_of(totals[r]);
  }
#include "product_tile.inc"
};

#if defined(__x86_64__) && !defined(__clang__)
#define HAS_WIDE_TILES
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq")
// Add the sum of each of four vectors' lanes to sums, all four at once.
inline void add_totals_of_four(const __m512* totals, float* sums) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(totals[0], totals[1]),
                                  _mm512_unpackhi_ps(totals[0], totals[1]));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(totals[2], totals[3]),
                                  _mm512_unpackhi_ps(totals[2], totals[3]));
  const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, _MM_SHUFFLE(1, 0, 1, 0)),
                                    _mm512_shuffle_ps(ab, cd, _MM_SHUFFLE(3, 2, 3, 2)));
  const __m256 halves =
      _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
  _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), four));
}

struct Floats16 {
  using Element = float;
  using Vector = __m512;
  using Sums = __m512;
  static constexpr int kLanes = 16, kRows = 4, kTokens = 6;
  static Vector load(const float* from) { return _mm512_loadu_ps(from); }
  static Sums multiply_add(Sums sums, Vector a, Vector b) { return _mm512_fmadd_ps(a, b, sums); }
  static void add_totals(const Sums* totals, float* sums) { add_totals_of_four(totals, sums); }
#include "product_tile.inc"
};

#pragma GCC target("avx512bf16")
struct Pairs16 {  // two products of bfloat16 in each lane
  using Element = uint16_t;
  using Vector = __m512i;
  using Sums = __m512;
  static constexpr int kLanes = 32, kRows = 4, kTokens = 6;
  static Vector load(const uint16_t* from) { return _mm512_loadu_si512(from); }
  static Sums multiply_add(Sums sums, Vector a, Vector b) {
    return _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  static void add_totals(const Sums* totals, float* sums) { add_totals_of_four(totals, sums); }
#include "product_tile.inc"
};
#pragma GCC pop_options
#endif

// Where a thread keeps what it cannot read in place.
struct Copies {
  alignas(64) float weights[kBlockRows * kBlockDepth];
  alignas(64) float tokens[kBlockTokens * kBlockDepth];
};
thread_local Copies copied;

// Return elements [begin, begin + depth) of `count` rows, and the stride between rows: in place, or
// copied to `buffer` where they are of another dtype or not whole vectors: zeros fill the last one.
// Rows lie along `dim` of the matrix.
template <class Lanes>
auto fetch(const Tensor& matrix, int dim, int64_t first, int64_t count, int64_t begin,
           int64_t depth, float* buffer) {
  using Element = typename Lanes::Element;
  const int64_t row_stride = matrix.strides[dim];
  const int64_t bytes = matrix.element_bytes();  // of the three dtypes, float32 alone has 4
  const char* data = matrix.data() + (first * row_stride + begin) * bytes;
  const auto* rows = reinterpret_cast<const Element*>(data);
  if (bytes == sizeof(Element) && depth % Lanes::kLanes == 0) return std::pair(rows, row_stride);
  Element* copies = reinterpret_cast<Element*>(buffer);
  for (int64_t r = 0; r < count; r++) {
    Element* copy = copies + r * kBlockDepth;
    if constexpr (sizeof(Element) == sizeof(float)) {
      load_floats(data + r * row_stride * bytes, matrix.dtype, depth, copy);
    } else {
      std::copy_n(rows + r * row_stride, depth, copy);
    }
    std::fill(copy + depth, copy + rounded_up(depth, Lanes::kLanes), Element());
  }
  return std::pair(static_cast<const Element*>(copies), kBlockDepth);
}

template <class Lanes>
void multiply_with(Tensor& out, const Tensor& left, const Tensor& right, const Tensor* added) {
  const int64_t n = out.sizes[0], k = left.sizes[1], r = out.sizes[1];
  const int64_t bytes = out.element_bytes();
  // of one row that is added to all, or of one for each
  const bool one_row = added == nullptr || added->dims == 1 || added->sizes[0] == 1;
  const int64_t added_stride = one_row ? 0 : added->strides[0];
#pragma omp parallel for collapse(2) schedule(dynamic) if (2.0 * n * k * r > kOneThreadOperations)
  for (int64_t row = 0; row < r; row += kBlockRows) {
    for (int64_t token = 0; token < n; token += kBlockTokens) {
      alignas(64) float sums[kBlockTokens * kBlockRows] = {};
      float terms[kBlockRows];
      const int64_t rows = std::min(kBlockRows, r - row);
      const int64_t tokens = std::min(kBlockTokens, n - token);
      for (int64_t begin = 0; begin < k; begin += kBlockDepth) {
        const int64_t depth = std::min(kBlockDepth, k - begin);
        const auto [weight, weight_stride] =
            fetch<Lanes>(right, 1, row, rows, begin, depth, copied.weights);
        const auto [state, state_stride] =
            fetch<Lanes>(left, 0, token, tokens, begin, depth, copied.tokens);
        Lanes::add_block(weight, weight_stride, rows, state, state_stride, tokens,
                         rounded_up(depth, Lanes::kLanes), sums);
      }
      for (int64_t t = 0; t < tokens; t++) {
        float* line = sums + t * kBlockRows;
        if (added != nullptr) {
          const int64_t at = (token + t) * added_stride + row;
          load_floats(added->data() + at * bytes, added->dtype, rows, terms);
          for (int64_t i = 0; i < rows; i++) line[i] += terms[i];
        }
        const int64_t at = (token + t) * out.strides[0] + row;
        store_floats(line, rows, out.data() + at * bytes, out.dtype);
      }
    }
  }
}

using Multiply = decltype(&multiply_with<Floats8>);

// The widest instructions that this processor has for a dtype.
Multiply choose(int32_t dtype) {
#if defined(HAS_WIDE_TILES)
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq");
  if (wide && dtype != kBfloat16) return multiply_with<Floats16>;
  if (wide && __builtin_cpu_supports("avx512bf16")) return multiply_with<Pairs16>;
#endif
  return multiply_with<Floats8>;
}

// out (n, r) = left (n, k) @ right (k, r) + added, a row or one for each of n, or null for nothing.
// Contiguous along r, and left and right along k, as hidden rows and a checkpoint's weights are.
// That shapes fit, torch has seen to.
void multiply(Tensor& out, const Tensor& left, const Tensor& right, const Tensor* added) {
  require(is_floating(out.dtype) && left.dtype == out.dtype && right.dtype == out.dtype,
          "a product takes float32, bfloat16 or float16, all the same");
  require(left.strides[1] == 1 && right.strides[0] == 1 && out.strides[1] == 1,
          "a product takes contiguous rows, and columns of what is on the right");
  if (added != nullptr) {
    const int64_t last = added->dims - 1;
    require(added->dtype == out.dtype && added->sizes[last] == out.sizes[1] &&
                added->strides[last] == 1,
            "what is added to a product is a contiguous row of its dtype");
  }
  choose(out.dtype)(out, left, right, added);
}

}  // namespace
}  // namespace llama

using llama::as_error_code;
using llama::checked;
using llama::Tensor;

EXPORTED int32_t aoti_torch_cpu_mm_out(Tensor* out, Tensor* left, Tensor* right) {
  return as_error_code("aoti_torch_cpu_mm_out", [&] {
    llama::multiply(checked(out), checked(left), checked(right), nullptr);
  });
}

EXPORTED int32_t aoti_torch_cpu_addmm_out(Tensor* out, Tensor* added, Tensor* left, Tensor* right,
                                          double beta, double alpha) {
  return as_error_code("aoti_torch_cpu_addmm_out", [&] {
    llama::require(beta == 1 && alpha == 1, "what is added to a product is added as it is");
    llama::multiply(checked(out), checked(left), checked(right), &checked(added));
  });
}
