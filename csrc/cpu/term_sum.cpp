// Sums of a term over rows, forward, backward, and both in one pass.
#include "kernels.h"
#include "term_tile.h"

namespace elbo_ext {
namespace {

// Gradients of this size are no longer in a cache when somebody reads them, and a store past the caches spares the memory
// the reading of what it overwrites (benchmarks/NOTES.md).
constexpr int64_t kStreamedElements = int64_t{1} << 21;

template <template <class> class TermOf, class R, bool kGradient>
void run_groups(const TermSumProblem& p, int64_t begin, int64_t end) {
  constexpr int kWeight = TermOf<Vec<R>>::kInputs, kOperands = kWeight + 1;
  Buffer<R> buffer[kOperands], upstream_buffer;
  Sums<R> sums(p.space, p.values.row, p.block_sum);
  TermTile<R> t;
  t.weighted = p.operand[kWeight].present();
  TileLimits limits;
  for (int k = 0; k < kOperands; ++k) {
    limits.consider<R>(p.space, p.operand[k]);
    limits.consider<R>(p.space, p.gradient[k]);
    t.constant[k] = p.operand[k].constant;
  }
  t.streams = kGradient && limits.elements == kTile && p.space.rows * p.space.cols >= kStreamedElements;

  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = group * p.blocks.per_group;
    for (int64_t block = first; block < std::min(first + p.blocks.per_group, p.blocks.count); ++block) {
      for_each_tile(p.space, p.blocks, block, limits, [&](const Tile& tile) {
        t.size = tile.size();
        for (int k = 0; k < (t.weighted ? kOperands : kWeight); ++k)
          t.operand[k] = load(p.space, p.operand[k], tile, buffer[k]);
        if (kGradient) {
          t.upstream = load(p.space, p.upstream, tile, upstream_buffer);
          for (int k = 0; k < kOperands; ++k) t.gradient[k].begin(p.space, p.gradient[k], tile);
        }
        t.value = p.values.element ? static_cast<R*>(p.values.element) + tile.col : sums.values_of_short_rows();

        run_term<TermOf, R, kGradient>(t, p.forms);

        sums.add(tile, t.sum);
        if (kGradient)
          for (int k = 0; k < kOperands; ++k) t.gradient[k].finish(p.space, p.gradient[k], tile, group);
      });
      sums.end_block(block);
    }
  }
  if (t.streams) flush_streams();
}

template <template <class> class TermOf>
void run_term_sum(const TermSumProblem& p, int64_t begin, int64_t end) {
  if (p.compute_double) {
    if (p.wants_gradient) run_groups<TermOf, double, true>(p, begin, end);
    else run_groups<TermOf, double, false>(p, begin, end);
  } else {
    if (p.wants_gradient) run_groups<TermOf, float, true>(p, begin, end);
    else run_groups<TermOf, float, false>(p, begin, end);
  }
}

}  // namespace

namespace CPU_CAPABILITY {

void term_sum(const TermSumProblem& p, int64_t begin, int64_t end) {
  switch (p.term) {
#define ELBO_TERM_CASE(number, Term, name) \
  case number: return run_term_sum<Term>(p, begin, end);
    ELBO_FOR_EACH_TERM(ELBO_TERM_CASE)
#undef ELBO_TERM_CASE
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace elbo_ext
