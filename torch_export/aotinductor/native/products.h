// Products of matrices in float32, bfloat16 and float16, summed in float32.
#pragma once

#include <cstdint>

#include "tensor.h"

namespace llama {

// out (n, r) = alpha * left (n, k) @ right (k, r) + beta * added, broadcast, or null for nothing.
//
// Throws where shapes or dtypes don't fit. Any strides; fastest where both are contiguous along k,
// as hidden rows and a checkpoint's weights are.
void multiply(Tensor& out, const Tensor& left, const Tensor& right, const Tensor* added,
              double beta, double alpha);

}  // namespace llama
