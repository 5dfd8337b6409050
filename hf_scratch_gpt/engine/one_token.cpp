// One token of each text on its way through a GPT, with the keys and values of the tokens before it
// at hand.
//
// The mathematics is that of the model's blocks; `one_token.py` fills in the structures. For one
// text all matrices are read once, at 0.9 of the speed of memory: 1.7 to 3.2 times as fast as
// `nn.Linear`s.
//
// B texts, C hidden, H heads, D head size, S tokens so far, V words

#include <limits>

#include "preparing.h"

namespace {

struct Norm {
  const float *weight, *bias;
  float eps;
};

struct Block {
  Norm input_layernorm;
  Product query, key, value, out;
  Norm post_attention_layernorm;
  Product up, down;
  void *keys, *values;  // (B, H, room, D)
  float scaling;
  bool tanh;  // GELU's form
};

// Its place among all texts, and its first token's among those that are padded on the left.
struct Text {
  int64_t index, first;
};

struct Model {
  const Block* blocks;
  int64_t layers;
  Norm norm;
  Product head;
  Rough rough_head;
  int64_t heads, room, inner_size;  // room for so many tokens; the feed-forward's size
  int64_t way;                      // to read matrices; see `times`
  Type type;                        // of keys and values, and of matrices if they are not int8
  const Text* texts;                // those that go on
  int64_t count;
};

void normalize(const float* x, int64_t count, const Norm& norm, float* y) {
  float mean = 0, variance = 0;
#pragma omp simd reduction(+ : mean)
  for (int64_t i = 0; i < count; i++) mean += x[i] / count;
#pragma omp simd reduction(+ : variance)
  for (int64_t i = 0; i < count; i++) variance += (x[i] - mean) * (x[i] - mean) / count;
  const float factor = 1 / std::sqrt(variance + norm.eps);
  for (int64_t i = 0; i < count; i++)
    y[i] = (x[i] - mean) * factor * norm.weight[i] + norm.bias[i];
}

// e to the power of x, to the last digit but one, for several x at once unlike std::exp: 2 to the
// power of a whole number, times Taylor's polynomial of what is left.
inline float exponential(float x) {
  x = std::min(std::max(x, -87.0f), 88.0f);
  const float whole = std::nearbyint(x * 1.44269504f);                     // 1 / ln 2
  const float rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two parts
  float sum = 1 / 720.0f;
  for (float factor : {1 / 120.0f, 1 / 24.0f, 1 / 6.0f, 0.5f, 1.0f, 1.0f})
    sum = sum * rest + factor;
  const int32_t bits = (int32_t(x == x ? whole : 0) + 127) * (1 << 23);  // of a NaN comes a NaN
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return sum * power;
}

void gelu(float* x, int64_t count, bool tanh) {
  // (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), and u = sqrt(2 / pi) (x + 0.044715 x^3)
  if (tanh) {
#pragma omp simd
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
  const Input<int8_t> integers(x.data(), x.size());
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
  const auto [start, end] = share_of(head.rows);
  for (int64_t row = start; row < end; row++) own.count += may_be_best(row);
#pragma omp atomic
  found.count += own.count;
#pragma omp barrier
  if (!std::isfinite(found.lower) || found.count > rough.most) return false;
  const Input<W> exact(x.data(), x.size());
  for (int64_t row = start; row < end; row++) {
    if (!may_be_best(row)) continue;
    float y;
    times(0, exact, head, row, 0, &y);
#pragma omp critical
    if (y > found.score || (y == found.score && row < found.row)) found.score = y, found.row = row;
  }
  return true;
}

// Weights are of type W, keys and values of type T; `position` tokens have been read before.
// Returns the word that scores highest, if the rough head tells, as it may of one text; or -1, and
// all `scores` (B, V).
template <typename W, typename T>
int64_t run(const Model& model, int64_t position, const float* embedded, float* scores,
            int threads) {
  const int64_t count = model.count, hidden_size = model.head.columns, words = model.head.rows;
  const int64_t size = hidden_size / model.heads;
  const Text* texts = model.texts;
  std::vector<float> hidden(embedded, embedded + count * hidden_size);
  std::vector<float> normalized(hidden.size()), gathered(hidden.size());
  std::vector<float> inner(count * model.inner_size);
  std::vector<float> query(hidden.size()), key(hidden.size()), value(hidden.size());
  const auto multiply_all = [&](const Product& product, const std::vector<float>& x, auto use) {
    if (count > 1)
      multiply_many<W>(product, x.data(), count, use);
    else
      multiply(product, Input<W>(x.data(), x.size()), model.way,
               [&](int64_t row, float y) { use(0, row, &y, 1); });
  };
  const auto into = [&](std::vector<float>& all) {
    return [&all, size = int64_t(all.size()) / count](int64_t text, int64_t row, const float* y,
                                                      int64_t rows) {
      std::copy(y, y + rows, &all[text * size + row]);
    };
  };
  const auto add = [&](int64_t text, int64_t row, const float* y, int64_t rows) {
    for (int64_t i = 0; i < rows; i++) hidden[text * hidden_size + row + i] += y[i];
  };
  const auto normalize_all = [&](const Norm& norm) {
#pragma omp for
    for (int64_t start = 0; start < count * hidden_size; start += hidden_size)
      normalize(&hidden[start], hidden_size, norm, &normalized[start]);
  };
  Found found;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> weights(position + 1);
    for (const Block* block = model.blocks; block < model.blocks + model.layers; block++) {
      T *keys = static_cast<T*>(block->keys), *values = static_cast<T*>(block->values);
      normalize_all(block->input_layernorm);
      multiply_all(block->query, normalized, into(query));
      multiply_all(block->key, normalized, into(key));
      multiply_all(block->value, normalized, into(value));
#pragma omp barrier
#pragma omp for
      for (int64_t i = 0; i < count * model.heads; i++) {
        const auto [index, first] = texts[i / model.heads];
        const int64_t start = (index * model.heads + i % model.heads) * model.room * size;
        for (int64_t d = 0; d < size; d++) {
          put(keys + start + position * size + d, key[i * size + d]);
          put(values + start + position * size + d, value[i * size + d]);
        }
        attend(&query[i * size], keys + start + first * size, values + start + first * size,
               position + 1 - first, size, block->scaling, weights, &gathered[i * size]);
      }
      multiply_all(block->out, gathered, add);
#pragma omp barrier
      normalize_all(block->post_attention_layernorm);
      multiply_all(block->up, normalized, into(inner));
#pragma omp barrier
      const auto [start, end] = share_of(inner.size());
      gelu(&inner[start], end - start, block->tanh);
#pragma omp barrier
      multiply_all(block->down, inner, add);
#pragma omp barrier
    }
    normalize_all(model.norm);
    if (!find_best<W>(model.rough_head, model.head, normalized, model.way, scores, found))
      multiply_all(model.head, normalized,
                   [&](int64_t text, int64_t row, const float* y, int64_t rows) {
                     std::copy(y, y + rows, scores + texts[text].index * words + row);
                   });
  }
  return found.row;
}

}  // namespace

// What Python calls: a step, as `run`.
extern "C" int64_t step(const Model* model, int64_t position, const float* embedded, float* scores,
                        int threads) {
  const bool is_half = model->type == kBFloat16, is_int8 = model->head.type == kInt8;
  const auto of_int8 = is_half ? run<int8_t, BFloat16> : run<int8_t, float>;
  const auto of_floats = is_half ? run<BFloat16, BFloat16> : run<float, float>;
  return (is_int8 ? of_int8 : of_floats)(*model, position, embedded, scores, threads);
}

// One product by itself, to see how fast its matrix is read.
extern "C" int64_t product(const Product* product, int64_t way, const float* x, float* y,
                           int threads) {
  const int64_t columns = product->columns;
  const auto use = [&](int64_t row, float sum) { y[row] = sum; };
#pragma omp parallel num_threads(threads)
  switch (product->type) {
    case kFloat32: multiply(*product, Input<float>(x, columns), way, use); break;
    case kBFloat16: multiply(*product, Input<BFloat16>(x, columns), way, use); break;
    case kInt8: multiply(*product, Input<int8_t>(x, columns), way, use); break;
  }
  return 0;
}

// Products of `count` vectors by panels, as a layer of a model, to which GELU may be applied.
struct Layer {
  Product product;
  int64_t count;
  bool has_gelu, tanh;
};

extern "C" int64_t layer(const Layer* layer, int64_t, const float* x, float* y, int threads) {
  const Product& product = layer->product;
  const auto use = [&](int64_t vector, int64_t row, float* sums, int64_t rows) {
    if (layer->has_gelu) gelu(sums, rows, layer->tanh);
    std::copy(sums, sums + rows, y + vector * product.rows + row);
  };
#pragma omp parallel num_threads(threads)
  switch (product.type) {
    case kFloat32: multiply_many<float>(product, x, layer->count, use); break;
    case kBFloat16: multiply_many<BFloat16>(product, x, layer->count, use); break;
    case kInt8: multiply_many<int8_t>(product, x, layer->count, use); break;
  }
  return 0;
}

extern "C" int64_t panel_size() { return kPanel; }
