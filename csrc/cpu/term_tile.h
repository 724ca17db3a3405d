// The innermost loop of every term: values and derivatives over one tile, in registers.
#pragma once

#include "tile.h"

namespace elbo_ext {
namespace {

template <class R>
struct TermTile {
  int64_t size;
  Lane<R> input[kMaxOperands];  // the last one is the weight
  bool weighted = false;
  R* value = nullptr;           // where the values go one by one, if anywhere
  double sum = 0;               // their sum
  Lane<R> upstream;             // only read for gradients
  GradientTile<R> gradient[kMaxOperands];
};

template <template <class> class TermOf, class R, bool kGradient>
void run_term(TermTile<R>& tile, int form, int prior_form) {
  using V = Vec<R>;
  using Term = TermOf<V>;
  constexpr int kWidth = V::size();
  constexpr int kInputs = Term::kInputs;
  const V zero(R(0));

  // Copies, because the compiler must assume that a store through any pointer could change the tile itself.
  Lane<R> input[kInputs];
  R* numbers[kMaxOperands];
  bool add_up[kMaxOperands];
  for (int k = 0; k < kInputs; ++k) input[k] = tile.input[k];
  for (int k = 0; k < kMaxOperands; ++k) {
    numbers[k] = tile.gradient[k].numbers;
    add_up[k] = tile.gradient[k].add_up;
  }
  const Lane<R> weights = tile.input[kWeight], upstream = tile.upstream;
  const bool weighted = tile.weighted;
  R* const values = tile.value;

  // What depends on a uniform scale alone is computed once a tile.
  bool share_each = false;
  for (int k = 0; k < kInputs; ++k)
    if ((Term::kSharedInputs >> k & 1) && input[k].step != 0) share_each = true;
  typename Term::Shared shared{};
  if (!share_each) {
    V in[kInputs];
    for (int k = 0; k < kInputs; ++k) in[k] = V(input[k].data[0]);
    shared = Term::share(in, form, prior_form);
  }

  V sum = zero, gradient_sum[kMaxOperands];
  for (V& lanes : gradient_sum) lanes = zero;

  // The elements [i, i + count). Lanes past the end hold anything and must reach neither memory nor a sum.
  const auto step = [&](auto full, int64_t i, int count) __attribute__((always_inline)) {
    constexpr bool kFull = decltype(full)::value;
    const auto get = [&](const Lane<R>& lane) {
      const R* at = lane.data + i * lane.step;
      return kFull || lane.step == 0 ? V::loadu(at) : V::loadu(at, count);
    };
    const auto put = [&](R* to, V result) { kFull ? result.store(to + i) : result.store(to + i, count); };
    const auto inside = [&](V result) { return kFull ? result : V::set(zero, result, count); };

    V in[kInputs];
    for (int k = 0; k < kInputs; ++k) in[k] = get(input[k]);
    if (share_each) shared = Term::share(in, form, prior_form);

    V value, derivative[kInputs];
    if constexpr (kGradient) value = Term::gradient(shared, in, derivative);
    else value = Term::value(shared, in);

    V weight = zero, masked = zero;
    if (weighted) {
      weight = get(weights);
      masked = weight == zero;
    }
    if constexpr (kGradient) {
      const V grad = get(upstream), factor = weighted ? grad * weight : grad;
      const auto deliver = [&](int k, V result) {
        if (numbers[k]) put(numbers[k], result);
        else if (add_up[k]) gradient_sum[k] = gradient_sum[k] + inside(result);
      };
      for (int k = 0; k < kInputs; ++k) {
        const V result = derivative[k] * factor;
        deliver(k, weighted ? select(masked, zero, result) : result);
      }
      if (weighted) deliver(kWeight, value * grad);
    }
    // A weight of zero leaves the element out, whatever stands there: 0 * inf must not become NaN.
    if (weighted) value = select(masked, zero, value * weight);
    if (values) put(values, value);
    sum = sum + inside(value);
  };

  int64_t i = 0;
  for (; i + kWidth <= tile.size; i += kWidth) step(std::true_type{}, i, kWidth);
  if (i < tile.size) step(std::false_type{}, i, static_cast<int>(tile.size - i));

  tile.sum = sum_lanes(sum);
  if constexpr (kGradient)
    for (int k = 0; k < kMaxOperands; ++k)
      if (add_up[k]) tile.gradient[k].sum = sum_lanes(gradient_sum[k]);
}

// The sums of a block: of each of its rows, and of all of it, whichever are wanted.
template <class R>
class Sums {
 public:
  Sums(const Space& space, void* row_value, double* block_sum)
      : cols_(space.cols), row_value_(static_cast<R*>(row_value)), block_sum_(block_sum) {}

  // Where the values of a tile that holds several rows have to be put, to be summed row by row.
  R* values_of_short_rows() { return row_value_ && cols_ < kShortRow ? values_.data : nullptr; }

  void add(const Tile& tile, double tile_sum) {
    block_ += tile_sum;
    if (row_value_ == nullptr) return;
    if (const R* values = values_of_short_rows()) {
      for (int64_t r = 0; r < tile.rows; ++r)
        row_value_[tile.row + r] = static_cast<R>(sum_row(values + r * tile.cols, tile.cols));
      return;
    }
    row_ = tile.col == 0 ? tile_sum : row_ + tile_sum;
    if (tile.col + tile.cols == cols_) row_value_[tile.row] = static_cast<R>(row_);
  }

  void end_block(int64_t block) {
    if (block_sum_) block_sum_[block] = block_;
    block_ = 0;
  }

 private:
  int64_t cols_;
  R* row_value_;
  double* block_sum_;
  double block_ = 0, row_ = 0;
  Buffer<R> values_;
};

}  // namespace
}  // namespace elbo_ext
