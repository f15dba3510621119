#include "attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "elements.h"

namespace llama {
namespace {

constexpr int64_t kKeys = 64;      // of one block
constexpr int64_t kQueries = 64;   // of one task: rows of all heads that share a KV head
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

// What one thread works on: some queries of the heads that share a KV head, block by block of keys.
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

  void begin() {
    std::fill(seen_.begin(), seen_.end(), 0.0f);
    std::fill(largest_.begin(), largest_.end(), kMinusInfinity);
    std::fill(sums_.begin(), sums_.end(), 0.0f);
  }

  float* query(int64_t row) { return &queries_[row * width_]; }
  float* seen(int64_t row) { return &seen_[row * padded_width_]; }
  float largest(int64_t row) const { return largest_[row]; }
  float sum(int64_t row) const { return sums_[row]; }

  void load_keys(const Heads& keys, const Heads& values, int64_t batch, int64_t head, int64_t first,
                 int64_t count) {
    for (int64_t key = 0; key < count; key++) {
      keys.load(batch, head, first + key, row_.data());
      for (int64_t i = 0; i < width_; i++) keys_[i * kKeys + key] = row_[i];
      values.load(batch, head, first + key, &values_[key * padded_width_]);
    }
  }

  void score(int64_t rows) {
    std::fill(scores_.begin(), scores_.end(), 0.0f);
    add_product(queries_.data(), width_, keys_.data(), kKeys, scores_.data(), kKeys,
                rounded_up(rows, kTileRows), width_, kKeys);
  }

  // Turn the scores of a row into weights of its first `visible` keys, against the largest so far.
  void weigh(int64_t row, int64_t visible) {
    float* scores = &scores_[row * kKeys];
    std::fill(scores + visible, scores + kKeys, kMinusInfinity);
    const float before = largest_[row];
    const float largest = std::max(before, *std::max_element(scores, scores + kKeys));
    if (largest == kMinusInfinity) {
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
    float* seen_row = seen(row);
    for (int64_t i = 0; i < padded_width_; i++) seen_row[i] *= kept;
  }

  void look(int64_t rows, int64_t count) {
    add_product(scores_.data(), kKeys, values_.data(), padded_width_, seen_.data(), padded_width_,
                rounded_up(rows, kTileRows), count, padded_width_);
  }

 private:
  int64_t width_, padded_width_, padded_rows_;
  std::vector<float> queries_;  // (rows, width), scaled
  std::vector<float> keys_;     // (width, kKeys)
  std::vector<float> values_;   // (kKeys, padded width)
  std::vector<float> row_;
  std::vector<float> scores_;  // (rows, kKeys)
  std::vector<float> seen_;    // (rows, padded width)
  std::vector<float> largest_, sums_;
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
#pragma omp parallel
  {
    Task task(group * positions, width);
#pragma omp for collapse(3) schedule(dynamic)
    for (int64_t batch = 0; batch < batches; batch++) {
      for (int64_t kv_head = 0; kv_head < kv_heads; kv_head++) {
        for (int64_t block = 0; block < blocks; block++) {
          const int64_t first = block * positions, count = std::min(positions, n - first);
          task.begin();
          for (int64_t row = 0; row < group * count; row++) {
            float* scaled = task.query(row);
            Heads{query}.load(batch, kv_head * group + row / count, first + row % count, scaled);
            for (int64_t i = 0; i < width; i++) scaled[i] *= static_cast<float>(scale);
          }
          const int64_t end = causal ? std::min(m, first + count) : m;
          for (int64_t at = 0; at < end; at += kKeys) {
            const int64_t keys = std::min(kKeys, end - at);
            task.load_keys({key}, {value}, batch, kv_head, at, keys);
            task.score(group * count);
            for (int64_t row = 0; row < group * count; row++) {
              const int64_t visible = causal ? first + row % count + 1 - at : keys;
              task.weigh(row, std::clamp<int64_t>(visible, 0, keys));
            }
            task.look(group * count, keys);
          }
          for (int64_t row = 0; row < group * count; row++) {
            const int64_t head = kv_head * group + row / count, position = first + row % count;
            float* values = task.seen(row);
            for (int64_t i = 0; i < width; i++) values[i] /= task.sum(row);
            const int64_t line = (batch * n + position) * heads + head;
            store_floats(values, width, seen->data() + line * width * seen->element_bytes(),
                         seen->dtype, 1);
            reinterpret_cast<float*>(sums->data())[line] =
                task.largest(row) + std::log(task.sum(row));
          }
        }
      }
    }
  }
  return {std::move(seen), std::move(sums)};
}

}  // namespace llama
