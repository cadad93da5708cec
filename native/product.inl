// The dense product rows x latents, tile by tile, in one of several precisions.
//
// A packed row is `steps` 32-bit words: one float (fp32), two bf16 or four int8 along D. Rows of x are packed into tiles
// of kRows, latents into panels of kPanel = 2 kLanes, step by step, so that the inner loop reads forward only. Steps are
// taken in slices, so that a panel's slice stays in L1 while the tiles pass.
// A product offers
//     kRows, kSlice, Registers           rows of a tile; steps of a slice; set up and released around a sweep
//     words(d)                           steps of a row of d numbers
//     round(row, d, words, bound)        packs one row and says what rounding it cost; round_latent, if it is there,
//                                        does so for latents
//     pack_tile(rows, pitch, steps, out) kRows packed rows as a tile
//     multiply(tile, panel, steps, sums, resumes)
//                                        sums[r][v] = the product of row r with latents v kLanes ... (v + 1) kLanes, and
//                                        what sums[r][v] was before if it `resumes`
//     convert(sums, packed, first, scale) sums in real units; int8 counts in products of the two scales

constexpr int64_t kPanel = 2 * kLanes;

/// The norms that bound the error of a product with this row.
struct RowBound {
  float norm;      // of the packed row
  float rounding;  // of (row - packed row)
  float scale;     // real value of one packed unit
  int32_t sum;     // int8: of the packed numbers
};

/// sqrt of a sum of d squares, made a little larger: an upper bound of the norm in spite of rounding and underflow.
inline float norm_above(float squares, int64_t d) {
  const float terms = static_cast<float>(d);
  return __builtin_sqrtf(squares + terms * 1.2e-38f) * (1.0f + (terms + 16.0f) * 0x1p-24f);
}

/// Words between the rows that wait to be packed: off the power of two, or they would share a few cache sets.
inline int64_t row_pitch(int64_t steps) { return (steps + 15) / 16 * 16 + 16; }

/// out[step][r] = rows[r][step] ^ flip.
template <int64_t kWidth>
void interleave(const uint32_t* rows, int64_t pitch, int64_t steps, uint32_t flip, uint32_t* out) {
  for (int64_t s = 0; s < steps; ++s)
    for (int64_t r = 0; r < kWidth; ++r) out[s * kWidth + r] = rows[r * pitch + s] ^ flip;
}

/// What a product needs of its thread while it runs: nothing, unless it says otherwise.
struct NoRegisters {
  NoRegisters() {}
  ~NoRegisters() {}
};

/// Accumulators of a register tile from the sums so far, and back.
template <class Lanes, int kRows>
inline __attribute__((always_inline)) void begin_sums(Lanes (&acc)[kRows][2], const Vec (&sums)[kRows][2], bool resumes) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    acc[r][0] = resumes ? (Lanes)sums[r][0] : Lanes{};
    acc[r][1] = resumes ? (Lanes)sums[r][1] : Lanes{};
  }
}
template <class Lanes, int kRows>
inline __attribute__((always_inline)) void end_sums(const Lanes (&acc)[kRows][2], Vec (&sums)[kRows][2]) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    sums[r][0] = (Vec)acc[r][0];
    sums[r][1] = (Vec)acc[r][1];
  }
}

/// acc[r][v] += x[r] w[v]. A level that has a better way of its own overloads it.
template <int kRows>
inline __attribute__((always_inline)) void add_products(Vec (&acc)[kRows][2], const float* x, Vec w0, Vec w1) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const Vec xr = splat(x[r]);
    acc[r][0] = fma(xr, w0, acc[r][0]);
    acc[r][1] = fma(xr, w1, acc[r][1]);
  }
}

struct Fp32Product {
  using Registers = NoRegisters;
  static constexpr int kRows = kTileRows;
  static constexpr int64_t kSlice = 192;

  static int64_t words(int64_t d) { return d; }

  static void round(const float* row, int64_t d, uint32_t* words, RowBound& bound) {
    memcpy(words, row, static_cast<size_t>(d) * 4);
    bound = {norm_above(dot(row, row, d), d), 0.0f, 1.0f, 0};
  }

  static void pack_tile(const uint32_t* rows, int64_t pitch, int64_t steps, uint32_t* out) {
    interleave<kRows>(rows, pitch, steps, 0, out);
  }

  static inline void convert(Vec (&)[kRows][2], const PackedEncoder&, int64_t, const float*) {}

  static __attribute__((noinline)) void multiply(const uint32_t* tile, const uint32_t* panel, int64_t steps,
                                                 Vec (&sums)[kRows][2], bool resumes) {
    Vec acc[kRows][2];
    begin_sums(acc, sums, resumes);
    const float* x = reinterpret_cast<const float*>(tile);
    const float* w = reinterpret_cast<const float*>(panel);
    for (int64_t s = 0; s < steps; ++s, x += kRows, w += kPanel) add_products(acc, x, load(w), load(w + kLanes));
    end_sums(acc, sums);
  }
};

inline int64_t latent_at(const PackedEncoder& packed, int64_t place) {
  return packed.latent ? packed.latent[place] : place;
}

/// `Product::round`, but for the products that take latents in a smaller range than rows.
template <class Product>
inline void round_latent(const float* row, int64_t d, uint32_t* words, RowBound& bound) {
  if constexpr (requires { &Product::round_latent; }) Product::round_latent(row, d, words, bound);
  else Product::round(row, d, words, bound);
}

template <class Product>
void pack_panels(const float* encoder, const float* latent_bias, const float* threshold, int64_t n_latents, int64_t d,
                 const PackedEncoder& packed, int64_t begin, int64_t end, uint32_t* rows) {
  const int64_t steps = Product::words(d), pitch = row_pitch(steps);
  // Each of the two sums (this product's and the canonical one) is within (d + 8) 2^-24 of the exact one, relative to
  // norm times norm; the rest leaves room for the packed row's norm being a little larger, for the rounding of the
  // bounds and of their comparison with a threshold.
  const float summing = 2.2f * static_cast<float>(d + 16) * 0x1p-24f;
  for (int64_t p = begin; p < end; ++p) {
    for (int64_t j = 0; j < kPanel; ++j) {
      const int64_t place = p * kPanel + j;
      if (place >= n_latents) {
        memset(rows + j * pitch, 0, static_cast<size_t>(steps) * 4);
        packed.upper_bias[place] = -__builtin_inff();
        packed.norm[place] = packed.rounding[place] = packed.bias_slack[place] = packed.scale[place] = 0;
        packed.offset[place] = 0;
        continue;
      }
      RowBound bound;
      const int64_t latent = latent_at(packed, place);
      const float* row = encoder + latent * d;
      if (place + 2 < n_latents) prefetch_row(encoder + latent_at(packed, place + 2) * d, d);
      round_latent<Product>(row, d, rows + j * pitch, bound);
      const float bias = latent_bias[latent], above = threshold ? threshold[latent] : 0.0f;
      const float slack = (__builtin_fabsf(bias) + above) * 0x1p-21f + 1e-30f;
      packed.upper_bias[place] = bias - above + slack;
      packed.bias_slack[place] = 2 * slack;
      packed.norm[place] = bound.norm;
      packed.rounding[place] = bound.rounding + summing * (bound.norm + bound.rounding);
      packed.scale[place] = bound.scale;
      packed.offset[place] = 128 * bound.sum;
    }
    interleave<kPanel>(rows, pitch, steps, 0, packed.panels + p * steps * kPanel);
  }
}
