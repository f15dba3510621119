#include "attention.h"

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

// out (rows, columns) += left (rows, inner) @ right (inner, columns); rows a multiple of 4, columns
// of 16.
void add_product(const float* left, int64_t left_stride, const float* right, int64_t right_stride,
                 float* out, int64_t out_stride, int64_t rows, int64_t inner, int64_t columns) {
  for (int64_t row = 0; row < rows; row += kTileRows) {
    for (int64_t column = 0; column < columns; column += kTileColumns) {
      float* corner = out + row * out_stride + column;
      Float8 sums[kTileRows][2];
#pragma GCC unroll 4
      for (int r = 0; r < kTileRows; r++) {
        sums[r][0] = load_float8(corner + r * out_stride);
        sums[r][1] = load_float8(corner + r * out_stride + 8);
      }
      for (int64_t i = 0; i < inner; i++) {
        const Float8 low = load_float8(right + i * right_stride + column);
        const Float8 high = load_float8(right + i * right_stride + column + 8);
#pragma GCC unroll 4
        for (int r = 0; r < kTileRows; r++) {
          const float factor = left[(row + r) * left_stride + i];
          sums[r][0] += factor * low;
          sums[r][1] += factor * high;
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < kTileRows; r++) {
        store_float8(corner + r * out_stride, sums[r][0]);
        store_float8(corner + r * out_stride + 8, sums[r][1]);
      }
    }
  }
}

// A (batch, heads, positions, width) tensor, a row at a time.
struct Heads {
  const Tensor& tensor;

  void load(int64_t batch, int64_t head, int64_t position, float* to) const {
    const int64_t* strides = tensor.strides;
    const int64_t at = batch * strides[0] + head * strides[1] + position * strides[2];
    load_floats(tensor.data() + at * tensor.element_bytes(), tensor.dtype, strides[3],
                tensor.sizes[3], to);
  }
};

struct Problem {
  const Heads query, key, value;
  Tensor &seen, &sums;  // results
  int64_t heads, group, queries, keys, width;
  bool causal;
  float scale;
};

// What one thread works with: some queries of the heads that share a KV head, as rows, against one
// block of keys after the other.
class Task {
 public:
  Task(int64_t rows, int64_t width)
      : width_(width),
        padded_width_(rounded_up(width, kTileColumns)),
        padded_rows_(rounded_up(rows, kTileRows)),
        queries_(padded_rows_ * width),
        keys_(width * kKeys),
        values_(kKeys * padded_width_),
        row_(width),
        scores_(padded_rows_ * kKeys),
        seen_(padded_rows_ * padded_width_),
        largest_(padded_rows_),
        sums_(padded_rows_) {}

  // Write the results of queries [first, first + count) of each head of the group.
  void run(const Problem& problem, int64_t batch, int64_t kv_head, int64_t first, int64_t count) {
    const int64_t rows = problem.group * count;
    load_queries(problem, batch, kv_head, first, count);
    const int64_t end = problem.causal ? std::min(problem.keys, first + count) : problem.keys;
    for (int64_t key = 0; key < end; key += kKeys) {
      const int64_t key_count = std::min(kKeys, end - key);
      load_keys(problem, batch, kv_head, key, key_count);
      std::fill(scores_.begin(), scores_.end(), 0.0f);
      add_product(queries_.data(), width_, keys_.data(), kKeys, scores_.data(), kKeys,
                  rounded_up(rows, kTileRows), width_, kKeys);
      for (int64_t row = 0; row < rows; row++) {
        const int64_t seen_keys = problem.causal ? first + row % count + 1 - key : key_count;
        weigh(row, std::clamp<int64_t>(seen_keys, 0, key_count));
      }
      add_product(scores_.data(), kKeys, values_.data(), padded_width_, seen_.data(),
                  padded_width_, rounded_up(rows, kTileRows), key_count, padded_width_);
    }
    store(problem, batch, kv_head, first, count);
  }

 private:
  void load_queries(const Problem& problem, int64_t batch, int64_t kv_head, int64_t first,
                    int64_t count) {
    std::fill(seen_.begin(), seen_.end(), 0.0f);
    std::fill(largest_.begin(), largest_.end(), kMinusInfinity);
    std::fill(sums_.begin(), sums_.end(), 0.0f);
    for (int64_t row = 0; row < problem.group * count; row++) {
      float* query = &queries_[row * width_];
      const int64_t head = kv_head * problem.group + row / count;
      problem.query.load(batch, head, first + row % count, query);
      for (int64_t i = 0; i < width_; i++) query[i] *= problem.scale;
    }
  }

  void load_keys(const Problem& problem, int64_t batch, int64_t kv_head, int64_t first,
                 int64_t count) {
    for (int64_t key = 0; key < count; key++) {
      problem.key.load(batch, kv_head, first + key, row_.data());
      for (int64_t i = 0; i < width_; i++) keys_[i * kKeys + key] = row_[i];
      problem.value.load(batch, kv_head, first + key, &values_[key * padded_width_]);
    }
  }

  // Turn the scores of a row into weights of its first `count` keys, against the largest so far.
  void weigh(int64_t row, int64_t count) {
    float* scores = &scores_[row * kKeys];
    std::fill(scores + count, scores + kKeys, kMinusInfinity);
    const float before = largest_[row];
    const float largest = std::max(before, *std::max_element(scores, scores + kKeys));
    if (largest == kMinusInfinity) {  // it sees none yet, and infinities have no difference
      std::fill(scores, scores + kKeys, 0.0f);
      return;
    }
    Float8 total = {};
    for (int64_t key = 0; key < kKeys; key += 8) {
      const Float8 weights = exponential<Float8, Int8>(load_float8(scores + key) - largest);
      total += weights;
      store_float8(scores + key, weights);
    }
    const float kept = std::exp(before - largest);
    sums_[row] = sums_[row] * kept + sum_of(total);
    largest_[row] = largest;
    float* seen = &seen_[row * padded_width_];
    for (int64_t i = 0; i < padded_width_; i++) seen[i] *= kept;
  }

  void store(const Problem& problem, int64_t batch, int64_t kv_head, int64_t first,
             int64_t count) {
    for (int64_t row = 0; row < problem.group * count; row++) {
      const int64_t head = kv_head * problem.group + row / count;
      const int64_t position = batch * problem.queries + first + row % count;
      const int64_t line = position * problem.heads + head;
      float* seen = &seen_[row * padded_width_];
      for (int64_t i = 0; i < width_; i++) seen[i] /= sums_[row];
      char* place = problem.seen.data() + line * width_ * problem.seen.element_bytes();
      store_floats(seen, width_, place, problem.seen.dtype, 1);
      reinterpret_cast<float*>(problem.sums.data())[line] = largest_[row] + std::log(sums_[row]);
    }
  }

  int64_t width_, padded_width_, padded_rows_;
  std::vector<float> queries_;        // (rows, width), scaled
  std::vector<float> keys_;           // (width, kKeys)
  std::vector<float> values_;         // (kKeys, padded width)
  std::vector<float> row_;            // (width,)
  std::vector<float> scores_;         // (rows, kKeys)
  std::vector<float> seen_;           // (rows, padded width)
  std::vector<float> largest_, sums_;  // (rows,)
};

}  // namespace

std::pair<std::unique_ptr<Tensor>, std::unique_ptr<Tensor>> attend(
    const Tensor& query, const Tensor& key, const Tensor& value, bool causal, double scale) {
  require(query.dims == 4 && key.dims == 4 && value.dims == 4, "attention takes 4 dimensions");
  const int64_t batches = query.sizes[0], heads = query.sizes[1], n = query.sizes[2];
  const int64_t width = query.sizes[3], kv_heads = key.sizes[1], m = key.sizes[2];
  require(key.sizes[0] == batches && key.sizes[3] == width &&
              std::equal(key.sizes, key.sizes + 4, value.sizes),
          "the shapes of attention don't fit");
  require(kv_heads > 0 && heads % kv_heads == 0, "heads don't share KV heads evenly");
  require(is_floating(query.dtype) && key.dtype == query.dtype && value.dtype == query.dtype,
          "attention takes float32, bfloat16 or float16, all the same");
  const int64_t sizes[] = {batches, heads, n, width};
  const int64_t strides[] = {n * heads * width, width, heads * width, 1};
  const int64_t sum_strides[] = {n * heads, 1, heads};
  auto seen = empty_tensor(4, sizes, strides, query.dtype, query.device);
  auto sums = empty_tensor(3, sizes, sum_strides, kFloat32, query.device);

  const int64_t group = heads / kv_heads;
  const int64_t positions = std::max<int64_t>(1, kQueries / group);  // of one task
  const int64_t blocks = (n + positions - 1) / positions;
  const Problem problem{{query}, {key}, {value}, *seen,  *sums,
                        heads,   group, n,       m,      width,
                        causal,  static_cast<float>(scale)};
  const bool worth_threads = 4.0 * batches * heads * n * m * width > kOneThreadOperations;
  const int threads = worth_threads ? omp_get_max_threads() : 1;
  std::vector<Task> tasks;
  for (int thread = 0; thread < threads; thread++) tasks.emplace_back(group * positions, width);
#pragma omp parallel for collapse(3) schedule(dynamic) num_threads(threads)
  for (int64_t batch = 0; batch < batches; batch++) {
    for (int64_t kv_head = 0; kv_head < kv_heads; kv_head++) {
      for (int64_t block = 0; block < blocks; block++) {
        const int64_t first = block * positions;
        tasks[omp_get_thread_num()].run(problem, batch, kv_head, first,
                                        std::min(positions, n - first));
      }
    }
  }
  return {std::move(seen), std::move(sums)};
}

}  // namespace llama
