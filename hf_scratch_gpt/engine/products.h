// Products of matrices and one vector, read as fast as memory gives. Each thread is given rows of
// each matrix; sums are in float32, those of int8 in 32 bits.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace {  // one file is compiled

using BFloat16 = uint16_t;  // the upper half of a float's bits

enum Type : int64_t { kFloat32, kBFloat16, kInt8 };

// y = W x + bias. The weight is (rows, columns); an int8 one is multiplied by each row's scale.
// `panels` is the weight packed for many vectors, see panels.h; or null.
struct Product {
  void *weight, *panels;
  float *scale, *bias;
  int64_t rows, columns;
  Type type;
};

inline float wide(float number) { return number; }
inline float wide(BFloat16 number) {
  const uint32_t bits = uint32_t(number) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline void put(float* place, float number) { *place = number; }
inline void put(BFloat16* place, float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  *place = BFloat16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to the nearest, ties to even
}

constexpr int64_t kLine = 64;     // bytes, what memory is read by
constexpr int64_t kAhead = 2048;  // bytes

// Ask for the line that is `kAhead` bytes further on; there may be no memory at all.
template <bool ahead, typename T>
inline void ask_ahead(const T* place) {
  if (ahead) __builtin_prefetch(reinterpret_cast<const char*>(place) + kAhead);
}

// The products of x and each of N vectors of `count` numbers, which start `distance` numbers apart.
template <int N, bool ahead, typename T>
[[gnu::noinline]] void dots(const float* x, const T* y, int64_t distance, int64_t count,
                            float* sums) {
  constexpr int64_t kWidth = 16;  // so many sums at once keep a processor busy
  constexpr int64_t kStep = kLine / sizeof(T);
  float parts[N][kWidth] = {};
  // As a function of its own, so that g++ keeps the sums in registers: a sixth of a step's time.
  const auto add = [&](int n, int64_t i) {
    for (int64_t j = 0; j < kWidth; j++) parts[n][j] += x[i + j] * wide(y[n * distance + i + j]);
  };
  const int64_t lines = count / kStep * kStep;
  for (int64_t i = 0; i < lines; i += kStep)
    for (int n = 0; n < N; n++) {
      ask_ahead<ahead>(&y[n * distance + i]);
      for (int64_t j = 0; j < kStep; j += kWidth) add(n, i + j);
    }
  for (int n = 0; n < N; n++) {
    for (int64_t width = kWidth / 2; width > 0; width /= 2)
      for (int64_t j = 0; j < width; j++) parts[n][j] += parts[n][width + j];
    sums[n] = parts[n][0];
    for (int64_t i = lines; i < count; i++) sums[n] += x[i] * wide(y[n * distance + i]);
  }
}

// A vector to be multiplied by matrices of W.
template <typename W>
struct Input {
  const float* x;

  Input(const float* x, int64_t) : x(x) {}

  // By N rows, from `row` on, `distance` rows apart.
  template <int N, bool ahead>
  void times(const Product& product, int64_t row, int64_t distance, float* y) const {
    const W* weight = static_cast<const W*>(product.weight) + row * product.columns;
    dots<N, ahead>(x, weight, distance * product.columns, product.columns, y);
  }
};

// Multiplied by int8, the vector becomes integers as well, as fine as a sum in 32 bits allows: 14
// bits for 768 numbers, 12 for 3,072.
template <>
struct Input<int8_t> {
  std::vector<int16_t> x;
  float scale = 0;

  Input(const float* exact, int64_t count) : x(count) {
    float largest = 0;
    int32_t beyond = 0;  // how many are infinite or NaN, as then all sums are
#pragma omp simd reduction(max : largest) reduction(+ : beyond)
    for (int64_t i = 0; i < count; i++) {
      largest = std::max(largest, std::fabs(exact[i]));
      beyond += !(std::fabs(exact[i]) <= FLT_MAX);
    }
    if (beyond) scale = NAN;
    if (beyond || largest == 0) return;
    const float limit = std::min(INT32_MAX / 127 / count, int64_t(INT16_MAX));
    scale = largest / limit;
    for (int64_t i = 0; i < count; i++) x[i] = int16_t(std::nearbyint(exact[i] / scale));
  }

  template <int N, bool ahead>
  [[gnu::noinline]] void times(const Product& product, int64_t row, int64_t distance,
                               float* y) const {
    const int64_t columns = product.columns, width = N == 1 && !ahead ? columns : kLine;
    const int64_t whole = columns / width * width;
    const int8_t* weight = static_cast<const int8_t*>(product.weight) + row * columns;
    int32_t sums[N] = {};
    const auto add = [&](int n, int64_t i) {
      sums[n] += int32_t(x[i]) * int16_t(weight[n * distance * columns + i]);
    };
    for (int64_t i = 0; i < whole; i += width)
      for (int n = 0; n < N; n++) {
        ask_ahead<ahead>(&weight[n * distance * columns + i]);
        for (int64_t j = 0; j < width; j++) add(n, i + j);
      }
    for (int n = 0; n < N; n++) {
      for (int64_t i = whole; i < columns; i++) add(n, i);
      y[n] = sums[n] * scale * product.scale[row + n * distance];
    }
  }
};

constexpr int64_t kPlaces = 4;

// Some processors read memory faster from four places at once, others from one; some if they are
// asked ahead of what is needed, others foresee it. `way` 0 and 2 are one place, 2 and 3 ask ahead.
template <typename W>
void times(int64_t way, const Input<W>& x, const Product& product, int64_t row, int64_t distance,
           float* y) {
  switch (way) {
    case 0: return x.template times<1, false>(product, row, distance, y);
    case 1: return x.template times<kPlaces, false>(product, row, distance, y);
    case 2: return x.template times<1, true>(product, row, distance, y);
    default: return x.template times<kPlaces, true>(product, row, distance, y);
  }
}

// This thread's share of so many, from the first up to the second.
inline std::pair<int64_t, int64_t> share_of(int64_t count) {
  const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
  return {count * thread / threads, count * (thread + 1) / threads};
}

// Hand some rows of W x + bias to `use`, those of this thread, which waits for no other. If it
// reads from several places at once, these are as far apart as its share allows.
template <typename W, typename Use>
void multiply(const Product& product, const Input<W>& x, int64_t way, Use use) {
  const auto [start, end] = share_of(product.rows);
  const int64_t places = way % 2 ? kPlaces : 1, distance = (end - start) / places;
  const auto use_with_bias = [&](int64_t row, float y) {
    use(row, product.bias ? y + product.bias[row] : y);
  };
  float y[kPlaces];
  for (int64_t row = start; row < start + distance; row++) {
    times(way, x, product, row, distance, y);
    for (int64_t n = 0; n < places; n++) use_with_bias(row + n * distance, y[n]);
  }
  for (int64_t row = start + places * distance; row < end; row++) {
    times(way - way % 2, x, product, row, 0, y);
    use_with_bias(row, y[0]);
  }
}

}  // namespace
