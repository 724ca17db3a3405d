// V neighbouring elements of a tensor of any dtype, in one access where V of them fill 1, 2, 4, 8 or 16 bytes. The dtype
// is a number that all threads share, not a template argument: a branch on it costs next to nothing compared to the access,
// and saves the kernels a copy for every combination of dtypes. Reading is apart from converting, so that the accesses
// of several tensors are in flight before the first of them is waited for.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "device.cuh"

namespace elbo_ext {
namespace {

// As much of a tensor as a kernel needs to reach an element by its offset.
struct Array {
  char* data;
  DType dtype;
};

// What V elements take, as they lie in memory. Eight floats at once are never read: with eight, all tensors are of half
// precision (see lay_out in term_sum.cu).
template <class R, int V>
struct Raw {
  static constexpr int kBytes = V * (V == 8 ? 2 : static_cast<int>(sizeof(R)));
  uint32_t word[(kBytes + 3) / 4];
};

// Most data is read once, and should not displace other data in the caches. None of these loads is one of ld.global.nc
// (__ldg), which may only read what its kernel does not write: stored gradients are multiplied in place (stored_gradients.cu).
template <int kBytes>
__device__ __forceinline__ void load_bytes(const char* from, uint32_t* word) {
  if constexpr (kBytes > 16) {
    load_bytes<16>(from, word);
    load_bytes<kBytes - 16>(from + 16, word + 4);
  } else if constexpr (kBytes == 16) {
    const uint4* at = reinterpret_cast<const uint4*>(from);
    const uint4 w = __ldcs(at);
    word[0] = w.x, word[1] = w.y, word[2] = w.z, word[3] = w.w;
  } else if constexpr (kBytes == 8) {
    const uint2* at = reinterpret_cast<const uint2*>(from);
    const uint2 w = __ldcs(at);
    word[0] = w.x, word[1] = w.y;
  } else if constexpr (kBytes == 4) {
    const uint32_t* at = reinterpret_cast<const uint32_t*>(from);
    word[0] = __ldcs(at);
  } else if constexpr (kBytes == 2) {
    word[0] = *reinterpret_cast<const uint16_t*>(from);
  } else {
    word[0] = *reinterpret_cast<const uint8_t*>(from);
  }
}

template <int kBytes>
__device__ __forceinline__ void store_bytes(char* to, const uint32_t* word) {
  if constexpr (kBytes > 16) {
    store_bytes<16>(to, word);
    store_bytes<kBytes - 16>(to + 16, word + 4);
  } else if constexpr (kBytes == 16) {
    __stcs(reinterpret_cast<uint4*>(to), make_uint4(word[0], word[1], word[2], word[3]));
  } else if constexpr (kBytes == 8) {
    __stcs(reinterpret_cast<uint2*>(to), make_uint2(word[0], word[1]));
  } else if constexpr (kBytes == 4) {
    __stcs(reinterpret_cast<uint32_t*>(to), word[0]);
  } else {
    *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(word[0]);
  }
}

template <class R, int V>
__device__ __forceinline__ Raw<R, V> load(const Array& array, int64_t offset) {
  Raw<R, V> raw;
  if constexpr (V == 8) {
    load_bytes<16>(array.data + 2 * offset, raw.word);
  } else {
    switch (array.dtype) {
      case DType::kDouble:
        if constexpr (sizeof(R) == 8) load_bytes<8 * V>(array.data + 8 * offset, raw.word);
        break;
      case DType::kFloat: load_bytes<4 * V>(array.data + 4 * offset, raw.word); break;
      case DType::kBool: load_bytes<V>(array.data + offset, raw.word); break;
      default: load_bytes<2 * V>(array.data + 2 * offset, raw.word); break;
    }
  }
  return raw;
}

// A vector of integers, as numbers of the compute type: what four of them are is not in every word of Raw.
template <class R, int V>
__device__ __forceinline__ void put_number(Raw<R, V>& raw, int i, R number) {
  if constexpr (sizeof(R) == 8) {
    raw.word[2 * i] = __double2loint(number);
    raw.word[2 * i + 1] = __double2hiint(number);
  } else {
    raw.word[i] = __float_as_uint(number);
  }
}
template <class R>
__device__ __forceinline__ DType dtype_in_registers(DType dtype) {
  return is_integer(dtype) ? (sizeof(R) == 8 ? DType::kDouble : DType::kFloat) : dtype;
}
__device__ __forceinline__ int64_t read_integer(const Array& array, int64_t offset) {
  switch (array.dtype) {
    case DType::kUInt8: return __ldg(reinterpret_cast<const uint8_t*>(array.data) + offset);
    case DType::kInt8: return __ldg(reinterpret_cast<const signed char*>(array.data) + offset);
    case DType::kInt16: return __ldg(reinterpret_cast<const int16_t*>(array.data) + offset);
    case DType::kInt32: return __ldg(reinterpret_cast<const int32_t*>(array.data) + offset);
    default: return __ldg(reinterpret_cast<const long long*>(array.data) + offset);
  }
}
// V neighbours of any dtype that data may have. Their dtype_in_registers() is what convert() takes.
template <class R, int V>
__device__ __forceinline__ Raw<R, V> load_data(const Array& array, int64_t offset) {
  if (V == 8 || !is_integer(array.dtype)) return load<R, V>(array, offset);
  Raw<R, V> raw = {};
  if constexpr (V != 8) {
    const auto load_as = [&](auto integer) {
      using I = decltype(integer);
      uint32_t word[(V * sizeof(I) + 3) / 4];
      load_bytes<V* static_cast<int>(sizeof(I))>(array.data + static_cast<int>(sizeof(I)) * offset, word);
      ELBO_UNROLL
      for (int i = 0; i < V; ++i) {
        if constexpr (sizeof(I) == 8)
          put_number<R, V>(raw, i, static_cast<R>(static_cast<I>(static_cast<uint64_t>(word[2 * i + 1]) << 32 | word[2 * i])));
        else
          put_number<R, V>(raw, i, static_cast<R>(static_cast<I>(word[i * sizeof(I) / 4] >> (8 * (i * sizeof(I) % 4)))));
      }
    };
    switch (array.dtype) {
      case DType::kUInt8: load_as(uint8_t{}); break;
      case DType::kInt8: load_as(int8_t{}); break;
      case DType::kInt16: load_as(int16_t{}); break;
      case DType::kInt32: load_as(int32_t{}); break;
      default: load_as(int64_t{}); break;
    }
  }
  return raw;
}

// Elements that lie apart, each into sizeof(R) bytes of its own; those outside of the mask are not touched.
template <class R, int V>
__device__ __forceinline__ Raw<R, V> load_scattered(const Array& array, const int64_t (&offset)[V], unsigned mask) {
  constexpr int kWords = sizeof(R) / 4;
  Raw<R, V> raw = {};
  const auto load_as = [&](auto bits) {
    ELBO_UNROLL
    for (int i = 0; i < V; ++i)
      if (mask >> i & 1) raw.word[kWords * i] = __ldg(reinterpret_cast<const decltype(bits)*>(array.data) + offset[i]);
  };
  switch (array.dtype) {
    case DType::kDouble:
      ELBO_UNROLL
      for (int i = 0; i < V; ++i) {
        if (!(mask >> i & 1)) continue;
        const double number = __ldg(reinterpret_cast<const double*>(array.data) + offset[i]);
        if constexpr (sizeof(R) == 8) {
          raw.word[2 * i] = __double2loint(number), raw.word[2 * i + 1] = __double2hiint(number);
        } else {
          // Only noise that the caller gave: too rare for room of its own.
          raw.word[i] = __float_as_uint(static_cast<float>(number));
        }
      }
      break;
    case DType::kFloat: load_as(uint32_t{}); break;
    case DType::kBool: load_as(uint8_t{}); break;
    case DType::kBFloat16:
    case DType::kHalf: load_as(uint16_t{}); break;
    default:
      ELBO_UNROLL
      for (int i = 0; i < V; ++i)
        if (mask >> i & 1) put_number<R, V>(raw, i, static_cast<R>(read_integer(array, offset[i])));
  }
  return raw;
}

template <class Two>
__device__ __forceinline__ uint32_t bits_of(Two two) {
  uint32_t bits;
  static_assert(sizeof two == sizeof bits);
  memcpy(&bits, &two, sizeof bits);
  return bits;
}

__device__ __forceinline__ float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }

// Element i of a vector that is stored in half the bits of its number type, two to a word.
__device__ __forceinline__ uint32_t half_bits(const uint32_t* word, int i) {
  return i % 2 == 0 ? word[i / 2] & 0xFFFFu : word[i / 2] >> 16;
}

// Elements [first, first + count) of a vector, in the compute type. What is none of the first dtypes is the last one.
template <class R, int V, int first = 0, int count = V>
__device__ __forceinline__ void convert(const Raw<R, V>& raw, DType dtype, R* to) {
  if (dtype == DType::kBFloat16) {
    ELBO_UNROLL
    for (int i = first; i < first + count; ++i)
      to[i - first] = bits_to_float(i % 2 == 0 ? raw.word[i / 2] << 16 : raw.word[i / 2] & 0xFFFF0000u);
  } else if (V == 8 || dtype == DType::kHalf) {
    ELBO_UNROLL
    for (int i = first; i < first + count; ++i)
      to[i - first] = __half2float(__ushort_as_half(static_cast<uint16_t>(half_bits(raw.word, i))));
  } else if constexpr (V != 8) {
    if (dtype == DType::kBool) {
      ELBO_UNROLL
      for (int i = first; i < first + count; ++i)
        to[i - first] = (raw.word[i / 4] >> (8 * (i % 4)) & 0xFFu) != 0 ? R(1) : R(0);
    } else if (sizeof(R) == 4 || dtype == DType::kFloat) {
      ELBO_UNROLL
      for (int i = first; i < first + count; ++i) to[i - first] = bits_to_float(raw.word[i]);
    } else if constexpr (sizeof(R) == 8) {
      ELBO_UNROLL
      for (int i = first; i < first + count; ++i)
        to[i - first] = __hiloint2double(raw.word[2 * i + 1], raw.word[2 * i]);
    }
  }
}

template <class R, int V>
__device__ __forceinline__ void convert_scattered(const Raw<R, V>& raw, DType in_memory, R* to) {
  const DType dtype = dtype_in_registers<R>(in_memory);
  ELBO_UNROLL
  for (int i = 0; i < V; ++i) {
    const uint32_t word = raw.word[sizeof(R) / 4 * i];
    switch (dtype) {
      case DType::kBFloat16: to[i] = bits_to_float(word << 16); break;
      case DType::kHalf: to[i] = __half2float(__ushort_as_half(static_cast<uint16_t>(word))); break;
      case DType::kBool: to[i] = word != 0 ? R(1) : R(0); break;
      case DType::kDouble:
        if constexpr (sizeof(R) == 8) {
          to[i] = __hiloint2double(raw.word[2 * i + 1], word);
          break;
        }
        [[fallthrough]];
      default: to[i] = bits_to_float(word);
    }
  }
}

// ... and back.
template <class R, int V, int first = 0, int count = V>
__device__ __forceinline__ void pack(const R* from, DType dtype, Raw<R, V>& raw) {
  if (V != 8 && dtype == DType::kFloat) {
    if constexpr (V != 8) {
      ELBO_UNROLL
      for (int i = 0; i < count; ++i) raw.word[first + i] = __float_as_uint(static_cast<float>(from[i]));
    }
  } else if (V != 8 && dtype == DType::kDouble) {
    if constexpr (sizeof(R) == 8) {
      ELBO_UNROLL
      for (int i = 0; i < count; ++i) {
        raw.word[2 * (first + i)] = __double2loint(from[i]);
        raw.word[2 * (first + i) + 1] = __double2hiint(from[i]);
      }
    }
  } else {
    static_assert(count % 2 == 0 || count == 1);
    const auto pack_as = [&](auto convert) {
      ELBO_UNROLL
      for (int i = 0; i < count; i += 2)
        raw.word[(first + i) / 2] =
            convert(static_cast<float>(from[i]), count == 1 ? 0.f : static_cast<float>(from[(i + 1) % count]));
    };
    if (dtype == DType::kBFloat16) pack_as([](float low, float high) { return bits_of(__floats2bfloat162_rn(low, high)); });
    else pack_as([](float low, float high) { return bits_of(__floats2half2_rn(low, high)); });
  }
}

template <class R, int V>
__device__ __forceinline__ void store_raw(const Array& array, int64_t offset, const Raw<R, V>& raw) {
  if constexpr (V == 8) {
    store_bytes<16>(array.data + 2 * offset, raw.word);
  } else {
    switch (array.dtype) {
      case DType::kDouble:
        if constexpr (sizeof(R) == 8) store_bytes<8 * V>(array.data + 8 * offset, raw.word);
        break;
      case DType::kFloat: store_bytes<4 * V>(array.data + 4 * offset, raw.word); break;
      default: store_bytes<2 * V>(array.data + 2 * offset, raw.word); break;
    }
  }
}

template <class R, int V>
__device__ __forceinline__ void store_vector(const Array& array, int64_t offset, const R* from) {
  if constexpr (V == 1 && sizeof(R) == 4) {
    if (array.dtype == DType::kDouble) {  // the gradient of given noise: see load_scattered
      reinterpret_cast<double*>(array.data)[offset] = static_cast<double>(*from);
      return;
    }
  }
  Raw<R, V> raw;
  pack<R, V>(from, array.dtype, raw);
  store_raw<R, V>(array, offset, raw);
}

// One element, where a kernel wants no more. Also a double for a kernel that computes in float.
template <class R>
__device__ __forceinline__ R read(const Array& array, int64_t offset) {
  if (array.dtype == DType::kDouble) return static_cast<R>(__ldg(reinterpret_cast<const double*>(array.data) + offset));
  if (is_integer(array.dtype)) return static_cast<R>(read_integer(array, offset));
  R number = R(0);
  convert<R, 1>(load<R, 1>(array, offset), array.dtype, &number);
  return number;
}

// A single result. All results are made in double.
__device__ __forceinline__ void write(const Array& array, int64_t index, double number) {
  store_vector<double, 1>(array, index, &number);
}

}  // namespace
}  // namespace elbo_ext
