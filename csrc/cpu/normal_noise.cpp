// Normal noise into memory.
#include "kernels.h"
#include "normals.h"
#include "tile.h"

namespace elbo_ext {
namespace {

template <class R>
void run_noise(int64_t seed, int64_t first, int64_t count, R* out) {
  NormalBuffer<R, kTile> normals;
  for (int64_t done = 0; done < count; done += kTile) {
    const int64_t n = std::min(kTile, count - done);
    std::memcpy(out + done, normals.fill(seed, first + done, n), n * sizeof(R));
  }
}

}  // namespace

namespace CPU_CAPABILITY {

void normal_noise(int64_t seed, int64_t first, int64_t count, DType dtype, void* out) {
  dtype == DType::kDouble ? run_noise(seed, first, count, static_cast<double*>(out))
                          : run_noise(seed, first, count, static_cast<float*>(out));
}

}  // namespace CPU_CAPABILITY
}  // namespace elbo_ext
