// What the levels with AVX2 share: vectors of 8 floats, and rows rounded to int8.

constexpr int kLanes = 8;
constexpr int kTileRows = 6;       // 12 accumulators, 2 of the panel, 1 broadcast: 15 of 16 registers
constexpr int kGradientBlock = 6;
constexpr bool kHasLow = true;

#include "vector.inl"

inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline float sum(Vec a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)a), _mm256_extractf128_ps((__m256)a, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline Vec root(Vec a) { return (Vec)_mm256_sqrt_ps((__m256)a); }
inline uint32_t at_least(Vec a, Vec b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GE_OQ)));
}

inline int32_t append_lanes(float* upper, uint32_t* place, int32_t count, uint32_t mask, Vec values, uint32_t first) {
  return append_one_by_one(upper, place, count, mask, values, first);
}

#include "select.inl"
#include "linear.inl"
#include "product.inl"

inline Vec to_int8(Vec scaled, int8_t* out) {
  const __m256i whole = _mm256_cvtps_epi32((__m256)scaled);
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packs_epi16(halves, halves));
  return (Vec)_mm256_cvtepi32_ps(whole);
}

#include "int8.inl"

using Bf16Product = Fp32Product;

/// Products of fours summed into int32, unsigned by signed: rows of x are shifted by 128. `Unit` says how.
template <class Unit>
struct ShiftedInt8Product : Int8Rows<1> {
  static constexpr int kRows = kTileRows;
  static constexpr int64_t kSlice = 192;
  using Registers = NoRegisters;

  static void pack_tile(const uint32_t* rows, int64_t pitch, int64_t steps, uint32_t* out) {
    interleave<kRows>(rows, pitch, steps, 0x80808080, out);
  }

  static __attribute__((noinline)) void multiply(const uint32_t* tile, const uint32_t* panel, int64_t steps,
                                                 Vec (&sums)[kRows][2], bool resumes) {
    __m256i acc[kRows][2];
    begin_sums(acc, sums, resumes);
    const auto words = [](const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); };
    for (int64_t s = 0; s < steps; ++s, tile += kRows, panel += kPanel) {
      const __m256i w0 = words(panel), w1 = words(panel + kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const __m256i x = _mm256_set1_epi32(static_cast<int>(tile[r]));
        Unit::add(acc[r][0], x, w0);
        Unit::add(acc[r][1], x, w1);
      }
    }
    end_sums(acc, sums);
  }

  static inline __attribute__((always_inline)) void convert(Vec (&acc)[kRows][2], const PackedEncoder& packed,
                                                             int64_t first, const float* row_scale) {
    for (int v = 0; v < 2; ++v) {
      const __m256i offset = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed.offset + first + v * kLanes));
      const Vec scale = load(packed.scale + first + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const __m256i sums = _mm256_sub_epi32((__m256i)acc[r][v], offset);
        acc[r][v] = (Vec)_mm256_cvtepi32_ps(sums) * (scale * splat(row_scale[r]));
      }
    }
  }
};
