// The functions of torch's C interface about handles: what programs of every device call.
//
// Names and signatures are those of torch/csrc/inductor/aoti_torch/c/shim.h, 2.9.1 to 2.14.1.

#include <algorithm>
#include <cstdlib>
#include <new>

#include "tensor.h"

using llama::as_error_code;
using llama::checked;
using llama::Device;
using llama::require;
using llama::Tensor;

namespace llama {

int64_t Tensor::element_bytes() const {
  switch (dtype) {
    case kUint8:
    case kInt8:
    case kBool:
      return 1;
    case kInt16:
    case kFloat16:
    case kBfloat16:
      return 2;
    case kInt32:
    case kFloat32:
      return 4;
    case kInt64:
    case kFloat64:
      return 8;
    default:
      throw std::invalid_argument("a tensor of dtype " + std::to_string(dtype) + " is not known");
  }
}

int64_t Tensor::elements() const {
  int64_t count = 1;
  for (int64_t dim = 0; dim < dims; dim++) count *= sizes[dim];
  return count;
}

namespace {

std::unique_ptr<Tensor> shaped(int64_t dims, const int64_t* sizes, const int64_t* strides,
                               int64_t offset, int32_t dtype, Device device) {
  require(0 <= dims && dims <= kMaxDims, "a tensor has 0 to 8 dimensions");
  auto tensor = std::make_unique<Tensor>();
  tensor->dims = dims;
  std::copy_n(sizes, dims, tensor->sizes);
  std::copy_n(strides, dims, tensor->strides);
  tensor->offset = offset;
  tensor->dtype = dtype;
  tensor->device = device;
  return tensor;
}

// Bytes from the start of the memory to the end of the last element.
int64_t extent_bytes(const Tensor& tensor) {
  int64_t last = tensor.offset;
  bool overflows = tensor.offset < 0;
  for (int64_t dim = 0; dim < tensor.dims; dim++) {
    require(tensor.sizes[dim] >= 0, "a size is negative");
    require(tensor.strides[dim] >= 0, "a stride is negative");
    if (tensor.sizes[dim] == 0) return 0;
    int64_t reach;
    overflows |= __builtin_mul_overflow(tensor.sizes[dim] - 1, tensor.strides[dim], &reach);
    overflows |= __builtin_add_overflow(last, reach, &last);
  }
  int64_t bytes;
  overflows |= __builtin_mul_overflow(last + 1, tensor.element_bytes(), &bytes);
  require(!overflows, "a tensor's size has no meaning");
  return bytes;
}

}  // namespace

std::shared_ptr<void> take_host_memory(int64_t bytes) {
  constexpr int64_t kAlignment = 64;  // what vectors are loaded from best, and what torch gives
  const int64_t whole = (std::max<int64_t>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment;
  void* memory = std::aligned_alloc(kAlignment, whole);
  if (memory == nullptr) throw std::bad_alloc();
  return std::shared_ptr<void>(memory, std::free);
}

std::unique_ptr<Tensor> empty_tensor(int64_t dims, const int64_t* sizes, const int64_t* strides,
                                     int32_t dtype, Device device) {
  auto tensor = shaped(dims, sizes, strides, 0, dtype, device);
  tensor->storage_bytes = extent_bytes(*tensor);
  tensor->memory = take_memory(tensor->storage_bytes, device);
  return tensor;
}

}  // namespace llama

EXPORTED int32_t aoti_torch_create_tensor_from_blob_v2(
    void* data, int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t offset,
    int32_t dtype, int32_t device_type, int32_t device_index, Tensor** created, int32_t,
    const uint8_t*, int64_t) {
  return as_error_code("aoti_torch_create_tensor_from_blob_v2", [&] {
    const Device device{device_type, device_index};
    auto tensor = llama::shaped(dims, sizes, strides, offset, dtype, device);
    tensor->storage_bytes = llama::extent_bytes(*tensor);
    tensor->memory = std::shared_ptr<void>(std::shared_ptr<void>(), data);
    *created = tensor.release();
  });
}

EXPORTED int32_t aoti_torch_create_tensor_from_blob(void* data, int64_t dims, const int64_t* sizes,
                                                    const int64_t* strides, int64_t offset,
                                                    int32_t dtype, int32_t device_type,
                                                    int32_t device_index, Tensor** created) {
  return aoti_torch_create_tensor_from_blob_v2(data, dims, sizes, strides, offset, dtype,
                                               device_type, device_index, created, 0, nullptr, 0);
}

EXPORTED int32_t aoti_torch_empty_strided(int64_t dims, const int64_t* sizes,
                                          const int64_t* strides, int32_t dtype,
                                          int32_t device_type, int32_t device_index,
                                          Tensor** created) {
  return as_error_code("aoti_torch_empty_strided", [&] {
    const Device device{device_type, device_index};
    *created = llama::empty_tensor(dims, sizes, strides, dtype, device).release();
  });
}

EXPORTED int32_t aoti_torch_delete_tensor_object(Tensor* tensor) {
  delete tensor;
  return 0;
}

EXPORTED int32_t aoti_torch_new_tensor_handle(Tensor* original, Tensor** created) {
  return as_error_code("aoti_torch_new_tensor_handle",
                       [&] { *created = new Tensor(checked(original)); });
}

EXPORTED int32_t aoti_torch__reinterpret_tensor(Tensor* original, int64_t dims,
                                                const int64_t* sizes, const int64_t* strides,
                                                int64_t offset, Tensor** created) {
  return as_error_code("aoti_torch__reinterpret_tensor", [&] {
    const Tensor& source = checked(original);
    auto tensor = llama::shaped(dims, sizes, strides, offset, source.dtype, source.device);
    tensor->storage_bytes = source.storage_bytes;
    require(llama::extent_bytes(*tensor) <= source.storage_bytes, "a view leaves its tensor");
    tensor->memory = source.memory;
    *created = tensor.release();
  });
}

// A copy with the same strides, as far as a program can tell.
EXPORTED int32_t aoti_torch_clone_preserve_strides(Tensor* original, Tensor** created) {
  return as_error_code("aoti_torch_clone_preserve_strides", [&] {
    const Tensor& source = checked(original);
    auto tensor = std::make_unique<Tensor>(source);
    tensor->memory = llama::take_memory(source.storage_bytes, source.device);
    llama::copy_memory(tensor->memory.get(), source.memory.get(), source.storage_bytes,
                       source.device);
    *created = tensor.release();
  });
}

EXPORTED int32_t aoti_torch_clone(Tensor* original, Tensor** created) {
  return aoti_torch_clone_preserve_strides(original, created);
}

// Questions about a tensor; the arrays stay the tensor's.
#define ANSWER(function, Result, expression)                                     \
  EXPORTED int32_t function(Tensor* handle, Result* answer) {                    \
    return as_error_code(#function, [&] {                                        \
      Tensor& tensor = checked(handle);                                   \
      *answer = expression;                                                      \
    });                                                                          \
  }
ANSWER(aoti_torch_get_data_ptr, void*, tensor.data())
ANSWER(aoti_torch_get_dim, int64_t, tensor.dims)
ANSWER(aoti_torch_get_numel, int64_t, tensor.elements())
ANSWER(aoti_torch_get_sizes, int64_t*, tensor.sizes)
ANSWER(aoti_torch_get_strides, int64_t*, tensor.strides)
ANSWER(aoti_torch_get_dtype, int32_t, tensor.dtype)
ANSWER(aoti_torch_get_device_type, int32_t, tensor.device.type)
ANSWER(aoti_torch_get_storage_offset, int64_t, tensor.offset)
ANSWER(aoti_torch_get_storage_size, int64_t, tensor.storage_bytes)
#undef ANSWER

EXPORTED int32_t aoti_torch_is_defined(Tensor* handle, bool* answer) {
  *answer = handle != nullptr;
  return 0;
}

// Codes.
EXPORTED int32_t aoti_torch_device_type_cpu() { return llama::kCpu; }
EXPORTED int32_t aoti_torch_device_type_cuda() { return llama::kCuda; }
EXPORTED int32_t aoti_torch_dtype_bfloat16() { return llama::kBfloat16; }
EXPORTED int32_t aoti_torch_dtype_bool() { return llama::kBool; }
EXPORTED int32_t aoti_torch_dtype_float16() { return llama::kFloat16; }
EXPORTED int32_t aoti_torch_dtype_float32() { return llama::kFloat32; }
EXPORTED int32_t aoti_torch_dtype_int32() { return llama::kInt32; }
EXPORTED int32_t aoti_torch_dtype_int64() { return llama::kInt64; }
EXPORTED int32_t aoti_torch_layout_strided() { return 0; }

// There is no autograd to turn off.
EXPORTED bool aoti_torch_grad_mode_is_enabled() { return false; }
EXPORTED void aoti_torch_grad_mode_set_enabled(bool) {}

// The one function that throws, as torch's does: generated code catches it and returns an error.
EXPORTED void aoti_torch_check(bool holds, const char* function, const char* file, uint32_t line,
                               const char* message) {
  if (holds) return;
  throw std::runtime_error(std::string(message) + " (" + function + ", " + file + ":" +
                           std::to_string(line) + ")");
}

EXPORTED void aoti_torch_warn(const char*, const char*, uint32_t, const char* message) {
  std::fprintf(stderr, "%s\n", message);
}
