// What the levels with AVX-512 share: vectors of 16 floats, and how a vector is rounded to bf16 and int8.

constexpr int kLanes = 16;
constexpr int kTileRows = 12;      // 24 accumulators, 2 of the panel, the rest for broadcasts: 32 registers
constexpr int kGradientBlock = 12; // vectors of encoder and decoder gradient held in registers at once
constexpr bool kHasLow = true;

#include "vector.inl"

inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline float sum(Vec a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256((__m512)a), _mm512_extractf32x8_ps((__m512)a, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline Vec root(Vec a) { return (Vec)_mm512_sqrt_ps((__m512)a); }
inline uint32_t at_least(Vec a, Vec b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ); }

inline int32_t append_lanes(float* upper, uint32_t* place, int32_t count, uint32_t mask, Vec values, uint32_t first) {
  const __mmask16 lanes = static_cast<__mmask16>(mask);
  const __m512i all = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(first)),
                                       _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  // Compressed in registers and stored whole: storing compressed is microcode on some CPUs, and there is room.
  _mm512_storeu_ps(upper + count, _mm512_maskz_compress_ps(lanes, (__m512)values));
  _mm512_storeu_si512(place + count, _mm512_maskz_compress_epi32(lanes, all));
  return count + __builtin_popcount(mask);
}

#include "select.inl"
#include "linear.inl"
#include "product.inl"

inline Vec to_bf16(Vec exact, uint16_t* out) {
  const __m256i half = (__m256i)_mm512_cvtneps_pbh((__m512)exact);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), half);
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
}

inline Vec to_int8(Vec scaled, int8_t* out) {
  const __m128i bytes = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32((__m512)scaled));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), bytes);
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}

#include "bf16.inl"
#include "int8.inl"

/// Integer sums less `offset`, in real units.
inline __attribute__((always_inline)) Vec real(Vec sums, __m512i offset, Vec scale) {
  return (Vec)_mm512_cvtepi32_ps(_mm512_sub_epi32((__m512i)sums, offset)) * scale;
}
