// Attention of a prompt to itself, without its matrix of scores.
#pragma once

#include <memory>
#include <utility>

#include "tensor.h"

namespace llama {

// query (batch, heads, n, width), key and value (batch, kv_heads, m, width), any strides.
//
// Returns what each query sees, (batch, heads, n, width) over memory of (batch, n, heads, width),
// and the logarithm of its sum of exponentials, (batch, heads, n) float32 over (batch, n, heads).
// causal: query i sees keys 0 to i. Throws where shapes or dtypes don't fit.
std::pair<std::unique_ptr<Tensor>, std::unique_ptr<Tensor>> attend(
    const Tensor& query, const Tensor& key, const Tensor& value, bool causal, double scale);

}  // namespace llama
