// Random words as a pure function of a counter and a key.
// Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <cstdint>

#include "macros.h"

namespace elbo_ext {
namespace {

// high and low half of the 64-bit product; vector types of 32-bit words bring an overload of their own.
ELBO_INLINE void multiply_wide(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
  const uint64_t product = static_cast<uint64_t>(a) * b;
  high = static_cast<uint32_t>(product >> 32);
  low = static_cast<uint32_t>(product);
}

// Philox4x32-10: the counter (four 32-bit words) is replaced by the random words. Word is uint32_t or a vector of them.
template <class Word>
ELBO_INLINE void philox4x32_10(Word (&counter)[4], uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  ELBO_UNROLL
  for (int round = 0; round < 10; ++round) {
    Word high0, low0, high2, low2;
    multiply_wide(counter[0], 0xD2511F53u, high0, low0);
    multiply_wide(counter[2], 0xCD9E8D57u, high2, low2);
    counter[0] = high2 ^ counter[1] ^ key0;
    counter[1] = low2;
    counter[2] = high0 ^ counter[3] ^ key1;
    counter[3] = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

}  // namespace
}  // namespace elbo_ext
