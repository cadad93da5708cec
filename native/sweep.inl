// The fused product and running-threshold top-k: a block of rows against all latents; scores are never stored.
//
// Every latent has an interval [lower, upper] that holds its canonical value. T is the k-th largest lower bound seen
// so far on a row: a latent whose upper bound is below T cannot be among the top k. T only rises, and starts just above
// 0 because the ReLU makes the rest inactive. What passes is appended to the row's buffer; a full buffer is pruned.

constexpr float kLeast = 1e-38f;  // below bias_slack, so that no positive value's upper bound is below it

/// The candidates of each row of a block for one top-k.
struct Candidates {
  int64_t k, capacity;
  float* upper;      // [rows][capacity]
  uint32_t* index;   // [rows][capacity], rising
  int32_t* count;    // [rows]; -1: saturated
  float* threshold;  // [rows] T; infinite for a row that takes no part (any more)
  uint32_t* keys;    // [capacity]
};

struct Block {
  const PackedEncoder* packed;
  const uint32_t* tiles;
  const float* row_norm;      // >= |x| and |packed x|
  const float* row_rounding;  // >= |x - packed x|
  const float* row_scale;
  int64_t n_tiles, n_panels, steps;
  const uint32_t* dead_bits;  // null: no AuxK
};

/// Twice the half width of a latent's interval on a row.
inline float interval(const Block& block, int64_t row, uint32_t latent) {
  const PackedEncoder& packed = *block.packed;
  const float half = block.row_rounding[row] * packed.norm[latent] + block.row_norm[row] * packed.rounding[latent];
  return 2.0f * half * (1.0f + 0x1p-20f) + packed.bias_slack[latent];
}

/// Raises T of a row and drops the candidates below it, keeping their order; saturated when that frees too little.
__attribute__((noinline)) void prune(const Block& block, Candidates& c, int64_t row, int64_t room) {
  float* upper = c.upper + row * c.capacity;
  uint32_t* index = c.index + row * c.capacity;
  const int64_t count = c.count[row];
  if (count >= c.k) {
    for (int64_t j = 0; j < count; ++j) {
      const float lower = upper[j] - interval(block, row, index[j]);
      c.keys[j] = lower > 0 ? bits(lower) : 0;
    }
    const float kth = from_bits(kth_largest(c.keys, count, c.k));
    if (kth > c.threshold[row]) c.threshold[row] = kth;
  }
  const float threshold = c.threshold[row];
  int64_t kept = 0;
  for (int64_t j = 0; j < count; ++j) {
    upper[kept] = upper[j];
    index[kept] = index[j];
    kept += upper[j] >= threshold;
  }
  c.count[row] = static_cast<int32_t>(kept);
  if (kept + room > c.capacity) {
    c.count[row] = -1;
    c.threshold[row] = __builtin_inff();
  }
}

/// Appends the latents of `mask` (bit j: latent first + j, upper bound values[j]) to a row's candidates.
__attribute__((noinline)) void append(const Block& block, Candidates& c, int64_t row, uint32_t mask, const float* values,
                                      uint32_t first) {
  float* upper = c.upper + row * c.capacity;
  uint32_t* index = c.index + row * c.capacity;
  int32_t count = c.count[row];
  for (; mask; mask &= mask - 1) {
    const int j = __builtin_ctz(mask);
    upper[count] = values[j];
    index[count++] = first + static_cast<uint32_t>(j);
  }
  c.count[row] = count;
  if (count + kPanel > c.capacity) prune(block, c, row, kPanel);
}

template <class Product>
void sweep(const Block& block, Candidates& top, Candidates* aux) {
  const PackedEncoder& packed = *block.packed;
  for (int64_t p = 0; p < block.n_panels; ++p) {
    const uint32_t* panel = packed.panels + p * block.steps * kPanel;
    const float *bias = packed.upper_bias + p * kPanel, *norm = packed.norm + p * kPanel;
    const float* rounding = packed.rounding + p * kPanel;
    const Vec bias0 = load(bias), bias1 = load(bias + kLanes), norm0 = load(norm), norm1 = load(norm + kLanes);
    const Vec rounding0 = load(rounding), rounding1 = load(rounding + kLanes);
    const uint32_t dead = aux ? block.dead_bits[p] : 0;
    for (int64_t t = 0; t < block.n_tiles; ++t) {
      Vec acc[kTileRows][2] = {};
      Product::multiply(block.tiles + t * block.steps * kTileRows, panel, block.steps, acc);
      Product::convert(acc, packed, p * kPanel, block.row_scale + t * kTileRows);
#pragma GCC unroll 16
      for (int r = 0; r < kTileRows; ++r) {
        const int64_t row = t * kTileRows + r;
        const Vec row_norm = splat(block.row_norm[row]), row_rounding = splat(block.row_rounding[row]);
        const Vec upper0 = acc[r][0] + bias0 + fma(row_rounding, norm0, row_norm * rounding0);
        const Vec upper1 = acc[r][1] + bias1 + fma(row_rounding, norm1, row_norm * rounding1);
        const Vec least = splat(top.threshold[row]);
        const uint32_t passed = at_least(upper0, least) | at_least(upper1, least) << kLanes;
        uint32_t passed_aux = 0;
        if (__builtin_expect(dead != 0, 0)) {
          const Vec least_aux = splat(aux->threshold[row]);
          passed_aux = (at_least(upper0, least_aux) | at_least(upper1, least_aux) << kLanes) & dead;
        }
        if (__builtin_expect((passed | passed_aux) != 0, 0)) {
          float values[kPanel];
          store(values, upper0);
          store(values + kLanes, upper1);
          const uint32_t first = static_cast<uint32_t>(p * kPanel);
          if (passed) append(block, top, row, passed, values, first);
          if (passed_aux) append(block, *aux, row, passed_aux, values, first);
        }
      }
    }
  }
}
