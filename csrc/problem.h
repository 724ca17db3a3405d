// What an operator hands to a kernel: plain numbers and pointers. The CPU kernels must not see a torch header that
// belongs to the stable ABI, so this file includes none.
#pragma once

#include <cstdint>

namespace elbo_ext {

constexpr int kMaxDims = 12;  // rows and columns together, after neighbouring dimensions have been joined
constexpr int kMaxInputs = 6;  // of a term
constexpr int kMaxOperands = kMaxInputs + 1;  // with the weight, which comes after the inputs
constexpr int kLatentInputs = 4;  // mu, scale, prior_mu, prior_scale

enum class DType : int {
  kFloat,
  kDouble,
  kBFloat16,
  kHalf,
  kBool,
  // Data alone, counts and pixels: read, never written.
  kUInt8,
  kInt8,
  kInt16,
  kInt32,
  kInt64
};
constexpr int64_t kBytesOf[] = {4, 8, 2, 2, 1, 1, 1, 2, 4, 8};  // in the order of DType
constexpr int64_t bytes_of(DType dtype) { return kBytesOf[static_cast<int>(dtype)]; }
constexpr bool is_integer(DType dtype) { return dtype >= DType::kUInt8; }

enum class NoiseKind {
  kNormal,
  kGumbel
};

// The joint shape that all operands broadcast to, cut into `rows` that are summed and whose sums are wanted one by one,
// of `cols` elements each. Where no row sums are asked for (a sum over everything, element-wise values, a backward
// pass) all dimensions are columns of one row. Row and column numbers count through the lists of dimensions, the last
// one fastest.
struct Space {
  int row_dims = 0, col_dims = 0;
  int64_t row_size[kMaxDims], col_size[kMaxDims];
  int64_t rows = 1, cols = 1;
  int64_t elements() const { return rows * cols; }
};

// How a tensor lies in a Space: element (row, col) stands at data + row offset + column offset.
struct View {
  void* data = nullptr;  // null: there is no such tensor
  DType dtype = DType::kFloat;
  int64_t row_stride[kMaxDims], col_stride[kMaxDims];
  bool cols_uniform = true;  // the same element for every column: all column strides are 0
  bool cols_dense = false;   // column number = offset
  bool rows_uniform = true;  // the same elements for every row
  bool rows_dense = false;   // row number * cols = offset (and cols_dense)
  int64_t dense_rows = 1;    // where cols_dense: so many rows lie one after the other, from each multiple of it on
};

struct Operand : View {
  // Stands for every element where data is null; else for what belongs to the form of the numbers (terms/forms.h).
  double constant = 0.0;
  bool present() const { return data != nullptr; }
};

// The gradient of the result of an operator: upstream * factor at each element.
struct Upstream : Operand {
  double factor = 1.0;
};

// Where the gradient of an operand goes. An operand as large as the space gets its gradient element by element; the
// gradient of a broadcast operand is summed over the elements that share it.
struct GradientSink : View {
  bool summed = false;
  int64_t numel = 0;
  double* partial = nullptr;   // on the CPU: [groups][numel], where each group of blocks adds into a buffer of its own
  int64_t partial_stride = 0;  // numel
  bool wanted() const { return data != nullptr; }
};

// How the CPU cuts its work: into blocks that depend on the shape alone. A block is either a piece of one long row or
// several short rows; a group is a run of blocks that one thread works through in order.
struct Blocks {
  int64_t rows_per_block = 1;  // > 1 only where blocks_per_row == 1
  int64_t blocks_per_row = 1;
  int64_t count = 0;
  int64_t per_group = 1;
  int64_t groups = 0;
};

constexpr int64_t kBlockElements = 8192;

// The values of a forward pass, in the compute type, float or double. At most one of the three is wanted.
struct Values {
  void* element = nullptr;  // [cols], with one row: each element's value
  void* row = nullptr;      // [rows]: the sum of each row
  void* total = nullptr;    // the sum of everything over `divisor`
  double divisor = 1.0;
};

// loss = beta * kl - total, computed after the total of a log-likelihood.
struct ELBO {
  DType kl_dtype = DType::kFloat;
  const void* kl = nullptr;  // [kl_count], null: no ELBO is wanted
  int64_t kl_count = 0;
  double kl_factor = 0.0;    // kl reduced is the sum of its elements times this: d(kl reduced) / dkl
  double beta = 0.0;
  void *loss = nullptr, *reduced_kl = nullptr;  // in the compute type
  void* kl_factor_out = nullptr;                // kl_factor, likewise; null: not wanted
};

// The backward pass of loss = beta * kl - log-likelihood, given the gradients of -log-likelihood.
struct ScalarRef {
  const void* data = nullptr;  // null: 0
  DType dtype = DType::kFloat;
};
struct StoredGradients {
  int count = 0;
  struct Gradient {
    void* data;
    DType dtype;
    int64_t numel;  // dense, and not 0
  } gradient[kMaxOperands];  // multiplied by grad_loss - grad_log_likelihood, and not touched if that is 1
  ScalarRef grad_loss, grad_log_likelihood, grad_kl, kl_factor;
  double beta = 0.0;
  void* kl_gradient = nullptr;  // kl_factor * (beta * grad_loss + grad_kl), in the dtype of kl_factor; null: not wanted
};

// The bound of each example from its K samples, and their normalized weights: [samples, examples], row-major, all of it in
// the compute type.
struct ImportanceProblem {
  bool compute_double;
  int64_t samples, examples;
  const void* log_weights;
  void* bound;              // [examples]
  void* weights = nullptr;  // null: not wanted
};

struct TermSumProblem {
  int term;
  int forms;  // terms/forms.h
  bool compute_double;
  Space space;
  Operand operand[kMaxOperands];  // the inputs of the term, and the weight, absent: 1
  Values values;
  ELBO elbo;
  Upstream upstream;
  GradientSink gradient[kMaxOperands];
  bool wants_gradient = false;
  // set by the CPU
  Blocks blocks;
  double* block_sum = nullptr;  // [blocks.count]
};

// A term over a dimension (terms/categorical.h). The rows of the space are the elements of the data, in row-major order; each
// has `classes` parameters, which are not among the columns.
constexpr int kClassOperands = 3;  // the two inputs, and the weight
struct ClassOperand : Operand {
  int64_t class_stride = 0;
};
struct ClassView : View {
  int64_t class_stride = 0;
};
struct CategoricalProblem {
  int term;
  bool compute_double;
  Space space;
  int64_t classes;
  // Absent: a number, `constant`. Where one is present, its constant is an option: of a KL's logits, unimix; of labels, the
  // number of a class that is left out.
  ClassOperand operand[kClassOperands];
  void* row_value = nullptr;  // [rows], in the compute type, times the weight; null: not wanted
  // backward
  bool wants_gradient = false;
  Upstream upstream;
  ClassView gradient[kClassOperands];
  ClassOperand grad_z;  // of a sample, whose gradient passes to the probabilities of operand 0; absent: 0
  // One-hot samples of the probabilities of operand 0: of element (k * rows + row), the number of the class.
  int64_t samples = 0;
  const int64_t* seed = nullptr;
  bool seed_on_host = false;
  ClassOperand noise;  // where there is no seed
  int64_t noise_sample_stride = 0;
  ClassView z;  // zeros, among which the kernel writes ones
  int64_t z_sample_stride = 0;
};

// out[i] = the sum of numbers [i * length, (i + 1) * length) over `divisor`, all of them in the compute type.
struct FoldProblem {
  bool compute_double;
  int64_t count, length;
  const void* numbers;
  double divisor;
  void* out;
};

// z[k, row, col] = mu + sigma * eps, where eps is element (k * rows + row) * cols + col of the stream of `seed`, or read.
struct LatentProblem {
  int results;  // terms/sample.h
  int forms;    // of the inputs, as for the term gaussian_kl
  bool compute_double;
  // Of one sample; columns and rows count in row-major order of the tensors' dimensions. Only where log q and log p are
  // wanted, which are sums over each sample of its own, the samples are rows too, and `samples` is 1.
  Space space;
  Operand input[kLatentInputs];  // as the term gaussian_kl takes them
  int64_t samples = 1;        // K
  const int64_t* seed = nullptr;
  bool seed_on_host = false;  // `seed` is not in the memory of the data's device, but in the CPU's
  Operand noise;  // where there is no seed
  int64_t noise_sample_stride = 0;
  // forward
  View z;
  int64_t z_sample_stride = 0;
  Values kl;            // by element never
  Values log_q, log_p;  // by row
  // backward
  Operand grad_z;  // absent: 0
  int64_t grad_z_sample_stride = 0;
  bool with_kl = false;        // there is a gradient of the KL
  Upstream upstream_kl;
  bool with_log_prob = false;  // there is one of log q or log p
  Upstream upstream_q, upstream_p;
  int64_t upstream_q_sample_stride = 0, upstream_p_sample_stride = 0;
  GradientSink gradient[kLatentInputs];
  View noise_gradient;
  int64_t noise_gradient_sample_stride = 0;
  // set by the CPU
  Blocks blocks;
  double *block_sum = nullptr, *block_sum_q = nullptr, *block_sum_p = nullptr;  // [blocks.count]
  int64_t elements() const { return samples * space.elements(); }
};

}  // namespace elbo_ext
