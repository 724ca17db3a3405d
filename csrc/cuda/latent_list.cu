// The latent stage of many tensors, such as the weights of a network, by one kernel: where they are contiguous and of one dtype,
// float32 or bfloat16, with one sample of each, numbers for priors, and one KL in all.
#include "entries.h"
#include "latent.cuh"

namespace elbo_ext {
namespace {

using R = float;
constexpr int kWidth = kGroup<R>;
using T = Pack<R, kWidth>;

// One of the tensors. It takes kPiece elements of a block at a time, which are units of the kernel's work.
constexpr int kPiece = 4 * kThreads * kWidth;
struct Listed {
  char *mu, *scale, *z;  // backward: the gradient of z, or null
  int64_t size;
  int64_t seed;  // or its address
  double constant[kLatentInputs];  // the floor of the scale, and the prior
  int first_unit;
};
struct ListedBackward : Listed {
  char *mu_gradient, *scale_gradient;  // null: not wanted
};

template <class OneTensor>
struct ListParams {
  OneTensor tensor[kMostListed];
  int count, units, forms;
  bool seeds_on_host;
  SumPlan<1> kl;
  Array upstream;  // of the KL: one number, or absent
  double upstream_factor;
};

template <class OneTensor>
__device__ __forceinline__ uint64_t seed_of(const ListParams<OneTensor>& p, const OneTensor& tensor) {
  return static_cast<uint64_t>(p.seeds_on_host ? tensor.seed : __ldg(reinterpret_cast<const int64_t*>(tensor.seed)));
}

// Calls body(tensor, first, end) for the pieces of this block.
template <class OneTensor, class Body>
__device__ __forceinline__ void for_each_piece(const ListParams<OneTensor>& p, Body&& body) {
  int k = 0;
  for (int unit = static_cast<int>(blockIdx.x); unit < p.units; unit += static_cast<int>(gridDim.x)) {
    while (k + 1 < p.count && p.tensor[k + 1].first_unit <= unit) ++k;
    const OneTensor& tensor = p.tensor[k];
    const int64_t first = static_cast<int64_t>(unit - tensor.first_unit) * kPiece;
    body(tensor, first, minimum(first + kPiece, tensor.size));
  }
}

// Calls body(group, mask) for the groups of this thread in [first, end). A group is whole but for the last one of a tensor.
template <class Body>
__device__ __forceinline__ void for_each_group(int64_t first, int64_t end, Body&& body) {
  for (int64_t n = first + static_cast<int64_t>(threadIdx.x) * kWidth; n < end; n += kThreads * kWidth)
    body(n, AnyGroup<R, kWidth, 1>::members(n, n, end));
}

// A group of a contiguous tensor, `otherwise` outside of the mask.
template <DType dtype>
__device__ __forceinline__ T read_group(char* data, int64_t group, unsigned mask, R otherwise) {
  const Array array{data, dtype};
  T numbers(otherwise);
  if (mask == kAllMembers<kWidth>) {
    convert<R, kWidth>(load<R, kWidth>(array, group), dtype, numbers.x);
  } else {
    ELBO_UNROLL
    for (int i = 0; i < kWidth; ++i)
      if (mask >> i & 1) numbers.x[i] = read<R>(array, group + i);
  }
  return numbers;
}
template <DType dtype>
__device__ __forceinline__ void store_group(char* data, int64_t group, unsigned mask, const T& numbers) {
  const Array array{data, dtype};
  if (mask == kAllMembers<kWidth>) {
    store_vector<R, kWidth>(array, group, numbers.x);
  } else {
    ELBO_UNROLL
    for (int i = 0; i < kWidth; ++i)
      if (mask >> i & 1) store_vector<R, 1>(array, group + i, numbers.x + i);
  }
}

// What all groups of a tensor have in common: the form of its scale, its prior, its seed. `in` has room for mu and the scale.
struct Common {
  ScaleForm<R> form;
  T in[kLatentInputs];
  typename GaussianKL<T>::Precomputed prior;
  uint64_t seed;

  template <class OneTensor>
  __device__ __forceinline__ Common(const ListParams<OneTensor>& p, const OneTensor& tensor)
      : form(Forms{p.forms, tensor.constant}, kScale), seed(seed_of(p, tensor)) {
    in[kPriorMu] = T(static_cast<R>(tensor.constant[kPriorMu]));
    in[kPriorScale] = T(static_cast<R>(tensor.constant[kPriorScale]));
    prior = GaussianKL<T>::precompute(in, Forms{p.forms, tensor.constant});
  }
};

constexpr int kListBlocks = 3;  // that a multiprocessor holds

template <DType dtype, bool kWithKL>
__global__ void __launch_bounds__(kThreads, kListBlocks) latent_list_kernel(const __grid_constant__ ListParams<Listed> p) {
  double sum[1] = {};
  for_each_piece(p, [&](const Listed& tensor, int64_t first, int64_t end) {
    Common common(p, tensor);
    for_each_group(first, end, [&](int64_t n, unsigned mask) {
      common.in[kMu] = read_group<dtype>(tensor.mu, n, mask, R(0));
      common.in[kScale] = read_group<dtype>(tensor.scale, n, mask, R(1));
      if constexpr (kWithKL) {
        T kl = GaussianKL<T>::value(common.prior, common.in);
        ELBO_UNROLL
        for (int i = 0; i < kWidth; ++i) kl.x[i] = mask >> i & 1 ? kl.x[i] : R(0);
        sum[0] += static_cast<double>(sum_of(kl));
      }
      T eps;
      whole_group(common.seed, static_cast<uint64_t>(n) / kWidth, eps.x);
      store_group<dtype>(tensor.z, n, mask, standard_deviation(common.form, common.in[kScale]) * eps + common.in[kMu]);
    });
  });
  if constexpr (kWithKL) total_sums<1u>(p.kl, sum);
}

template <DType dtype, bool kWithKL>
__global__ void __launch_bounds__(kThreads, kListBlocks) latent_list_backward_kernel(
    const __grid_constant__ ListParams<ListedBackward> p) {
  const T upstream(p.upstream.data == nullptr ? R(0) : static_cast<R>(read<double>(p.upstream, 0) * p.upstream_factor));
  for_each_piece(p, [&](const ListedBackward& tensor, int64_t first, int64_t end) {
    Common common(p, tensor);
    for_each_group(first, end, [&](int64_t n, unsigned mask) {
      common.in[kScale] = read_group<dtype>(tensor.scale, n, mask, R(1));
      T d[kLatentInputs] = {T(R(0)), T(R(0)), T(R(0)), T(R(0))};
      if constexpr (kWithKL) {
        common.in[kMu] = read_group<dtype>(tensor.mu, n, mask, R(0));
        GaussianKL<T>::gradient(common.prior, common.in, d);
        d[kMu] = d[kMu] * upstream;
        d[kScale] = d[kScale] * upstream;
      }
      if (tensor.z != nullptr) {
        const T g = read_group<dtype>(tensor.z, n, mask, R(0));
        T eps;
        whole_group(common.seed, static_cast<uint64_t>(n) / kWidth, eps.x);
        add_samples(common.form, common.in[kScale], g, g * eps, d);
      }
      if (tensor.mu_gradient != nullptr) store_group<dtype>(tensor.mu_gradient, n, mask, d[kMu]);
      if (tensor.scale_gradient != nullptr) store_group<dtype>(tensor.scale_gradient, n, mask, d[kScale]);
    });
  });
}

// ---- on the host ----

bool fits(const View& view, DType dtype) {
  return view.rows_dense && view.dtype == dtype && aligned(view.data, dtype, kWidth);
}

bool fits(const LatentProblem& p, bool backward, DType dtype) {
  bool all = !p.compute_double && p.samples == 1 && p.seed != nullptr && p.kl.row == nullptr;
  for (const Slot slot : {kMu, kScale}) {
    const GradientSink& sink = p.gradient[slot];
    all = all && p.input[slot].present() && fits(p.input[slot], dtype) && (!sink.wanted() || (!sink.summed && fits(sink, dtype)));
  }
  for (const Slot slot : {kPriorMu, kPriorScale}) all = all && !p.input[slot].present();
  if (!backward) return all && fits(p.z, dtype);
  return all && (!p.grad_z.present() || fits(p.grad_z, dtype)) &&
         (!p.with_kl || (p.upstream_kl.rows_uniform && p.upstream_kl.cols_uniform));
}

template <class OneTensor>
ListParams<OneTensor> list_of(const LatentList& list) {
  ListParams<OneTensor> params{};
  params.count = list.count;
  params.forms = list.problem[0]->forms;
  params.seeds_on_host = list.problem[0]->seed_on_host;
  for (int k = 0; k < list.count; ++k) {
    const LatentProblem& p = *list.problem[k];
    OneTensor& tensor = params.tensor[k];
    tensor.mu = as_bytes(p.input[kMu].data);
    tensor.scale = as_bytes(p.input[kScale].data);
    tensor.z = as_bytes(list.backward ? p.grad_z.data : p.z.data);
    tensor.size = p.space.elements();
    tensor.seed = p.seed_on_host ? *p.seed : reinterpret_cast<int64_t>(p.seed);
    for (int slot = 0; slot < kLatentInputs; ++slot) tensor.constant[slot] = p.input[slot].constant;
    tensor.first_unit = params.units;
    params.units += static_cast<int>(divide_up(tensor.size, kPiece));
    if constexpr (std::is_same_v<OneTensor, ListedBackward>) {
      tensor.mu_gradient = as_bytes(p.gradient[kMu].data);
      tensor.scale_gradient = as_bytes(p.gradient[kScale].data);
    }
  }
  return params;
}

int64_t blocks_for(int units, const CudaCall& call) {
  return std::clamp<int64_t>(units, 1, static_cast<int64_t>(multiprocessors(call.device)) * kListBlocks);
}

template <DType dtype>
const char* run_forward(const LatentList& list, const CudaCall& call) {
  ListParams<Listed> params = list_of<Listed>(list);
  const int64_t blocks = blocks_for(params.units, call);
  const bool with_kl = list.kl.total != nullptr;
  if (with_kl) {
    params.kl.total(0, {as_bytes(list.kl.total), DType::kFloat}, list.kl.divisor);
    if (const char* error = prepare_totals(params.kl, blocks, call)) return error;
  }
  return launch(with_kl ? latent_list_kernel<dtype, true> : latent_list_kernel<dtype, false>,
                dim3(static_cast<unsigned>(blocks)), kThreads, params, call);
}

template <DType dtype>
const char* run_backward(const LatentList& list, const CudaCall& call) {
  ListParams<ListedBackward> params = list_of<ListedBackward>(list);
  const LatentProblem& first = *list.problem[0];
  params.upstream = array_of(first.upstream_kl);
  params.upstream_factor = first.upstream_kl.factor;
  return launch(first.with_kl ? latent_list_backward_kernel<dtype, true> : latent_list_backward_kernel<dtype, false>,
                dim3(static_cast<unsigned>(blocks_for(params.units, call))), kThreads, params, call);
}

template <DType dtype>
const char* run(const LatentList& list, const CudaCall& call) {
  return list.backward ? run_backward<dtype>(list, call) : run_forward<dtype>(list, call);
}

}  // namespace

bool lists(const LatentList& list) {
  const DType dtype = list.problem[0]->input[kMu].dtype;
  if (dtype != DType::kFloat && dtype != DType::kBFloat16) return false;
  return std::all_of(list.problem, list.problem + list.count,
                     [&](const LatentProblem* p) { return fits(*p, list.backward, dtype); });
}

const char* latent_list(const LatentList& list, const CudaCall& call) {
  return list.problem[0]->input[kMu].dtype == DType::kFloat ? run<DType::kFloat>(list, call)
                                                            : run<DType::kBFloat16>(list, call);
}

}  // namespace elbo_ext
