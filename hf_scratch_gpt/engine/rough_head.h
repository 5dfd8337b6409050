// The word that scores highest, found by a head in int8 and few rows of the head itself.

#pragma once

#include "products.h"

#include <limits>
#include <numeric>

namespace {

// The head in int8, less the mean of its rows. More than `most` rows of the head do not pay; if
// that is 0, there is no rough head.
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

// What each thread has found among its rows.
struct Found {
  std::vector<float> lowers, scores;
  std::vector<int64_t> rows, counts;

  Found(int threads)
      : lowers(threads), scores(threads, -std::numeric_limits<float>::infinity()),
        rows(threads, -1), counts(threads) {}

  // The best of all, of several the first; -1 if there is none.
  int64_t row() const {
    return rows[std::max_element(scores.begin(), scores.end()) - scores.begin()];
  }
};

// Find the best row of the head by which to multiply x; all threads call this together. False if
// that does not pay, or the bound cannot tell. `scores` (V) is memory to use.
// A row that cannot reach what another one reaches for sure is left out. The few that remain are
// multiplied by the head itself.
template <typename W>
bool find_best(const Rough& rough, const Product& head, const std::vector<float>& x, int64_t way,
               float* scores, Found& found) {
  if (!rough.most) return false;
  const int thread = omp_get_thread_num();
  const Input<int8_t> integers(x);
  const Bound bound(rough, x, integers);
  float lower = -std::numeric_limits<float>::infinity();  // what some row reaches for sure
  multiply(rough.product, integers, way, [&](int64_t row, float y) {
    scores[row] = y;
    lower = std::max(lower, bound.lowest(row, y));
  });
  found.lowers[thread] = lower;
#pragma omp barrier
  lower = *std::max_element(found.lowers.begin(), found.lowers.end());
  const auto may_be_best = [&](int64_t row) { return scores[row] + bound(row) >= lower; };
  const auto [start, end] = share_of(head);
  for (int64_t row = start; row < end; row++) found.counts[thread] += may_be_best(row);
#pragma omp barrier
  const int64_t count = std::accumulate(found.counts.begin(), found.counts.end(), int64_t(0));
  if (!std::isfinite(lower) || count > rough.most) return false;
  const Input<W> exact(x);
  for (int64_t row = start; row < end; row++) {
    if (!may_be_best(row)) continue;
    float y;
    times(0, exact, head, row, 0, &y);
    if (y > found.scores[thread]) found.scores[thread] = y, found.rows[thread] = row;
  }
  return true;
}

}  // namespace
