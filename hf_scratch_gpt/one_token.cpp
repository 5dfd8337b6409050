// One token's way through a GPT, with the keys and values of the tokens before it at hand.
//
// To write a token, all weights are read once and used once, so this is as fast as memory is read.
// Each thread is given rows of each matrix; sums are in float32, those of int8 in 32 bits. The
// mathematics is that of `blocks_scratch_gpt.py`; `one_token.py` compiles this file and fills in
// the structures.
//
// C hidden, H heads, D head size, S tokens so far

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using BFloat16 = uint16_t;  // the upper half of a float's bits

// y = W x + bias. The weight is (rows, columns); an int8 one is multiplied by each row's scale.
struct Product {
  const void* weight;
  const float* scale;
  const float* bias;
  int64_t rows;
  int64_t columns;
};

struct Norm {
  const float* weight;
  const float* bias;
  float eps;
};

struct Block {
  Norm input_layernorm;
  Product query, key, value, out;
  Norm post_attention_layernorm;
  Product up, down;
  void* keys;    // (H, room, D)
  void* values;  // (H, room, D)
  float scaling;
  bool tanh;  // GELU's form
};

struct Model {
  const Block* blocks;
  int64_t layers;
  Norm norm;
  Product head;
  int64_t heads;
  int64_t room;        // for so many tokens
  int64_t inner_size;  // of the feed-forward
  int64_t way;         // to read matrices; see `multiply`
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
[[gnu::noinline]] void dots(const float* x, const T* y, int64_t distance, int64_t count, float* sums) {
  constexpr int64_t kWidth = 16;  // so many sums at once keep a processor busy
  constexpr int64_t kStep = kLine / sizeof(T);
  float parts[N][kWidth] = {};
  const auto add = [&](int n, int64_t i) {
    for (int64_t j = 0; j < kWidth; j++) parts[n][j] += x[i + j] * wide(y[n * distance + i + j]);
  };
  const int64_t whole = count / kWidth * kWidth, lines = count / kStep * kStep;
  for (int64_t i = 0; i < lines; i += kStep)
    for (int n = 0; n < N; n++) {
      ask_ahead<ahead>(&y[n * distance + i]);
      for (int64_t j = 0; j < kStep; j += kWidth) add(n, i + j);
    }
  for (int64_t i = lines; i < whole; i += kWidth)
    for (int n = 0; n < N; n++) add(n, i);
  for (int n = 0; n < N; n++) {
    for (int64_t width = kWidth / 2; width > 0; width /= 2)
      for (int64_t j = 0; j < width; j++) parts[n][j] += parts[n][width + j];
    sums[n] = parts[n][0];
    for (int64_t i = whole; i < count; i++) sums[n] += x[i] * wide(y[n * distance + i]);
  }
}

// A vector to be multiplied by matrices of W.
template <typename W>
struct Input {
  const float* x;

  Input(const std::vector<float>& x) : x(x.data()) {}

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

  Input(const std::vector<float>& exact) : x(exact.size()) {
    float largest = 0, zero = 0;
    for (float number : exact) {
      largest = std::max(largest, std::fabs(number));
      zero += number * 0;
    }
    if (zero != 0) scale = zero;  // NaN, as of all sums with an infinity or a NaN
    if (largest == 0 || zero != 0) return;
    const float limit = std::min(INT32_MAX / 127 / int64_t(x.size()), int64_t(INT16_MAX));
    scale = largest / limit;
    for (size_t i = 0; i < x.size(); i++) x[i] = int16_t(std::lrint(exact[i] / scale));
  }

  template <int N, bool ahead>
  [[gnu::noinline]] void times(const Product& product, int64_t row, int64_t distance, float* y) const {
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

// Hand some rows of W x + bias to `use`, those of this thread, which waits for no other. If it reads
// from several places at once, these are as far apart as its share allows.
template <typename W, typename Use>
void multiply(const Product& product, const Input<W>& x, int64_t way, Use use) {
  const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
  const int64_t start = product.rows * thread / threads, end = product.rows * (thread + 1) / threads;
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

void normalize(const std::vector<float>& x, const Norm& norm, std::vector<float>& y) {
  const int64_t count = x.size();
  float mean = 0, variance = 0;
#pragma omp simd reduction(+ : mean)
  for (int64_t i = 0; i < count; i++) mean += x[i] / count;
#pragma omp simd reduction(+ : variance)
  for (int64_t i = 0; i < count; i++) variance += (x[i] - mean) * (x[i] - mean) / count;
  const float factor = 1 / std::sqrt(variance + norm.eps);
  for (int64_t i = 0; i < count; i++) y[i] = (x[i] - mean) * factor * norm.weight[i] + norm.bias[i];
}

// e to the power of x, for x from -87 to 88, to the last digit but one. Unlike std::exp it is
// computed for several x at once: 2 to the power of a whole number, times a polynomial of what is
// left, Taylor's up to its 6th power.
inline float exponential(float x) {
  x = std::min(std::max(x, -87.0f), 88.0f);
  const float whole = std::nearbyint(x * 1.44269504f);                     // 1 / ln 2
  const float rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two parts
  float sum = 1 / 720.0f;
  for (float factor : {1 / 120.0f, 1 / 24.0f, 1 / 6.0f, 0.5f, 1.0f, 1.0f}) sum = sum * rest + factor;
  const int32_t bits = (int32_t(x == x ? whole : 0) + 127) * (1 << 23);  // of a NaN comes a NaN
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return sum * power;
}

void gelu(std::vector<float>& x, bool tanh) {
  const int64_t count = x.size();
  if (tanh) {
    // (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), and u = sqrt(2 / pi) (x + 0.044715 x^3)
    for (int64_t i = 0; i < count; i++)
      x[i] /= 1 + exponential(-1.5957691f * (x[i] + 0.044715f * x[i] * x[i] * x[i]));
  } else {
    for (int64_t i = 0; i < count; i++) x[i] *= 0.5f * (1 + std::erf(x[i] * 0.70710678f));
  }
}

// One head: query (D) looks at keys and values (S, D).
template <typename T>
void attend(const float* query, const T* keys, const T* values, int64_t tokens, int64_t size,
            float scaling, std::vector<float>& weights, float* gathered) {
  for (int64_t s = 0; s < tokens; s++) {
    dots<1, false>(query, keys + s * size, 0, size, &weights[s]);
    weights[s] *= scaling;
  }
  const float largest = *std::max_element(weights.begin(), weights.begin() + tokens);
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t s = 0; s < tokens; s++) sum += weights[s] = exponential(weights[s] - largest);
  std::fill(gathered, gathered + size, 0.0f);
  for (int64_t s = 0; s < tokens; s++) {
    const float weight = weights[s] / sum;
    for (int64_t d = 0; d < size; d++) gathered[d] += weight * wide(values[s * size + d]);
  }
}

// Weights are of type W, keys and values of type T; `position` tokens have been read before.
template <typename W, typename T>
void step(const Model& model, int64_t position, const float* embedded, float* logits, int threads) {
  const int64_t hidden_size = model.head.columns, size = hidden_size / model.heads;
  std::vector<float> hidden(embedded, embedded + hidden_size);
  std::vector<float> query(hidden_size), gathered(hidden_size), inner(model.inner_size);
  const int64_t way = model.way;

#pragma omp parallel num_threads(threads)
  {
    // Each thread's own.
    std::vector<float> normalized(hidden_size), weights(position + 1), activated;
    for (const Block* block = model.blocks; block < model.blocks + model.layers; block++) {
      T* keys = static_cast<T*>(block->keys);
      T* values = static_cast<T*>(block->values);
      // Where row `row` of this token's key or value lies.
      const auto place = [&](int64_t row) {
        return (row / size * model.room + position) * size + row % size;
      };

      normalize(hidden, block->input_layernorm, normalized);
      const Input<W> x(normalized);
      multiply(block->query, x, way, [&](int64_t row, float y) { query[row] = y; });
      multiply(block->key, x, way, [&](int64_t row, float y) { put(keys + place(row), y); });
      multiply(block->value, x, way, [&](int64_t row, float y) { put(values + place(row), y); });
#pragma omp barrier
#pragma omp for
      for (int64_t head = 0; head < model.heads; head++) {
        const int64_t start = head * model.room * size;
        attend(&query[head * size], keys + start, values + start, position + 1, size,
               block->scaling, weights, &gathered[head * size]);
      }
      multiply(block->out, Input<W>(gathered), way,
               [&](int64_t row, float y) { hidden[row] += y; });
#pragma omp barrier

      normalize(hidden, block->post_attention_layernorm, normalized);
      multiply(block->up, Input<W>(normalized), way,
               [&](int64_t row, float y) { inner[row] = y; });
#pragma omp barrier
      activated = inner;
      gelu(activated, block->tanh);
      multiply(block->down, Input<W>(activated), way,
               [&](int64_t row, float y) { hidden[row] += y; });
#pragma omp barrier
    }
    normalize(hidden, model.norm, normalized);
    multiply(model.head, Input<W>(normalized), way,
             [&](int64_t row, float y) { logits[row] = y; });
  }
}

// One product by itself, to see how fast its matrix is read.
template <typename W>
void multiply_alone(const Product& product, int64_t way, const float* x, float* y,
                    int threads) {
  const std::vector<float> numbers(x, x + product.columns);
#pragma omp parallel num_threads(threads)
  multiply(product, Input<W>(numbers), way, [&](int64_t row, float sum) { y[row] = sum; });
}

}  // namespace

extern "C" {

void step_float32(const Model* model, int64_t position, const float* embedded, float* logits,
                  int threads) {
  step<float, float>(*model, position, embedded, logits, threads);
}

void step_bfloat16(const Model* model, int64_t position, const float* embedded, float* logits,
                   int threads) {
  step<BFloat16, BFloat16>(*model, position, embedded, logits, threads);
}

void step_int8_float32(const Model* model, int64_t position, const float* embedded, float* logits,
                       int threads) {
  step<int8_t, float>(*model, position, embedded, logits, threads);
}

void step_int8_bfloat16(const Model* model, int64_t position, const float* embedded,
                        float* logits, int threads) {
  step<int8_t, BFloat16>(*model, position, embedded, logits, threads);
}

void multiply_float32(const Product* product, int64_t way, const float* x, float* y,
                      int threads) {
  multiply_alone<float>(*product, way, x, y, threads);
}

void multiply_bfloat16(const Product* product, int64_t way, const float* x, float* y,
                       int threads) {
  multiply_alone<BFloat16>(*product, way, x, y, threads);
}

void multiply_int8(const Product* product, int64_t way, const float* x, float* y,
                   int threads) {
  multiply_alone<int8_t>(*product, way, x, y, threads);
}
}
