// What the kernels of the latent stage share: the noise of a tile, and loops over its registers.
#pragma once

#include "normals.h"
#include "term_tile.h"

namespace elbo_ext {
namespace {

// as GaussianKL takes them
enum Slot {
  kMu,
  kScale,
  kPriorMu,
  kPriorScale
};

// The forms of the inputs, and what belongs to them (terms/forms.h).
template <class R>
Forms forms_of(const LatentProblem& p, TermTile<R>& t) {
  for (int k = 0; k < kLatentInputs; ++k) t.constant[k] = p.input[k].constant;
  return {p.forms, t.constant};
}

// The noise of one tile of one sample.
template <class R>
struct Noise {
  NoiseBuffer<R, kTile> normals;
  Buffer<R> buffer;

  Lane<R> load(const LatentProblem& p, const Tile& tile, int64_t sample) {
    if (p.seed == nullptr) {
      Operand noise = p.noise;
      noise.data = advance(noise, sample * p.noise_sample_stride);
      return elbo_ext::load(p.space, noise, tile, buffer);
    }
    const int64_t first = (sample * p.space.rows + tile.row) * p.space.cols + tile.col;
    return {normals.fill(*p.seed, first, tile.size()), 1};
  }

  static void* advance(const View& view, int64_t elements) {
    return static_cast<char*>(view.data) + elements * bytes_of(view.dtype);
  }
};

// A sum over samples, element by element, in double: there may be many thousands of them.
template <class R>
struct SampleSum {
  double total[kTile];

  void add(const Buffer<R>& numbers, int64_t size, bool first) {
    for (int64_t i = 0; i < size; ++i) total[i] = (first ? 0.0 : total[i]) + numbers.data[i];
  }
  void finish(Buffer<R>& to, int64_t size) const {
    for (int64_t i = 0; i < size; ++i) to.data[i] = static_cast<R>(total[i]);
  }
};

// Applies body(i, count) to the registers of a tile; the last one may be partly filled.
template <class R, class Body>
ELBO_INLINE void for_each_register(int64_t size, Body&& body) {
  constexpr int64_t kWidth = Vec<R>::size();
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) body(i, kWidth);
  if (i < size) body(i, size - i);
}
template <class R>
ELBO_INLINE Vec<R> get(const Lane<R>& lane, int64_t i, int64_t count) {
  const R* at = lane.data + i * lane.step;
  return lane.step == 0 || count == Vec<R>::size() ? Vec<R>::loadu(at) : Vec<R>::loadu(at, count);
}
template <class R>
ELBO_INLINE void put(R* to, Vec<R> numbers, int64_t count) {
  count == Vec<R>::size() ? numbers.store(to) : numbers.store(to, count);
}

// What the samples add to the gradient of an operand, to what is there already (`add`), or in its place.
template <class R, class Number>
void deliver(GradientTile<R>& gradient, int64_t size, bool add, Number&& number) {
  if (gradient.numbers) {
    for_each_register<R>(size, [&](int64_t i, int64_t count) {
      Vec<R> value = number(i, count);
      if (add) value = value + get(Lane<R>{gradient.numbers, 1}, i, count);
      put(gradient.numbers + i, value, count);
    });
  } else if (gradient.add_up) {
    Vec<R> sum(R(0));
    for_each_register<R>(size, [&](int64_t i, int64_t count) {
      sum = sum + Vec<R>::set(Vec<R>(R(0)), number(i, count), count);
    });
    gradient.sum = (add ? gradient.sum : 0.0) + sum_lanes(sum);
  }
}

}  // namespace
}  // namespace elbo_ext
