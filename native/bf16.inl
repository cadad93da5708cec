// Rows rounded to bf16, for the levels that multiply them, and the bound on what the rounding costs. The level defines
// `to_bf16(v, out)`, which writes a vector's kLanes numbers and returns them as floats.

/// Words of two bf16. `words` counts whole groups of kGroup: what lies behind d is zero.
template <int64_t kGroup>
struct Bf16Rows {
  static int64_t words(int64_t d) { return ((d + 1) / 2 + kGroup - 1) / kGroup * kGroup; }

  static void round(const float* row, int64_t d, uint32_t* words, RowBound& bound) {
    Vec squares{}, errors{};
    memset(words + d / 2, 0, static_cast<size_t>(Bf16Rows::words(d) - d / 2) * 4);
    uint16_t* out = reinterpret_cast<uint16_t*>(words);
    each_vector(d, [&](int64_t t, auto at) {
      const Vec exact = at.load(row + t);
      uint16_t part[kLanes];
      const bool is_whole = t + kLanes <= d;
      const Vec rounded = to_bf16(exact, is_whole ? out + t : part);
      if (!is_whole) memcpy(out + t, part, static_cast<size_t>(d - t) * 2);
      const Vec error = exact - rounded;
      squares = fma(rounded, rounded, squares);
      errors = fma(error, error, errors);
    });
    bound = {norm_above(sum(squares), d), norm_above(sum(errors), d), 1.0f, 0};
  }
};
