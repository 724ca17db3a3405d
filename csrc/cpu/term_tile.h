// The innermost loop of every term: values and derivatives over one tile, in registers.
#pragma once

#include "tile.h"

namespace elbo_ext {
namespace {

template <class R>
struct TermTile {
  int64_t size;
  Lane<R> operand[kMaxOperands];  // the inputs, and the weight
  double constant[kMaxOperands];  // (problem.h)
  bool weighted = false;
  R* value = nullptr;           // where the values go one by one, if anywhere
  double sum = 0;               // their sum
  Lane<R> upstream;             // only read for gradients
  GradientTile<R> gradient[kMaxOperands];
  bool streams = false;         // gradients go past the caches
};

// What is known of a tile before its loop begins. The ordinary tile is unweighted and has each input in its first form, a
// scale as logvar; a loop without the branches for all else takes half the time (benchmarks/NOTES.md). What is precomputed
// (from the scale) is computed once for the tile, or anew for each register.
enum class FastPath {
  kNone,
  kPrecomputedOnce,
  kRecomputed
};

// Numbers of elements of a tile, as wide as what they gather.
template <class R>
using Index = at::vec::int_same_size_t<R>;

// Where x, the first input of a term of counts, is above 0 (terms/count.h), and how often.
template <class R>
int positions_above_zero(const TermTile<R>& tile, Index<R>* position) {
  const Lane<R>& x = tile.operand[0];
  int count = 0;
  int64_t i = 0;
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<R, float>) {
    if (x.step == 1) {
      __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      for (; i + 16 <= tile.size; i += 16, lanes = _mm512_add_epi32(lanes, _mm512_set1_epi32(16))) {
        const __mmask16 above = _mm512_cmp_ps_mask(_mm512_loadu_ps(x.data + i), _mm512_setzero_ps(), _CMP_GT_OQ);
        _mm512_storeu_si512(position + count, _mm512_maskz_compress_epi32(above, lanes));  // there is room for a register
        count += __builtin_popcount(above);
      }
    }
  }
#endif
  for (; i < tile.size; ++i) {
    position[count] = static_cast<Index<R>>(i);
    count += x.data[i * x.step] > R(0) ? 1 : 0;
  }
  return count;
}

template <template <class> class TermOf, class R, bool kGradient, FastPath kFastPath>
void run_term_loop(TermTile<R>& tile, Forms forms, bool recompute) {
  using V = Vec<R>;
  using Term = TermOf<V>;
  constexpr int kWidth = V::size();
  constexpr int kInputs = Term::kInputs, kWeight = kInputs;
  constexpr bool kIsCountTerm = IsCountTerm<Term>::value;
  const V zero(R(0));
  if constexpr (kFastPath != FastPath::kNone) {
    forms = {0};
    recompute = kFastPath == FastPath::kRecomputed;
  }
  const bool weighted = kFastPath == FastPath::kNone && tile.weighted;
  bool streams = kFastPath != FastPath::kNone && tile.streams && !kIsCountTerm;  // x > 0 is added to what x = 0 wrote

  // Copies, because the compiler must assume that a store through any pointer could change the tile itself.
  const R* from[kInputs];
  int64_t step_of[kInputs];
  R* to[kInputs];
  bool wanted[kInputs];
  for (int k = 0; k < kInputs; ++k) {
    from[k] = tile.operand[k].data;
    step_of[k] = tile.operand[k].step * kWidth;
    to[k] = tile.gradient[k].numbers;
    wanted[k] = to[k] != nullptr || tile.gradient[k].add_up;
    streams = streams && reinterpret_cast<uintptr_t>(to[k]) % sizeof(V) == 0;
  }
  const R *weights = tile.operand[kWeight].data, *upstream = tile.upstream.data;
  const int64_t weight_step = tile.operand[kWeight].step * kWidth, upstream_step = tile.upstream.step * kWidth;
  R* const weight_gradient = tile.gradient[kWeight].numbers;
  R* values = tile.value;

  typename Term::Precomputed precomputed{};
  if (!recompute) {
    V in[kInputs];
    for (int k = 0; k < kInputs; ++k) in[k] = V(from[k][0]);
    precomputed = Term::precompute(in, forms);
  }

  V sum = zero, gradient_sum[kInputs], weight_gradient_sum = zero;
  for (V& lanes : gradient_sum) lanes = zero;

  // The elements [i, i + count). Lanes past the end hold anything and must reach neither memory nor a sum.
  const auto step = [&](auto full, int64_t i, int count) __attribute__((always_inline)) {
    constexpr bool kFull = decltype(full)::value;
    const auto get = [&](const R*& at, int64_t lane_step) {
      const V numbers = kFull || lane_step == 0 ? V::loadu(at) : V::loadu(at, count);
      at += lane_step;
      return numbers;
    };
    const auto put = [&](R* at, V result) { kFull ? result.store(at + i) : result.store(at + i, count); };
    const auto inside = [&](V result) { return kFull ? result : V::set(zero, result, count); };

    V in[kInputs];
    for (int k = 0; k < kInputs; ++k) in[k] = get(from[k], step_of[k]);
    if (recompute) precomputed = Term::precompute(in, forms);

    V value, derivative[kInputs];
    if constexpr (kIsCountTerm) {
      value = at_most_zero<Term, kGradient>(in, forms, derivative);
      if constexpr (kGradient)
        if (wanted[0]) derivative[0] = Term::data_gradient(in, forms);
    } else if constexpr (kGradient) {
      value = Term::gradient(precomputed, in, derivative);
    } else {
      value = Term::value(precomputed, in);
    }

    V weight = zero, masked = zero;
    if (weighted) {
      weight = get(weights, weight_step);
      masked = weight == zero;
    }
    if constexpr (kGradient) {
      const V grad = get(upstream, upstream_step), factor = weighted ? grad * weight : grad;
      for (int k = 0; k < kInputs; ++k) {
        if (!wanted[k]) continue;
        V result = derivative[k] * factor;
        if (weighted) result = select(masked, zero, result);
        if (to[k]) (kFull && streams) ? stream(to[k] + i, result) : put(to[k], result);
        else gradient_sum[k] = gradient_sum[k] + inside(result);
      }
      if (weighted) {
        // A term that is left out and is not finite says nothing about its weight.
        const V of_weight = select(masked, select(value - value == zero, value * grad, zero), value * grad);
        if (weight_gradient) put(weight_gradient, of_weight);
        weight_gradient_sum = weight_gradient_sum + inside(of_weight);
      }
    }
    // A weight of zero leaves the element out, whatever stands there: 0 * inf must not become NaN.
    if (weighted) value = select(masked, zero, value * weight);
    if (values) put(values, value);
    sum = sum + inside(value);
  };

  int64_t i = 0;
  for (; i + kWidth <= tile.size; i += kWidth) step(std::true_type{}, i, kWidth);
  if (i < tile.size) step(std::false_type{}, i, static_cast<int>(tile.size - i));

  if constexpr (kIsCountTerm) {
    // The elements whose x is above 0, a register of them at a time. Lanes past the last one repeat it.
    Index<R> position[kTile + kWidth];
    const int count = positions_above_zero(tile, position);
    for (int first = 0; first < count; first += kWidth) {
      const int lanes = std::min(kWidth, count - first);
      for (int lane = count; lane < first + kWidth; ++lane) position[lane] = position[count - 1];
      const auto at = Vec<Index<R>>::loadu(position + first);
      const auto get = [&](const Lane<R>& lane) {
        return lane.step == 0 ? V::loadu(lane.data) : at::vec::gather<sizeof(R)>(lane.data, at);
      };
      const auto add = [&](R* to, V number) {
        R numbers[kWidth];
        number.store(numbers);
        for (int lane = 0; lane < lanes; ++lane) to[position[first + lane]] += numbers[lane];
      };
      const auto inside = [&](V result) { return lanes == kWidth ? result : V::set(zero, result, lanes); };

      V in[kInputs], derivative[kInputs];
      for (int k = 0; k < kInputs; ++k) in[k] = get(tile.operand[k]);
      V value = Term::template above_zero<kGradient>(in, forms, derivative);
      V weight = zero, masked = zero;
      if (weighted) {
        weight = get(tile.operand[kWeight]);
        masked = weight == zero;
      }
      if constexpr (kGradient) {
        const V grad = get(tile.upstream), factor = weighted ? grad * weight : grad;
        for (int k = 1; k < kInputs; ++k) {
          if (!wanted[k]) continue;
          V result = derivative[k] * factor;
          if (weighted) result = select(masked, zero, result);
          if (to[k]) add(to[k], result);
          else gradient_sum[k] = gradient_sum[k] + inside(result);
        }
        if (weighted) {
          const V of_weight = select(masked, select(value - value == zero, value * grad, zero), value * grad);
          if (weight_gradient) add(weight_gradient, of_weight);
          weight_gradient_sum = weight_gradient_sum + inside(of_weight);
        }
      }
      if (weighted) value = select(masked, zero, value * weight);
      if (values) add(values, value);
      sum = sum + inside(value);
    }
  }

  tile.sum = sum_lanes(sum);
  if constexpr (kGradient) {
    for (int k = 0; k < kInputs; ++k)
      if (tile.gradient[k].add_up) tile.gradient[k].sum = sum_lanes(gradient_sum[k]);
    if (tile.gradient[kWeight].add_up) tile.gradient[kWeight].sum = sum_lanes(weight_gradient_sum);
  }
}

template <template <class> class TermOf, class R, bool kGradient>
void run_term(TermTile<R>& tile, int number_of_forms) {
  using Term = TermOf<Vec<R>>;
  const Forms forms{number_of_forms, tile.constant};
  bool recompute = false;
  for (int k = 0; k < Term::kInputs; ++k)
    if ((Term::kPrecomputedFrom >> k & 1) && tile.operand[k].step != 0) recompute = true;
  if constexpr (std::is_same_v<R, float>) {
    if (!tile.weighted && forms == 0) {
      if constexpr (Term::kPrecomputedFrom != 0)
        if (recompute) return run_term_loop<TermOf, R, kGradient, FastPath::kRecomputed>(tile, forms, true);
      return run_term_loop<TermOf, R, kGradient, FastPath::kPrecomputedOnce>(tile, forms, false);
    }
  }
  run_term_loop<TermOf, R, kGradient, FastPath::kNone>(tile, forms, recompute);
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
