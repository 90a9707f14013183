// Vectors of the instruction set that is compiled for: GCC's and Clang's vector types, which have the operators of
// their elements, and the few operations that no operator expresses.
//
// QCOMPILE_AVX512 selects vectors of 64 bytes, QCOMPILE_VNNI the dot products of AVX512-VNNI, QCOMPILE_BF16 those of
// AVX512-BF16; without any: AVX2.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace qcompile {

#if defined(QCOMPILE_AVX512)
constexpr int kVectorBytes = 64;
#else
constexpr int kVectorBytes = 32;
#endif
constexpr int kLanes = kVectorBytes / 4;  // 32-bit numbers of a vector

template <class T, int bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(bytes), aligned(bytes)));
};
using Int8s = VectorOf<int8_t, kVectorBytes>::type;
using UInt8s = VectorOf<uint8_t, kVectorBytes>::type;
using Int16s = VectorOf<int16_t, kVectorBytes>::type;
using UInt16s = VectorOf<uint16_t, kVectorBytes>::type;
using Int32s = VectorOf<int32_t, kVectorBytes>::type;
using UInt64s = VectorOf<uint64_t, kVectorBytes>::type;
using UInt32s = VectorOf<uint32_t, kVectorBytes>::type;
using Floats = VectorOf<float, kVectorBytes>::type;
using HalfWidth = VectorOf<uint16_t, kVectorBytes / 2>::type;     // one 16-bit number for each lane
using QuarterWidth = VectorOf<int8_t, kVectorBytes / 4>::type;    // one 8-bit number for each lane

template <class Vector>
inline Vector load(const void* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class Vector>
inline void store(void* to, Vector v) {
  std::memcpy(to, &v, sizeof v);
}

// ------------------------------------------------------------------------------------------------------ dot products

// sum[lane] + w[2 lane] x[2 lane] + w[2 lane + 1] x[2 lane + 1], exact for |w x| < 2^30
inline Int32s dot_16(Int32s sum, Int16s w, Int16s x) {
#if defined(QCOMPILE_VNNI)
  return (Int32s)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
#elif defined(QCOMPILE_AVX512)
  return sum + (Int32s)_mm512_madd_epi16((__m512i)w, (__m512i)x);
#else
  return sum + (Int32s)_mm256_madd_epi16((__m256i)w, (__m256i)x);
#endif
}

#if defined(QCOMPILE_VNNI)
// sum[lane] plus the four products of bytes 4 lane + i
inline Int32s dot_8(Int32s sum, Int8s a, UInt8s b) {
  return (Int32s)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)b, (__m512i)a);
}
#endif

// ------------------------------------------------------------------------------------------------------- conversions

inline Int32s round_to_ints(Floats v) {  // half to even; what does not fit becomes the smallest number
#if defined(QCOMPILE_AVX512)
  return (Int32s)_mm512_cvtps_epi32((__m512)v);
#else
  return (Int32s)_mm256_cvtps_epi32((__m256)v);
#endif
}

inline Floats to_floats(Int32s v) { return __builtin_convertvector(v, Floats); }

inline Floats from_float16(HalfWidth v) {
#if defined(QCOMPILE_AVX512)
  return (Floats)_mm512_cvtph_ps((__m256i)v);
#else
  return (Floats)_mm256_cvtph_ps((__m128i)v);
#endif
}

inline HalfWidth to_float16(Floats v) {
#if defined(QCOMPILE_AVX512)
  return (HalfWidth)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#else
  return (HalfWidth)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#endif
}

inline Floats from_bfloat16(HalfWidth v) { return (Floats)(__builtin_convertvector(v, UInt32s) << 16); }

inline HalfWidth to_bfloat16(Floats v) {  // to nearest, half to even; NaN stays NaN
  const UInt32s bits = (UInt32s)v;
  const UInt32s rounded = (bits + (0x7fff + ((bits >> 16) & 1))) >> 16;
  return __builtin_convertvector(v == v ? rounded : bits >> 16 | 0x40, HalfWidth);
}

// Two bfloat16 in each lane, `low` in its lower half: to nearest, half away from zero
inline UInt32s pair_of_bfloat16(Floats low, Floats high) {
  return ((UInt32s)low + 0x8000) >> 16 | (((UInt32s)high + 0x8000) & 0xffff0000);
}

// ------------------------------------------------------------------------------------------------------------ of floats

inline float total(Floats v) {
#if defined(QCOMPILE_AVX512)
  return _mm512_reduce_add_ps((__m512)v);
#else
  const __m128 halves = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 pairs = _mm_add_ps(halves, _mm_movehl_ps(halves, halves));
  return _mm_cvtss_f32(_mm_add_ss(pairs, _mm_movehdup_ps(pairs)));
#endif
}

// e^v for v <= 0, 0 below -87, NaN of NaN; relative error 2e-7: 2^n times the Taylor polynomial of what is left, which is
// at most ln 2 / 2
inline Floats exp_of(Floats v) {
  constexpr float kLeast = -87, kHigh = 0.693359375f, kLow = -2.12194440e-4f;  // ln 2 in two parts, the first exact
  const Floats bounded = v < kLeast ? kLeast + Floats{} : v;
  const Int32s n = round_to_ints(bounded * 1.44269504f);
  const Floats x = bounded - to_floats(n) * kHigh - to_floats(n) * kLow;
  Floats sum = x * (1.f / 5040) + 1.f / 720;
  sum = sum * x + 1.f / 120;
  sum = sum * x + 1.f / 24;
  sum = sum * x + 1.f / 6;
  sum = sum * x + 0.5f;
  sum = sum * x + 1.f;
  sum = sum * x + 1.f;
  return v < kLeast ? Floats{} : sum * (Floats)((n + 127) << 23);
}

// lane i gets v[i ^ bit]
inline Floats lanes_swapped(Floats v, int bit) {
  Int32s lanes = {};
  for (int i = 0; i < kLanes; ++i) lanes[i] = i ^ bit;
#if defined(QCOMPILE_AVX512)
  return (Floats)_mm512_permutexvar_ps((__m512i)lanes, (__m512)v);
#else
  return (Floats)_mm256_permutevar8x32_ps((__m256)v, (__m256i)lanes);
#endif
}

// A matrix of kLanes vectors, in place: the bit by which a row and a column differ is exchanged, one bit after the other
inline void transpose(Floats* rows) {
#pragma GCC unroll 4
  for (int bit = 1; bit < kLanes; bit *= 2) {
    Int32s odd = {};
    for (int i = 0; i < kLanes; ++i) odd[i] = i & bit ? -1 : 0;
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) {
      if (r & bit) continue;
      const Floats a = rows[r], b = rows[r + bit];
      rows[r] = odd ? lanes_swapped(b, bit) : a;
      rows[r + bit] = odd ? b : lanes_swapped(a, bit);
    }
  }
}

// -------------------------------------------------------------------------------------------- arrays of any float type

enum class Type { bfloat16, float16, float32 };

inline int64_t size_of(Type type) { return type == Type::float32 ? 4 : 2; }

// kLanes numbers of `type`
inline Floats load_floats(const void* from, Type type) {
  if (type == Type::float32) return load<Floats>(from);
  const auto bits = load<HalfWidth>(from);
  return type == Type::bfloat16 ? from_bfloat16(bits) : from_float16(bits);
}

inline void store_floats(void* to, Type type, Floats v) {
  if (type == Type::float32) return store(to, v);
  store(to, type == Type::bfloat16 ? to_bfloat16(v) : to_float16(v));
}

}  // namespace qcompile
