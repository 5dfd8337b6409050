// The word that scores highest, found by a head in int8 and few rows of the head itself.

#pragma once

#include "products.h"

#include <limits>

namespace {

// The head in int8, less the mean of its rows. More than `most` rows of the head do not pay; if
// that is 0, there is no rough head.
struct Rough {
  Product product;
  const float *errors, *lengths;  // (V)
  int64_t most;
};

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// What all threads have found so far.
struct Found {
  float lower = -kInfinity;  // what some row's score reaches for sure
  int64_t count = 0;         // of rows that may be best
  float score = -kInfinity;
  int64_t row = -1;  // the best, of several the first
};

// Find the best row of the head by which to multiply x; all threads call this together. False if
// that does not pay, or the bound cannot tell. `scores` (V) is memory to use.
//
// The rough head gives each score, less what is the same for all words, but for an error. That is
// at most the length of x times that of the row's error, and the length of the rounded row times
// that of the error of x (Cauchy-Schwarz inequality); `errors` has room for the rounding of sums.
// A row that cannot reach `lower` is left out. The few that remain are multiplied by the head.
template <typename W>
bool find_best(const Rough& rough, const Product& head, const std::vector<float>& x, int64_t way,
               float* scores, Found& found) {
  if (!rough.most) return false;
  const Input<int8_t> integers(x);
  double squares = 0, squares_off = 0;  // those of floats may be too small for a float
  for (size_t i = 0; i < x.size(); i++) {
    const double error = x[i] - integers.x[i] * double(integers.scale);
    squares += double(x[i]) * x[i];
    squares_off += error * error;
  }
  // A little more, for what their own rounding may lose.
  const float length = std::sqrt(squares) * 1.001, off = std::sqrt(squares_off) * 1.001;
  const auto bound = [&](int64_t row) {
    return length * rough.errors[row] + off * rough.lengths[row];
  };
  Found own;
  multiply(rough.product, integers, way, [&](int64_t row, float y) {
    scores[row] = y;
    const float error = bound(row);  // of numbers that are too small or too large it cannot tell
    const bool can_tell = length > 1e-8f && error < 1e30f && std::isfinite(y);
    own.lower = std::max(own.lower, can_tell ? y - error : kInfinity);
  });
#pragma omp critical
  found.lower = std::max(found.lower, own.lower);
#pragma omp barrier
  const auto may_be_best = [&](int64_t row) { return scores[row] + bound(row) >= found.lower; };
  const auto [start, end] = share_of(head);
  for (int64_t row = start; row < end; row++) own.count += may_be_best(row);
#pragma omp atomic
  found.count += own.count;
#pragma omp barrier
  if (!std::isfinite(found.lower) || found.count > rough.most) return false;
  const Input<W> exact(x);
  for (int64_t row = start; row < end; row++) {
    if (!may_be_best(row)) continue;
    float y;
    times(0, exact, head, row, 0, &y);
#pragma omp critical
    if (y > found.score || (y == found.score && row < found.row)) found.score = y, found.row = row;
  }
  return true;
}

}  // namespace
