// Noise into memory.
#include "kernels.h"
#include "normals.h"
#include "tile.h"

namespace elbo_ext {
namespace {

template <class R>
void run_noise(NoiseKind kind, int64_t seed, int64_t first, int64_t count, R* out) {
  NoiseBuffer<R, kTile> buffer;
  for (int64_t done = 0; done < count; done += kTile) {
    const int64_t n = std::min(kTile, count - done);
    const R* const noise = kind == NoiseKind::kGumbel ? buffer.fill_gumbel(seed, first + done, n)
                                                      : buffer.fill(seed, first + done, n);
    std::memcpy(out + done, noise, n * sizeof(R));
  }
}

}  // namespace

namespace CPU_CAPABILITY {

void noise(NoiseKind kind, int64_t seed, int64_t first, int64_t count, DType dtype, void* out) {
  dtype == DType::kDouble ? run_noise(kind, seed, first, count, static_cast<double*>(out))
                          : run_noise(kind, seed, first, count, static_cast<float*>(out));
}

}  // namespace CPU_CAPABILITY
}  // namespace elbo_ext
