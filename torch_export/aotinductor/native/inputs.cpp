// What a request's steps start from: rows of the embedding table, and the rotations of each slot.

#include <cmath>
#include <cstdint>
#include <vector>

#include "elements.h"

// Write the rows of `count` tokens of a table, `width` elements each, one after the other.
//
// The table is stored as `stored`, the model computes with it as `model`, and the rows are wanted
// as `wanted` (torch's codes of floating-point dtypes): each step rounds once.
EXPORTED void llama_rows(const void* table, int32_t stored, int32_t model, int32_t wanted,
                               const int64_t* tokens, int64_t count, int64_t width, void* rows) {
  const auto bytes = [](int32_t dtype) { return dtype == llama::kFloat32 ? 4 : 2; };
  std::vector<float> row(width);
  std::vector<uint8_t> rounded(width * bytes(model));
  for (int64_t i = 0; i < count; i++) {
    const char* from = static_cast<const char*>(table) + tokens[i] * width * bytes(stored);
    llama::load_floats(from, stored, 1, width, row.data());
    llama::store_floats(row.data(), width, rounded.data(), model, 1);
    llama::load_floats(rounded.data(), model, 1, width, row.data());
    char* to = static_cast<char*>(rows) + i * width * bytes(wanted);
    llama::store_floats(row.data(), width, to, wanted, 1);
  }
}

// Write the rotations of `slots` positions: cosines (slots, 2 * half), then signed sines, in
// float32, as Hugging Face computes them: the minus of its rotation is in the first half of a row.
EXPORTED void llama_rotations(const float* frequencies, int64_t half, float scaling,
                                    int64_t slots, float* rotations) {
  float* sines = rotations + slots * 2 * half;
  for (int64_t slot = 0; slot < slots; slot++) {
    for (int64_t i = 0; i < half; i++) {
      const float angle = static_cast<float>(slot) * frequencies[i];
      const float cosine = std::cos(angle) * scaling, sine = std::sin(angle) * scaling;
      float* cosines = rotations + slot * 2 * half;
      cosines[i] = cosines[half + i] = cosine;
      sines[slot * 2 * half + i] = -sine;
      sines[slot * 2 * half + half + i] = sine;
    }
  }
}
