// Vectors of kWidth floats of the instruction set that this unit is compiled for, told by a macro
// of ours: g++ 12 defines no __AVX512F__ for `#pragma GCC target`. Included by kernels_<isa>.cpp
// after the pragma; everything is in the set's own namespace and `static`, so that the linker
// never serves one set's code to another.
#include "types.h"

namespace multiexit::cpu::ISA_NAMESPACE {

#if defined(MULTIEXIT_AVX512)
constexpr int64_t kWidth = 16;
#else
constexpr int64_t kWidth = 8;  // without AVX a pair of SSE registers
#endif

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef int32_t VecInt __attribute__((vector_size(kWidth * 4)));
typedef uint32_t VecBits __attribute__((vector_size(kWidth * 4)));
typedef uint16_t VecHalf __attribute__((vector_size(kWidth * 2)));

static inline Vec fill(float x) { return Vec{} + x; }

static inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

static inline Vec load(const BFloat16* p) {
  VecHalf half;
  __builtin_memcpy(&half, p, sizeof half);
  return (Vec)(__builtin_convertvector(half, VecBits) << 16);
}

static inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }

// Rounds to the nearest, ties to even; NaN stays NaN.
static inline void store(BFloat16* p, Vec v) {
  const VecBits bits = (VecBits)v;
  const VecBits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const VecHalf half = __builtin_convertvector(v != v ? (bits >> 16) | 0x40 : rounded, VecHalf);
  __builtin_memcpy(p, &half, sizeof half);
}

#if defined(MULTIEXIT_AVX512)
static inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
static inline Vec load(const Float16* p) {
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline void store(Float16* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, 0));
}
static inline float sum_of(Vec v) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)v),
                                    _mm512_extractf32x8_ps((__m512)v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// Four of the above at once, added in the same order.
static inline __m128 sums_of(Vec a, Vec b, Vec c, Vec d) {
  const auto halves = [](Vec x, Vec y) {
    return _mm512_add_ps(_mm512_shuffle_f32x4((__m512)x, (__m512)y, 0x44),
                         _mm512_shuffle_f32x4((__m512)x, (__m512)y, 0xee));
  };
  const __m512 ab = halves(a, b), cd = halves(c, d);
  const __m512 four = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88),
                                    _mm512_shuffle_f32x4(ab, cd, 0xdd));
  const __m512 two = _mm512_add_ps(four, _mm512_permute_ps(four, 0x4e));
  const __m512 one = _mm512_add_ps(two, _mm512_permute_ps(two, 0xb1));
  const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
  return _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, one));
}
#elif defined(MULTIEXIT_AVX2)
static inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
static inline Vec load(const Float16* p) {
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline void store(Float16* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, 0));
}
static inline float sum_of(Vec v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)v),
                                 _mm256_extractf128_ps((__m256)v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
#else
static inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
static inline float half_to_float(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, body = bits & 0x7fffu;
  float magnitude;
  // The exponent moves from bias 15 to 127; the product does the same for subnormal numbers.
  uint32_t wide = body << 13;
  __builtin_memcpy(&magnitude, &wide, 4);
  magnitude *= 0x1p112f;
  __builtin_memcpy(&wide, &magnitude, 4);
  if (body >= 0x7c00) wide |= 0x7f800000u;
  wide |= sign;
  __builtin_memcpy(&magnitude, &wide, 4);
  return magnitude;
}
static inline uint16_t float_to_half(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint16_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00;
  if (bits >= 0x477ff000u) return sign | 0x7c00;
  if (bits < 0x38800000u) {
    // Adding one half leaves the subnormal's bits, rounded by the hardware, at the low end.
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    __builtin_memcpy(&bits, &magnitude, 4);
    return sign | static_cast<uint16_t>(bits - 0x3f000000u);
  }
  return sign | static_cast<uint16_t>((bits - 0x38000000u + 0xfff + (bits >> 13 & 1)) >> 13);
}
static inline Vec load(const Float16* p) {
  Vec v;
  for (int64_t i = 0; i < kWidth; ++i) v[i] = half_to_float(p[i].bits);
  return v;
}
static inline void store(Float16* p, Vec v) {
  for (int64_t i = 0; i < kWidth; ++i) p[i].bits = float_to_half(v[i]);
}
static inline float sum_of(Vec v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}
#endif

// The first `count` < kWidth numbers, zeros behind them; nothing past them is read.
template <class T>
static inline Vec load_first(const T* p, int64_t count) {
  T room[kWidth] = {};
  __builtin_memcpy(room, p, count * sizeof(T));
  return load(room);
}

template <class T>
static inline void store_first(T* p, Vec v, int64_t count) {
  T room[kWidth];
  store(room, v);
  __builtin_memcpy(p, room, count * sizeof(T));
}

static inline float max_of(Vec v) {
  float best = v[0];
  for (int64_t i = 1; i < kWidth; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// e^x within 2 ulp; 0 below -87.3, where subnormal numbers begin; NaN stays NaN.
// Source: Cephes `expf`.
static inline Vec exp(Vec x) {
  const Vec low = fill(-87.33654f), high = fill(88.3762626647950f);
  Vec y = x > high ? high : x;
  y = y < low ? low : y;
  const Vec magic = fill(12582912.0f);
  const Vec n = fma(y, fill(1.44269504088896341f), magic) - magic;
  y = fma(n, fill(-0.693359375f), y);
  y = fma(n, fill(2.12194440e-4f), y);
  Vec p = fill(1.9875691500e-4f);
  p = fma(p, y, fill(1.3981999507e-3f));
  p = fma(p, y, fill(8.3334519073e-3f));
  p = fma(p, y, fill(4.1665795894e-2f));
  p = fma(p, y, fill(1.6666665459e-1f));
  p = fma(p, y, fill(5.0000001201e-1f));
  p = fma(p, y * y, y) + 1.0f;
  const VecInt exponent = (__builtin_convertvector(n, VecInt) + 127) << 23;
  const Vec result = p * (Vec)exponent;
  return x < low ? fill(0.0f) : x != x ? x : result;
}

// log x within 2 ulp for normal x > 0; a finite number for others, but NaN stays NaN.
// Source: Cephes `logf`.
static inline Vec log(Vec x) {
  const VecInt bits = (VecInt)x;
  const Vec half = (Vec)((bits & 0x7fffff) | 0x3f000000);
  const VecInt is_low = half < 0.707106781186547524f;
  const Vec n = __builtin_convertvector((bits >> 23 & 0xff) - 126 + is_low, Vec);
  const Vec y = (is_low ? half + half : half) - 1.0f, z = y * y;
  Vec p = fill(7.0376836292e-2f);
  p = fma(p, y, fill(-1.1514610310e-1f));
  p = fma(p, y, fill(1.1676998740e-1f));
  p = fma(p, y, fill(-1.2420140846e-1f));
  p = fma(p, y, fill(1.4249322787e-1f));
  p = fma(p, y, fill(-1.6668057665e-1f));
  p = fma(p, y, fill(2.0000714765e-1f));
  p = fma(p, y, fill(-2.4999993993e-1f));
  p = fma(p, y, fill(3.3333331174e-1f));
  p = fma(n, fill(-2.12194440e-4f), p * y * z);
  p = fma(z, fill(-0.5f), p) + y;
  const Vec result = fma(n, fill(0.693359375f), p);
  return x != x ? x : result;
}

}  // namespace multiexit::cpu::ISA_NAMESPACE
