// What a handle of torch's C interface points to where torch isn't: memory with a shape.
#pragma once

#include <cstdint>
#include <cstdio>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace llama {

// The codes are torch's (c10/core/ScalarType.h and DeviceType.h): the same tensors go to libtorch.
enum DType : int32_t { kFloat16 = 5, kFloat32 = 6, kBfloat16 = 15 };
enum DeviceType : int32_t { kCpu = 0, kCuda = 1 };

constexpr int64_t kMaxDims = 8;

struct Device {
  int32_t type;
  int32_t index;
};

struct Tensor {
  std::shared_ptr<void> memory;  // without an owner where it is the caller's
  int64_t storage_bytes;
  int64_t dims;
  int64_t sizes[kMaxDims];
  int64_t strides[kMaxDims];  // in elements
  int64_t offset;             // in elements, from the start of the memory
  int32_t dtype;
  Device device;

  int64_t element_bytes() const;
  int64_t elements() const;
  int64_t extent_bytes() const;  // from the start of the memory to the end of the last element
  char* data() const { return static_cast<char*>(memory.get()) + offset * element_bytes(); }
};

// Throw std::invalid_argument with `problem` unless `holds`.
inline void require(bool holds, const char* problem) {
  if (!holds) throw std::invalid_argument(problem);
}

inline Tensor& checked(Tensor* handle) {
  require(handle != nullptr, "a handle is null");
  return *handle;
}

// Return a new tensor over fresh memory of the device; throws where there is none left.
std::unique_ptr<Tensor> empty_tensor(int64_t dims, const int64_t* sizes, const int64_t* strides,
                                     int32_t dtype, Device device);

// Memory that goes back by itself when its last owner goes; throws where there is none left.
std::shared_ptr<void> take_host_memory(int64_t bytes);

// Each runtime library has its own of these two.
std::shared_ptr<void> take_memory(int64_t bytes, Device device);
void copy_memory(void* to, const void* from, int64_t bytes, Device device);

// Run `body` behind the C interface: 0, or 1 and a line on stderr, as torch's functions do.
template <class Body>
int32_t as_error_code(const char* function, Body body) noexcept {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", function, error.what());
    return 1;
  }
}

}  // namespace llama
