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

// The terms of the elements [i, i + count) of a tile, count == a register's width if Full.
template <template <class> class TermOf, class R, bool kGradient, bool kFull>
struct TermStep {
  using V = Vec<R>;
  using Term = TermOf<V>;

  ELBO_INLINE static V get(const Lane<R>& lane, int64_t i, int count) {
    const R* at = lane.data + i * lane.step;
    return kFull || lane.step == 0 ? V::loadu(at) : V::loadu(at, count);
  }
  ELBO_INLINE static void put(R* to, V numbers, int count) { kFull ? numbers.store(to) : numbers.store(to, count); }
  // Lanes past the end of the tile hold anything; they must not reach a sum.
  ELBO_INLINE static V inside(V numbers, int count) { return kFull ? numbers : V::set(V(R(0)), numbers, count); }

  ELBO_INLINE static void run(TermTile<R>& tile, typename Term::Shared& shared, bool share_each, int form,
                              int prior_form, int64_t i, int count, V& sum, V (&gradient_sum)[kMaxOperands]) {
    V in[Term::kInputs];
    for (int k = 0; k < Term::kInputs; ++k) in[k] = get(tile.input[k], i, count);
    if (share_each) shared = Term::share(in, form, prior_form);

    V derivative[kMaxOperands], value;
    if constexpr (kGradient) value = Term::gradient(shared, in, derivative);
    else value = Term::value(shared, in);

    const V zero(R(0));
    if constexpr (kGradient) {
      derivative[kWeight] = value;
      V factor = get(tile.upstream, i, count), masked = zero;
      V factor_of_weight = factor;
      if (tile.weighted) {
        const V weight = get(tile.input[kWeight], i, count);
        factor = factor * weight;
        masked = weight == zero;
      }
      const auto deliver = [&](int k, V number) {
        GradientTile<R>& to = tile.gradient[k];
        if (to.numbers) put(to.numbers + i, number, count);
        else if (to.add_up) gradient_sum[k] = gradient_sum[k] + inside(number, count);
      };
      for (int k = 0; k < Term::kInputs; ++k) {
        V number = derivative[k] * factor;
        if (tile.weighted) number = select(masked, zero, number);
        deliver(k, number);
      }
      if (tile.weighted) deliver(kWeight, derivative[kWeight] * factor_of_weight);
    }
    if (tile.weighted) {
      // A weight of zero leaves the element out, whatever stands there: 0 * inf must not become NaN.
      const V weight = get(tile.input[kWeight], i, count);
      value = select(weight == zero, zero, value * weight);
    }
    if (tile.value) put(tile.value + i, value, count);
    sum = sum + inside(value, count);
  }
};

template <template <class> class TermOf, class R, bool kGradient>
void run_term(TermTile<R>& tile, int form, int prior_form) {
  using V = Vec<R>;
  using Term = TermOf<V>;
  constexpr int kWidth = V::size();

  // What depends on a uniform scale alone is computed once a tile.
  bool share_each = false;
  for (int k = 0; k < Term::kInputs; ++k)
    if ((Term::kSharedInputs >> k & 1) && tile.input[k].step != 0) share_each = true;
  typename Term::Shared shared{};
  if (!share_each) {
    V in[Term::kInputs];
    for (int k = 0; k < Term::kInputs; ++k) in[k] = V(tile.input[k].data[0]);
    shared = Term::share(in, form, prior_form);
  }

  V sum(R(0)), gradient_sum[kMaxOperands];
  for (V& lanes : gradient_sum) lanes = V(R(0));
  int64_t i = 0;
  for (; i + kWidth <= tile.size; i += kWidth)
    TermStep<TermOf, R, kGradient, true>::run(tile, shared, share_each, form, prior_form, i, kWidth, sum, gradient_sum);
  if (i < tile.size)
    TermStep<TermOf, R, kGradient, false>::run(tile, shared, share_each, form, prior_form, i,
                                               static_cast<int>(tile.size - i), sum, gradient_sum);
  tile.sum = sum_lanes(sum);
  if constexpr (kGradient)
    for (int k = 0; k < kMaxOperands; ++k)
      if (tile.gradient[k].add_up) tile.gradient[k].sum = sum_lanes(gradient_sum[k]);
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
