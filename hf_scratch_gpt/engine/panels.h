// Products of a matrix and several vectors, nearly as fast as the processor multiplies.
//
// The matrix is packed: of kPanel rows, a panel, the numbers of a column lie side by side. A panel
// is multiplied by up to kTall vectors at a time, whose sums fill the processor's registers, while
// the next panel is asked for. Sums are in float32 and in the order of columns, however many
// vectors there are and whichever thread it is.

#pragma once

#include "products.h"

namespace {

#ifdef __AVX512F__
constexpr int64_t kVector = 16, kTall = 12;  // floats of a register; vectors at a time
#else
constexpr int64_t kVector = 8, kTall = 6;
#endif
constexpr int64_t kPanel = 2 * kVector;
constexpr int64_t kBlock = 16 * kTall;  // so many vectors a cache holds while panels pass by
typedef float Vector __attribute__((vector_size(kVector * sizeof(float))));

template <typename W>
inline Vector load(const W* place) {
  float numbers[kVector];
  for (int i = 0; i < kVector; i++) numbers[i] = wide(place[i]);
  Vector result;
  std::memcpy(&result, numbers, sizeof result);
  return result;
}

// A panel times N of x's vectors; y (N, kPanel). Of the next panel, from `next` on, the lines of
// every `pause`th column are asked for.
template <int N, typename W>
[[gnu::noinline]] void tile(const W* panel, int64_t columns, const float* x, const W* next,
                            int64_t pause, float* y) {
  Vector sums[N][2] = {};
  int64_t left = 1;
  for (int64_t c = 0; c < columns; c++, panel += kPanel) {
    if (--left == 0) {
      for (size_t i = 0; i < kPanel; i += kLine / sizeof(W)) __builtin_prefetch(next + i);
      left = pause, next += kPanel;
    }
    const Vector first = load(panel), second = load(panel + kVector);
    for (int n = 0; n < N; n++) {
      sums[n][0] += first * x[n * columns + c];
      sums[n][1] += second * x[n * columns + c];
    }
  }
  std::memcpy(y, sums, sizeof sums);
}

template <int N, typename... Rest>
void tile_of(int64_t vectors, Rest... rest) {
  if (vectors == N) return tile<N>(rest...);
  if constexpr (N > 1) tile_of<N - 1>(vectors, rest...);
}

// Hand some rows of W x + bias, of each of the vectors in x, to `use`, those of this thread.
template <typename W, typename Use>
void multiply_many(const Product& product, const float* x, int64_t vectors, Use use) {
  const int64_t columns = product.columns, size = columns * kPanel;
  const auto [start, end] = share_of((product.rows + kPanel - 1) / kPanel);
  for (int64_t block = 0; block < vectors; block += kBlock) {
    const int64_t count = std::min(kBlock, vectors - block), groups = (count + kTall - 1) / kTall;
    for (int64_t i = start * groups; i < end * groups; i++) {
      const int64_t panel = i / groups, group = i % groups;
      const int64_t first = block + count * group / groups;
      const int64_t number = block + count * (group + 1) / groups - first;
      const W* place = static_cast<const W*>(product.panels) + panel * size;
      const W* next = place + size + columns * group / groups * kPanel;
      float y[kTall * kPanel];
      tile_of<kTall>(number, place, columns, x + first * columns, next, groups, y);
      const int64_t row = panel * kPanel, rows = std::min(kPanel, product.rows - row);
      for (int64_t n = 0; n < number; n++)
        for (int64_t j = 0; j < rows; j++) {
          const float scale = product.scale ? product.scale[row + j] : 1;
          const float bias = product.bias ? product.bias[row + j] : 0;
          use(row + j, first + n, y[n * kPanel + j] * scale + bias);
        }
    }
  }
}

}  // namespace
