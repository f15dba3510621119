// A whole step as one native call: the handles of each program's inputs, the programs in order.
//
// Every function of torch's C interface comes in as a pointer, so that one library serves over
// libtorch and over the runtime library.

#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

using Handle = void*;  // torch's AtenTensorHandle
using Create = int32_t (*)(void* data, int64_t dims, const int64_t* sizes, const int64_t* strides,
                           int64_t offset, int32_t dtype, int32_t device_type,
                           int32_t device_index, Handle* created, int32_t layout,
                           const uint8_t* metadata, int64_t metadata_size);
using Drop = int32_t (*)(Handle);
using Run = int32_t (*)(void* container, Handle* inputs, size_t input_count, Handle* outputs,
                        size_t output_count, void* stream, void* proxy_executor);
using Update = int32_t (*)(void* container, void* map, bool use_inactive, bool check_full_update);

constexpr int32_t kStrided = 0;  // torch's layout of an ordinary tensor
constexpr int32_t kCallFactor = 1000;

}  // namespace

extern "C" {

// What a call reads or writes; the caller keeps the memory, the sizes and the strides.
struct Tensor {
  void* data;
  int64_t dims;
  const int64_t* sizes;
  const int64_t* strides;  // in elements
  int32_t dtype;           // torch's code
};

// Run `calls` programs in order, each on its next counts[i] tensors of `inputs`.
//
// Returns 0, or 1000 * (call + 1) + the code of what failed in that call. No handle is leaked: a
// run owns those it is given, also when it fails, and those that no run was given are dropped.
__attribute__((visibility("default"))) int32_t llama_step(
    Create create, Drop drop, int32_t device_type, int32_t device_index, int64_t calls,
    void** containers, Run* runs, const int64_t* counts, Tensor** inputs, void* stream) {
  std::vector<Handle> handles;
  for (int64_t call = 0; call < calls; call++) {
    const int32_t failed_here = kCallFactor * static_cast<int32_t>(call + 1);
    handles.assign(counts[call], nullptr);
    for (int64_t i = 0; i < counts[call]; i++) {
      const Tensor& tensor = **inputs++;
      const int32_t code =
          create(tensor.data, tensor.dims, tensor.sizes, tensor.strides, 0, tensor.dtype,
                 device_type, device_index, &handles[i], kStrided, nullptr, 0);
      if (code != 0) {
        for (int64_t made = 0; made < i; made++) drop(handles[made]);
        return failed_here + code;
      }
    }
    // a program that returns nothing has one output all the same, which it leaves alone
    Handle output = nullptr;
    const int32_t code =
        runs[call](containers[call], handles.data(), handles.size(), &output, 1, stream, nullptr);
    if (output != nullptr) drop(output);
    if (code != 0) return failed_here + code;
  }
  return 0;
}

// Bind tensors to a program's constants by name: torch takes a C++ map for that up to 2.9.
//
// `update` is AOTInductorModelContainerUpdateUserManagedConstantBuffer; the handles stay the
// caller's. Returns its code.
__attribute__((visibility("default"))) int32_t llama_bind(Update update, void* container,
                                                          const char** names, Handle* handles,
                                                          int64_t count) {
  std::unordered_map<std::string, Handle> constants;
  for (int64_t i = 0; i < count; i++) constants.emplace(names[i], handles[i]);
  return update(container, &constants, false, true);
}
}
