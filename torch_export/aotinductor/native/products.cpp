#include "products.h"

#include <algorithm>

#include "elements.h"

namespace llama {
namespace {

// Blocks of one task: its weights, tokens and sums stay in the caches of one core.
constexpr int64_t kBlockRows = 32;
constexpr int64_t kBlockTokens = 48;
constexpr int64_t kBlockDepth = 1024;
constexpr int64_t kTileRows = 4;
constexpr int64_t kTileTokens = 3;
// Less work than this is done before a second thread has begun (some 50 microseconds).
constexpr double kOneThreadOperations = 4e6;

// Rows of k elements: the tokens, or the weights of the output's columns.
struct Rows {
  const char* data;
  int64_t count;
  int64_t row_stride, stride;  // in elements
  int32_t dtype;
};

struct Chunk {  // some rows, some of their elements, as float32 with zeros up to a whole vector
  const float* data;
  int64_t row_stride;
};

// sums (tokens, rows) += tokens @ rows transposed, over `depth` elements: whole vectors.
template <int tokens>
void add_tile(const float* const rows[kTileRows], const Chunk& left, int64_t depth, float* sums,
              int64_t row_count) {
  Float8 totals[tokens][kTileRows] = {};
  for (int64_t i = 0; i < depth; i += 8) {
    Float8 weights[kTileRows];
    for (int r = 0; r < kTileRows; r++) std::memcpy(&weights[r], rows[r] + i, sizeof(Float8));
    for (int t = 0; t < tokens; t++) {
      Float8 token;
      std::memcpy(&token, left.data + t * left.row_stride + i, sizeof(Float8));
      for (int r = 0; r < kTileRows; r++) totals[t][r] += token * weights[r];
    }
  }
  for (int t = 0; t < tokens; t++) {
    for (int64_t r = 0; r < row_count; r++) {
      const Float8& lanes = totals[t][r];
      sums[t * kBlockRows + r] += ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) +
                                  ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
    }
  }
}

// Return elements [begin, begin + depth) of `count` rows: in place, or copied to `buffer`.
Chunk fetch(const Rows& rows, int64_t first, int64_t count, int64_t begin, int64_t depth,
            float* buffer) {
  const int64_t width = rows.dtype == kFloat32 ? 4 : 2;
  const char* data = rows.data + (first * rows.row_stride + begin * rows.stride) * width;
  if (rows.dtype == kFloat32 && rows.stride == 1 && depth % 8 == 0) {
    return {reinterpret_cast<const float*>(data), rows.row_stride};
  }
  for (int64_t r = 0; r < count; r++) {
    float* row = buffer + r * kBlockDepth;
    load_floats(data + r * rows.row_stride * width, rows.dtype, rows.stride, depth, row);
    std::fill(row + depth, row + (depth + 7) / 8 * 8, 0.0f);
  }
  return {buffer, kBlockDepth};
}

// Add one block of tokens times one block of weights to sums (kBlockTokens, kBlockRows).
void add_block(const Chunk& weights, int64_t row_count, const Chunk& left, int64_t token_count,
               int64_t depth, float* sums) {
  for (int64_t t = 0; t < token_count; t += kTileTokens) {
    const Chunk tile{left.data + t * left.row_stride, left.row_stride};
    for (int64_t r = 0; r < row_count; r += kTileRows) {
      const int64_t rows_left = std::min(kTileRows, row_count - r);
      const float* rows[kTileRows];
      for (int64_t i = 0; i < kTileRows; i++) {  // the last row again where there are fewer
        rows[i] = weights.data + (r + std::min(i, rows_left - 1)) * weights.row_stride;
      }
      float* corner = sums + t * kBlockRows + r;
      switch (std::min(kTileTokens, token_count - t)) {
        case 3:
          add_tile<3>(rows, tile, depth, corner, rows_left);
          break;
        case 2:
          add_tile<2>(rows, tile, depth, corner, rows_left);
          break;
        default:
          add_tile<1>(rows, tile, depth, corner, rows_left);
      }
    }
  }
}

}  // namespace

void multiply(Tensor& out, const Tensor& left, const Tensor& right, const Tensor* added,
              double beta, double alpha) {
  require(out.dims == 2 && left.dims == 2 && right.dims == 2, "a product takes matrices");
  const int64_t n = left.sizes[0], k = left.sizes[1], r = right.sizes[1];
  require(right.sizes[0] == k && out.sizes[0] == n && out.sizes[1] == r,
          "the shapes of a product don't fit");
  require(is_floating(out.dtype) && left.dtype == out.dtype && right.dtype == out.dtype,
          "a product takes float32, bfloat16 or float16, all the same");
  require(added == nullptr || added->dtype == out.dtype, "what is added has another dtype");
  const Rows tokens{left.data(), n, left.strides[0], left.strides[1], left.dtype};
  const Rows weights{right.data(), r, right.strides[1], right.strides[0], right.dtype};
  const int64_t token_blocks = (n + kBlockTokens - 1) / kBlockTokens;
  const int64_t row_blocks = (r + kBlockRows - 1) / kBlockRows;
  const double operations = 2.0 * n * k * r;

#pragma omp parallel for collapse(2) schedule(dynamic) if (operations > kOneThreadOperations)
  for (int64_t row_block = 0; row_block < row_blocks; row_block++) {
    for (int64_t token_block = 0; token_block < token_blocks; token_block++) {
      alignas(64) static thread_local float weight_buffer[kBlockRows * kBlockDepth];
      alignas(64) static thread_local float token_buffer[kBlockTokens * kBlockDepth];
      alignas(64) float sums[kBlockTokens * kBlockRows] = {};
      const int64_t row = row_block * kBlockRows, rows = std::min(kBlockRows, r - row);
      const int64_t token = token_block * kBlockTokens;
      const int64_t count = std::min(kBlockTokens, n - token);
      for (int64_t begin = 0; begin < k; begin += kBlockDepth) {
        const int64_t depth = std::min(kBlockDepth, k - begin);
        const Chunk right_chunk = fetch(weights, row, rows, begin, depth, weight_buffer);
        const Chunk left_chunk = fetch(tokens, token, count, begin, depth, token_buffer);
        add_block(right_chunk, rows, left_chunk, count, (depth + 7) / 8 * 8, sums);
      }
      for (int64_t t = 0; t < count; t++) {
        float* row_sums = sums + t * kBlockRows;
        for (int64_t i = 0; i < rows; i++) row_sums[i] *= static_cast<float>(alpha);
        if (added != nullptr) {
          float terms[kBlockRows];
          const bool whole = added->dims == 2;
          const int64_t stride = added->strides[whole];
          const int64_t at = (whole ? (token + t) * added->strides[0] : 0) + row * stride;
          load_floats(added->data() + at * added->element_bytes(), added->dtype, stride, rows,
                      terms);
          for (int64_t i = 0; i < rows; i++) row_sums[i] += static_cast<float>(beta) * terms[i];
        }
        char* place = out.data() + ((token + t) * out.strides[0] + row * out.strides[1]) *
                                       out.element_bytes();
        store_floats(row_sums, rows, place, out.dtype, out.strides[1]);
      }
    }
  }
}

}  // namespace llama
