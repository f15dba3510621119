// libllama_runtime.so for CUDA: memory of the device, and the guard that programs ask for.
//
// What programs launch are their own kernels, through the driver and libcudart, which a start opens
// for all before it opens this.

#include <algorithm>
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

// Memory once taken from the device stays here and is used again by what is as large.
//
// A step takes the same sizes in the same order each time, so after its first run it takes nothing
// from the device: it can be captured. What a captured step used for scratch others may use between
// its replays, as they run on its stream. Nothing is freed, which would break the capture.
class Pool {
 public:
  std::shared_ptr<void> take(int64_t bytes) {
    const int64_t size = size_class(bytes);
    void* memory = nullptr;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = free_.find(size);
      if (found != free_.end()) {
        memory = found->second;
        free_.erase(found);
      }
    }
    if (memory == nullptr) check(cudaMalloc(&memory, size));
    return std::shared_ptr<void>(memory, [this, size](void* back) {
      const std::lock_guard<std::mutex> lock(mutex_);
      free_.emplace(size, back);
    });
  }

 private:
  // Four classes to an octave: prompts of many lengths leave few sizes behind, a fifth is wasted.
  static int64_t size_class(int64_t bytes) {
    int64_t step = 512;
    while (bytes > 8 * step) step *= 2;
    return std::max<int64_t>(1, (bytes + step - 1) / step) * step;
  }

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
