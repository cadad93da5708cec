// The level for ARM with dot products of int8 (asimddp: Cortex-A76, Neoverse N1, Apple M1 and later). bf16 runs as fp32.
#include "level.h"

#if defined(__ARM_FEATURE_DOTPROD)

#include <arm_neon.h>
#include <string.h>
#include <time.h>

#define MONOSEM_LEVEL neon_dot
#define MONOSEM_LEVEL_NAME "neon-dot"

namespace monosem::neon_dot {
namespace {

constexpr bool kHasLow = true;

#include "neon.inl"
#include "int8.inl"

using Bf16Product = Fp32Product;

/// Products of fours summed into int32 by sdot.
struct Int8Product : Int8Rows<1> {
  static constexpr int kRows = kTileRows;
  static constexpr int64_t kSlice = 192;
  using Registers = NoRegisters;

  struct Unit {
    template <int kLane>
    static inline __attribute__((always_inline)) int32x4_t add(int32x4_t sums, int8x16_t latents, int8x16_t rows) {
      return vdotq_laneq_s32(sums, latents, rows, kLane);
    }
  };

  static void pack_tile(const uint32_t* rows, int64_t pitch, int64_t steps, uint32_t* out) {
    interleave<kRows>(rows, pitch, steps, 0, out);
  }

  static __attribute__((noinline)) void multiply(const uint32_t* tile, const uint32_t* panel, int64_t steps,
                                                 Vec (&sums)[kRows][2], bool resumes) {
    int32x4_t acc[kRows][2];
    begin_sums(acc, sums, resumes);
    const auto words = [](const uint32_t* p) { return vreinterpretq_s8_u32(vld1q_u32(p)); };
    for (int64_t s = 0; s < steps; ++s, tile += kRows, panel += kPanel) {
      const int8x16_t w0 = words(panel), w1 = words(panel + kLanes);
#pragma GCC unroll 3
      for (int r = 0; r < kRows; r += kLanes) add_four_rows<Unit>(acc + r, words(tile + r), w0, w1);
    }
    end_sums(acc, sums);
  }

  static inline void convert(Vec (&acc)[kRows][2], const PackedEncoder& packed, int64_t first, const float* row_scale) {
    convert_integers(acc, packed, first, row_scale);
  }
};

#include "sweep.inl"
#include "rows.inl"
#include "latents.inl"
#include "update.inl"
#include "level_table.inl"

}  // namespace
}  // namespace monosem::neon_dot

const monosem::Level* monosem::level_neon_dot() { return &neon_dot::kLevel; }

#else

const monosem::Level* monosem::level_neon_dot() { return nullptr; }

#endif
