// libllama_runtime.so for CUDA: memory of the device, and the guard that programs ask for.
//
// What programs launch are their own kernels, through the driver and libcudart, which a start opens
// for all before it opens this.

#include <cstring>
#include <map>
#include <mutex>

#include "tensor.h"

using llama::as_error_code;
using llama::require;

// Of libcudart, whose headers a build needn't have.
extern "C" {
int cudaMalloc(void** memory, size_t bytes);
int cudaMemcpy(void* to, const void* from, size_t bytes, int kind);
int cudaSetDevice(int index);
const char* cudaGetErrorString(int error);
}

namespace llama {
namespace {

constexpr int kDeviceToDevice = 3;

void check(int error) {
  if (error != 0) throw std::runtime_error(cudaGetErrorString(error));
}

// Memory once taken from the device stays here and is used again by what is as large: few sizes, as
// prompts go through decode here (prefill calls products, which this library has not).
//
// A step takes the same sizes in the same order each time, so after its first run it takes nothing
// from the device: it can be captured. What a captured step used for scratch others may use between
// its replays, as they run on its stream. Nothing is freed, which would break the capture.
class Pool {
 public:
  std::shared_ptr<void> take(int64_t bytes) {
    void* memory = nullptr;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (auto kept = free_.extract(bytes)) memory = kept.mapped();
    }
    if (memory == nullptr) check(cudaMalloc(&memory, bytes));
    return std::shared_ptr<void>(memory, [this, bytes](void* back) {
      const std::lock_guard<std::mutex> lock(mutex_);
      free_.emplace(bytes, back);
    });
  }

 private:
  std::mutex mutex_;
  std::multimap<int64_t, void*> free_;
};

Pool& pool() {
  static Pool& pool = *new Pool;  // as long as the process: tensors may outlive static objects
  return pool;
}

}  // namespace

std::shared_ptr<void> take_memory(int64_t bytes, Device device) {
  return device.type == kCuda ? pool().take(bytes) : take_host_memory(bytes);
}

void copy_memory(void* to, const void* from, int64_t bytes, Device device) {
  if (device.type != kCuda) {
    std::memcpy(to, from, bytes);
    return;
  }
  check(cudaMemcpy(to, from, bytes, kDeviceToDevice));
}

}  // namespace llama

// The stream is an argument of each launch; what remains of a guard is the thread's device.
EXPORTED int32_t aoti_torch_create_cuda_stream_guard(void*, int32_t device_index, void** guard) {
  return as_error_code("aoti_torch_create_cuda_stream_guard", [&] {
    *guard = nullptr;
    llama::check(cudaSetDevice(device_index));
  });
}

EXPORTED int32_t aoti_torch_delete_cuda_stream_guard(void*) { return 0; }
