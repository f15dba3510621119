// libllama_runtime.so for a CPU: memory, and the operators that prefill's programs call.

#include <cmath>
#include <cstring>

#include "attention.h"
#include "elements.h"
#include "products.h"
#include "tensor.h"

using llama::as_error_code;
using llama::attend;
using llama::checked;
using llama::multiply;
using llama::require;
using llama::Tensor;

namespace llama {

std::shared_ptr<void> take_memory(int64_t bytes, Device device) {
  require(device.type == kCpu, "this runtime library has memory of the CPU alone");
  return take_host_memory(bytes);
}

void copy_memory(void* to, const void* from, int64_t bytes, Device) {
  std::memcpy(to, from, bytes);
}

}  // namespace llama

EXPORTED int32_t aoti_torch_cpu_mm_out(Tensor* out, Tensor* left, Tensor* right) {
  return as_error_code("aoti_torch_cpu_mm_out", [&] {
    multiply(checked(out), checked(left), checked(right), nullptr, 0, 1);
  });
}

EXPORTED int32_t aoti_torch_cpu_addmm_out(Tensor* out, Tensor* added, Tensor* left, Tensor* right,
                                          double beta, double alpha) {
  return as_error_code("aoti_torch_cpu_addmm_out", [&] {
    multiply(checked(out), checked(left), checked(right), &checked(added), beta, alpha);
  });
}

EXPORTED int32_t aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu(
    Tensor* query, Tensor* key, Tensor* value, double dropout, int32_t causal, Tensor** mask,
    double* scale, Tensor** seen, Tensor** sums) {
  return as_error_code("aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu", [&] {
    require(dropout == 0 && mask == nullptr, "attention takes no mask and no dropout here");
    require(checked(query).dims == 4, "attention takes 4 dimensions");
    const double usual = 1 / std::sqrt(static_cast<double>(query->sizes[3]));
    auto results = attend(*query, checked(key), checked(value), causal != 0,
                          scale != nullptr ? *scale : usual);
    *seen = results.first.release();
    *sums = results.second.release();
  });
}

#if defined(__x86_64__)
// Generated kernels call the exponential of a vector by the name that it has in libtorch.
EXPORTED __m256 Sleef_expf8_u10(__m256 x) { return llama::exponential<__m256, llama::Int8>(x); }

EXPORTED __attribute__((target("avx512f"))) __m512 Sleef_expf16_u10(__m512 x) {
  using Int16 = int32_t __attribute__((vector_size(64)));
  return llama::exponential<__m512, Int16>(x);
}
#endif
