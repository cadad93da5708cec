// The gradient of one latent, summed in registers over the rows on which it was active, in the order of the rows.

/// d_encoder += sum d_value centred[row] and d_decoder += sum value d_recons[row], over kBlock vectors starting at t.
template <int kBlock>
inline void add_pairs(const Pair* pairs, int64_t count, const float* centred, const float* d_recons, int64_t stride,
                      float* d_encoder, float* d_decoder) {
  Vec encoder[kBlock], decoder[kBlock];
#pragma GCC unroll 16
  for (int b = 0; b < kBlock; ++b) {
    encoder[b] = load(d_encoder + b * kLanes);
    decoder[b] = load(d_decoder + b * kLanes);
  }
  for (int64_t j = 0; j < count; ++j) {
    const Vec value = splat(pairs[j].value), d_value = splat(pairs[j].d_value);
    const float *x = centred + pairs[j].row * stride, *g = d_recons + pairs[j].row * stride;
#pragma GCC unroll 16
    for (int b = 0; b < kBlock; ++b) {
      encoder[b] = fma(d_value, load(x + b * kLanes), encoder[b]);
      decoder[b] = fma(value, load(g + b * kLanes), decoder[b]);
    }
  }
#pragma GCC unroll 16
  for (int b = 0; b < kBlock; ++b) {
    store(d_encoder + b * kLanes, encoder[b]);
    store(d_decoder + b * kLanes, decoder[b]);
  }
}

inline float add_list(const PairList& list, const LatentsTask& task, int64_t latent, float* d_encoder, float* d_decoder) {
  const Pair* pairs = list.pairs + list.start[latent];
  const int64_t count = list.start[latent + 1] - list.start[latent];
  float d_bias = 0;
  for (int64_t j = 0; j < count; ++j) d_bias += pairs[j].d_value;
  int64_t t = 0;
  for (; t + kGradientBlock * kLanes <= task.stride; t += kGradientBlock * kLanes)
    add_pairs<kGradientBlock>(pairs, count, task.centred + t, list.d_recons + t, task.stride, d_encoder + t, d_decoder + t);
  for (; t < task.stride; t += kLanes)
    add_pairs<1>(pairs, count, task.centred + t, list.d_recons + t, task.stride, d_encoder + t, d_decoder + t);
  return d_bias;
}

inline float latent_gradient(const LatentsTask& task, int64_t latent, float* d_encoder, float* d_decoder) {
  memset(d_encoder, 0, static_cast<size_t>(task.stride) * 4);
  memset(d_decoder, 0, static_cast<size_t>(task.stride) * 4);
  float d_bias = add_list(*task.main, task, latent, d_encoder, d_decoder);
  if (task.aux) d_bias += add_list(*task.aux, task, latent, d_encoder, d_decoder);
  return d_bias;
}

inline void column_sums(const float* matrix, int64_t stride, int64_t d, int64_t begin, int64_t end, double* out) {
  for (int64_t t = 0; t < d; ++t) out[t] = 0;
  for (int64_t row = begin; row < end; ++row)
    for (int64_t t = 0; t < d; ++t) out[t] += matrix[row * stride + t];
}

inline double spread(const float* matrix, int64_t stride, int64_t d, int64_t begin, int64_t end, const float* mean) {
  double total = 0;
  for (int64_t row = begin; row < end; ++row) {
    Vec squares{};
    each_vector(d, [&](int64_t t, auto at) {
      const Vec e = at.load(matrix + row * stride + t) - at.load(mean + t);
      squares = fma(e, e, squares);
    });
    total += sum(squares);
  }
  return total;
}
