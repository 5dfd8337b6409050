// Products of a matrix and several vectors, nearly as fast as the processor multiplies.
//
// The matrix is packed: of kPanel rows, a panel, the numbers of a column lie side by side. A panel
// is multiplied by up to kTall vectors at a time, whose sums fill the processor's registers, while
// the next panel is asked for. Sums are in float32 and in the order of columns, those of int8 in 32
// bits, however many vectors there are and whichever thread it is.

#pragma once

#ifdef __AVX2__
#include <immintrin.h>
#endif

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
typedef int32_t Integers __attribute__((vector_size(kVector * sizeof(int32_t))));
typedef int16_t Pairs __attribute__((vector_size(kVector * sizeof(int32_t))));

// How W is multiplied: by floats, a column at a time.
template <typename W>
struct Panel {
  using Number = float;  // of x, and of sums
  using Sums = Vector;
  static constexpr int64_t kColumns = 1;

  static Vector load(const W* place) {
    float numbers[kVector];
    for (int i = 0; i < kVector; i++) numbers[i] = wide(place[i]);
    Vector result;
    std::memcpy(&result, numbers, sizeof result);
    return result;
  }
  static void add(Sums& sums, const Vector& weights, float x) { sums += weights * x; }
};

// int8 is multiplied by integers of 16 bits, and the products of two columns are added at once.
template <>
struct Panel<int8_t> {
  using Number = int32_t;  // of x, two of 16 bits
  using Sums = Integers;
  static constexpr int64_t kColumns = 2;

  static Pairs load(const int8_t* place) {
#if defined(__AVX512BW__)
    return Pairs(_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)place)));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    return Pairs(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)place)));
#else
    Pairs result;
    for (int i = 0; i < 2 * kVector; i++) result[i] = place[i];
    return result;
#endif
  }
  static void add(Sums& sums, const Pairs& weights, int32_t x) {
#if defined(__AVX512BW__)
    sums += Sums(_mm512_madd_epi16(__m512i(weights), _mm512_set1_epi32(x)));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    sums += Sums(_mm256_madd_epi16(__m256i(weights), _mm256_set1_epi32(x)));
#else
    int16_t pair[2];
    std::memcpy(pair, &x, sizeof pair);
    for (int i = 0; i < kVector; i++)
      sums[i] += weights[2 * i] * pair[0] + weights[2 * i + 1] * pair[1];
#endif
  }
};

// Vectors to be multiplied by panels of W.
template <typename W>
struct Inputs {
  const float* x;
  int64_t columns;

  Inputs(const float* x, int64_t vectors, int64_t columns) : x(x), columns(columns) {}
  const float* at(int64_t n) const { return x + n * columns; }
  float scale(int64_t) const { return 1; }
};

template <>
struct Inputs<int8_t> {
  int64_t pairs;
  std::vector<int32_t> x;
  std::vector<float> scales;

  Inputs(const float* exact, int64_t vectors, int64_t columns)
      : pairs((columns + 1) / 2), x(vectors * pairs) {
    for (int64_t n = 0; n < vectors; n++) {
      const Input<int8_t> one(exact + n * columns, columns);
      std::memcpy(&x[n * pairs], one.x.data(), columns * sizeof(int16_t));
      scales.push_back(one.scale);
    }
  }
  const int32_t* at(int64_t n) const { return &x[n * pairs]; }
  float scale(int64_t n) const { return scales[n]; }
};

// A panel times N of x's vectors, `steps` times some columns; y (N, kPanel). Of the next panel,
// from `next` on, the lines of every `pause`th step are asked for.
template <int N, typename W>
[[gnu::noinline]] void tile(const W* panel, int64_t steps, const typename Panel<W>::Number* x,
                            const W* next, int64_t pause, void* y) {
  constexpr int64_t kSize = kPanel * Panel<W>::kColumns;
  typename Panel<W>::Sums sums[N][2];
  for (auto& pair : sums) pair[0] = pair[1] = typename Panel<W>::Sums{};
  int64_t left = 1;
  for (int64_t i = 0; i < steps; i++, panel += kSize) {
    if (--left == 0) {
      for (size_t j = 0; j < kSize; j += kLine / sizeof(W)) __builtin_prefetch(next + j);
      left = pause, next += kSize;
    }
    const auto first = Panel<W>::load(panel), second = Panel<W>::load(panel + kSize / 2);
    for (int n = 0; n < N; n++) {
      Panel<W>::add(sums[n][0], first, x[n * steps + i]);
      Panel<W>::add(sums[n][1], second, x[n * steps + i]);
    }
  }
  std::memcpy(y, sums, sizeof sums);
}

template <int N, typename... Rest>
void tile_of(int64_t vectors, Rest... rest) {
  if (vectors == N) return tile<N>(rest...);
  if constexpr (N > 1) tile_of<N - 1>(vectors, rest...);
}

// Hand some rows of W x + bias, of each of the vectors in x, to `use`, those of this thread: the
// vector's number, and from which row on how many sums there are. Threads take panels as they come
// to them, since one may be slower than another.
template <typename W, typename Use>
void multiply_many(const Product& product, const float* x, int64_t vectors, Use use) {
  constexpr int64_t kColumns = Panel<W>::kColumns;
  const int64_t columns = product.columns, steps = (columns + kColumns - 1) / kColumns;
  const int64_t size = steps * kColumns * kPanel;
  for (int64_t block = 0; block < vectors; block += kBlock) {
    const int64_t count = std::min(kBlock, vectors - block), groups = (count + kTall - 1) / kTall;
    const Inputs<W> inputs(x + block * columns, count, columns);
#pragma omp for schedule(guided) nowait
    for (int64_t row = 0; row < product.rows; row += kPanel) {
      const int64_t rows = std::min(kPanel, product.rows - row);
      const W* panel = static_cast<const W*>(product.panels) + row / kPanel * size;
      float scales[kPanel], biases[kPanel];
      for (int64_t j = 0; j < rows; j++) {
        scales[j] = product.scale ? product.scale[row + j] : 1;
        biases[j] = product.bias ? product.bias[row + j] : 0;
      }
      for (int64_t group = 0; group < groups; group++) {
        const int64_t first = count * group / groups, end = count * (group + 1) / groups;
        const W* next = panel + size + steps * group / groups * kColumns * kPanel;
        typename Panel<W>::Number y[kTall * kPanel];
        tile_of<kTall>(end - first, panel, steps, inputs.at(first), next, groups, y);
        for (int64_t n = first; n < end; n++) {
          float sums[kPanel];
          for (int64_t j = 0; j < kPanel; j++)
            sums[j] = y[(n - first) * kPanel + j] * inputs.scale(n) * scales[j] + biases[j];
          use(block + n, row, sums, rows);
        }
      }
    }
  }
}

}  // namespace
