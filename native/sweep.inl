// The fused product and running-threshold top-k: a block of rows against all latents; scores are never stored.
//
// Every latent has an interval [lower, upper] that holds its canonical value. T is the k-th largest lower bound seen
// so far on a row: a latent whose upper bound is below T cannot be among the top k. T only rises, and starts just above
// 0 because the ReLU makes the rest inactive, or higher by a guess that has to be confirmed (rows.inl). What passes is
// appended to the row's buffer; a full buffer is pruned.

constexpr float kLeast = 1e-38f;  // below bias_slack, so that no positive value's upper bound is below it

/// The candidates of each row of a block for one top-k.
struct Candidates {
  int64_t k, capacity;
  float* upper;      // [rows][capacity]
  uint32_t* index;   // [rows][capacity] places, rising; latents from rank_candidates on
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
  int64_t n_panels, steps;
  int64_t n_dead;
};

/// Twice the half width of the interval of a place's latent on a row.
inline float interval(const Block& block, int64_t row, uint32_t place) {
  const PackedEncoder& packed = *block.packed;
  const float half = block.row_rounding[row] * packed.norm[place] + block.row_norm[row] * packed.rounding[place];
  return 2.0f * half * (1.0f + 0x1p-20f) + packed.bias_slack[place];
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

/// What a panel adds to the bounds of its latents.
struct PanelBounds {
  Vec bias0, bias1;              // upper bounds
  float most_norm, most_rounding;  // of any of its latents

  PanelBounds(const PackedEncoder& packed, int64_t first)
      : bias0(load(packed.upper_bias + first)), bias1(load(packed.upper_bias + first + kLanes)), most_norm(0), most_rounding(0) {
    for (int64_t j = first; j < first + kPanel; ++j) {
      most_norm = packed.norm[j] > most_norm ? packed.norm[j] : most_norm;
      most_rounding = packed.rounding[j] > most_rounding ? packed.rounding[j] : most_rounding;
    }
  }
};

/// Appends to a row's candidates the latents of `mask` (bit j: place first + j) whose upper bounds reach T.
__attribute__((noinline)) void append(const Block& block, Candidates& c, int64_t row, uint32_t mask, Vec sums0, Vec sums1,
                                      int64_t first) {
  const PackedEncoder& packed = *block.packed;
  const Vec row_norm = splat(block.row_norm[row]), row_rounding = splat(block.row_rounding[row]);
  const auto upper_bounds = [&](Vec sums, int64_t at) {
    return sums + load(packed.upper_bias + at) +
           fma(row_rounding, load(packed.norm + at), row_norm * load(packed.rounding + at));
  };
  const Vec upper0 = upper_bounds(sums0, first), upper1 = upper_bounds(sums1, first + kLanes);
  const Vec least = splat(c.threshold[row]);
  mask &= at_least(upper0, least) | at_least(upper1, least) << kLanes;
  if (!mask) return;
  constexpr uint32_t kHalf = (1u << kLanes) - 1;
  float* upper = c.upper + row * c.capacity;
  uint32_t* index = c.index + row * c.capacity;
  int32_t count = c.count[row];
  count = append_lanes(upper, index, count, mask & kHalf, upper0, static_cast<uint32_t>(first));
  count = append_lanes(upper, index, count, mask >> kLanes, upper1, static_cast<uint32_t>(first + kLanes));
  c.count[row] = count;
  if (count + kPanel > c.capacity) prune(block, c, row, kPanel);
}

/// Compares the products of a tile and a panel with the thresholds of the rows. What the bounds of a row leave of its
/// threshold is taken for the whole panel at once, a little too low; `append` looks at the few latents that reach it.
template <class Product>
inline __attribute__((always_inline)) void compare(const Block& block, const PanelBounds& panel, Candidates& top,
                                                   Candidates* aux, int64_t tile, int64_t first,
                                                   Vec (&acc)[Product::kRows][2]) {
  constexpr int kRows = Product::kRows;
  const int64_t row = tile * kRows;
  Product::convert(acc, *block.packed, first, block.row_scale + row);
  const uint32_t dead = !aux || first >= block.n_dead ? 0
                        : block.n_dead - first >= kPanel ? 0xFFFFFFFFu >> (32 - kPanel) : (1u << (block.n_dead - first)) - 1;
  float least[kRows + kLanes], least_aux[kRows + kLanes];
  for (int r = 0; r < kRows; r += kLanes) {
    const Vec most = fma(load(block.row_rounding + row + r), splat(panel.most_norm),
                         load(block.row_norm + row + r) * splat(panel.most_rounding));
    store(least + r, load(top.threshold + row + r) - most);
    if (__builtin_expect(dead != 0, 0)) store(least_aux + r, load(aux->threshold + row + r) - most);
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const auto reach = [&](float t) {
      return at_least(acc[r][0], splat(t) - panel.bias0) | at_least(acc[r][1], splat(t) - panel.bias1) << kLanes;
    };
    const uint32_t passed = reach(least[r]);
    if (__builtin_expect(passed != 0, 0)) append(block, top, row + r, passed, acc[r][0], acc[r][1], first);
    if (__builtin_expect(dead != 0, 0)) {
      const uint32_t passed_aux = reach(least_aux[r]) & dead;
      if (passed_aux) append(block, *aux, row + r, passed_aux, acc[r][0], acc[r][1], first);
    }
  }
}

/// Sums of a tile and a panel, between two slices.
template <class Product>
struct TileSums {
  Vec of[Product::kRows][2];
};

/// `which` tiles of a block against all latents.
template <class Product>
void sweep(const Block& block, Candidates& top, Candidates* aux, const uint32_t* which, int64_t n_tiles,
           TileSums<Product>* sums) {
  const typename Product::Registers registers;
  constexpr int kRows = Product::kRows;
  for (int64_t p = 0; p < block.n_panels; ++p) {
    const PanelBounds bounds(*block.packed, p * kPanel);
    for (int64_t step = 0; step < block.steps; step += Product::kSlice) {
      const bool ends = step + Product::kSlice >= block.steps;
      const int64_t n_steps = ends ? block.steps - step : Product::kSlice;
      const uint32_t* panel = block.packed->panels + (p * block.steps + step) * kPanel;
      const uint32_t* next = panel + n_steps * kPanel;
      const int64_t share = (n_steps * kPanel / n_tiles + 15) / 16 * 16;
      for (int64_t i = 0; i < n_tiles; ++i) {
        for (int64_t word = i * share; word < (i + 1) * share; word += 16) __builtin_prefetch(next + word, 0, 3);
        const uint32_t* tile = block.tiles + (which[i] * block.steps + step) * kRows;
        Product::multiply(tile, panel, n_steps, sums[i].of, step > 0);
        if (ends) compare<Product>(block, bounds, top, aux, which[i], p * kPanel, sums[i].of);
      }
    }
  }
}
