// What an operator hands to a kernel: plain numbers and pointers. The CPU kernels must not see a torch header that
// belongs to the stable ABI, so this file includes none.
#pragma once

#include <cstdint>

namespace elbo_ext {

constexpr int kMaxDims = 12;      // after neighbouring dimensions have been joined
constexpr int kMaxInputs = 4;     // of a term
constexpr int kWeight = kMaxInputs;          // the slot of weight= behind the inputs of a term
constexpr int kMaxOperands = kMaxInputs + 1;

enum class DType : int { kFloat, kDouble, kBFloat16, kHalf, kBool };

// The joint shape that all operands broadcast to, cut into `rows` that are summed and whose sums are wanted one by one,
// of `cols` elements each. Where no row sums are asked for (a sum over everything, element-wise values, a backward
// pass) all dimensions are columns of one row. Row and column numbers count through the lists of dimensions, the last
// one fastest.
struct Space {
  int row_dims = 0, col_dims = 0;
  int64_t row_size[kMaxDims], col_size[kMaxDims];
  int64_t rows = 1, cols = 1;
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
};

struct Operand : View {
  double constant = 0.0;  // stands for every element where data is null
  bool present() const { return data != nullptr; }
};

// Where the gradient of an operand goes. An operand as large as the space gets its gradient element by element. The
// gradient of a broadcast operand is summed: each group of blocks adds into a buffer of its own, in doubles, and the
// buffers are added up in order, so that the result does not depend on the number of threads.
struct GradientSink : View {
  bool summed = false;
  double* partial = nullptr;   // [groups][numel]
  int64_t partial_stride = 0;  // numel, or 0 where all groups may share one buffer because no two meet in an element
  int64_t numel = 0;
  bool wanted() const { return data != nullptr || partial != nullptr; }
};

// Work is cut into blocks that depend on the shape alone. A block is either a piece of one long row or several short
// rows; a group is a run of blocks that one thread works through in order.
struct Blocks {
  int64_t rows_per_block = 1;  // > 1 only where blocks_per_row == 1
  int64_t blocks_per_row = 1;
  int64_t count = 0;
  int64_t per_group = 1;
  int64_t groups = 0;
};

constexpr int64_t kBlockElements = 8192;

struct TermSumProblem {
  int term;
  int form, prior_form;
  bool compute_double;
  Space space;
  Blocks blocks;
  Operand input[kMaxOperands];  // the last one is the weight, absent: 1
  Operand upstream;             // gradient of the result at each element, absent: `upstream.constant`
  // The wanted results; absent ones are null. Values are in the compute type, float or double.
  void* element_value = nullptr;  // [cols], only with one row
  void* row_value = nullptr;      // [rows], only with blocks_per_row == 1
  double* block_sum = nullptr;    // [blocks.count]
  GradientSink gradient[kMaxOperands];
  bool wants_gradient = false;
};

// z[k, row, col] = mu + sigma * eps, where eps is element (k * rows + row) * cols + col of the stream of `seed`, or read.
struct LatentProblem {
  int form, prior_form;
  bool compute_double;
  bool with_kl;
  Space space;  // of one sample; its columns and rows count in row-major order of the tensors' dimensions
  Blocks blocks;
  Operand input[kMaxInputs];  // mu, scale, prior_mu, prior_scale, as the term gaussian_kl takes them
  int64_t samples = 1;        // K
  const int64_t* seed = nullptr;
  Operand noise;  // where there is no seed
  int64_t noise_sample_stride = 0;
  // forward
  View z;
  int64_t z_sample_stride = 0;
  void* row_value = nullptr;    // KL of each row, as in TermSumProblem
  double* block_sum = nullptr;
  // backward
  Operand grad_z;  // absent: 0
  int64_t grad_z_sample_stride = 0;
  Operand upstream_kl;  // absent: `upstream_kl.constant`
  GradientSink gradient[kMaxInputs];
  View noise_gradient;
  int64_t noise_gradient_sample_stride = 0;
};

}  // namespace elbo_ext
