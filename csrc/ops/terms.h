// What the operators and Python know of the terms: as they declare it themselves (terms/list.h).
#pragma once

#include <string>
#include <vector>

namespace elbo_ext {

struct TermInfo {
  int number;  // in the operator schema
  std::string name;
  std::vector<std::vector<std::string>> inputs;  // for each, the names of its forms (terms/forms.h)
  size_t tensors;  // how many of them may be tensors, the first ones; the others are numbers
};

const std::vector<TermInfo>& terms();

// Null if there is none of that number.
const TermInfo* find_term(int64_t number);

// Whether `forms` has a form for each input, and nothing else.
bool has_forms(const TermInfo& term, int64_t forms);

}  // namespace elbo_ext
