// libllama_runtime.so for a CPU: memory, and the exponential that generated kernels call by the
// name that it has in libtorch. The operators of prefill stand in products.cpp and attention.cpp.

#include <cstring>

#include "elements.h"

namespace llama {

std::shared_ptr<void> take_memory(int64_t bytes, Device device) {
  require(device.type == kCpu, "this runtime library has memory of the CPU alone");
  return take_host_memory(bytes);
}

void copy_memory(void* to, const void* from, int64_t bytes, Device) {
  std::memcpy(to, from, bytes);
}

}  // namespace llama

#if defined(__x86_64__)
EXPORTED __m256 Sleef_expf8_u10(__m256 x) { return llama::exponential<__m256, llama::Int8>(x); }

EXPORTED __attribute__((target("avx512f"))) __m512 Sleef_expf16_u10(__m512 x) {
  using Int16 = int32_t __attribute__((vector_size(64)));
  return llama::exponential<__m512, Int16>(x);
}
#endif
