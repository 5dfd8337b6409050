// One token's way through a GPT, with the keys and values of the tokens before it at hand.
//
// The mathematics is that of the model's blocks; `one_token.py` fills in the structures. All
// matrices are read once, at 0.9 of the speed of memory: 1.7 to 3.2 times as fast as `nn.Linear`s.
//
// C hidden, H heads, D head size, S tokens so far, V words

#include <numeric>

#include "rough_head.h"

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
  void *keys, *values;  // (H, room, D)
  float scaling;
  bool tanh;  // GELU's form
};

struct Model {
  const Block* blocks;
  int64_t layers;
  Norm norm;
  Product head;
  Rough rough_head;
  int64_t heads, room, inner_size;  // room for so many tokens; the feed-forward's size
  int64_t way;                      // to read matrices; see `times`
};

void normalize(const std::vector<float>& x, const Norm& norm, std::vector<float>& y) {
  const int64_t count = x.size();
  float mean = 0, variance = 0;
#pragma omp simd reduction(+ : mean)
  for (int64_t i = 0; i < count; i++) mean += x[i] / count;
#pragma omp simd reduction(+ : variance)
  for (int64_t i = 0; i < count; i++) variance += (x[i] - mean) * (x[i] - mean) / count;
  const float factor = 1 / std::sqrt(variance + norm.eps);
  for (int64_t i = 0; i < count; i++)
    y[i] = (x[i] - mean) * factor * norm.weight[i] + norm.bias[i];
}

// e to the power of x, for x from -87 to 88, to the last digit but one. Unlike std::exp it is
// computed for several x at once: 2 to the power of a whole number, times a polynomial of what is
// left, Taylor's up to its 6th power.
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

// Weights are of type W, keys and values of type T; `position` tokens have been read before. Each
// thread hands what the head is to score to `score`.
template <typename W, typename T, typename Score>
void step(const Model& model, int64_t position, const float* embedded, int threads, Score score) {
  const int64_t hidden_size = model.head.columns, size = hidden_size / model.heads;
  std::vector<float> hidden(embedded, embedded + hidden_size);
  std::vector<float> query(hidden_size), gathered(hidden_size), inner(model.inner_size);
  const int64_t way = model.way;
  const auto add = [&](int64_t row, float y) { hidden[row] += y; };
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> normalized(hidden_size), weights(position + 1), activated;
    for (const Block* block = model.blocks; block < model.blocks + model.layers; block++) {
      T *keys = static_cast<T*>(block->keys), *values = static_cast<T*>(block->values);
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
      multiply(block->out, Input<W>(gathered), way, add);
#pragma omp barrier
      normalize(hidden, block->post_attention_layernorm, normalized);
      multiply(block->up, Input<W>(normalized), way, [&](int64_t row, float y) { inner[row] = y; });
#pragma omp barrier
      activated = inner;
      gelu(activated, block->tanh);
      multiply(block->down, Input<W>(activated), way, add);
#pragma omp barrier
    }
    normalize(hidden, model.norm, normalized);
    score(normalized);
  }
}

// The word that scores highest, of several the first, without reading all of the head; or -1 if
// that does not pay, or the bound cannot tell. `scores` (V) is memory to use.
// A row that cannot reach what another one reaches for sure is left out. The few that remain are
// multiplied by the head itself; more than `most` do not pay.
template <typename W, typename T>
int64_t best_word(const Model& model, int64_t position, const float* embedded, float* scores,
                  int threads) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  const Rough& rough = model.rough_head;
  std::vector<float> lowers(threads, kLowest), best_scores(threads, kLowest);
  std::vector<int64_t> best_rows(threads, -1), counts(threads, 0);

  step<W, T>(model, position, embedded, threads, [&](const std::vector<float>& x) {
    const int thread = omp_get_thread_num();
    const Input<int8_t> integers(x);
    const Bound bound(rough, x, integers);
    float lower = kLowest;  // what some row of this thread's reaches for sure
    multiply(rough.product, integers, model.way, [&](int64_t row, float y) {
      scores[row] = y;
      lower = std::max(lower, bound.lowest(row, y));
    });
    lowers[thread] = lower;
#pragma omp barrier
    lower = *std::max_element(lowers.begin(), lowers.end());
    const auto may_be_best = [&](int64_t row) { return scores[row] + bound(row) >= lower; };
    const auto [start, end] = share_of(model.head);
    for (int64_t row = start; row < end; row++) counts[thread] += may_be_best(row);
#pragma omp barrier
    const int64_t count = std::accumulate(counts.begin(), counts.end(), int64_t(0));
    if (!std::isfinite(lower) || count > rough.most) return;
    const Input<W> exact(x);
    for (int64_t row = start; row < end; row++) {
      if (!may_be_best(row)) continue;
      float y;
      times(0, exact, model.head, row, 0, &y);
      if (y > best_scores[thread]) best_scores[thread] = y, best_rows[thread] = row;
    }
  });
  return best_rows[std::max_element(best_scores.begin(), best_scores.end()) - best_scores.begin()];
}

}  // namespace

// What Python calls, for weights of type W, keys and values of type T: all scores of the next word,
// the best word, and one product by itself, to see how fast its matrix is read.
#define STEP(name, W, T)                                                                           \
  int64_t step_##name(const Model* model, int64_t position, const float* embedded, float* logits,  \
                      int threads) {                                                               \
    step<W, T>(*model, position, embedded, threads, [&](const std::vector<float>& x) {             \
      multiply(model->head, Input<W>(x), model->way, [&](int64_t row, float y) { logits[row] = y; }); \
    });                                                                                            \
    return 0;                                                                                      \
  }
#define BEST_WORD(name, T)                                                                         \
  int64_t best_word_##name(const Model* model, int64_t position, const float* embedded,            \
                           float* scores, int threads) {                                           \
    return best_word<T, T>(*model, position, embedded, scores, threads);                           \
  }
#define MULTIPLY(name, W)                                                                          \
  int64_t multiply_##name(const Product* product, int64_t way, const float* x, float* y,           \
                          int threads) {                                                           \
    const std::vector<float> numbers(x, x + product->columns);                                     \
    _Pragma("omp parallel num_threads(threads)")                                                   \
    multiply(*product, Input<W>(numbers), way, [&](int64_t row, float sum) { y[row] = sum; });     \
    return 0;                                                                                      \
  }

extern "C" {
STEP(float32, float, float)
STEP(bfloat16, BFloat16, BFloat16)
STEP(int8_float32, int8_t, float)
STEP(int8_bfloat16, int8_t, BFloat16)
BEST_WORD(float32, float)
BEST_WORD(bfloat16, BFloat16)
MULTIPLY(float32, float)
MULTIPLY(bfloat16, BFloat16)
MULTIPLY(int8, int8_t)
}
