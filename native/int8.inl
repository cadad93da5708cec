// Rows rounded to int8, for the levels that multiply them, and what the rounding is expected to cost. The level defines
// `to_int8(v, out)`, which writes a vector's kLanes numbers and returns them as floats.

inline float largest_magnitude(const float* row, int64_t d) {
  uint32_t lanes[kLanes];
  typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
  Bits most{};
  each_vector(d, [&](int64_t t, auto at) {  // bits of positive floats order like the floats do
    const Bits magnitude = (Bits)at.load(row + t) & 0x7FFFFFFFu;
    most = magnitude > most ? magnitude : most;
  });
  memcpy(lanes, &most, sizeof lanes);
  uint32_t largest = 0;
  for (const uint32_t lane : lanes) largest = lane > largest ? lane : largest;
  return from_bits(largest);
}

/// Words of four int8, in whole groups of kGroup. Their bound is not one: operands are too coarse for Cauchy-Schwarz to
/// be of use. Rounding errors are taken as independent, and the interval as 8 of their standard deviations,
/// |error| / sqrt(D) each.
template <int64_t kGroup>
struct Int8Rows {
  static int64_t words(int64_t d) { return ((d + 3) / 4 + kGroup - 1) / kGroup * kGroup; }

  static void round(const float* row, int64_t d, uint32_t* words, RowBound& bound) { round_within(127, row, d, words, bound); }

  /// To whole numbers from -most to most.
  static void round_within(int most, const float* row, int64_t d, uint32_t* words, RowBound& bound) {
    const float scale = largest_magnitude(row, d) / static_cast<float>(most);
    const Vec inverse = splat(scale > 0 ? 1.0f / scale : 0.0f), unit = splat(scale);
    Vec squares{}, errors{}, total{};  // sums of whole numbers below 2^24 are exact
    int8_t* out = reinterpret_cast<int8_t*>(words);
    memset(words, 0, static_cast<size_t>(Int8Rows::words(d)) * 4);
    each_vector(d, [&](int64_t t, auto at) {
      const Vec exact = at.load(row + t);
      int8_t part[kLanes];
      const bool is_whole = t + kLanes <= d;
      const Vec whole = to_int8(exact * inverse, is_whole ? out + t : part);
      if (!is_whole) memcpy(out + t, part, static_cast<size_t>(d - t));
      const Vec error = exact - unit * whole;
      squares = fma(exact, exact, squares);
      errors = fma(error, error, errors);
      total += whole;
    });
    const float error = norm_above(sum(errors), d), deviations = 8.0f / __builtin_sqrtf(static_cast<float>(d));
    bound = {norm_above(sum(squares), d) + error, deviations < 1 ? deviations * error : error, scale,
             static_cast<int32_t>(sum(total))};
  }
};
