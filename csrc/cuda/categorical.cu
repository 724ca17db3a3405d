// Terms over a dimension: a team of threads for each row, which goes through its classes in sweeps. After the first one they
// come from the caches. The formulas: terms/categorical.h.
#include "entries.h"
#include "noise.cuh"
#include "plan.h"

#include "../terms/categorical.h"

namespace elbo_ext {
namespace {

enum ClassSlot {
  kInput0,
  kInput1,
  kWeight,
  kUpstream,
  kGradZ,
  kGradient0,
  kGradient1,
  kWeightGradient,
  kNoise,
  kZ,
  kClassSlots
};

struct ClassParams {
  Layout<kClassSlots> layout;  // of the rows
  int64_t class_stride[kClassSlots];
  double constant[kClassInputs];
  double upstream, upstream_factor;  // upstream: what stands for it where there is none
  int64_t rows, classes;
  void* row_value;
  // of samples
  int64_t samples, noise_sample_stride, z_sample_stride;
  const int64_t* seed;
  int64_t seed_on_host;

  __device__ __forceinline__ bool present(int slot) const { return layout.place[slot] != kAbsent; }
  __device__ __forceinline__ int64_t offset(int slot, int64_t row) const {
    return layout.place[slot] == kUniform ? 0 : layout.offset(slot, row);
  }
  template <class R>
  __device__ __forceinline__ R number(int slot, int64_t row, R otherwise) const {
    return present(slot) ? read<R>(layout.array[slot], offset(slot, row)) : otherwise;
  }
};

// ---- teams ----

template <class Combine>
__device__ __forceinline__ double over_warp(double number, Combine&& combine) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    number = combine(number, __shfl_xor_sync(kAllLanes, number, distance));
  return number;
}

// Combines the numbers of a team, 1, 32 or all threads of a block, for all of them.
template <int kTeam, class Combine>
__device__ __forceinline__ double over_team(double number, Combine&& combine) {
  if constexpr (kTeam == 1) return number;
  number = over_warp(number, combine);
  if constexpr (kTeam == kThreads) {
    __shared__ double per_warp[kThreads / kWarp];
    __syncthreads();  // the numbers before these have been read
    if (threadIdx.x % kWarp == 0) per_warp[threadIdx.x / kWarp] = number;
    __syncthreads();
    number = per_warp[0];
    ELBO_UNROLL
    for (int warp = 1; warp < kThreads / kWarp; ++warp) number = combine(number, per_warp[warp]);
  }
  return number;
}

// Calls body(row) for the rows of this thread's team, all of whose threads call it.
template <int kTeam, class Body>
__device__ __forceinline__ void for_each_row(int64_t rows, Body&& body) {
  const int64_t teams = static_cast<int64_t>(gridDim.x) * (kThreads / kTeam);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kTeam) + threadIdx.x / kTeam; row < rows; row += teams)
    body(row);
}

// ---- a row ----

// The operands of a row. kPlain: all are of the compute type, and their classes lie together.
template <class R, bool kPlain>
struct RowOfClasses {
  const ClassParams& p;
  bool labels;    // input 0 is 1 for the class `label`, and 0 for the others
  int64_t label;
  int64_t first[kClassInputs];

  __device__ __forceinline__ RowOfClasses(const ClassParams& p, bool labels, int64_t row) : p(p), labels(labels), label(-1) {
    ELBO_UNROLL
    for (int k = 0; k < kClassInputs; ++k) first[k] = p.present(k) ? p.offset(k, row) : 0;
    if (labels) label = read_integer(p.layout.array[0], first[0]);
  }
  static __device__ __forceinline__ R at(const ClassParams& p, int slot, int64_t row_offset, int64_t c) {
    if constexpr (kPlain) return reinterpret_cast<const R*>(p.layout.array[slot].data)[row_offset + c];
    else return read<R>(p.layout.array[slot], row_offset + c * p.class_stride[slot]);
  }
  __device__ __forceinline__ R input(int k, int64_t c) const {
    if (k == 0 && labels) return c == label ? R(1) : R(0);
    return p.present(k) ? at(p, k, first[k], c) : static_cast<R>(p.constant[k]);
  }
  __device__ __forceinline__ void inputs(int64_t c, R (&in)[kClassInputs]) const {
    in[0] = input(0, c);
    in[1] = input(1, c);
  }
};

template <class R, int kTeam, bool kPlain>
__device__ __forceinline__ R largest_of(const RowOfClasses<R, kPlain>& row, int k) {
  if (!row.p.present(k)) return static_cast<R>(row.p.constant[k]);
  R most = -std::numeric_limits<R>::infinity();
  for (int64_t c = threadIdx.x % kTeam; c < row.p.classes; c += kTeam) most = larger(row.input(k, c), most);
  return static_cast<R>(over_team<kTeam>(static_cast<double>(most), [](double a, double b) { return larger(a, b); }));
}

// Sums in the compute type end after so many classes of a thread, and go on in double.
constexpr int kClassesPerSum = 32;

template <int kSums, int kTeam, class R, bool kPlain, class Add>
__device__ __forceinline__ void sum_classes(const RowOfClasses<R, kPlain>& row, R (&result)[kSums], Add&& add) {
  double total[kSums] = {};
  for (int64_t begin = threadIdx.x % kTeam; begin < row.p.classes; begin += kTeam * kClassesPerSum) {
    R sum[kSums] = {};
    const int64_t end = minimum(begin + kTeam * kClassesPerSum, row.p.classes);
    for (int64_t c = begin; c < end; c += kTeam) {
      R in[kClassInputs];
      row.inputs(c, in);
      add(in, c, sum);
    }
    ELBO_UNROLL
    for (int k = 0; k < kSums; ++k) total[k] += static_cast<double>(sum[k]);
  }
  ELBO_UNROLL
  for (int k = 0; k < kSums; ++k)
    result[k] = static_cast<R>(over_team<kTeam>(total[k], [](double a, double b) { return a + b; }));
}

// The term of a row, as far as its sums tell it.
template <class Term, int kTeam, class R, bool kPlain>
__device__ __forceinline__ Term learn(const RowOfClasses<R, kPlain>& row) {
  Term term(ClassConstants{row.p.constant[0], static_cast<double>(row.p.classes)});
  R largest[kClassInputs] = {R(0), R(0)};
  ELBO_UNROLL
  for (int k = 0; k < kClassInputs; ++k)
    if (Term::kSoftmax >> k & 1) largest[k] = largest_of<R, kTeam>(row, k);
  term.given_largest(largest);
  if constexpr (Term::kLabels)
    term.given_own(row.label >= 0 && row.label < row.p.classes ? RowOfClasses<R, kPlain>::at(row.p, 1, row.first[1], row.label)
                                                               : R(0));
  R sum[Term::kSums];
  sum_classes<Term::kSums, kTeam>(row, sum, [&](const R(&in)[kClassInputs], int64_t, R(&to)[Term::kSums]) {
    term.template add<0>(in, to);
  });
  term.template given_sums<0>(sum);
  if constexpr (Term::kSweeps == 2) {
    sum_classes<Term::kSums, kTeam>(row, sum, [&](const R(&in)[kClassInputs], int64_t, R(&to)[Term::kSums]) {
      term.template add<1>(in, to);
    });
    term.template given_sums<1>(sum);
  }
  return term;
}

// Blocks of a multiprocessor; for more the kernels in double have not the registers.
template <class R>
constexpr int kResidentBlocks = std::is_same_v<R, double> ? 2 : 3;

// ---- values and gradients ----

template <template <class> class TermOf, class R, int kTeam, bool kPlain>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<R>) categorical_kernel(const __grid_constant__ ClassParams p) {
  using Term = TermOf<R>;
  const int lane = threadIdx.x % kTeam;
  for_each_row<kTeam>(p.rows, [&](int64_t at) {
    const RowOfClasses<R, kPlain> row(p, Term::kLabels, at);
    const bool left_out = Term::kLabels && row.label == static_cast<int64_t>(p.constant[0]);
    const bool outside = Term::kLabels && (row.label < 0 || row.label >= p.classes);
    const R weight = p.number(kWeight, at, R(1)), zero = R(0);
    const Term term = learn<Term, kTeam>(row);
    const R value = left_out ? zero : outside ? -std::numeric_limits<R>::infinity()
                                              : term.value();
    if (lane == 0 && p.row_value != nullptr)
      static_cast<R*>(p.row_value)[at] = weight == zero ? zero : weight * value;

    const bool inputs_wanted = p.present(kGradient0) || p.present(kGradient1);
    if (!inputs_wanted && !p.present(kWeightGradient)) return;
    const R upstream = p.present(kUpstream)
                           ? static_cast<R>(read<double>(p.layout.array[kUpstream], p.offset(kUpstream, at)) * p.upstream_factor)
                           : static_cast<R>(p.upstream);
    if (lane == 0 && p.present(kWeightGradient)) {
      // The term; but 0 where it is left out and no number.
      const bool number = abs(value) <= std::numeric_limits<R>::max();
      const R of_value = weight == zero && !number ? zero : upstream * value;
      store_vector<R, 1>(p.layout.array[kWeightGradient], p.offset(kWeightGradient, at), &of_value);
    }
    if (!inputs_wanted) return;
    const bool nothing = left_out || outside || weight == zero;
    const R factor = upstream * weight;
    R mean_of_z[1] = {zero};
    int64_t z_offset = 0;
    if constexpr (Term::kSoftmax & 1) {
      if (p.present(kGradZ)) {  // of the probabilities: d p_c / d l_k = (1 - u) s_c ([c = k] - s_k)
        z_offset = p.offset(kGradZ, at);
        sum_classes<1, kTeam>(row, mean_of_z, [&](const R(&in)[kClassInputs], int64_t c, R(&to)[1]) {
          to[0] += exp(in[0] - term.largest[0]) * term.over_sum[0] * RowOfClasses<R, kPlain>::at(p, kGradZ, z_offset, c);
        });
      }
    }
    const int64_t to[kClassInputs] = {p.present(kGradient0) ? p.offset(kGradient0, at) : 0,
                                      p.present(kGradient1) ? p.offset(kGradient1, at) : 0};
    for (int64_t c = lane; c < p.classes; c += kTeam) {
      R in[kClassInputs], d[kClassInputs] = {zero, zero};
      row.inputs(c, in);
      if (!nothing) {
        term.gradient(in, d);
        d[0] *= factor;
        d[1] *= factor;
      }
      if constexpr (Term::kSoftmax & 1) {
        if (p.present(kGradZ))
          d[0] += term.kept * (exp(in[0] - term.largest[0]) * term.over_sum[0] *
                               (RowOfClasses<R, kPlain>::at(p, kGradZ, z_offset, c) - mean_of_z[0]));
      }
      ELBO_UNROLL
      for (int k = 0; k < kClassInputs; ++k) {
        const int slot = kGradient0 + k;
        if (!p.present(slot)) continue;
        if constexpr (kPlain) reinterpret_cast<R*>(p.layout.array[slot].data)[to[k] + c] = d[k];
        else store_vector<R, 1>(p.layout.array[slot], to[k] + c * p.class_stride[slot], d + k);
      }
    }
  });
}

// ---- samples ----

__device__ __forceinline__ uint32_t word_of(uint64_t seed, uint64_t number) {
  uint32_t word[4];
  random_words(seed, number / kNormalsPerCounter, word);
  const int place = static_cast<int>(number % kNormalsPerCounter);
  const uint32_t low = place == 0 ? word[0] : word[1], high = place == 2 ? word[2] : word[3];
  return place < 2 ? low : high;
}

// The class of the largest log-probability with Gumbel noise is a draw of it (Gumbel 1954; Maddison, Tarlow & Minka 2014).
template <class R, int kTeam>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<R>) categorical_sample_kernel(const __grid_constant__ ClassParams p) {
  using Term = CategoricalKL<R>;
  const uint64_t seed = p.seed == nullptr ? 0 : static_cast<uint64_t>(p.seed_on_host ? reinterpret_cast<int64_t>(p.seed) : *p.seed);
  const bool mixed = p.constant[0] > 0.0;
  for_each_row<kTeam>(p.rows, [&](int64_t at) {
    const RowOfClasses<R, false> row(p, false, at);
    R largest[kClassInputs] = {largest_of<R, kTeam>(row, 0), R(0)};
    Term term(ClassConstants{p.constant[0], static_cast<double>(p.classes)});
    term.given_largest(largest);
    R over_sum = R(0);
    if (mixed) {
      R sum[1];
      sum_classes<1, kTeam>(row, sum, [&](const R(&in)[kClassInputs], int64_t, R(&to)[1]) {
        to[0] += exp(in[0] - term.largest[0]);
      });
      over_sum = R(1) / sum[0];
    }
    for (int64_t sample = 0; sample < p.samples; ++sample) {
      const int64_t noise = p.present(kNoise) ? sample * p.noise_sample_stride + p.offset(kNoise, at) : 0;
      R most = -std::numeric_limits<R>::infinity();
      int64_t drawn = p.classes;
      for (int64_t c = threadIdx.x % kTeam; c < p.classes; c += kTeam) {
        R score = row.input(0, c) - largest[0];
        if (mixed) score = log(term.kept * (exp(row.input(0, c) - term.largest[0]) * over_sum) + term.uniform);
        score += p.present(kNoise)
                     ? read<R>(p.layout.array[kNoise], noise + c * p.class_stride[kNoise])
                     : gumbel<R>(word_of(seed, static_cast<uint64_t>((sample * p.rows + at) * p.classes + c)));
        if (score > most) {
          most = score;
          drawn = c;
        }
      }
      const double best = over_team<kTeam>(static_cast<double>(most), [](double a, double b) { return larger(a, b); });
      const double own = static_cast<double>(most) == best ? static_cast<double>(drawn) : static_cast<double>(p.classes);
      int64_t first = static_cast<int64_t>(over_team<kTeam>(own, [](double a, double b) { return minimum(a, b); }));
      if (first == p.classes) first = 0;  // no score is a number
      if (threadIdx.x % kTeam == 0)
        write(p.layout.array[kZ], sample * p.z_sample_stride + p.offset(kZ, at) + first * p.class_stride[kZ], 1.0);
    }
  });
}

// ---- on the host ----

// Classes of a row for a whole block, and for a warp; fewer, or classes that do not lie together while rows do, take a thread.
constexpr int64_t kBlockRow = 2048, kWarpRow = 8;

int team_for(const CategoricalProblem& p, const ClassOperand& logits) {
  const bool rows_together = logits.class_stride != 1 && p.space.row_dims > 0 && logits.row_stride[p.space.row_dims - 1] == 1;
  if (p.classes < kWarpRow || (rows_together && p.space.rows >= kThreads)) return 1;
  return p.classes >= kBlockRow ? kThreads : kWarp;
}

template <class R>
const char* launch_rows(void (*kernel)(ClassParams), int team, const ClassParams& params, const CudaCall& call) {
  const int64_t most = static_cast<int64_t>(multiprocessors(call.device)) * kBlocksPerMultiprocessor;
  const int64_t blocks = std::clamp<int64_t>(divide_up(params.rows * team, kThreads), 1, most);
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), kThreads, params, call);
}

template <template <class> class TermOf, class R>
const char* run_rows(const ClassParams& params, int team, bool plain, const CudaCall& call) {
  void (*kernel)(ClassParams);
  switch (team) {
    case 1: kernel = categorical_kernel<TermOf, R, 1, false>; break;
    case kWarp: kernel = plain ? categorical_kernel<TermOf, R, kWarp, true> : categorical_kernel<TermOf, R, kWarp, false>; break;
    default:
      kernel = plain ? categorical_kernel<TermOf, R, kThreads, true> : categorical_kernel<TermOf, R, kThreads, false>;
  }
  return launch_rows<R>(kernel, team, params, call);
}

template <class R>
const char* run(const CategoricalProblem& p, const CudaCall& call) {
  ClassParams params{};
  const Dimensions dims(p.space);
  LayoutBuilder<kClassSlots> builder(params.layout, dims, /*segment=*/1, /*group=*/1, p.compute_double);
  constexpr DType kCompute = std::is_same_v<R, double> ? DType::kDouble : DType::kFloat;
  bool plain = true;
  const auto add = [&](int slot, const auto& view, bool written, int64_t sample_stride = 0) {
    builder.set(slot, view, written, sample_stride);
    if constexpr (requires { view.class_stride; }) {
      params.class_stride[slot] = view.class_stride;
      const bool one_number = slot == kWeight || slot == kWeightGradient || (p.operand[0].present() && slot == kInput0 && p.term == 32);
      plain = plain && (view.data == nullptr || one_number || (view.dtype == kCompute && view.class_stride == 1));
    }
  };
  add(kInput0, p.operand[0], false);
  add(kInput1, p.operand[1], false);
  add(kWeight, p.operand[2], false);
  add(kUpstream, p.upstream, false);
  add(kGradZ, p.grad_z, false);
  add(kGradient0, p.gradient[0], true);
  add(kGradient1, p.gradient[1], true);
  add(kWeightGradient, p.gradient[2], true);
  for (int k = 0; k < kClassInputs; ++k) params.constant[k] = p.operand[k].constant;
  params.upstream = p.upstream.constant;
  params.upstream_factor = p.upstream.factor;
  params.rows = p.space.rows;
  params.classes = p.classes;
  params.row_value = p.row_value;
  const int team = team_for(p, p.operand[p.operand[0].class_stride == 0 ? 1 : 0]);
  if (p.row_value != nullptr || p.wants_gradient) {
    const char* error = "there is no such term";
    switch (p.term) {
#define ELBO_CLASS_TERM_CASE(number, Term, name) \
  case number: error = run_rows<Term, R>(params, team, plain, call); break;
      ELBO_FOR_EACH_CLASS_TERM(ELBO_CLASS_TERM_CASE)
#undef ELBO_CLASS_TERM_CASE
    }
    if (error != nullptr) return error;
  }
  if (p.samples == 0) return nullptr;
  add(kNoise, p.noise, false, p.noise_sample_stride);
  add(kZ, p.z, true, p.z_sample_stride);
  params.samples = p.samples;
  params.noise_sample_stride = p.noise_sample_stride;
  params.z_sample_stride = p.z_sample_stride;
  params.seed = p.seed_on_host ? reinterpret_cast<const int64_t*>(*p.seed) : p.seed;
  params.seed_on_host = p.seed_on_host ? 1 : 0;
  return launch_rows<R>(team == 1       ? categorical_sample_kernel<R, 1>
                        : team == kWarp ? categorical_sample_kernel<R, kWarp>
                                        : categorical_sample_kernel<R, kThreads>,
                        team, params, call);
}

}  // namespace

template <>
const char* categorical<ELBO_REAL>(const CategoricalProblem& p, const CudaCall& call) {
  return run<ELBO_REAL>(p, call);
}

}  // namespace elbo_ext
