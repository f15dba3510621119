// What a request's steps start from: weights in the model's dtype, rows of the embedding table, and
// the rotations of each slot.

#include <cmath>
#include <cstdint>
#include <vector>

#include "elements.h"

namespace {

constexpr int32_t kFloat64 = 7;  // torch's code; it is read, and written nowhere

int64_t element_bytes(int32_t dtype) {
  return dtype == kFloat64 ? 8 : dtype == llama::kFloat32 ? 4 : 2;
}

}  // namespace

// Write `count` elements in another dtype, rounded to the nearest by way of float32 (torch's codes
// of floating-point dtypes). One thread: the caller has as many as it likes.
EXPORTED void llama_convert(const void* from, int32_t stored, void* to, int32_t wanted,
                            int64_t count) {
  constexpr int64_t kPiece = 2048;  // stays in a core's first cache
  float piece[kPiece];
  for (int64_t begin = 0; begin < count; begin += kPiece) {
    const int64_t part = std::min(kPiece, count - begin);
    const char* place = static_cast<const char*>(from) + begin * element_bytes(stored);
    if (stored == kFloat64) {
      std::copy_n(reinterpret_cast<const double*>(place), part, piece);
    } else {
      llama::load_floats(place, stored, part, piece);
    }
    char* target = static_cast<char*>(to) + begin * element_bytes(wanted);
    llama::store_floats(piece, part, target, wanted);
  }
}

// Write the rows of `count` tokens of a table, `width` elements each, one after the other.
//
// The table is stored as `stored`, the model computes with it as `model`, and the rows are wanted
// as `wanted`: each step rounds once.
EXPORTED void llama_rows(const void* table, int32_t stored, int32_t model, int32_t wanted,
                         const int64_t* tokens, int64_t count, int64_t width, void* rows) {
  std::vector<char> rounded(width * element_bytes(model));
  for (int64_t i = 0; i < count; i++) {
    const char* from = static_cast<const char*>(table) + tokens[i] * width * element_bytes(stored);
    llama_convert(from, stored, rounded.data(), model, width);
    char* to = static_cast<char*>(rows) + i * width * element_bytes(wanted);
    llama_convert(rounded.data(), model, to, wanted, width);
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
