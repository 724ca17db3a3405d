// Noise in bulk: Philox on registers of 32-bit words, the transformations in loops that the compiler vectorizes.
#pragma once

#include <cmath>
#include <cstring>

#include <ATen/cpu/vec/vec.h>

#include "../terms/macros.h"

namespace elbo_ext {
namespace {

ELBO_INLINE float root(float x) { return std::sqrt(x); }
ELBO_INLINE double root(double x) { return std::sqrt(x); }

}  // namespace
}  // namespace elbo_ext

#include "../terms/noise.h"

namespace elbo_ext {
namespace {

// at::vec has no widening integer product, so each instruction set names its own register of words and that product.
#if defined(CPU_CAPABILITY_AVX512)

struct Register {
  static constexpr int size = 16;
  __m512i value;
  static Register load(const uint32_t* from) { return {_mm512_loadu_si512(from)}; }
  static Register splat(uint32_t word) { return {_mm512_set1_epi32(static_cast<int>(word))}; }
  void store(uint32_t* to) const { _mm512_storeu_si512(to, value); }
};
ELBO_INLINE Register operator^(Register a, Register b) { return {_mm512_xor_si512(a.value, b.value)}; }
ELBO_INLINE void multiply_wide(Register a, uint32_t b, Register& high, Register& low) {
  const __m512i factor = _mm512_set1_epi32(static_cast<int>(b));
  const __m512i even = _mm512_mul_epu32(a.value, factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.value, 32), factor);
  high.value = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
  low.value = _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
}

#elif defined(CPU_CAPABILITY_AVX2)

struct Register {
  static constexpr int size = 8;
  __m256i value;
  static Register load(const uint32_t* from) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))}; }
  static Register splat(uint32_t word) { return {_mm256_set1_epi32(static_cast<int>(word))}; }
  void store(uint32_t* to) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value); }
};
ELBO_INLINE Register operator^(Register a, Register b) { return {_mm256_xor_si256(a.value, b.value)}; }
ELBO_INLINE void multiply_wide(Register a, uint32_t b, Register& high, Register& low) {
  const __m256i factor = _mm256_set1_epi32(static_cast<int>(b));
  const __m256i even = _mm256_mul_epu32(a.value, factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a.value, 32), factor);
  high.value = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  low.value = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}

#else  // any other machine: plain arrays, in the shape that compilers turn into their own vectors

struct Register {
  static constexpr int size = 8;
  uint32_t value[size];
  static Register load(const uint32_t* from) {
    Register r;
    std::memcpy(r.value, from, sizeof r.value);
    return r;
  }
  static Register splat(uint32_t word) {
    Register r;
    for (uint32_t& lane : r.value) lane = word;
    return r;
  }
  void store(uint32_t* to) const { std::memcpy(to, value, sizeof value); }
};
ELBO_INLINE Register operator^(Register a, Register b) {
  for (int i = 0; i < Register::size; ++i) a.value[i] ^= b.value[i];
  return a;
}
ELBO_INLINE void multiply_wide(Register a, uint32_t b, Register& high, Register& low) {
  for (int i = 0; i < Register::size; ++i) multiply_wide(a.value[i], b, high.value[i], low.value[i]);
}

#endif

// Two registers side by side: a round of Philox is a chain of dependent steps, and the second chain fills its waits.
struct Words {
  static constexpr int size = 2 * Register::size;
  Register half[2];
  static Words load(const uint32_t* from) { return {{Register::load(from), Register::load(from + Register::size)}}; }
  static Words splat(uint32_t word) { return {{Register::splat(word), Register::splat(word)}}; }
  void store(uint32_t* to) const {
    half[0].store(to);
    half[1].store(to + Register::size);
  }
};
ELBO_INLINE Words operator^(Words a, Words b) { return {{a.half[0] ^ b.half[0], a.half[1] ^ b.half[1]}}; }
ELBO_INLINE void multiply_wide(Words a, uint32_t b, Words& high, Words& low) {
  for (int i = 0; i < 2; ++i) multiply_wide(a.half[i], b, high.half[i], low.half[i]);
}
ELBO_INLINE Words operator^(Words a, uint32_t b) { return a ^ Words::splat(b); }

constexpr int kCountersPerBlock = 32;
constexpr int kNormalsPerBlock = kCountersPerBlock * kNormalsPerCounter;

// The words of `counters` counters, rounded up to whole blocks, as make(word, out) turns a block of them into numbers.
// first_counter is a multiple of Words::size, so that the lower half of the counter never overflows inside a register.
template <class F, class Make>
void fill_from_words(uint64_t seed, uint64_t first_counter, int64_t counters, F* out, Make&& make) {
  for (int64_t done = 0; done < counters; done += kCountersPerBlock, out += kNormalsPerBlock) {
    uint32_t word[4][kCountersPerBlock];
    for (int i = 0; i < kCountersPerBlock; i += Words::size) {
      const uint64_t counter = first_counter + done + i;
      uint32_t low[Words::size];
      for (int j = 0; j < Words::size; ++j) low[j] = static_cast<uint32_t>(counter) + j;
      Words lanes[4] = {Words::load(low), Words::splat(static_cast<uint32_t>(counter >> 32)), Words::splat(0),
                        Words::splat(0)};
      philox4x32_10(lanes, seed);
      for (int j = 0; j < 4; ++j) lanes[j].store(word[j] + i);
    }
    F number[4][kCountersPerBlock];
    make(word, number);
    for (int i = 0; i < kCountersPerBlock; ++i)
      for (int j = 0; j < 4; ++j) out[kNormalsPerCounter * i + j] = number[j][i];
  }
}

template <class F>
void fill_normals(uint64_t seed, uint64_t first_counter, int64_t counters, F* out) {
  fill_from_words(seed, first_counter, counters, out, [](const auto& word, auto& normal) {
    for (int j = 0; j < 4; j += 2)
      for (int i = 0; i < kCountersPerBlock; ++i)
        box_muller<F>(word[j][i], word[j + 1][i], normal[j][i], normal[j + 1][i]);
  });
}

template <class F>
void fill_gumbel(uint64_t seed, uint64_t first_counter, int64_t counters, F* out) {
  fill_from_words(seed, first_counter, counters, out, [](const auto& word, auto& number) {
    for (int j = 0; j < 4; ++j)
      for (int i = 0; i < kCountersPerBlock; ++i) number[j][i] = gumbel<F>(word[j][i]);
  });
}

// Room for any stretch of up to `count` numbers, wherever it begins.
template <class F, int64_t count>
struct alignas(64) NoiseBuffer {
  F data[count + 2 * kNormalsPerBlock];

  // Normals number first .. first + n - 1 of the stream, n <= count.
  const F* fill(int64_t seed, int64_t first, int64_t n) { return fill_by(fill_normals<F>, seed, first, n); }
  // Gumbel noise, one number for each word.
  const F* fill_gumbel(int64_t seed, int64_t first, int64_t n) { return fill_by(elbo_ext::fill_gumbel<F>, seed, first, n); }

 private:
  const F* fill_by(void (*fill)(uint64_t, uint64_t, int64_t, F*), int64_t seed, int64_t first, int64_t n) {
    constexpr uint64_t kAligned = 32;  // a multiple of every Words::size
    const uint64_t first_counter = static_cast<uint64_t>(first) / kNormalsPerCounter / kAligned * kAligned;
    const int64_t skip = first - static_cast<int64_t>(first_counter * kNormalsPerCounter);
    fill(static_cast<uint64_t>(seed), first_counter, (skip + n + kNormalsPerCounter - 1) / kNormalsPerCounter, data);
    return data + skip;
  }
};

}  // namespace
}  // namespace elbo_ext
