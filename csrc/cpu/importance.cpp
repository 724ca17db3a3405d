// The importance-weighted bound of many examples, and the normalized weights of their samples. The formulas:
// terms/importance.h.
#include <algorithm>

#include "kernels.h"
#include "vec_math.h"

namespace elbo_ext {
namespace {

template <class R>
Vec<R> get(const R* from, int64_t count) {
  return count >= Vec<R>::size() ? Vec<R>::loadu(from) : Vec<R>::loadu(from, count);
}
template <class R>
void put(R* to, Vec<R> numbers, int64_t count) {
  count >= Vec<R>::size() ? numbers.store(to) : numbers.store(to, count);
}

// So many weights are added up in the compute type before they are added to a sum in double.
constexpr int64_t kSamplesAtOnce = 64;

// Examples that are worked on at once, so that neighbouring memory is read in one go: a cache line or more of each sample.
constexpr int kRegisters = 4;

template <class R>
void run_many(const ImportanceProblem& p, int64_t begin, int64_t end) {
  using V = Vec<R>;
  const R log_count = static_cast<R>(std::log(static_cast<double>(p.samples)));
  const R* const log_weights = static_cast<const R*>(p.log_weights);
  R *const bound = static_cast<R*>(p.bound), *const weights = static_cast<R*>(p.weights);

  for (int64_t first = begin; first < end; first += kRegisters * V::size()) {
    // Register r of each sample; the last one may be partly filled, or there may be fewer.
    const auto for_each = [&](int64_t sample, auto&& body) {
      const int64_t at = sample * p.examples + first;
      for (int r = 0; r < kRegisters && first + r * V::size() < end; ++r) {
        body(r, at + r * V::size(), end - first - r * V::size());
      }
    };
    V largest[kRegisters], sum[kRegisters];
    double total[kRegisters * V::size()] = {};
    for (V& number : largest) number = V(-std::numeric_limits<R>::infinity());
    for (int64_t sample = 0; sample < p.samples; ++sample)
      for_each(sample, [&](int r, int64_t i, int64_t count) { largest[r] = larger(get(log_weights + i, count), largest[r]); });
    for (V& reference : largest) reference = finite_reference(reference);
    for (int64_t begin_at = 0; begin_at < p.samples; begin_at += kSamplesAtOnce) {
      for (V& number : sum) number = V(R(0));
      for (int64_t sample = begin_at; sample < std::min(begin_at + kSamplesAtOnce, p.samples); ++sample)
        for_each(sample, [&](int r, int64_t i, int64_t count) {
          const V weight = exp(get(log_weights + i, count) - largest[r]);
          sum[r] = sum[r] + weight;
          if (weights) put(weights + i, weight, count);
        });
      R lane[kRegisters * V::size()];
      for (int r = 0; r < kRegisters; ++r) sum[r].store(lane + r * V::size());
      for (int i = 0; i < kRegisters * V::size(); ++i) total[i] += lane[i];
    }
    R lane[kRegisters * V::size()];
    for (int i = 0; i < kRegisters * V::size(); ++i) lane[i] = static_cast<R>(total[i]);
    for (int r = 0; r < kRegisters; ++r) sum[r] = V::loadu(lane + r * V::size());
    for_each(0, [&](int r, int64_t i, int64_t count) {
      put(bound + i, log_mean_weight(sum[r], largest[r], log_count), count);
    });
    if (!weights) continue;
    for (V& number : sum) number = normalizer(number);
    for (int64_t sample = 0; sample < p.samples; ++sample)
      for_each(sample, [&](int r, int64_t i, int64_t count) { put(weights + i, get(weights + i, count) * sum[r], count); });
  }
}

// One example: neighbours in memory are its samples.
template <class R>
void run_one(const ImportanceProblem& p) {
  using V = Vec<R>;
  const R* const log_weights = static_cast<const R*>(p.log_weights);
  R *const bound = static_cast<R*>(p.bound), *const weights = static_cast<R*>(p.weights);
  const auto for_each = [&](auto&& body) {
    for (int64_t i = 0; i < p.samples; i += V::size()) body(i, p.samples - i);
  };
  const auto inside = [](V outside, V numbers, int64_t count) {
    return V::set(outside, numbers, std::min<int64_t>(count, V::size()));
  };

  const V nothing(-std::numeric_limits<R>::infinity());
  V largest = nothing, sum(R(0));
  for_each([&](int64_t i, int64_t count) { largest = larger(inside(nothing, get(log_weights + i, count), count), largest); });
  R lane[V::size()];
  largest.store(lane);
  const V reference = finite_reference(V(*std::max_element(lane, lane + V::size())));
  double in_double = 0.0;
  for_each([&](int64_t i, int64_t count) {
    const V weight = exp(get(log_weights + i, count) - reference);
    sum = sum + inside(V(R(0)), weight, count);
    if (weights) put(weights + i, weight, count);
    if (i / V::size() % kSamplesAtOnce == kSamplesAtOnce - 1) {
      in_double += sum_lanes(sum);
      sum = V(R(0));
    }
  });
  const V total(static_cast<R>(in_double + sum_lanes(sum)));
  put(bound, log_mean_weight(total, reference, static_cast<R>(std::log(static_cast<double>(p.samples)))), 1);
  const V over_total = normalizer(total);
  if (weights)
    for_each([&](int64_t i, int64_t count) { put(weights + i, get(weights + i, count) * over_total, count); });
}

template <class R>
void run(const ImportanceProblem& p, int64_t begin, int64_t end) {
  p.examples == 1 ? run_one<R>(p) : run_many<R>(p, begin, end);
}

}  // namespace

namespace CPU_CAPABILITY {

void importance(const ImportanceProblem& p, int64_t begin, int64_t end) {
  p.compute_double ? run<double>(p, begin, end) : run<float>(p, begin, end);
}

}  // namespace CPU_CAPABILITY
}  // namespace elbo_ext
