// Noise, made in registers from (seed, element number). The formulas: terms/noise.h.
#pragma once

#include "device.cuh"

namespace elbo_ext {
namespace {

// The words of a counter.
__device__ __forceinline__ void random_words(uint64_t seed, uint64_t counter, uint32_t (&word)[4]) {
  word[0] = static_cast<uint32_t>(counter);
  word[1] = static_cast<uint32_t>(counter >> 32);
  word[2] = word[3] = 0u;
  philox4x32_10(word, seed);
}

// As many normals as `out` has room for, from number `index * room` on.
template <class R>
__device__ __forceinline__ void whole_group(uint64_t seed, uint64_t index, R (&out)[4]) {
  uint32_t word[4];
  random_words(seed, index, word);
  box_muller<R>(word[0], word[1], out[0], out[1]);
  box_muller<R>(word[2], word[3], out[2], out[3]);
}
template <class R>
__device__ __forceinline__ void whole_group(uint64_t seed, uint64_t index, R (&out)[2]) {
  uint32_t word[4];
  random_words(seed, index / 2, word);
  const bool upper = index % 2 != 0;
  box_muller<R>(upper ? word[2] : word[0], upper ? word[3] : word[1], out[0], out[1]);
}

// The Gumbel noise of a counter.
template <class R>
__device__ __forceinline__ void gumbel_group(uint64_t seed, uint64_t counter, R (&out)[4]) {
  uint32_t word[4];
  random_words(seed, counter, word);
  ELBO_UNROLL
  for (int i = 0; i < 4; ++i) out[i] = gumbel<R>(word[i]);
}

// One normal: half of a pair.
template <class R>
__device__ __forceinline__ R normal(uint64_t seed, int64_t number) {
  R pair[2];
  whole_group(seed, static_cast<uint64_t>(number) / 2, pair);
  return number % 2 == 0 ? pair[0] : pair[1];
}

// Normals from number `first` on. Where that is no multiple of the group, as it may be for samples after the first one,
// they come from two groups.
template <class R, int kRoom>
__device__ __forceinline__ void normals(uint64_t seed, int64_t first, R (&out)[kRoom]) {
  const uint64_t index = static_cast<uint64_t>(first) / kRoom;
  const int skip = static_cast<int>(first % kRoom);
  whole_group(seed, index, out);
  if (skip == 0) return;
  R next[kRoom];
  whole_group(seed, index + 1, next);
  for (int i = 0; i < skip; ++i) {  // moved by one place at a time: registers have no addresses
    ELBO_UNROLL
    for (int j = 0; j + 1 < kRoom; ++j) out[j] = out[j + 1];
    out[kRoom - 1] = next[0];
    ELBO_UNROLL
    for (int j = 0; j + 1 < kRoom; ++j) next[j] = next[j + 1];
  }
}

}  // namespace
}  // namespace elbo_ext
