#include "terms.h"

#include <sstream>

#include "../terms/categorical.h"
#include "../terms/list.h"
#include "../terms/traits.h"

namespace elbo_ext {
namespace {

template <class Term>
TermInfo info_of(int number, const char* name) {
  TermInfo info{number, name, {}, static_cast<size_t>(tensors_of<Term>())};
  std::istringstream inputs(Term::kSignature);
  for (std::string input; inputs >> input;) {
    info.inputs.emplace_back();
    std::vector<std::string>& names = info.inputs.back();
    std::istringstream forms_and_floors(input);
    std::string forms, floor;
    std::getline(forms_and_floors, forms, '^');
    std::istringstream each(forms);
    for (std::string form; std::getline(each, form, '|');) names.push_back(form);
    const std::vector<std::string> without_floor = names;
    while (std::getline(forms_and_floors, floor, '^'))
      for (const std::string& form : without_floor) names.push_back(form + "+" + floor);
  }
  return info;
}

}  // namespace

const std::vector<TermInfo>& terms() {
#define ELBO_TERM_INFO(number, Term, name) info_of<Term<double>>(number, name),
  static const std::vector<TermInfo> known{ELBO_FOR_EACH_TERM(ELBO_TERM_INFO) ELBO_FOR_EACH_CLASS_TERM(ELBO_TERM_INFO)};
#undef ELBO_TERM_INFO
  return known;
}

const TermInfo* find_term(int64_t number) {
  for (const TermInfo& term : terms())
    if (term.number == number) return &term;
  return nullptr;
}

bool has_forms(const TermInfo& term, int64_t forms) {
  int64_t rest = forms;
  for (const auto& names : term.inputs) {
    if ((rest & 15) >= static_cast<int64_t>(names.size())) return false;
    rest >>= 4;
  }
  return rest == 0;
}

}  // namespace elbo_ext
