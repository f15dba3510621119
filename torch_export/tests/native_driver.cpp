// Runs the runtime library's functions under sanitizers (test_native.py): every shape that could
// read or write beside a tensor, errors, and handles that nobody else holds. Each tensor has memory
// of its own, of exactly its size.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <vector>

#include "attention.cpp"
#include "elements.h"
#include "products.cpp"  // with each of its tiles, whichever the processor would choose

using llama::Tensor;

extern "C" {
int32_t aoti_torch_create_tensor_from_blob(void*, int64_t, const int64_t*, const int64_t*, int64_t,
                                           int32_t, int32_t, int32_t, Tensor**);
int32_t aoti_torch_delete_tensor_object(Tensor*);
int32_t aoti_torch_new_tensor_handle(Tensor*, Tensor**);
int32_t aoti_torch__reinterpret_tensor(Tensor*, int64_t, const int64_t*, const int64_t*, int64_t,
                                       Tensor**);
int32_t aoti_torch_clone(Tensor*, Tensor**);
}

namespace {

void expect(bool holds, const char* what, int64_t which = 0) {
  if (holds) return;
  std::printf("wrong: %s (%ld)\n", what, static_cast<long>(which));
  std::exit(1);
}

std::unique_ptr<Tensor> filled(std::vector<int64_t> sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i > 0; i--) strides[i - 1] = strides[i] * sizes[i];
  auto tensor = llama::empty_tensor(sizes.size(), sizes.data(), strides.data(), dtype, {});
  for (int64_t i = 0; i < tensor->elements(); i++) {
    const float value = static_cast<float>((i * 7919 + 13) % 251) / 125 - 1;
    llama::store_floats(&value, 1, tensor->data() + i * tensor->element_bytes(), dtype);
  }
  return tensor;
}

float at(const Tensor& tensor, int64_t element) {
  float value;
  llama::load_floats(tensor.data() + element * tensor.element_bytes(), tensor.dtype, 1, &value);
  return value;
}

void check_products(llama::Multiply chosen, int32_t dtype) {
  for (int64_t n : {1, 5, 7, 49}) {
    for (int64_t k : {1, 9, 33, 1025}) {
      for (int64_t r : {1, 3, 50}) {
        const auto left = filled({n, k}, dtype), weights = filled({r, k}, dtype);
        const auto bias = filled({r}, dtype), out = filled({n, r}, dtype);
        Tensor right = *weights;
        std::swap(right.sizes[0], right.sizes[1]);
        std::swap(right.strides[0], right.strides[1]);
        chosen(*out, *left, right, bias.get());
        for (int64_t i = 0; i < n * r; i++) {
          double sum = at(*bias, i % r), size = std::abs(sum);
          for (int64_t j = 0; j < k; j++) {
            const double term = at(*left, i / r * k + j) * at(*weights, i % r * k + j);
            sum += term, size += std::abs(term);
          }
          const double rounding = dtype == llama::kFloat32 ? 1e-6 : 8e-3;
          expect(std::abs(at(*out, i) - sum) <= 1e-6 * size + rounding * std::abs(sum), "product",
                 n * 1000 + r);
        }
      }
    }
  }
}

void check_attention(int32_t dtype) {
  for (int64_t n : {1, 5, 70}) {
    for (int64_t width : {4, 33}) {
      const auto query = filled({1, 6, n, width}, dtype);
      const auto key = filled({1, 2, n, width}, dtype), value = filled({1, 2, n, width}, dtype);
      Tensor *seen, *sums;
      llama::attend(*query, *key, *value, 0.5, &seen, &sums);
      expect(seen->elements() == 6 * n * width, "attention's size");
      for (int64_t i = 0; i < 6 * n * width; i++) {
        expect(std::abs(at(*seen, i)) <= 1.01f, "attention", n);
      }
      aoti_torch_delete_tensor_object(seen);
      aoti_torch_delete_tensor_object(sums);
    }
  }
}

void check_exponential() {
  const float infinity = std::numeric_limits<float>::infinity();
  for (float x = -110; x < 95; x += 0.0137f) {
    const float got = llama::exponential<llama::Float8, llama::Int8>(llama::Float8{} + x)[3];
    const double right = std::exp(static_cast<double>(x));
    if (right > std::numeric_limits<float>::max()) {
      expect(got == infinity, "exponential beyond the largest number", x);
      continue;
    }
    const float rounded = static_cast<float>(right);
    const double unit = std::nextafter(rounded, infinity) - rounded;
    expect(std::abs(got - right) <= unit, "exponential", static_cast<int64_t>(x));
  }
  const llama::Float8 odd = {infinity, -infinity, std::nanf(""), 0, 0, 0, 0, 0};
  const llama::Float8 got = llama::exponential<llama::Float8, llama::Int8>(odd);
  expect(got[0] == infinity && got[1] == 0 && std::isnan(got[2]) && got[3] == 1, "odd exponential");
}

void check_handles() {
  std::vector<float> memory(12, 1.0f);
  const int64_t sizes[] = {3, 4}, strides[] = {4, 1}, beyond[] = {4, 4};
  Tensor *blob, *view, *same, *copy, *none = nullptr;
  const auto create = [&](const int64_t* sizes, Tensor** made) {
    return aoti_torch_create_tensor_from_blob(memory.data(), 2, sizes, strides, 0, llama::kFloat32,
                                              0, 0, made);
  };
  expect(create(sizes, &blob) == 0, "a handle");
  expect(aoti_torch__reinterpret_tensor(blob, 2, beyond, strides, 0, &none) == 1, "a view beyond");
  expect(aoti_torch__reinterpret_tensor(blob, 1, sizes, strides + 1, 9, &view) == 0, "a view");
  expect(aoti_torch_clone(blob, &copy) == 0 && at(*copy, 11) == 1.0f, "a copy");
  expect(aoti_torch_delete_tensor_object(blob) == 0, "deleting");
  expect(aoti_torch_new_tensor_handle(copy, &same) == 0, "a second handle");
  expect(aoti_torch_delete_tensor_object(copy) == 0, "deleting the first");
  expect(at(*same, 11) == 1.0f && at(*view, 2) == 1.0f, "what is left of memory");
  expect(aoti_torch_cpu_mm_out(same, nullptr, same) == 1, "a null handle");
  aoti_torch_delete_tensor_object(view);
  aoti_torch_delete_tensor_object(same);
}

}  // namespace

int main() {
  for (int32_t dtype : {llama::kFloat32, llama::kBfloat16, llama::kFloat16}) {
    check_products(llama::multiply_with<llama::Floats8>, dtype);
    check_products(llama::choose(dtype), dtype);
    check_attention(dtype);
  }
  check_exponential();
  check_handles();
  std::puts("checked");
}
