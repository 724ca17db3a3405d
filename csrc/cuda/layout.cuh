// How the tensors of a problem lie in the space of its elements, as kernels see it. Elements are numbered row by row;
// numbers and offsets have 64 bits throughout.
#pragma once

#include "vector.cuh"

namespace elbo_ext {
namespace {

#define ELBO_NO_UNROLL _Pragma("unroll 1")

// Division of numbers below 2^63 by a size that the host knows: a multiplication and a shift. With
// multiplier = ceil(2^(63 + bits) / size), 2^(bits - 1) < size <= 2^bits, the quotient is exact (Granlund, Montgomery,
// "Division by invariant integers using multiplication", PLDI 1994).
struct Divider {
  int64_t size = 1;
  uint64_t multiplier = uint64_t{1} << 63;
  int shift = 0;  // bits - 1; -1 stands for size 1

  Divider() = default;
  explicit Divider(int64_t size) : size(size) {  // at least 1
    int bits = 0;
    while (bits < 63 && (uint64_t{1} << bits) < static_cast<uint64_t>(size)) ++bits;
    const unsigned __int128 numerator = static_cast<unsigned __int128>(1) << (63 + bits);
    multiplier = static_cast<uint64_t>((numerator + size - 1) / size);
    shift = bits - 1;
  }

  __device__ __forceinline__ int64_t quotient(int64_t number) const {
    if (shift < 0) return number;
    return static_cast<int64_t>(__umul64hi(static_cast<uint64_t>(number), multiplier) >> shift);
  }
};

// How a group of neighbouring elements is found in a tensor. Groups begin at multiples of their length.
enum Place : uint8_t {
  kAbsent,      // there is no tensor
  kUniform,     // one element stands for all
  kContiguous,  // offset = element number, and aligned: a vector
  kRun,         // a vector at an offset of its own
  kStep,        // a stride between the elements, possibly 0
  kScattered,   // each element has an offset of its own
  kRepeat,      // contiguous, and then again: a vector at element number modulo Layout::period
  kPerUnit,     // one element stands for all of a unit of work (sums.cuh)
};

// Element numbers count through the dimensions, the last one fastest.
template <int kSlots>
struct Layout {
  int dims = 0;
  unsigned contiguous = 0;  // bit k: in slot k, offset = element number
  Divider period;  // of kRepeat
  bool units_differ = false;  // there is a kPerUnit
  Divider size[kMaxDims];
  int64_t stride[kMaxDims][kSlots];
  Array array[kSlots];
  Place place[kSlots] = {};

  __device__ __forceinline__ int64_t offset(int slot, int64_t number) const {
    if (contiguous >> slot & 1) return number;
    int64_t offset = 0;
    for (int dim = dims - 1; dim > 0; --dim) {
      const int64_t outer = size[dim].quotient(number);
      offset += (number - outer * size[dim].size) * stride[dim][slot];
      number = outer;
    }
    return offset + number * stride[0][slot];
  }

  // Where a group lies in a tensor that is contiguous or repeats.
  __device__ __forceinline__ int64_t vector_offset(Place place, int64_t number) const {
    if (place != kRepeat || period.size == 1) return number;  // the second says nothing new, but saves a register
    return number - period.quotient(number) * period.size;
  }

  // Adds to the offsets of all slots, over dimensions [low, high) alone.
  __device__ __forceinline__ void add_offsets(int64_t number, int low, int high, int64_t (&offset)[kSlots]) const {
    for (int dim = high - 1; dim >= low; --dim) {
      const int64_t outer = dim == low ? 0 : size[dim].quotient(number);
      const int64_t index = number - outer * size[dim].size;
      ELBO_UNROLL
      for (int k = 0; k < kSlots; ++k) offset[k] += index * stride[dim][k];
      number = outer;
    }
  }
};

// Tensors are dense for a kernel if they are read as vectors or are one number, for all or for a unit.
__host__ __device__ __forceinline__ bool reads_vectors(Place place) { return place == kContiguous || place == kRepeat; }
inline bool is_dense(Place place) { return place <= kUniform || reads_vectors(place) || place == kPerUnit; }

template <int kWidth>
constexpr unsigned kAllMembers = (1u << kWidth) - 1;

// Reads a group in two steps, so that several tensors are in flight at once: begin() loads, finish() converts. What is
// one element for all, or a constant, is for the caller to know.
template <class R, int kWidth, int kSlots>
struct AnyGroup {
  Raw<R, kWidth> raw;  // a vector, or else one element in each sizeof(R) bytes

  // Elements of the group that belong to [first, end): bit i for element i.
  static __device__ __forceinline__ unsigned members(int64_t group, int64_t first, int64_t end) {
    unsigned mask = 0;
    ELBO_UNROLL
    for (int i = 0; i < kWidth; ++i) mask |= (group + i >= first && group + i < end ? 1u : 0u) << i;
    return mask;
  }

  static __device__ __forceinline__ Place place_of(const Layout<kSlots>& layout, int slot, unsigned mask) {
    const Place place = layout.place[slot];
    return place > kUniform && mask != kAllMembers<kWidth> ? kScattered : place;  // no access beyond the end
  }
  static __device__ __forceinline__ bool is_vector(Place place) {
    return place == kContiguous || place == kRun || place == kRepeat;
  }
  static __device__ __forceinline__ int64_t vector_offset(const Layout<kSlots>& layout, int slot, int64_t group,
                                                          Place place) {
    return place == kRun ? layout.offset(slot, group) : layout.vector_offset(place, group);
  }

  // `base` is added to all offsets: the beginning of a sample.
  __device__ __forceinline__ void begin(const Layout<kSlots>& layout, int slot, int64_t group, unsigned mask,
                                        int64_t base = 0) {
    const Place place = place_of(layout, slot, mask);
    if (place <= kUniform) return;
    const Array& array = layout.array[slot];
    if (is_vector(place)) {
      raw = load<R, kWidth>(array, base + vector_offset(layout, slot, group, place));
      return;
    }
    int64_t offset[kWidth];
    offsets(layout, slot, group, place, base, offset);
    raw = load_scattered<R, kWidth>(array, offset, mask);
  }

  __device__ __forceinline__ void finish(const Layout<kSlots>& layout, int slot, unsigned mask, R* to, R uniform) const {
    const Place place = place_of(layout, slot, mask);
    const DType dtype = layout.array[slot].dtype;
    if (is_vector(place)) {
      convert<R, kWidth>(raw, dtype, to);
    } else if (place > kUniform) {
      convert_scattered<R, kWidth>(raw, dtype, to);
    } else {
      ELBO_UNROLL
      for (int i = 0; i < kWidth; ++i) to[i] = uniform;
    }
  }

  static __device__ __forceinline__ void store(const Layout<kSlots>& layout, int slot, int64_t group, unsigned mask,
                                               const R* from, int64_t base = 0) {
    const Array& array = layout.array[slot];
    const Place place = place_of(layout, slot, mask);
    if (is_vector(place))
      return store_vector<R, kWidth>(array, base + vector_offset(layout, slot, group, place), from);
    R rest[kWidth];
    ELBO_UNROLL
    for (int i = 0; i < kWidth; ++i) rest[i] = from[i];
    ELBO_NO_UNROLL
    for (int i = 0; i < kWidth; ++i) {
      if (mask >> i & 1) store_vector<R, 1>(array, base + layout.offset(slot, group + i), rest);
      ELBO_UNROLL
      for (int j = 0; j + 1 < kWidth; ++j) rest[j] = rest[j + 1];
    }
  }

 private:
  // A loop that is not unrolled, for its divisions; the results move through registers, which have no addresses.
  static __device__ __forceinline__ void offsets(const Layout<kSlots>& layout, int slot, int64_t group, Place place,
                                                 int64_t base, int64_t (&offset)[kWidth]) {
    const int64_t step = place == kStep ? layout.stride[layout.dims - 1][slot] : 0;
    int64_t next = 0;
    ELBO_NO_UNROLL
    for (int i = 0; i < kWidth; ++i) {
      next = i == 0 || place == kScattered ? base + layout.offset(slot, group + i) : next + step;
      ELBO_UNROLL
      for (int j = 0; j + 1 < kWidth; ++j) offset[j] = offset[j + 1];
      offset[kWidth - 1] = next;
    }
  }
};

// The same where units are whole groups and each tensor is_dense(): of those that have one element for a unit the caller
// knows it.
template <class R, int kWidth, int kSlots>
struct DenseGroup {
  Raw<R, kWidth> raw;

  static __device__ __forceinline__ unsigned members(int64_t, int64_t, int64_t) { return kAllMembers<kWidth>; }
  __device__ __forceinline__ void begin(const Layout<kSlots>& layout, int slot, int64_t group, unsigned, int64_t base = 0) {
    const Place place = layout.place[slot];
    if (reads_vectors(place)) raw = load<R, kWidth>(layout.array[slot], base + layout.vector_offset(place, group));
  }
  __device__ __forceinline__ void finish(const Layout<kSlots>& layout, int slot, unsigned, R* to, R uniform) const {
    if (reads_vectors(layout.place[slot])) return convert<R, kWidth>(raw, layout.array[slot].dtype, to);
    ELBO_UNROLL
    for (int i = 0; i < kWidth; ++i) to[i] = uniform;
  }
  static __device__ __forceinline__ void store(const Layout<kSlots>& layout, int slot, int64_t group, unsigned,
                                               const R* from, int64_t base = 0) {
    store_vector<R, kWidth>(layout.array[slot], base + group, from);
  }
};

// The number that a tensor of place kPerUnit has for the unit that begins with an element.
template <class R, int kSlots>
__device__ __forceinline__ R per_unit(const Layout<kSlots>& layout, int slot, int64_t first) {
  return read<R>(layout.array[slot], layout.offset(slot, first));
}

// What stands for all elements of a tensor that is no larger than one element, or absent.
template <class R, int kSlots>
__device__ __forceinline__ R uniform_number(const Layout<kSlots>& layout, int slot, double constant) {
  return layout.place[slot] == kUniform ? read<R>(layout.array[slot], 0) : static_cast<R>(constant);
}

// The gradient of a result, upstream * factor, if it is one number for all elements; else the factor, which those of single
// elements are still to be multiplied by.
template <class R, int kSlots>
__device__ __forceinline__ R uniform_upstream(const Layout<kSlots>& layout, int slot, double constant, double factor) {
  const Place place = layout.place[slot];
  if (place == kUniform) return static_cast<R>(read<double>(layout.array[slot], 0) * factor);
  return static_cast<R>(place > kUniform ? factor : constant);
}
// If it is one number for each unit.
template <class R, int kSlots>
__device__ __forceinline__ R per_unit_upstream(const Layout<kSlots>& layout, int slot, int64_t first, double factor) {
  return static_cast<R>(per_unit<double>(layout, slot, first) * factor);
}

// A thread of a kernel for any layout works on 16 bytes of the compute type at a time: on four floats or two doubles.
template <class R>
constexpr int kGroup = 16 / sizeof(R);

}  // namespace
}  // namespace elbo_ext
