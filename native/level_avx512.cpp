// The level for AVX-512 with dot products of bf16 and int8 (Zen 4, Sapphire Rapids and later).
#include "level.h"

#if defined(__AVX512F__) && defined(__AVX512BF16__) && defined(__AVX512VNNI__)

#include <immintrin.h>
#include <string.h>
#include <time.h>

#define MONOSEM_LEVEL avx512
#define MONOSEM_LEVEL_NAME "avx512"

namespace monosem::avx512 {
namespace {

#include "avx512.inl"

/// Products of pairs summed into fp32 by vdpbf16ps.
struct Bf16Product : Bf16Rows<1> {
  static constexpr int kRows = kTileRows;
  static constexpr int64_t kSlice = 192;
  using Registers = NoRegisters;

  static void pack_tile(const uint32_t* rows, int64_t pitch, int64_t steps, uint32_t* out) {
    interleave<kRows>(rows, pitch, steps, 0, out);
  }

  static inline void convert(Vec (&)[kRows][2], const PackedEncoder&, int64_t, const float*) {}

  static __attribute__((noinline)) void multiply(const uint32_t* tile, const uint32_t* panel, int64_t steps,
                                                 Vec (&sums)[kRows][2], bool resumes) {
    __m512 acc[kRows][2];
    begin_sums(acc, sums, resumes);
    for (int64_t s = 0; s < steps; ++s, tile += kRows, panel += kPanel) {
      const __m512bh w0 = (__m512bh)_mm512_loadu_si512(panel), w1 = (__m512bh)_mm512_loadu_si512(panel + kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const __m512bh x = (__m512bh)_mm512_set1_epi32(static_cast<int>(tile[r]));
        acc[r][0] = _mm512_dpbf16_ps(acc[r][0], x, w0);
        acc[r][1] = _mm512_dpbf16_ps(acc[r][1], x, w1);
      }
    }
    end_sums(acc, sums);
  }
};

/// Products of fours summed into int32 by vpdpbusd, which multiplies unsigned by signed: rows of x are shifted by 128.
struct Int8Product : Int8Rows<1> {
  static constexpr int kRows = kTileRows;
  static constexpr int64_t kSlice = 192;
  using Registers = NoRegisters;

  static void pack_tile(const uint32_t* rows, int64_t pitch, int64_t steps, uint32_t* out) {
    interleave<kRows>(rows, pitch, steps, 0x80808080, out);
  }

  static __attribute__((noinline)) void multiply(const uint32_t* tile, const uint32_t* panel, int64_t steps,
                                                 Vec (&sums)[kRows][2], bool resumes) {
    __m512i acc[kRows][2];
    begin_sums(acc, sums, resumes);
    for (int64_t s = 0; s < steps; ++s, tile += kRows, panel += kPanel) {
      const __m512i w0 = _mm512_loadu_si512(panel), w1 = _mm512_loadu_si512(panel + kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const __m512i x = _mm512_set1_epi32(static_cast<int>(tile[r]));
        // Written out because the compiler spills the accumulators of the intrinsic.
        asm("vpdpbusd %2, %1, %0" : "+v"(acc[r][0]) : "v"(x), "v"(w0));
        asm("vpdpbusd %2, %1, %0" : "+v"(acc[r][1]) : "v"(x), "v"(w1));
      }
    }
    end_sums(acc, sums);
  }

  static inline __attribute__((always_inline)) void convert(Vec (&acc)[kRows][2], const PackedEncoder& packed,
                                                             int64_t first, const float* row_scale) {
    for (int v = 0; v < 2; ++v) {
      const __m512i offset = _mm512_loadu_si512(packed.offset + first + v * kLanes);
      const Vec scale = load(packed.scale + first + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) acc[r][v] = real(acc[r][v], offset, scale * splat(row_scale[r]));
    }
  }
};

#include "sweep.inl"
#include "rows.inl"
#include "latents.inl"
#include "update.inl"
#include "level_table.inl"

}  // namespace
}  // namespace monosem::avx512

const monosem::Level* monosem::level_avx512() { return &avx512::kLevel; }

#else

const monosem::Level* monosem::level_avx512() { return nullptr; }

#endif
