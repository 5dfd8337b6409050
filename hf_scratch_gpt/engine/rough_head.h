// How much the scores of a head in int8 tell; `one_token.cpp` has `best_word`, which uses them.

#pragma once

#include "products.h"

#include <limits>

namespace {

// The head in int8, less the mean of its rows; nothing to do for a model that has none.
struct Rough {
  Product product;
  const float *errors, *lengths;  // (V)
  int64_t most;
};

// How far off the scores of a rough head may be, of one vector x.
//
// The rough head gives each score, less what is the same for all words, but for an error. That is
// at most the length of x times that of the row's error, and the length of the rounded row times
// that of the error of x (Cauchy-Schwarz inequality); `errors` has room for the rounding of sums.
struct Bound {
  const Rough& rough;
  float length = 0, off = 0;  // of x, and of its error

  Bound(const Rough& rough, const std::vector<float>& x, const Input<int8_t>& integers)
      : rough(rough) {
    double squares = 0, squares_off = 0;  // those of floats may be too small for a float
    for (size_t i = 0; i < x.size(); i++) {
      const double error = x[i] - integers.x[i] * double(integers.scale);
      squares += double(x[i]) * x[i];
      squares_off += error * error;
    }
    // A little more, for what their own rounding may lose.
    length = std::sqrt(squares) * 1.001;
    off = std::sqrt(squares_off) * 1.001;
  }

  float operator()(int64_t row) const {
    return length * rough.errors[row] + off * rough.lengths[row];
  }
  // The least that a score may be; infinite if numbers are too small or too large to tell.
  float lowest(int64_t row, float score) const {
    const float error = (*this)(row);
    const bool can_tell = length > 1e-8f && error < 1e30f && std::isfinite(score);
    return can_tell ? score - error : std::numeric_limits<float>::infinity();
  }
};

}  // namespace
