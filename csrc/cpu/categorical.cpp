// Terms over a dimension, row by row: the classes of a row in registers, in several sweeps. The formulas:
// terms/categorical.h.
#include <ATen/cpu/vec/functional.h>

#include <vector>

#include "kernels.h"
#include "normals.h"
#include "tile.h"

#include "../terms/categorical.h"

namespace elbo_ext {
namespace {

// Rows whose classes do not lie together are copied so many at a time, so that what lies next to each other in memory, the
// same class of neighbouring rows, is read in one go: a cache line of floats.
constexpr int64_t kRowsTogether = 16;
// Sums in the compute type end after so many registers, and go on in double.
constexpr int64_t kRegistersPerSum = 64;

// The classes of a few rows of one operand as a Lane each: in place where they lie together in the compute type, else copied.
template <class R>
class ClassLanes {
 public:
  ClassLanes(const Space& space, const ClassOperand& operand, int64_t classes)
      : space_(space), operand_(operand), classes_(classes), in_place_(operand.dtype == dtype_of<R>() && (operand.class_stride == 1 || classes == 1)) {
    if (!operand.present()) splat(static_cast<R>(operand.constant), one_number_);
    else if (!in_place_) copied_.resize(classes * kRowsTogether);
  }

  void begin(int64_t first, int64_t rows, int64_t sample_offset = 0) {
    first_ = first;
    sample_offset_ = sample_offset;
    if (!operand_.present() || in_place_) return;
    int64_t offset[kRowsTogether];
    for (int64_t r = 0; r < rows; ++r) offset[r] = sample_offset + row_offset(space_, operand_, first + r);
    with_readable_dtype(operand_.dtype, [&](auto zero) {
      using S = decltype(zero);
      const S* const data = static_cast<const S*>(operand_.data);
      if (operand_.class_stride == 1) {
        for (int64_t r = 0; r < rows; ++r) load_dense(data + offset[r], classes_, copied_.data() + r * classes_);
        return;
      }
      for (int64_t c = 0; c < classes_; ++c)
        for (int64_t r = 0; r < rows; ++r)
          copied_[r * classes_ + c] = static_cast<R>(data[offset[r] + c * operand_.class_stride]);
    });
  }
  Lane<R> row(int64_t r) const {
    if (!operand_.present()) return {one_number_.data, 0};
    if (!in_place_) return {copied_.data() + r * classes_, 1};
    return {static_cast<const R*>(operand_.data) + sample_offset_ + row_offset(space_, operand_, first_ + r), 1};
  }
  bool present() const { return operand_.present(); }

 private:
  const Space& space_;
  const ClassOperand& operand_;
  int64_t classes_, first_ = 0, sample_offset_ = 0;
  bool in_place_;
  Buffer<R> one_number_;
  std::vector<R> copied_;
};

// Where the gradients of a few rows go, the same way.
template <class R>
class ClassSink {
 public:
  ClassSink(const Space& space, const ClassView& view, int64_t classes)
      : space_(space), view_(view), classes_(classes), in_place_(view.dtype == dtype_of<R>() && (view.class_stride == 1 || classes == 1)) {
    if (wanted() && !in_place_) copied_.resize(classes * kRowsTogether);
  }
  bool wanted() const { return view_.data != nullptr; }
  void begin(int64_t first) { first_ = first; }
  R* row(int64_t r) {
    if (in_place_) return static_cast<R*>(view_.data) + row_offset(space_, view_, first_ + r);
    return copied_.data() + r * classes_;
  }
  void finish(int64_t rows) const {
    if (!wanted() || in_place_) return;
    int64_t offset[kRowsTogether];
    for (int64_t r = 0; r < rows; ++r) offset[r] = row_offset(space_, view_, first_ + r);
    with_dtype(view_.dtype, [&](auto zero) {
      using S = decltype(zero);
      S* const data = static_cast<S*>(view_.data);
      if (view_.class_stride == 1) {
        for (int64_t r = 0; r < rows; ++r) store_dense(copied_.data() + r * classes_, classes_, data + offset[r]);
        return;
      }
      for (int64_t c = 0; c < classes_; ++c)
        for (int64_t r = 0; r < rows; ++r)
          data[offset[r] + c * view_.class_stride] = static_cast<S>(copied_[r * classes_ + c]);
    });
  }

 private:
  const Space& space_;
  const ClassView& view_;
  int64_t classes_, first_ = 0;
  bool in_place_;
  std::vector<R> copied_;
};

// The classes of one row, a register at a time.
template <class R>
struct ClassesOfRow {
  using V = Vec<R>;
  int64_t classes;
  Lane<R> input[kClassInputs];
  bool labels;    // input 0 is 1 for the class `label`, and 0 for the others
  int64_t label;

  static V get(const Lane<R>& lane, int64_t c, int64_t count) {
    if (lane.step == 0) return V::loadu(lane.data);
    return count >= V::size() ? V::loadu(lane.data + c) : V::loadu(lane.data + c, count);
  }

  // Calls body(in, first class, how many) for each register.
  template <class Body>
  ELBO_INLINE void for_each(Body&& body) const {
    for (int64_t c = 0; c < classes; c += V::size()) {
      const int64_t count = std::min<int64_t>(classes - c, V::size());
      V in[kClassInputs] = {labels ? one_hot(c) : get(input[0], c, count), get(input[1], c, count)};
      body(in, c, count);
    }
  }
  V one_hot(int64_t c) const {
    const V zero(R(0)), one(R(1));
    if (label < c || label >= c + V::size()) return zero;
    return select(abs(V::arange(R(0), R(1)) - V(static_cast<R>(label - c))) > zero, zero, one);
  }

  static ELBO_INLINE V inside(V outside, V numbers, int64_t count) {
    return count >= V::size() ? numbers : V::set(outside, numbers, count);
  }

  R largest(const Lane<R>& lane) const {
    if (lane.step == 0) return lane.data[0];
    const V nothing(-std::numeric_limits<R>::infinity());
    V most = nothing;
    for (int64_t c = 0; c < classes; c += V::size()) {
      const int64_t count = std::min<int64_t>(classes - c, V::size());
      most = larger(inside(nothing, get(lane, c, count), count), most);
    }
    return at::vec::vec_reduce_all<R>([](V& a, V& b) { return larger(a, b); }, most);
  }

  // The sums over the classes of what add(in, sum) adds.
  template <int kSums, class Add>
  ELBO_INLINE void sums(V (&result)[kSums], Add&& add) const {
    const V zero(R(0));
    double total[kSums] = {};
    V sum[kSums];
    const auto flush = [&] {
      for (int k = 0; k < kSums; ++k)
        total[k] += static_cast<double>(at::vec::vec_reduce_all<R>([](V& a, V& b) { return a + b; }, sum[k]));
    };
    for (V& number : sum) number = zero;
    int64_t registers = 0;
    for_each([&](const V(&in)[kClassInputs], int64_t, int64_t count) {
      if (count == V::size()) {
        add(in, sum);
      } else {
        V rest[kSums];
        for (V& number : rest) number = zero;
        add(in, rest);
        for (int k = 0; k < kSums; ++k) sum[k] = sum[k] + inside(zero, rest[k], count);
      }
      if (++registers % kRegistersPerSum == 0) {
        flush();
        for (V& number : sum) number = zero;
      }
    });
    flush();
    for (int k = 0; k < kSums; ++k) result[k] = V(static_cast<R>(total[k]));
  }
};

template <class V>
auto first_of(V numbers) {
  typename V::value_type lane[V::size()];
  numbers.store(lane);
  return lane[0];
}

// What a term knows of the classes of a register after its second sweep, for its gradients: kept for rows that are no longer
// than so many registers.
constexpr int64_t kMostKept = 64;
template <class Term>
struct KeptClass {
  struct Nothing {};
  using type = Nothing;
};
template <class Term>
  requires(Term::kSweeps == 2)
struct KeptClass<Term> {
  using type = typename Term::Class;
};

// The term of a row, as far as its sums tell it. `kept` may be null.
template <class Term, class R>
ELBO_INLINE Term learn(const CategoricalProblem& p, const ClassesOfRow<R>& row, typename KeptClass<Term>::type* kept) {
  using V = Vec<R>;
  Term term(ClassConstants{p.operand[0].constant, static_cast<double>(p.classes)});
  V largest[kClassInputs] = {V(R(0)), V(R(0))};
  for (int k = 0; k < kClassInputs; ++k)
    if (Term::kSoftmax >> k & 1) largest[k] = V(row.largest(row.input[k]));
  term.given_largest(largest);
  if constexpr (Term::kLabels)
    term.given_own(V(row.label >= 0 && row.label < row.classes ? row.input[1].data[row.label * row.input[1].step] : R(0)));
  V sum[Term::kSums];
  row.template sums<Term::kSums>(sum, [&](const V(&in)[kClassInputs], V(&to)[Term::kSums]) { term.template add<0>(in, to); });
  term.template given_sums<0>(sum);
  if constexpr (Term::kSweeps == 2) {
    row.template sums<Term::kSums>(sum, [&](const V(&in)[kClassInputs], V(&to)[Term::kSums]) {
      const typename Term::Class of_register = term.of(in);
      if (kept != nullptr) *kept++ = of_register;
      term.add(of_register, to);
    });
    term.template given_sums<1>(sum);
  }
  return term;
}

template <class R>
R number_at(const Space& space, const Operand& operand, int64_t row) {
  if (!operand.present()) return static_cast<R>(operand.constant);
  R number = R(0);
  with_readable_dtype(operand.dtype, [&](auto zero) {
    number = static_cast<R>(static_cast<const decltype(zero)*>(operand.data)[row_offset(space, operand, row)]);
  });
  return number;
}
inline int64_t label_at(const Space& space, const Operand& operand, int64_t row) {
  int64_t label = 0;
  with_readable_dtype(operand.dtype, [&](auto zero) {
    label = static_cast<int64_t>(static_cast<const decltype(zero)*>(operand.data)[row_offset(space, operand, row)]);
  });
  return label;
}

template <template <class> class TermOf, class R>
void run_rows(const CategoricalProblem& p, int64_t begin, int64_t end) {
  using V = Vec<R>;
  using Term = TermOf<V>;
  const int64_t classes = p.classes;
  const R infinity = std::numeric_limits<R>::infinity();
  const ClassOperand absent{};
  ClassLanes<R> first(p.space, Term::kLabels ? absent : p.operand[0], classes), second(p.space, p.operand[1], classes);
  ClassLanes<R> grad_z(p.space, p.grad_z, classes);
  ClassSink<R> sink[kClassInputs] = {{p.space, p.gradient[0], classes}, {p.space, p.gradient[1], classes}};
  const ClassView& of_weight = p.gradient[kClassInputs];
  const int64_t registers = (classes + V::size() - 1) / V::size();
  const bool keeps = Term::kSweeps == 2 && p.wants_gradient && registers <= kMostKept;
  std::vector<typename KeptClass<Term>::type> kept(keeps ? registers : 0);
  for (int64_t base = begin; base < end; base += kRowsTogether) {
    const int64_t rows = std::min(kRowsTogether, end - base);
    first.begin(base, rows);
    second.begin(base, rows);
    grad_z.begin(base, rows);
    for (ClassSink<R>& each : sink) each.begin(base);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = base + r;
      ClassesOfRow<R> row{classes, {first.row(r), second.row(r)}, Term::kLabels, -1};
      bool left_out = false, outside = false;
      if constexpr (Term::kLabels) {
        row.label = label_at(p.space, p.operand[0], at);
        left_out = row.label == static_cast<int64_t>(p.operand[0].constant);
        outside = row.label < 0 || row.label >= classes;
      }
      const Operand& weight_of_row = p.operand[kClassInputs];
      const R weight = weight_of_row.present() ? number_at<R>(p.space, weight_of_row, at) : R(1);
      const Term term = learn<Term>(p, row, keeps ? kept.data() : nullptr);
      const R value = left_out ? R(0) : outside ? -infinity
                                                : first_of(term.value());
      if (p.row_value != nullptr) static_cast<R*>(p.row_value)[at] = weight == R(0) ? R(0) : weight * value;
      if (!p.wants_gradient) continue;
      const R upstream = p.upstream.present() ? number_at<R>(p.space, p.upstream, at) * static_cast<R>(p.upstream.factor)
                                              : static_cast<R>(p.upstream.constant);
      if (of_weight.data != nullptr) {
        // The term; but 0 where it is left out and no number.
        const R of_value = weight == R(0) && !(std::abs(value) <= std::numeric_limits<R>::max()) ? R(0) : upstream * value;
        with_dtype(of_weight.dtype, [&](auto zero) {
          using S = decltype(zero);
          static_cast<S*>(of_weight.data)[row_offset(p.space, of_weight, at)] = static_cast<S>(of_value);
        });
      }
      const bool nothing = left_out || outside || weight == R(0);
      const V factor(upstream * weight), zero(R(0));
      V mean_of_z = zero, z_kept = zero;
      if constexpr (Term::kSoftmax & 1) {
        if (grad_z.present()) {  // of the probabilities: d p_c / d l_k = (1 - u) s_c ([c = k] - s_k)
          const Lane<R> lane = grad_z.row(r);
          double mean = 0;
          row.for_each([&](const V(&in)[kClassInputs], int64_t c, int64_t count) {
            const V s = exp(in[0] - term.largest[0]) * term.over_sum[0];
            mean += static_cast<double>(at::vec::vec_reduce_all<R>(
                [](V& a, V& b) { return a + b; },
                ClassesOfRow<R>::inside(zero, s * ClassesOfRow<R>::get(lane, c, count), count)));
          });
          mean_of_z = V(static_cast<R>(mean));
          z_kept = term.kept;
        }
      }
      R* const to[kClassInputs] = {sink[0].wanted() ? sink[0].row(r) : nullptr, sink[1].wanted() ? sink[1].row(r) : nullptr};
      row.for_each([&](const V(&in)[kClassInputs], int64_t c, int64_t count) {
        V d[kClassInputs] = {zero, zero};
        if (!nothing) {
          if constexpr (Term::kSweeps == 2) {
            if (!keeps) term.gradient(in, d);
            else term.gradient(kept[c / V::size()], d);
          } else {
            term.gradient(in, d);
          }
          for (V& number : d) number = number * factor;
        }
        if constexpr (Term::kSoftmax & 1) {
          if (grad_z.present()) {
            const V s = exp(in[0] - term.largest[0]) * term.over_sum[0];
            d[0] = d[0] + z_kept * (s * (ClassesOfRow<R>::get(grad_z.row(r), c, count) - mean_of_z));
          }
        }
        for (int k = 0; k < kClassInputs; ++k)
          if (to[k] != nullptr) count == V::size() ? d[k].store(to[k] + c) : d[k].store(to[k] + c, static_cast<int>(count));
      });
    }
    for (ClassSink<R>& each : sink) each.finish(rows);
  }
}

// ---- samples ----

// Gumbel noise of consecutive numbers, made in stretches.
template <class R>
class GumbelStream {
 public:
  GumbelStream(int64_t seed, int64_t end) : seed_(seed), end_(end) {}

  // Calls body(noise, first, count) for the stretches of numbers [first, first + count).
  template <class Body>
  void for_each(int64_t first, int64_t count, Body&& body) {
    for (int64_t done = 0; done < count;) {
      const int64_t number = first + done;
      if (number < made_ || number >= made_ + room_) {
        made_ = number;
        room_ = std::min(kTile, end_ - number);
        noise_ = buffer_.fill_gumbel(seed_, number, room_);
      }
      const int64_t stretch = std::min(count - done, made_ + room_ - number);
      body(noise_ + (number - made_), done, stretch);
      done += stretch;
    }
  }

 private:
  int64_t seed_, end_, made_ = 0, room_ = 0;
  const R* noise_ = nullptr;
  NoiseBuffer<R, kTile> buffer_;
};

// The class of the largest log-probability with Gumbel noise is a draw of it (Gumbel 1954; Maddison, Tarlow & Minka 2014).
template <class R>
void run_samples(const CategoricalProblem& p, int64_t begin, int64_t end) {
  using V = Vec<R>;
  using Term = CategoricalKL<V>;
  const int64_t classes = p.classes, all = p.space.rows * classes;
  const bool mixed = p.operand[0].constant > 0;
  const ClassOperand absent{};
  ClassLanes<R> logits(p.space, p.operand[0], classes), noise(p.space, p.noise, classes), prior(p.space, absent, classes);
  std::vector<R> score(classes + V::size());
  const std::optional<int64_t> seed = p.seed == nullptr ? std::nullopt : std::optional(*p.seed);
  for (int64_t sample = 0; sample < p.samples; ++sample) {
    GumbelStream<R> stream(seed.value_or(0), sample * all + end * classes);
    for (int64_t base = begin; base < end; base += kRowsTogether) {
      const int64_t rows = std::min(kRowsTogether, end - base);
      logits.begin(base, rows);
      noise.begin(base, rows, sample * p.noise_sample_stride);
      for (int64_t r = 0; r < rows; ++r) {
        const ClassesOfRow<R> row{classes, {logits.row(r), prior.row(r)}, false, -1};
        const V largest = V(row.largest(row.input[0]));
        V over_sum(R(0)), kept(R(1)), uniform(R(0));
        if (mixed) {
          const Term term = learn<Term>(p, row, nullptr);
          over_sum = term.over_sum[0];
          kept = term.kept;
          uniform = term.uniform;
        }
        row.for_each([&](const V(&in)[kClassInputs], int64_t c, int64_t count) {
          V log_p = in[0] - largest;
          if (mixed) log_p = log(kept * (exp(log_p) * over_sum) + uniform);
          log_p.store(score.data() + c, static_cast<int>(count));
        });
        if (seed) {
          stream.for_each((sample * p.space.rows + base + r) * classes, classes,
                          [&](const R* gumbel, int64_t first, int64_t count) {
            for (int64_t i = 0; i < count; ++i) score[first + i] += gumbel[i];
          });
        } else {
          const R* const gumbel = noise.row(r).data;
          for (int64_t c = 0; c < classes; ++c) score[c] += gumbel[c];
        }
        const ClassesOfRow<R> scores{classes, {{score.data(), 1}, {score.data(), 1}}, false, -1};
        const R most = scores.largest(scores.input[0]);
        int64_t drawn = 0;  // the first of the largest
        while (drawn + 1 < classes && score[drawn] != most) ++drawn;
        if (score[drawn] != most) drawn = 0;
        with_dtype(p.z.dtype, [&](auto zero) {
          using S = decltype(zero);
          static_cast<S*>(p.z.data)[sample * p.z_sample_stride + row_offset(p.space, p.z, base + r) +
                                    drawn * p.z.class_stride] = static_cast<S>(1.f);
        });
      }
    }
  }
}

template <class R>
void run(const CategoricalProblem& p, int64_t begin, int64_t end) {
  if (p.row_value != nullptr || p.wants_gradient) {
    switch (p.term) {
#define ELBO_CLASS_TERM_CASE(number, Term, name) \
  case number: run_rows<Term, R>(p, begin, end); break;
      ELBO_FOR_EACH_CLASS_TERM(ELBO_CLASS_TERM_CASE)
#undef ELBO_CLASS_TERM_CASE
    }
  }
  if (p.samples > 0) run_samples<R>(p, begin, end);
}

}  // namespace

namespace CPU_CAPABILITY {

void categorical(const CategoricalProblem& p, int64_t begin, int64_t end) {
  p.compute_double ? run<double>(p, begin, end) : run<float>(p, begin, end);
}

}  // namespace CPU_CAPABILITY
}  // namespace elbo_ext
