// The operators, for every device. They know nothing of autograd: elbo_ext/autograd/ builds on them.
//
// Common arguments of the term_sum family:
//   term        the number of the formula in csrc/terms/list.h
//   operands    its inputs in order, and last the weight, which multiplies each element's term; where one is None, the
//               number in `constants` stands for every element
//   forms       what the inputs hold, four bits each (csrc/terms/forms.h): 0 logvar, 1 log_std, 2 std, 3 var, 4 rho of a scale; 5 more
//               with min_std, 10 more with min_var: floors, which for a tensor stand in `constants`
//   batch_dims  leading dimensions of the joint broadcast shape that index examples; the others are summed
//   reduction   over the examples: 0 none, 1 sum, 2 mean
//   needs       which of the operands a gradient is returned for
// Values are float64 if any operand is, else float32; a gradient has the shape and the dtype of its operand.
#include <torch/csrc/stable/library.h>

#define ELBO_TERM \
  "int term, Tensor?[] operands, float[] constants, int forms, int batch_dims, int reduction"
#define ELBO_LATENT                                                                                              \
  "Tensor?[] inputs, float[] constants, int forms, Tensor? seed, Tensor? noise, int? num_samples, int results, " \
  "int batch_dims, int reduction"
#define ELBO_LATENT_LIST                                                                                          \
  "Tensor?[] inputs, float[] constants, int forms, Tensor seeds, int? num_samples, int results, int batch_dims, " \
  "int reduction"

// Terms over a dimension: of the operands, two inputs and the weight, the last dimension is that of the classes, which labels
// and the weight have with size 1. Where a gradient is wanted, an operand has the whole joint shape.
#define ELBO_CATEGORICAL ELBO_TERM

STABLE_TORCH_LIBRARY(elbo_ext, library) {
  library.def("term_sum(" ELBO_TERM ") -> Tensor");
  library.def("term_sum_backward(" ELBO_TERM ", Tensor grad, bool[] needs) -> Tensor[]");
  // The value, then the gradients of factor * value: one pass over the inputs.
  library.def("term_sum_with_gradients(" ELBO_TERM ", float factor, bool[] needs) -> Tensor[]");
  // loss = beta * kl - log-likelihood, the log-likelihood and the KL, reduced; d(reduced KL) / dkl, one number expanded to
  // the shape of kl; then the gradients of -log-likelihood. kl repeats over the examples that it broadcasts to.
  library.def("elbo_with_gradients(" ELBO_TERM ", Tensor kl, float beta, bool[] needs) -> Tensor[]");
  // Its backward pass, given what the forward pass left: turns the gradients of -log-likelihood into those of
  // grad_loss * loss + grad_log_likelihood * log-likelihood in place, and returns the gradient of kl, one number expanded.
  library.def(
      "elbo_backward(Tensor(a!)[] gradients, Tensor of_kl, Tensor? grad_loss, Tensor? grad_log_likelihood, "
      "Tensor? grad_kl, float beta) -> Tensor");
  // z = mu + sigma * eps, alone (results 0), with its KL to the prior (1), or with log q and log p of each sample (2, 3, 4:
  // csrc/terms/sample.h); inputs are mu and scale, and where there is more than z, prior_mu and prior_scale.
  library.def("latent(" ELBO_LATENT ") -> Tensor[]");
  // Gradients of the needed inputs and, with the last flag of needs, of the noise, given those of the results.
  // No list of gradients: torch does not fill in zeros that it keeps symbolic in a Tensor?[].
  library.def(
      "latent_backward(" ELBO_LATENT
      ", Tensor? grad_z, Tensor? grad_kl, Tensor? grad_log_q, Tensor? grad_log_p, "
      "bool[] needs) -> Tensor[]");
  // The same of several tensors together, without log q and log p: the inputs of the first one, then those of the next; a seed
  // for each; one KL, summed over the tensors, which have one batch shape. Gradients by the needed inputs, in their order.
  library.def("latent_list(" ELBO_LATENT_LIST ") -> Tensor[]");
  library.def("latent_list_backward(" ELBO_LATENT_LIST ", Tensor?[] grad_z, Tensor? grad_kl, bool[] needs) -> Tensor[]");
  // As those of the term_sum family. The constant of a tensor is an option: unimix of a KL's logits, the label that is ignored.
  library.def("categorical(" ELBO_CATEGORICAL ") -> Tensor");
  library.def("categorical_backward(" ELBO_CATEGORICAL ", Tensor grad, bool[] needs) -> Tensor[]");
  library.def("categorical_with_gradients(" ELBO_CATEGORICAL ", float factor, bool[] needs) -> Tensor[]");
  // One-hot samples of the probabilities of logits, of their dtype, the samples along a first axis if there is a number of
  // them; and the KL to the prior. Either a seed or noise, which has the shape of the samples.
  library.def(
      "categorical_sample(Tensor?[] operands, float[] constants, Tensor? seed, Tensor? noise, int? num_samples, "
      "int batch_dims, int reduction) -> Tensor[]");
  // Gradients by logits and prior, given those of the samples, summed over their axis, and of the KL.
  library.def(
      "categorical_sample_backward(Tensor?[] operands, float[] constants, int batch_dims, int reduction, Tensor? grad_z, "
      "Tensor? grad_kl, bool[] needs) -> Tensor[]");
  // Element i of row j is number first + i of the stream of seed j.
  library.def("normal_noise(Tensor seed, int count, bool double_precision, int first=0) -> Tensor");
  library.def("gumbel_noise(Tensor seed, int count, bool double_precision, int first=0) -> Tensor");
  // log 1/K sum_k w_k of log-weights [K, ...], contiguous and of float32 or float64; with_weights also w_k / sum_j w_j.
  library.def("importance_bound(Tensor log_weights, bool with_weights) -> Tensor[]");
  // Multiplies gradients in place, without touching their memory where the factor is 1.
  library.def("scale_gradients_(Tensor(a!)[] gradients, Tensor factor, bool negated=False) -> ()");
}
