// What the levels with AVX-512 share: vectors of 16 floats, and rows rounded to bf16 and int8.

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

/// Words of two bf16. `words` counts whole groups of kGroup: what lies behind d is zero.
template <int64_t kGroup>
struct Bf16Rows {
  static int64_t words(int64_t d) { return ((d + 1) / 2 + kGroup - 1) / kGroup * kGroup; }

  static void round(const float* row, int64_t d, uint32_t* words, RowBound& bound) {
    Vec squares{}, errors{};
    memset(words + d / 2, 0, static_cast<size_t>(Bf16Rows::words(d) - d / 2) * 4);
    each_vector(d, [&](int64_t t, auto at) {
      const __m512 exact = (__m512)at.load(row + t);
      const __m256i half = (__m256i)_mm512_cvtneps_pbh(exact);
      const __m512 rounded = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
      const Vec error = (Vec)_mm512_sub_ps(exact, rounded);
      squares = fma((Vec)rounded, (Vec)rounded, squares);
      errors = fma(error, error, errors);
      if (t + kLanes <= d) _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + t / 2), half);
      else memcpy(words + t / 2, &half, static_cast<size_t>(d - t) * 2);
    });
    bound = {norm_above(sum(squares), d), norm_above(sum(errors), d), 1.0f, 0};
  }
};

/// Words of four int8, in groups of kGroup likewise. Their bound is not one: operands are too coarse for Cauchy-Schwarz to
/// be of use. Rounding errors are taken as independent, and the interval as 8 of their standard deviations,
/// |error| / sqrt(D) each.
template <int64_t kGroup>
struct Int8Rows {
  static int64_t words(int64_t d) { return ((d + 3) / 4 + kGroup - 1) / kGroup * kGroup; }

  static void round(const float* row, int64_t d, uint32_t* words, RowBound& bound) {
    Vec largest{};
    each_vector(d, [&](int64_t t, auto at) {
      largest = (Vec)_mm512_max_ps((__m512)largest, _mm512_abs_ps((__m512)at.load(row + t)));
    });
    const float most = _mm512_reduce_max_ps((__m512)largest), scale = most / 127.0f;
    const Vec inverse = splat(scale > 0 ? 1.0f / scale : 0.0f), unit = splat(scale);
    Vec squares{}, errors{};
    __m512i total = _mm512_setzero_si512();
    int8_t* out = reinterpret_cast<int8_t*>(words);
    memset(words, 0, static_cast<size_t>(Int8Rows::words(d)) * 4);
    each_vector(d, [&](int64_t t, auto at) {
      const Vec exact = at.load(row + t);
      const __m512i whole = _mm512_cvtps_epi32((__m512)(exact * inverse));
      const __m128i bytes = _mm512_cvtsepi32_epi8(whole);
      const Vec error = exact - unit * (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
      squares = fma(exact, exact, squares);
      errors = fma(error, error, errors);
      total = _mm512_add_epi32(total, _mm512_cvtepi8_epi32(bytes));
      memcpy(out + t, &bytes, static_cast<size_t>(d - t < kLanes ? d - t : kLanes));
    });
    const float error = norm_above(sum(errors), d), deviations = 8.0f / __builtin_sqrtf(static_cast<float>(d));
    bound = {norm_above(sum(squares), d) + error, deviations < 1 ? deviations * error : error, scale,
             _mm512_reduce_add_epi32(total)};
  }

  /// Integer sums less `offset`, in real units.
  static inline __attribute__((always_inline)) Vec real(Vec sums, __m512i offset, Vec scale) {
    return (Vec)_mm512_cvtepi32_ps(_mm512_sub_epi32((__m512i)sums, offset)) * scale;
  }
};
