// Half-precision numbers as 32-bit words of two, and floats in an order that integers keep.
#pragma once
#include "cuda/target.cuh"

namespace multiexit::cuda {

template <class Pair>
__device__ __forceinline__ uint32_t word_of(const Pair& pair) {
  return reinterpret_cast<const uint32_t&>(pair);
}

struct BFloat16 {
  static __device__ __forceinline__ float2 widen(uint32_t word) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
  }
  // Rounded to nearest, the first number in the lower half.
  static __device__ __forceinline__ uint32_t narrow(float first, float second) {
    return word_of(__floats2bfloat162_rn(first, second));
  }
};

struct Float16 {
  static __device__ __forceinline__ float2 widen(uint32_t word) {
    return __half22float2(reinterpret_cast<const __half2&>(word));
  }
  static __device__ __forceinline__ uint32_t narrow(float first, float second) {
    return word_of(__floats2half2_rn(first, second));
  }
};

// The number at `index` of an array.
template <class Number>
__device__ __forceinline__ float number_at(const void* numbers, int64_t index) {
  const uint32_t bits = static_cast<const uint16_t*>(numbers)[index];
  return Number::widen(bits).x;
}

template <class Number>
__device__ __forceinline__ void put_number(void* numbers, int64_t index, float value) {
  static_cast<uint16_t*>(numbers)[index] = static_cast<uint16_t>(Number::narrow(value, 0.0f));
}

// Greater floats have greater integers; 0 is below the integer of every number.
__device__ __forceinline__ uint32_t ordered(float number) {
  const uint32_t bits = __float_as_uint(number);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float from_ordered(uint32_t order) {
  return __uint_as_float(order & 0x80000000u ? order & 0x7fffffffu : ~order);
}

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

}  // namespace multiexit::cuda
