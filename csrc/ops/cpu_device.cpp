// Problems on the CPU: cut into blocks, spread over torch's threads, their partial sums added up in order.
#include "device.h"

#include <algorithm>
#include <deque>
#include <memory>
#include <span>

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../cpu/dispatch.h"
#include "../terms/sample.h"

namespace elbo_ext {
namespace {

// Fewer elements than this are not worth waking another thread for. Making noise takes some ten times the time of a
// term.
constexpr int64_t kLeastElements = 65536, kLeastDraws = 8192;

// The buffers of a group's summed gradients together may take this part of what the operands of the space take, and no
// more groups than the second number are ever needed to keep the threads busy.
constexpr int64_t kElementsPerPartial = 32, kMostGroups = 64;

// ---- numbers in memory ----

// Calls call(pointer) with data as what it is.
template <class Call>
auto with_data(void* data, DType dtype, Call&& call) {
  switch (dtype) {
    case DType::kFloat: return call(static_cast<float*>(data));
    case DType::kDouble: return call(static_cast<double*>(data));
    case DType::kBFloat16: return call(static_cast<torch::headeronly::BFloat16*>(data));
    case DType::kHalf: return call(static_cast<torch::headeronly::Half*>(data));
    default: return call(static_cast<bool*>(data));
  }
}

double read(const void* data, DType dtype, int64_t index = 0) {
  return with_data(const_cast<void*>(data), dtype, [=](auto* numbers) { return static_cast<double>(numbers[index]); });
}
void write(void* data, DType dtype, int64_t index, double number) {
  with_data(data, dtype, [=](auto* numbers) {
    using S = std::remove_reference_t<decltype(*numbers)>;
    if constexpr (std::is_same_v<S, double>) numbers[index] = number;
    else numbers[index] = static_cast<S>(static_cast<float>(number));
  });
}
// By halves: a running sum of many numbers that are alike would round them all one way.
template <class S>
double sum_by_halves(const S* numbers, int64_t count) {
  if (count > 8) return sum_by_halves(numbers, count / 2) + sum_by_halves(numbers + count / 2, count - count / 2);
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(numbers[i]);
  return sum;
}
double sum_of(const void* data, DType dtype, int64_t count) {
  return with_data(const_cast<void*>(data), dtype, [=](auto* numbers) { return sum_by_halves(numbers, count); });
}

// ---- blocks and threads ----

// `max_groups` bounds the number of groups, 0 leaves one block a group.
Blocks make_blocks(const Space& space, int64_t max_groups) {
  Blocks blocks;
  if (space.rows == 0 || space.cols == 0) return blocks;
  if (space.cols >= kBlockElements) {
    blocks.blocks_per_row = (space.cols + kBlockElements - 1) / kBlockElements;
    blocks.count = space.rows * blocks.blocks_per_row;
  } else {
    blocks.rows_per_block = kBlockElements / space.cols;
    blocks.count = (space.rows + blocks.rows_per_block - 1) / blocks.rows_per_block;
  }
  const int64_t most = max_groups > 0 ? std::min(max_groups, blocks.count) : blocks.count;
  blocks.per_group = (blocks.count + most - 1) / most;
  blocks.groups = (blocks.count + blocks.per_group - 1) / blocks.per_group;
  return blocks;
}

// Runs kernel(problem, begin, end) over all groups of all problems, whose blocks are set, on as many threads as pay off: each
// gets at least `least_elements`.
template <class Problem, class Kernel>
void run_parallel(const std::vector<Problem*>& problems, int64_t elements, int64_t least_elements, const Kernel& kernel) {
  int64_t groups = 0;
  for (const Problem* problem : problems) groups += problem->blocks.groups;
  if (groups == 0) return;
  const auto run = [&](int64_t begin, int64_t end) {
    int64_t first = 0;
    for (const Problem* problem : problems) {
      const int64_t own = problem->blocks.groups;
      const int64_t from = std::max<int64_t>(begin - first, 0), to = std::min(end - first, own);
      if (from < to) kernel(*problem, from, to);
      first += own;
    }
  };
  if (elements < 2 * least_elements) return run(0, groups);
  const int64_t per_group = std::max<int64_t>(elements / groups, 1);
  const int64_t grain = std::max<int64_t>(least_elements / per_group, 1);
  torch::stable::parallel_for(0, groups, grain, run);
}

// A gradient of a whole result is one number, which the kernels take as a constant.
void read_uniform(Upstream& upstream) {
  if (!upstream.present() || !upstream.rows_uniform || !upstream.cols_uniform) return;
  upstream.constant = read(upstream.data, upstream.dtype) * upstream.factor;
  upstream.data = nullptr;
}

// ---- sums ----

// The blocks' sums of the values of one problem, and the last step to what is wanted of them.
class BlockSums {
 public:
  // Problem is a TermSumProblem or a LatentProblem whose blocks are set; `block_sum` is where its kernel puts them.
  // `in_all`: the sum over everything is wanted.
  template <class Problem>
  BlockSums(const Problem& problem, Values& values, double*& block_sum, bool in_all)
      : blocks_(problem.blocks), compute_(compute_type(problem.compute_double)) {
    if (in_all || (values.row != nullptr && blocks_.blocks_per_row > 1)) {
      row_ = values.row;
      values.row = nullptr;  // not for the kernel to write
      sums_.resize(blocks_.count);
      block_sum = sums_.data();
    }
  }

  double total() const { return sum(0, blocks_.count); }
  // Sums the blocks of each row, in order.
  void finish_rows() const {
    if (row_ == nullptr) return;
    for (int64_t row = 0; row < blocks_.count / blocks_.blocks_per_row; ++row)
      write(row_, compute_, row, sum(row * blocks_.blocks_per_row, blocks_.blocks_per_row));
  }

 private:
  double sum(int64_t first, int64_t count) const {
    double total = 0;
    for (int64_t i = 0; i < count; ++i) total += sums_[first + i];
    return total;
  }

  const Blocks& blocks_;
  DType compute_;
  void* row_ = nullptr;
  std::vector<double> sums_;
};

// The buffers of the summed gradients, and the last step of those sums.
class PartialGradients {
 public:
  explicit PartialGradients(std::span<GradientSink> sinks) {
    for (GradientSink& sink : sinks)
      if (sink.wanted() && sink.summed) sinks_.push_back(&sink);
  }

  // How many groups of blocks they allow (0: any number).
  int64_t max_groups(int64_t elements) const {
    const int64_t numel = total_numel();
    return numel == 0 ? 0 : std::clamp<int64_t>(elements / (kElementsPerPartial * numel), 1, kMostGroups);
  }

  void allocate(int64_t groups) {
    groups_ = groups;
    buffer_ = std::make_unique<double[]>(total_numel() * groups);  // zeros
    double* next = buffer_.get();
    for (GradientSink* sink : sinks_) {
      sink->partial = next;
      sink->partial_stride = sink->numel;
      next += sink->numel * groups;
    }
  }

  // Adds the groups' buffers up, in order, into the gradients.
  void finish() const {
    for (const GradientSink* sink : sinks_)
      for (int64_t i = 0; i < sink->numel; ++i) {
        double sum = 0;
        for (int64_t group = 0; group < groups_; ++group) sum += sink->partial[group * sink->numel + i];
        write(sink->data, sink->dtype, i, sum);
      }
  }

 private:
  int64_t total_numel() const {
    int64_t numel = 0;
    for (const GradientSink* sink : sinks_) numel += sink->numel;
    return numel;
  }

  std::vector<GradientSink*> sinks_;
  int64_t groups_ = 0;
  std::unique_ptr<double[]> buffer_;
};

void finish_elbo(const TermSumProblem& problem) {
  const ELBO& elbo = problem.elbo;
  if (elbo.loss == nullptr) return;
  const DType compute = compute_type(problem.compute_double);
  const double kl = sum_of(elbo.kl, elbo.kl_dtype, elbo.kl_count) * elbo.kl_factor;
  write(elbo.loss, compute, 0, elbo.beta * kl - read(problem.values.total, compute));
  write(elbo.reduced_kl, compute, 0, kl);
  if (elbo.kl_factor_out != nullptr) write(elbo.kl_factor_out, compute, 0, elbo.kl_factor);
}

// ---- the device ----

// A KL without samples takes its time as well.
int64_t work_in_draws(const LatentProblem& problem) {
  return problem.elements() + problem.space.elements() * kLeastDraws / kLeastElements;
}

// Works on memory, whatever the order of the dimensions.
template <class S, class R>
void multiply(S* data, int64_t numel, R factor) {
  torch::stable::parallel_for(0, numel, kLeastElements, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) data[i] = static_cast<S>(static_cast<R>(data[i]) * factor);
  });
}

class CpuDevice final : public Device {
 public:
  void term_sum(const Site&, TermSumProblem& problem) const override {
    read_uniform(problem.upstream);
    PartialGradients gradients(problem.gradient);
    problem.blocks = make_blocks(problem.space, gradients.max_groups(problem.space.elements()));
    gradients.allocate(problem.blocks.groups);
    const Values wanted = problem.values;
    const BlockSums sums(problem, problem.values, problem.block_sum, wanted.total != nullptr);
    run_parallel(std::vector<TermSumProblem*>{&problem}, problem.space.elements(), kLeastElements, cpu_kernels().term_sum);
    if (wanted.total != nullptr) write(wanted.total, compute_type(problem.compute_double), 0, sums.total() / wanted.divisor);
    sums.finish_rows();
    gradients.finish();
    finish_elbo(problem);
  }

  int latent(const Site&, const LatentProblems& problems) const override {
    const bool in_all = problems.kl.total != nullptr;
    std::deque<BlockSums> of_kl, of_others;  // whose elements stay where they are
    int64_t draws = 0;
    for (LatentProblem* problem : problems.each) {
      problem->blocks = make_blocks(problem->space, 0);
      of_kl.emplace_back(*problem, problem->kl, problem->block_sum, in_all);
      of_others.emplace_back(*problem, problem->log_q, problem->block_sum_q, false);
      of_others.emplace_back(*problem, problem->log_p, problem->block_sum_p, false);
      draws += work_in_draws(*problem);
    }
    const CpuKernels& kernels = cpu_kernels();
    run_parallel(problems.each, draws, kLeastDraws, [&](const LatentProblem& problem, int64_t begin, int64_t end) {
      (problem.results >= kPathwise ? kernels.sample_log_prob : kernels.latent)(problem, begin, end);
    });
    for (const std::deque<BlockSums>* all : {&of_kl, &of_others})
      for (const BlockSums& sums : *all) sums.finish_rows();
    if (!in_all) return 0;
    double total = 0;
    for (const BlockSums& sums : of_kl) total += sums.total();
    write(problems.kl.total, problems.kl_type, 0, total / problems.kl.divisor);
    return 1;
  }

  void latent_backward(const Site&, const std::vector<LatentProblem*>& problems) const override {
    std::deque<PartialGradients> gradients;
    int64_t draws = 0;
    for (LatentProblem* problem : problems) {
      read_uniform(problem->upstream_kl);
      PartialGradients& partial = gradients.emplace_back(problem->gradient);
      problem->blocks = make_blocks(problem->space, partial.max_groups(problem->space.elements()));
      partial.allocate(problem->blocks.groups);
      draws += work_in_draws(*problem);
    }
    const CpuKernels& kernels = cpu_kernels();
    run_parallel(problems, draws, kLeastDraws, [&](const LatentProblem& problem, int64_t begin, int64_t end) {
      (problem.with_log_prob ? kernels.sample_log_prob_backward : kernels.latent_backward)(problem, begin, end);
    });
    for (const PartialGradients& partial : gradients) partial.finish();
  }

  void categorical(const Site&, CategoricalProblem& problem) const override {
    read_uniform(problem.upstream);
    const int64_t work = problem.samples > 0 ? kLeastDraws : kLeastElements / 4;  // exponentials, and noise
    const int64_t rows = problem.space.rows, grain = std::max<int64_t>(work / problem.classes, 1);
    const auto run = [&](int64_t begin, int64_t end) { cpu_kernels().categorical(problem, begin, end); };
    if (rows < 2 * grain) return run(0, rows);
    torch::stable::parallel_for(0, rows, grain, run);
  }

  void fold(const Site&, const FoldProblem& problem) const override {
    const DType dtype = compute_type(problem.compute_double);
    const int64_t width = bytes_of(dtype);
    // Blocks that depend on the shape alone, so that the sum is the same for any number of threads.
    const int64_t per_sum = std::max<int64_t>((problem.length + kBlockElements - 1) / kBlockElements, 1);
    std::vector<double> sums(problem.count * per_sum);
    const int64_t grain = std::max<int64_t>(kLeastElements / std::clamp<int64_t>(problem.length, 1, kBlockElements), 1);
    torch::stable::parallel_for(0, problem.count * per_sum, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % per_sum * kBlockElements, count = std::min(kBlockElements, problem.length - first);
        sums[i] = sum_of(static_cast<const char*>(problem.numbers) + (i / per_sum * problem.length + first) * width, dtype, count);
      }
    });
    for (int64_t i = 0; i < problem.count; ++i) {
      double sum = 0;
      for (int64_t k = 0; k < per_sum; ++k) sum += sums[i * per_sum + k];
      write(problem.out, dtype, i, sum / problem.divisor);
    }
  }

  void noise(const Site&, NoiseKind kind, const Tensor& seed, int64_t first, const Tensor& out) const override {
    const int64_t* seeds = static_cast<const int64_t*>(seed.data_ptr());
    const DType dtype = dtype_of(out);
    const int64_t count = out.size(1), row_bytes = count * (dtype == DType::kDouble ? 8 : 4);
    for (int64_t row = 0; row < out.size(0); ++row)
      cpu_kernels().noise(kind, seeds[row], first, count, dtype, static_cast<char*>(out.data_ptr()) + row * row_bytes);
  }

  void importance(const Site&, const ImportanceProblem& problem) const override {
    const int64_t least = std::max<int64_t>(kLeastDraws / problem.samples, 1);  // an exponential is a cheap draw
    torch::stable::parallel_for(0, problem.examples, least, [&](int64_t begin, int64_t end) {
      cpu_kernels().importance(problem, begin, end);
    });
  }

  void stored_gradients(const Site&, const StoredGradients& problem) const override {
    const auto number = [](const ScalarRef& scalar) {
      return scalar.data == nullptr ? 0.0 : read(scalar.data, scalar.dtype);
    };
    const double factor = number(problem.grad_loss) - number(problem.grad_log_likelihood);
    for (int i = 0; i < problem.count && factor != 1.0; ++i) {
      const StoredGradients::Gradient& gradient = problem.gradient[i];
      with_data(gradient.data, gradient.dtype, [&](auto* data) {
        if constexpr (std::is_same_v<decltype(data), double*>) multiply(data, gradient.numel, factor);
        else multiply(data, gradient.numel, static_cast<float>(factor));
      });
    }
    if (problem.kl_gradient == nullptr) return;
    write(problem.kl_gradient, problem.kl_factor.dtype, 0,
          number(problem.kl_factor) * (problem.beta * number(problem.grad_loss) + number(problem.grad_kl)));
  }
};

}  // namespace

const Device& cpu_device() {
  static const CpuDevice device;
  return device;
}

}  // namespace elbo_ext
