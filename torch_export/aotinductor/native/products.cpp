// A tile of sums stays in registers while rows of weights and rows of tokens run past it, both as
// they lie in memory. So a short prompt reads each weight once and nothing is packed, which other
// libraries do and which pays for square matrices alone.

#include "products.h"

#include <algorithm>

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

bool has_wide() { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq"); }
bool has_pairs() { return has_wide() && __builtin_cpu_supports("avx512bf16"); }
#endif

// Rows of k elements: the tokens, or the weights of the output's columns.
struct Rows {
  const char* data;
  int64_t count;
  int64_t row_stride, stride;  // in elements
  int32_t dtype;
  int64_t width;  // bytes of an element
};

template <class Element>
struct Block {
  const Element* data;
  int64_t row_stride;
};

constexpr int32_t dtype_of(float) { return kFloat32; }
constexpr int32_t dtype_of(uint16_t) { return kBfloat16; }

void load_row(const char* from, const Rows& rows, int64_t depth, float* to) {
  load_floats(from, rows.dtype, rows.stride, depth, to);
}

void load_row(const char* from, const Rows& rows, int64_t depth, uint16_t* to) {
  const auto* elements = reinterpret_cast<const uint16_t*>(from);
  for (int64_t i = 0; i < depth; i++) to[i] = elements[i * rows.stride];
}

// Where a thread keeps what it cannot read in place.
struct Copies {
  alignas(64) float weights[kBlockRows * kBlockDepth];
  alignas(64) float tokens[kBlockTokens * kBlockDepth];
};
thread_local Copies copied;

// Return elements [begin, begin + depth) of some rows, in place, or copied to `buffer` where they
// are of another dtype, apart from each other, or not whole vectors: zeros fill the last one.
template <class Lanes>
Block<typename Lanes::Element> fetch(const Rows& rows, int64_t first, int64_t count, int64_t begin,
                                     int64_t depth, float* buffer) {
  using Element = typename Lanes::Element;
  const char* data = rows.data + (first * rows.row_stride + begin * rows.stride) * rows.width;
  if (rows.dtype == dtype_of(Element()) && rows.stride == 1 && depth % Lanes::kLanes == 0) {
    return {reinterpret_cast<const Element*>(data), rows.row_stride};
  }
  for (int64_t r = 0; r < count; r++) {
    Element* row = reinterpret_cast<Element*>(buffer) + r * kBlockDepth;
    load_row(data + r * rows.row_stride * rows.width, rows, depth, row);
    std::fill(row + depth, row + rounded_up(depth, Lanes::kLanes), Element());
  }
  return {reinterpret_cast<Element*>(buffer), kBlockDepth};
}

// What becomes of a sum: out = alpha * sum + beta * added.
struct Finish {
  Tensor& out;
  const Tensor* added;  // (r,), or (n, r)
  float beta, alpha;

  void store(float* sums, int64_t token, int64_t row, int64_t rows) const {
    for (int64_t i = 0; i < rows; i++) sums[i] *= alpha;
    if (added != nullptr) {
      float terms[kBlockRows];
      const int64_t last = added->dims - 1;
      const int64_t stride = added->sizes[last] == 1 ? 0 : added->strides[last];
      const bool each_token = added->dims == 2 && added->sizes[0] != 1;
      const int64_t at = row * stride + (each_token ? token * added->strides[0] : 0);
      load_floats(added->data() + at * added->element_bytes(), added->dtype, stride, rows, terms);
      for (int64_t i = 0; i < rows; i++) sums[i] += beta * terms[i];
    }
    const int64_t at = token * out.strides[0] + row * out.strides[1];
    store_floats(sums, rows, out.data() + at * out.element_bytes(), out.dtype, out.strides[1]);
  }
};

template <class Lanes>
void multiply_with(const Rows& tokens, const Rows& weights, int64_t k, const Finish& finish) {
  const int64_t row_blocks = (weights.count + kBlockRows - 1) / kBlockRows;
  const int64_t token_blocks = (tokens.count + kBlockTokens - 1) / kBlockTokens;
  const double operations = 2.0 * tokens.count * k * weights.count;

#pragma omp parallel for collapse(2) schedule(dynamic) if (operations > kOneThreadOperations)
  for (int64_t row_block = 0; row_block < row_blocks; row_block++) {
    for (int64_t token_block = 0; token_block < token_blocks; token_block++) {
      alignas(64) float sums[kBlockTokens * kBlockRows] = {};
      const int64_t row = row_block * kBlockRows, token = token_block * kBlockTokens;
      const int64_t row_count = std::min(kBlockRows, weights.count - row);
      const int64_t token_count = std::min(kBlockTokens, tokens.count - token);
      for (int64_t begin = 0; begin < k; begin += kBlockDepth) {
        const int64_t depth = std::min(kBlockDepth, k - begin);
        const auto right = fetch<Lanes>(weights, row, row_count, begin, depth, copied.weights);
        const auto left = fetch<Lanes>(tokens, token, token_count, begin, depth, copied.tokens);
        Lanes::add_block(right.data, right.row_stride, row_count, left.data, left.row_stride,
                         token_count, rounded_up(depth, Lanes::kLanes), sums);
      }
      for (int64_t i = 0; i < token_count; i++) {
        finish.store(sums + i * kBlockRows, token + i, row, row_count);
      }
    }
  }
}

using Multiply = void (*)(const Rows&, const Rows&, int64_t, const Finish&);

// The widest instructions that this processor has for a dtype.
Multiply choose(int32_t dtype) {
#if defined(HAS_WIDE_TILES)
  if (has_wide() && dtype != kBfloat16) return multiply_with<Floats16>;
  if (has_pairs() && dtype == kBfloat16) return multiply_with<Pairs16>;
#endif
  return multiply_with<Floats8>;
}

bool is_broadcast(int64_t size, int64_t wanted) { return size == 1 || size == wanted; }

void check_and_multiply(Multiply chosen, Tensor& out, const Tensor& left, const Tensor& right,
                        const Tensor* added, double beta, double alpha) {
  require(out.dims == 2 && left.dims == 2 && right.dims == 2, "a product takes matrices");
  const int64_t n = left.sizes[0], k = left.sizes[1], r = right.sizes[1];
  require(right.sizes[0] == k && out.sizes[0] == n && out.sizes[1] == r,
          "the shapes of a product don't fit");
  require(is_floating(out.dtype) && left.dtype == out.dtype && right.dtype == out.dtype,
          "a product takes float32, bfloat16 or float16, all the same");
  if (added != nullptr) {
    require(added->dtype == out.dtype, "what is added to a product has another dtype");
    require((added->dims == 1 || added->dims == 2) &&
                is_broadcast(added->sizes[added->dims - 1], r) &&
                (added->dims == 1 || is_broadcast(added->sizes[0], n)),
            "the shape of what is added to a product doesn't fit");
  }
  const int64_t width = out.element_bytes();
  const Rows tokens{left.data(), n, left.strides[0], left.strides[1], left.dtype, width};
  const Rows weights{right.data(), r, right.strides[1], right.strides[0], right.dtype, width};
  const Finish finish{out, added, static_cast<float>(beta), static_cast<float>(alpha)};
  chosen(tokens, weights, k, finish);
}

}  // namespace

void multiply(Tensor& out, const Tensor& left, const Tensor& right, const Tensor* added,
              double beta, double alpha) {
  check_and_multiply(choose(out.dtype), out, left, right, added, beta, alpha);
}

}  // namespace llama
