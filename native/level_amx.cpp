// The level for AVX-512 with matrix tiles of bf16 and int8, AMX (Sapphire Rapids and later). All but the low-precision
// products is that of avx512, to the bit.
#include "level.h"

#if defined(__AVX512F__) && defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)

#include <immintrin.h>
#include <string.h>
#include <time.h>

#define MONOSEM_LEVEL amx
#define MONOSEM_LEVEL_NAME "amx"

namespace monosem::amx {
namespace {

#include "avx512.inl"

/// A step of the matrix unit multiplies 16 rows by 16 latents along 16 words. Its tiles: 0 to 3 accumulate 32 rows x 32
/// latents, 4 and 5 hold rows, 6 and 7 latents. A packed tile of rows is [steps / 16][32 rows][16 words].
constexpr int64_t kWords = 16;

struct TileRegisters {
  TileRegisters() {
    alignas(64) struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  TileRegisters(const TileRegisters&) = delete;
  ~TileRegisters() { _tile_release(); }
};

inline void pack_words(const uint32_t* rows, int64_t pitch, int64_t steps, uint32_t* out) {
  for (int64_t s = 0; s < steps; s += kWords)
    for (int64_t r = 0; r < 32; ++r, out += kWords) memcpy(out, rows + r * pitch + s, kWords * 4);
}

#define MONOSEM_MULTIPLY(instruction)                                                                               \
  static __attribute__((noinline)) void multiply(const uint32_t* tile, const uint32_t* panel, int64_t steps,        \
                                                 Vec (&acc)[kRows][2], bool resumes) {                              \
    asm volatile("" ::: "memory"); /* the intrinsics do not say that they read memory */                            \
    if (resumes) {                                                                                                  \
      _tile_loadd(0, acc[0], 128);                                                                                  \
      _tile_loadd(1, acc[0] + 1, 128);                                                                              \
      _tile_loadd(2, acc[16], 128);                                                                                 \
      _tile_loadd(3, acc[16] + 1, 128);                                                                             \
    } else {                                                                                                        \
      _tile_zero(0);                                                                                                \
      _tile_zero(1);                                                                                                \
      _tile_zero(2);                                                                                                \
      _tile_zero(3);                                                                                                \
    }                                                                                                               \
    for (int64_t s = 0; s < steps; s += kWords, tile += 32 * kWords, panel += kPanel * kWords) {                    \
      _tile_loadd(4, tile, 64);                                                                                     \
      _tile_loadd(6, panel, 128);                                                                                   \
      instruction(0, 4, 6);                                                                                         \
      _tile_loadd(7, panel + kLanes, 128);                                                                          \
      instruction(1, 4, 7);                                                                                         \
      _tile_loadd(5, tile + 16 * kWords, 64);                                                                       \
      instruction(2, 5, 6);                                                                                         \
      instruction(3, 5, 7);                                                                                         \
    }                                                                                                               \
    _tile_stored(0, acc[0], 128);                                                                                   \
    _tile_stored(1, acc[0] + 1, 128);                                                                               \
    _tile_stored(2, acc[16], 128);                                                                                  \
    _tile_stored(3, acc[16] + 1, 128);                                                                              \
  }

/// Products of pairs summed into fp32 by tdpbf16ps.
struct Bf16Product : Bf16Rows<kWords> {
  static constexpr int kRows = 32;
  static constexpr int64_t kSlice = 128;
  using Registers = TileRegisters;

  static void pack_tile(const uint32_t* rows, int64_t pitch, int64_t steps, uint32_t* out) {
    pack_words(rows, pitch, steps, out);
  }

  static inline void convert(Vec (&)[kRows][2], const PackedEncoder&, int64_t, const float*) {}

  MONOSEM_MULTIPLY(_tile_dpbf16ps)
};

/// Products of fours summed into int32 by tdpbssd.
struct Int8Product : Int8Rows<kWords> {
  static constexpr int kRows = 32;
  static constexpr int64_t kSlice = 128;
  using Registers = TileRegisters;

  static void pack_tile(const uint32_t* rows, int64_t pitch, int64_t steps, uint32_t* out) {
    pack_words(rows, pitch, steps, out);
  }

  static inline void convert(Vec (&acc)[kRows][2], const PackedEncoder& packed, int64_t first, const float* row_scale) {
    const Vec scale0 = load(packed.scale + first), scale1 = load(packed.scale + first + kLanes);
    for (int r = 0; r < kRows; ++r) {
      acc[r][0] = real(acc[r][0], _mm512_setzero_si512(), scale0 * splat(row_scale[r]));
      acc[r][1] = real(acc[r][1], _mm512_setzero_si512(), scale1 * splat(row_scale[r]));
    }
  }

  MONOSEM_MULTIPLY(_tile_dpbssd)
};

#undef MONOSEM_MULTIPLY

#include "sweep.inl"
#include "rows.inl"
#include "latents.inl"
#include "update.inl"
#include "level_table.inl"

}  // namespace
}  // namespace monosem::amx

const monosem::Level* monosem::level_amx() { return &amx::kLevel; }

#else

const monosem::Level* monosem::level_amx() { return nullptr; }

#endif
