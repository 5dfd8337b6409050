// What is made of weights before texts are written: panels, and a rough head.

#pragma once

#include "panels.h"

namespace {

// The panels of a matrix of T, see `panels.h`; a pair of int8 counts as one number of 16 bits. The
// last panel has its last row several times if need be.
template <typename T>
void pack(const T* matrix, int64_t rows, int64_t columns, T* panels) {
  const auto [start, end] = share_of((rows + kPanel - 1) / kPanel);
  for (int64_t panel = start; panel < end; panel++) {
    const T* from[kPanel];
    for (int64_t r = 0; r < kPanel; r++)
      from[r] = matrix + std::min(panel * kPanel + r, rows - 1) * columns;
    T* to = panels + panel * kPanel * columns;
    for (int64_t c = 0; c < columns; c++, to += kPanel)
      for (int64_t r = 0; r < kPanel; r++) to[r] = from[r][c];
  }
}

// The head in int8, less the mean of its rows, which adds the same to all scores and is large where
// weights have been trained. Of each row: by how much the product with a vector of length 1 may be
// off, and the length of the rounded row. If more than `most` rows of the head itself are to be
// read, nothing is gained; if that is 0, there is no rough head.
struct Rough {
  Product product;
  float *errors, *lengths;  // (V)
  int64_t most;
};

// Fill a rough head, this thread some rows of it. `mean` (C) is 0 at first.
template <typename W>
void make_rough(const Rough& rough, const W* head, std::vector<double>& mean) {
  const int64_t rows = rough.product.rows, columns = rough.product.columns;
  const auto [start, end] = share_of(rows);
  std::vector<double> apart(columns);
  for (int64_t row = start; row < end; row++)
    for (int64_t c = 0; c < columns; c++) apart[c] += double(wide(head[row * columns + c])) / rows;
#pragma omp critical
  for (int64_t c = 0; c < columns; c++) mean[c] += apart[c];
#pragma omp barrier
  for (int64_t row = start; row < end; row++) {
    int8_t* weight = static_cast<int8_t*>(rough.product.weight) + row * columns;
    // Sums of squares, which may be too small for a float, and the largest number: it becomes 127.
    double exact = 0, rounded = 0, off = 0, largest = 1e-30;
#pragma omp simd reduction(+ : exact) reduction(max : largest)
    for (int64_t c = 0; c < columns; c++) {
      const double number = wide(head[row * columns + c]);
      exact += number * number;
      apart[c] = number - mean[c];
      largest = std::max(largest, std::fabs(apart[c]));
    }
    const float scale = rough.product.scale[row] = largest / 127;
#pragma omp simd reduction(+ : rounded, off)
    for (int64_t c = 0; c < columns; c++) {
      const double whole = std::nearbyint(std::min(std::max(apart[c] / scale, -127.0), 127.0));
      const double number = whole * scale;
      weight[c] = int8_t(whole);
      rounded += number * number;
      off += (apart[c] - number) * (apart[c] - number);
    }
    // Both products, sums of C terms, are rounded: by less than this much of their size.
    const double size = std::sqrt(exact) + std::sqrt(rounded);
    const double of_sums = std::ldexp(2 * (columns + 16) * size, -24);
    // A little more, as they are rounded as well, and products may be too small for a float.
    rough.errors[row] = (std::sqrt(off) + of_sums) * 1.001 + 1e-24;
    rough.lengths[row] = std::sqrt(rounded) * 1.001;
  }
}

}  // namespace

extern "C" int64_t pack(const Product* product, int64_t, const void* matrix, void* panels,
                        int threads) {
  const int64_t rows = product->rows, columns = product->columns;
#pragma omp parallel num_threads(threads)
  if (product->type == kFloat32)
    pack(static_cast<const float*>(matrix), rows, columns, static_cast<float*>(panels));
  else
    pack(static_cast<const BFloat16*>(matrix), rows, columns, static_cast<BFloat16*>(panels));
  return 0;
}

extern "C" int64_t make_rough(const Rough* rough, int64_t type, const void* head, float*,
                              int threads) {
  std::vector<double> mean(rough->product.columns);
#pragma omp parallel num_threads(threads)
  if (type == kFloat32)
    make_rough(*rough, static_cast<const float*>(head), mean);
  else
    make_rough(*rough, static_cast<const BFloat16*>(head), mean);
  return 0;
}
