// Attention of a prompt to itself, without its matrix of scores.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "elements.h"

namespace llama {
namespace {

constexpr int64_t kKeys = 64;     // of one block
constexpr int64_t kQueries = 64;  // of one task: rows of all heads that share a KV head
constexpr int64_t kTileRows = 4;
constexpr int64_t kTileColumns = 16;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// out (rows, columns) += left (rows, inner) @ right (inner, columns), where right and out are as
// wide as `columns`; rows a multiple of 4, columns of 16.
void add_product(const float* left, int64_t left_stride, const float* right, float* out,
                 int64_t rows, int64_t inner, int64_t columns) {
  for (int64_t row = 0; row < rows; row += kTileRows) {
    for (int64_t column = 0; column < columns; column += kTileColumns) {
      float* corner = out + row * columns + column;
      Float8 sums[kTileRows][2];
#pragma GCC unroll 4
      for (int r = 0; r < kTileRows; r++) {
        sums[r][0] = load_float8(corner + r * columns);
        sums[r][1] = load_float8(corner + r * columns + 8);
      }
      for (int64_t i = 0; i < inner; i++) {
        const Float8 low = load_float8(right + i * columns + column);
        const Float8 high = load_float8(right + i * columns + column + 8);
#pragma GCC unroll 4
        for (int r = 0; r < kTileRows; r++) {
          const float factor = left[(row + r) * left_stride + i];
          sums[r][0] += factor * low;
          sums[r][1] += factor * high;
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < kTileRows; r++) {
        store_float8(corner + r * columns, sums[r][0]);
        store_float8(corner + r * columns + 8, sums[r][1]);
      }
    }
  }
}

struct Problem {
  const Tensor &query, &key, &value;  // (1, heads or kv_heads, n, width)
  Tensor &seen, &sums;                // results
  int64_t heads, group, width;
  float scale;
};

// Read the row of one head and position as float32.
void load_row(const Tensor& heads, int64_t head, int64_t position, float* to) {
  const int64_t at = head * heads.strides[1] + position * heads.strides[2];
  const char* from = heads.data() + at * heads.element_bytes();
  load_floats(from, heads.dtype, heads.sizes[3], to);
}

// What one thread works with: some queries of the heads that share a KV head, as rows, against one
// block of keys after the other.
class Task {
 public:
  Task(const Problem& problem, int64_t positions)
      : problem_(problem),
        width_(problem.width),
        padded_width_(rounded_up(width_, kTileColumns)),
        padded_rows_(rounded_up(problem.group * positions, kTileRows)),
        queries_(padded_rows_ * width_),
        keys_(width_ * kKeys),
        values_(kKeys * padded_width_),
        row_(width_) {}

  // Write the results of queries [first, first + count) of each head of the group.
  void run(int64_t kv_head, int64_t first, int64_t count) {
    const int64_t rows = problem_.group * count, head = kv_head * problem_.group;
    seen_.assign(padded_rows_ * padded_width_, 0.0f);
    largest_.assign(padded_rows_, kMinusInfinity);
    sums_.assign(padded_rows_, 0.0f);
    for (int64_t row = 0; row < rows; row++) {
      float* query = &queries_[row * width_];
      load_row(problem_.query, head + row / count, first + row % count, query);
      for (int64_t i = 0; i < width_; i++) query[i] *= problem_.scale;
    }
    for (int64_t key = 0; key < first + count; key += kKeys) {
      const int64_t key_count = std::min(kKeys, first + count - key);
      load_keys(kv_head, key, key_count);
      scores_.assign(padded_rows_ * kKeys, 0.0f);
      const int64_t whole = rounded_up(rows, kTileRows);
      add_product(queries_.data(), width_, keys_.data(), scores_.data(), whole, width_, kKeys);
      for (int64_t row = 0; row < rows; row++) {
        const int64_t seen_keys = first + row % count + 1 - key;  // a query sees no later ones
        weigh(row, std::clamp<int64_t>(seen_keys, 0, key_count));
      }
      add_product(scores_.data(), kKeys, values_.data(), seen_.data(), whole, key_count,
                  padded_width_);
    }
    for (int64_t row = 0; row < rows; row++) {
      store(row, (first + row % count) * problem_.heads + head + row / count);
    }
  }

 private:
  void load_keys(int64_t kv_head, int64_t first, int64_t count) {
    for (int64_t key = 0; key < count; key++) {
      load_row(problem_.key, kv_head, first + key, row_.data());
      for (int64_t i = 0; i < width_; i++) keys_[i * kKeys + key] = row_[i];
      load_row(problem_.value, kv_head, first + key, &values_[key * padded_width_]);
    }
  }

  // Turn the scores of a row into weights of its first `count` keys, against the largest so far.
  void weigh(int64_t row, int64_t count) {
    float* scores = &scores_[row * kKeys];
    std::fill(scores + count, scores + kKeys, kMinusInfinity);
    const float largest = std::max(largest_[row], *std::max_element(scores, scores + kKeys));
    Float8 total = {};
    for (int64_t key = 0; key < kKeys; key += 8) {
      const Float8 weights = exponential<Float8, Int8>(load_float8(scores + key) - largest);
      total += weights;
      store_float8(scores + key, weights);
    }
    const float kept = std::exp(largest_[row] - largest);
    sums_[row] = sums_[row] * kept + sum_of(total);
    largest_[row] = largest;
    float* seen = &seen_[row * padded_width_];
    for (int64_t i = 0; i < padded_width_; i++) seen[i] *= kept;
  }

  // Write the result of a row to its line, of one position and head.
  void store(int64_t row, int64_t line) {
    float* seen = &seen_[row * padded_width_];
    for (int64_t i = 0; i < width_; i++) seen[i] /= sums_[row];
    char* place = problem_.seen.data() + line * width_ * problem_.seen.element_bytes();
    store_floats(seen, width_, place, problem_.seen.dtype);
    reinterpret_cast<float*>(problem_.sums.data())[line] = largest_[row] + std::log(sums_[row]);
  }

  const Problem& problem_;
  int64_t width_, padded_width_, padded_rows_;
  std::vector<float> queries_;                 // (rows, width), scaled
  std::vector<float> keys_, values_;           // (width, kKeys), (kKeys, padded width)
  std::vector<float> row_;                     // (width,)
  std::vector<float> scores_, seen_;           // (rows, kKeys), (rows, padded width)
  std::vector<float> largest_, sums_;          // (rows,)
};

// query (1, heads, n, width), key and value (1, kv_heads, n, width), each row contiguous; query i
// sees keys 0 to i. `seen` (1, heads, n, width) over memory of (n, heads, width), and `sums`, the
// logarithm of each query's sum of exponentials, (1, heads, n) float32 over (n, heads), are new.
// That shapes fit, torch has seen to.
void attend(const Tensor& query, const Tensor& key, const Tensor& value, double scale,
            Tensor** seen, Tensor** sums) {
  const int64_t heads = query.sizes[1], n = query.sizes[2], width = query.sizes[3];
  const int64_t kv_heads = key.sizes[1];
  require(query.strides[3] == 1 && key.strides[3] == 1 && value.strides[3] == 1,
          "attention takes contiguous rows");
  require(is_floating(query.dtype) && key.dtype == query.dtype && value.dtype == query.dtype,
          "attention takes float32, bfloat16 or float16, all the same");
  const int64_t strides[] = {n * heads * width, width, heads * width, 1};
  const int64_t sum_strides[] = {n * heads, 1, heads};
  auto results = empty_tensor(4, query.sizes, strides, query.dtype, query.device);
  auto logarithms = empty_tensor(3, query.sizes, sum_strides, kFloat32, query.device);

  const int64_t group = heads / kv_heads;
  const int64_t positions = std::max<int64_t>(1, kQueries / group);  // of one task
  const Problem problem{query, key, value, *results, *logarithms, heads, group, width,
                        static_cast<float>(scale)};
  const bool worth_threads = 4.0 * heads * n * n * width > kOneThreadOperations;
  const int threads = worth_threads ? omp_get_max_threads() : 1;
  std::vector<Task> tasks(threads, Task(problem, positions));
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
  for (int64_t kv_head = 0; kv_head < kv_heads; kv_head++) {
    for (int64_t first = 0; first < n; first += positions) {
      tasks[omp_get_thread_num()].run(kv_head, first, std::min(positions, n - first));
    }
  }
  *seen = results.release();
  *sums = logarithms.release();
}

}  // namespace
}  // namespace llama

using llama::checked;
using llama::Tensor;

EXPORTED int32_t aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu(
    Tensor* query, Tensor* key, Tensor* value, double dropout, int32_t causal, Tensor** mask,
    double* scale, Tensor** seen, Tensor** sums) {
  return llama::as_error_code("aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu", [&] {
    llama::require(dropout == 0 && mask == nullptr && causal != 0 && scale != nullptr,
                   "attention is causal here, with a scale, without a mask and dropout");
    llama::attend(checked(query), checked(key), checked(value), *scale, seen, sums);
  });
}
