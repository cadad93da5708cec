// The level for ARM with matrix products of bf16 and int8 (bf16 and i8mm: Cortex-A710, Neoverse V1 and N2, Apple M2 and later).
#include "level.h"

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) && defined(__ARM_FEATURE_MATMUL_INT8)

#include <arm_neon.h>
#include <string.h>
#include <time.h>

#define MONOSEM_LEVEL neon_mmla
#define MONOSEM_LEVEL_NAME "neon-mmla"

namespace monosem::neon_mmla {
namespace {

constexpr bool kHasLow = true;

#include "neon.inl"

inline Vec to_bf16(Vec exact, uint16_t* out) {
  const uint16x4_t half = vreinterpret_u16_bf16(vcvt_bf16_f32((float32x4_t)exact));
  vst1_u16(out, half);
  return (Vec)vshll_n_u16(half, 16);
}

#include "bf16.inl"
#include "int8.inl"

/// A matrix instruction multiplies 2 rows by 2 latents along 2 words. Its sums are {row 0 latent 0, row 0 latent 1, row 1
/// latent 0, row 1 latent 1}, and a packed tile of rows is [steps / 2][kRows][2 words].
constexpr int64_t kWords = 2;

template <class Unit>
struct MatrixProduct {
  static constexpr int kRows = 8;  // 16 accumulators, 4 of the panel, the rest for rows
  static constexpr int64_t kSlice = 192;
  using Registers = NoRegisters;
  using Sums = typename Unit::Sums;

  static void pack_tile(const uint32_t* rows, int64_t pitch, int64_t steps, uint32_t* out) {
    for (int64_t s = 0; s < steps; s += kWords)
      for (int64_t r = 0; r < kRows; ++r, out += kWords) memcpy(out, rows + r * pitch + s, kWords * 4);
  }

  /// The first and the second halves of two vectors: from sums of two rows to those of two pairs of latents, and back.
  static inline __attribute__((always_inline)) void exchange(uint64x2_t& a, uint64x2_t& b) {
    const uint64x2_t first = vzip1q_u64(a, b);
    b = vzip2q_u64(a, b);
    a = first;
  }

  static __attribute__((noinline)) void multiply(const uint32_t* tile, const uint32_t* panel, int64_t steps,
                                                 Vec (&sums)[kRows][2], bool resumes) {
    Sums acc[kRows / 2][4];
#pragma GCC unroll 16
    for (int pair = 0; pair < kRows / 2; ++pair) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        uint64x2_t a{}, b{};
        if (resumes) {
          a = (uint64x2_t)sums[2 * pair][v], b = (uint64x2_t)sums[2 * pair + 1][v];
          exchange(a, b);
        }
        acc[pair][2 * v] = (Sums)a, acc[pair][2 * v + 1] = (Sums)b;
      }
    }
    for (int64_t s = 0; s < steps; s += kWords, tile += kRows * kWords, panel += kPanel * kWords) {
      const uint32x4_t even0 = vld1q_u32(panel), even1 = vld1q_u32(panel + kLanes);
      const uint32x4_t odd0 = vld1q_u32(panel + kPanel), odd1 = vld1q_u32(panel + kPanel + kLanes);
      const uint32x4_t latents[4] = {vzip1q_u32(even0, odd0), vzip2q_u32(even0, odd0), vzip1q_u32(even1, odd1),
                                     vzip2q_u32(even1, odd1)};
#pragma GCC unroll 16
      for (int pair = 0; pair < kRows / 2; ++pair) {
        const uint32x4_t rows = vld1q_u32(tile + pair * 2 * kWords);
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) acc[pair][v] = Unit::add(acc[pair][v], rows, latents[v]);
      }
    }
#pragma GCC unroll 16
    for (int pair = 0; pair < kRows / 2; ++pair) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        uint64x2_t a = (uint64x2_t)acc[pair][2 * v], b = (uint64x2_t)acc[pair][2 * v + 1];
        exchange(a, b);
        sums[2 * pair][v] = (Vec)a;
        sums[2 * pair + 1][v] = (Vec)b;
      }
    }
  }
};

/// Products of bf16 summed into fp32. bfmmla rounds to odd, with twice the error of rounding to nearest, but half as often
/// as numbers are added: the bound on a sum's rounding holds.
struct Bf16Unit {
  using Sums = float32x4_t;

  static inline __attribute__((always_inline)) Sums add(Sums sums, uint32x4_t rows, uint32x4_t latents) {
    return vbfmmlaq_f32(sums, vreinterpretq_bf16_u32(rows), vreinterpretq_bf16_u32(latents));
  }
};

struct Bf16Product : Bf16Rows<kWords>, MatrixProduct<Bf16Unit> {
  static inline void convert(Vec (&)[kRows][2], const PackedEncoder&, int64_t, const float*) {}
};

/// Products of int8 summed into int32.
struct Int8Unit {
  using Sums = int32x4_t;

  static inline __attribute__((always_inline)) Sums add(Sums sums, uint32x4_t rows, uint32x4_t latents) {
    return vmmlaq_s32(sums, vreinterpretq_s8_u32(rows), vreinterpretq_s8_u32(latents));
  }
};

struct Int8Product : Int8Rows<kWords>, MatrixProduct<Int8Unit> {
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
}  // namespace monosem::neon_mmla

const monosem::Level* monosem::level_neon_mmla() { return &neon_mmla::kLevel; }

#else

const monosem::Level* monosem::level_neon_mmla() { return nullptr; }

#endif
