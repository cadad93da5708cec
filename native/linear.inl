// The few vector operations that everything else is made of.

/// The canonical dot product: four partial sums of vectors, then one order of adding them up. Every value of a latent
/// is made here and nowhere else, so that it does not depend on how the latent was found.
__attribute__((noinline)) float dot(const float* a, const float* b, int64_t d) {
  Vec s0{}, s1{}, s2{}, s3{};
  int64_t t = 0;
  for (; t + 4 * kLanes <= d; t += 4 * kLanes) {
    s0 = fma(load(a + t), load(b + t), s0);
    s1 = fma(load(a + t + kLanes), load(b + t + kLanes), s1);
    s2 = fma(load(a + t + 2 * kLanes), load(b + t + 2 * kLanes), s2);
    s3 = fma(load(a + t + 3 * kLanes), load(b + t + 3 * kLanes), s3);
  }
  each_vector(d - t, [&](int64_t u, auto at) { s0 = fma(at.load(a + t + u), at.load(b + t + u), s0); });
  return sum((s0 + s1) + (s2 + s3));
}

struct Dots {
  float first, second;
};

/// Two canonical dot products with one row, to the bit, for three quarters of the loads.
__attribute__((noinline)) Dots two_dots(const float* row, const float* a, const float* b, int64_t d) {
  Vec s0{}, s1{}, s2{}, s3{}, t0{}, t1{}, t2{}, t3{};
  const auto add = [&](int64_t at, Vec& s, Vec& t) {
    const Vec w = load(row + at);
    s = fma(load(a + at), w, s);
    t = fma(load(b + at), w, t);
  };
  int64_t t = 0;
  for (; t + 4 * kLanes <= d; t += 4 * kLanes) {
    add(t, s0, t0);
    add(t + kLanes, s1, t1);
    add(t + 2 * kLanes, s2, t2);
    add(t + 3 * kLanes, s3, t3);
  }
  each_vector(d - t, [&](int64_t u, auto at) {
    const Vec w = at.load(row + t + u);
    s0 = fma(at.load(a + t + u), w, s0);
    t0 = fma(at.load(b + t + u), w, t0);
  });
  return {sum((s0 + s1) + (s2 + s3)), sum((t0 + t1) + (t2 + t3))};
}

inline double squared_norm(const float* a, int64_t d) {
  double total = 0;
  for (int64_t t = 0; t < d; t += 4096) {
    const int64_t n = d - t < 4096 ? d - t : 4096;
    total += dot(a + t, a + t, n);
  }
  return total;
}

/// sums += factor * row.
inline void add_scaled(float* sums, float factor, const float* row, int64_t d) {
  const Vec f = splat(factor);
  each_vector(d, [&](int64_t t, auto at) { at.store(sums + t, fma(f, at.load(row + t), at.load(sums + t))); });
}

/// The same for at most 4 kLanes numbers, with all four vectors spelled out when they are there.
inline void add_part(float* sums, float factor, const float* row, int64_t n) {
  if (n < 4 * kLanes) return add_scaled(sums, factor, row, n);
  const Vec f = splat(factor);
#pragma GCC unroll 4
  for (int64_t t = 0; t < 4 * kLanes; t += kLanes) store(sums + t, fma(f, load(row + t), load(sums + t)));
}

inline void prefetch_row(const float* row, int64_t d) {
  for (int64_t t = 0; t < d; t += 16) __builtin_prefetch(row + t, 0, 3);
}

/// out[j] = row . matrix[index[j]] + plus.
inline void dots(const float* row, const float* matrix, int64_t d, const int32_t* index, int64_t count, float plus, float* out) {
  for (int64_t j = 0; j < count; ++j) {
    if (j + 3 < count) prefetch_row(matrix + index[j + 3] * d, d);
    out[j] = dot(row, matrix + index[j] * d, d) + plus;
  }
}

/// sums += sum_j value[j] matrix[index[j]], in the order of j.
template <class Index>
void add_rows(float* sums, const float* matrix, int64_t d, const Index* index, const float* value, int64_t count) {
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    for (int64_t ahead = j + 4; ahead < j + 8 && ahead < count; ++ahead) prefetch_row(matrix + index[ahead] * int64_t{d}, d);
    const float *w0 = matrix + index[j] * int64_t{d}, *w1 = matrix + index[j + 1] * int64_t{d};
    const float *w2 = matrix + index[j + 2] * int64_t{d}, *w3 = matrix + index[j + 3] * int64_t{d};
    const Vec v0 = splat(value[j]), v1 = splat(value[j + 1]), v2 = splat(value[j + 2]), v3 = splat(value[j + 3]);
    each_vector(d, [&](int64_t t, auto at) {
      Vec s = fma(v0, at.load(w0 + t), at.load(sums + t));
      s = fma(v1, at.load(w1 + t), s);
      s = fma(v2, at.load(w2 + t), s);
      at.store(sums + t, fma(v3, at.load(w3 + t), s));
    });
  }
  for (; j < count; ++j) add_scaled(sums, value[j], matrix + index[j] * int64_t{d}, d);
}
