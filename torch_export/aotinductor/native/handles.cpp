// The functions of torch's C interface about handles: what programs of every device call.
//
// Names and signatures are those of torch/csrc/inductor/aoti_torch/c/shim.h, 2.9.1 to 2.14.1.

#include <algorithm>
#include <new>

#include "tensor.h"

using llama::as_error_code;
using llama::checked;
using llama::Device;
using llama::require;
using llama::Tensor;

namespace llama {

int64_t Tensor::element_bytes() const {
  constexpr int8_t bytes[] = {1, 1, 2, 4, 8, 2, 4, 8, 0, 0, 0, 1, 0, 0, 0, 2};  // by code
  require(0 <= dtype && dtype < 16 && bytes[dtype] != 0, "a tensor's dtype is not known");
  return bytes[dtype];
}

int64_t Tensor::elements() const {
  int64_t count = 1;
  for (int64_t dim = 0; dim < dims; dim++) count *= sizes[dim];
  return count;
}

int64_t Tensor::extent_bytes() const {
  if (elements() == 0) return 0;
  int64_t last = offset;
  for (int64_t dim = 0; dim < dims; dim++) last += (sizes[dim] - 1) * strides[dim];
  return (last + 1) * element_bytes();
}

namespace {

std::unique_ptr<Tensor> shaped(int64_t dims, const int64_t* sizes, const int64_t* strides,
                               int64_t offset, int32_t dtype, Device device) {
  require(0 <= dims && dims <= kMaxDims, "a tensor has 0 to 8 dimensions");
  auto tensor = std::make_unique<Tensor>(Tensor{{}, 0, dims, {}, {}, offset, dtype, device});
  std::copy_n(sizes, dims, tensor->sizes);
  std::copy_n(strides, dims, tensor->strides);
  tensor->storage_bytes = tensor->extent_bytes();
  return tensor;
}

}  // namespace

std::shared_ptr<void> take_host_memory(int64_t bytes) {
  constexpr std::align_val_t kAlignment{64};  // what vectors are loaded from best, and torch gives
  return {::operator new(bytes, kAlignment),
          [](void* memory) { ::operator delete(memory, kAlignment); }};
}

std::unique_ptr<Tensor> empty_tensor(int64_t dims, const int64_t* sizes, const int64_t* strides,
                                     int32_t dtype, Device device) {
  auto tensor = shaped(dims, sizes, strides, 0, dtype, device);
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
    require(tensor->storage_bytes <= source.storage_bytes, "a view leaves its tensor");
    tensor->storage_bytes = source.storage_bytes;
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
#define ANSWER(function, Result, expression)                  \
  EXPORTED int32_t function(Tensor* handle, Result* answer) { \
    return as_error_code(#function, [&] {                     \
      Tensor& tensor = checked(handle);                       \
      *answer = expression;                                   \
    });                                                       \
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

EXPORTED int32_t aoti_torch_device_type_cpu() { return llama::kCpu; }
EXPORTED int32_t aoti_torch_device_type_cuda() { return llama::kCuda; }
EXPORTED int32_t aoti_torch_dtype_bfloat16() { return llama::kBfloat16; }
EXPORTED int32_t aoti_torch_dtype_bool() { return 11; }
EXPORTED int32_t aoti_torch_dtype_float16() { return llama::kFloat16; }
EXPORTED int32_t aoti_torch_dtype_float32() { return llama::kFloat32; }
EXPORTED int32_t aoti_torch_dtype_int32() { return 3; }
EXPORTED int32_t aoti_torch_dtype_int64() { return 4; }
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
