// What the levels of 64-bit ARM share: vectors of four floats, and products whose rows lie in the lanes of a vector.

constexpr int kLanes = 4;
constexpr int kTileRows = 12;      // 24 accumulators, 2 of the panel, 3 of the rows: 29 of 32 registers
constexpr int kGradientBlock = 12; // vectors of encoder and decoder gradient held in registers at once

#include "vector.inl"

inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
inline float sum(Vec a) {
  return vpadds_f32(vadd_f32(vget_low_f32((float32x4_t)a), vget_high_f32((float32x4_t)a)));
}
inline Vec root(Vec a) { return (Vec)vsqrtq_f32((float32x4_t)a); }
inline uint32_t at_least(Vec a, Vec b) {
  constexpr uint32x4_t kBits = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32(vcgeq_f32((float32x4_t)a, (float32x4_t)b), kBits));
}

inline int32_t append_lanes(float* upper, uint32_t* place, int32_t count, uint32_t mask, Vec values, uint32_t first) {
  return append_one_by_one(upper, place, count, mask, values, first);
}

/// acc[r][v] += x[r] w[v] for four rows r, in the lanes of x: Unit::add<lane>(sums, latents, rows).
template <class Unit, class Sums, class Words>
inline __attribute__((always_inline)) void add_four_rows(Sums (*acc)[2], Words x, Words w0, Words w1) {
  acc[0][0] = Unit::template add<0>(acc[0][0], w0, x);
  acc[0][1] = Unit::template add<0>(acc[0][1], w1, x);
  acc[1][0] = Unit::template add<1>(acc[1][0], w0, x);
  acc[1][1] = Unit::template add<1>(acc[1][1], w1, x);
  acc[2][0] = Unit::template add<2>(acc[2][0], w0, x);
  acc[2][1] = Unit::template add<2>(acc[2][1], w1, x);
  acc[3][0] = Unit::template add<3>(acc[3][0], w0, x);
  acc[3][1] = Unit::template add<3>(acc[3][1], w1, x);
}

struct Fp32Unit {
  template <int kLane>
  static inline __attribute__((always_inline)) Vec add(Vec sums, Vec latents, Vec rows) {
    return (Vec)vfmaq_laneq_f32((float32x4_t)sums, (float32x4_t)latents, (float32x4_t)rows, kLane);
  }
};

/// In place of broadcasts from memory, which take one of the vector units on many cores.
inline __attribute__((always_inline)) void add_products(Vec (&acc)[kTileRows][2], const float* x, Vec w0, Vec w1) {
#pragma GCC unroll 3
  for (int r = 0; r < kTileRows; r += kLanes) add_four_rows<Fp32Unit>(acc + r, load(x + r), w0, w1);
}

#include "select.inl"
#include "linear.inl"
#include "product.inl"

inline Vec to_int8(Vec scaled, int8_t* out) {
  const int16x4_t narrow = vqmovn_s32(vcvtnq_s32_f32((float32x4_t)scaled));
  const int8x8_t bytes = vqmovn_s16(vcombine_s16(narrow, narrow));
  memcpy(out, &bytes, 4);
  return (Vec)vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))));
}

/// Integer sums in real units: what int8 products do once all words are summed.
template <int kRows>
inline __attribute__((always_inline)) void convert_integers(Vec (&acc)[kRows][2], const PackedEncoder& packed,
                                                            int64_t first, const float* row_scale) {
  for (int v = 0; v < 2; ++v) {
    const Vec scale = load(packed.scale + first + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
      acc[r][v] = (Vec)vcvtq_f32_s32((int32x4_t)acc[r][v]) * (scale * splat(row_scale[r]));
  }
}
