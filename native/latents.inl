// The gradient of one latent, summed in registers over the rows on which it was active, in the order of the rows.

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

inline float sum_d_values(const PairList& list, int64_t latent) {
  float sum = 0;
  for (int64_t j = list.start[latent]; j < list.start[latent + 1]; ++j) sum += list.pairs[j].d_value;
  return sum;
}

/// d_encoder += sum d_value centred[row] and d_decoder += sum value d_recons[row], over kBlock vectors; both matrices
/// begin at row `first`.
template <int kBlock>
inline void add_pairs(const Pair* pairs, int64_t count, int64_t first, const float* centred, const float* d_recons,
                      int64_t stride, float* d_encoder, float* d_decoder) {
  Vec encoder[kBlock], decoder[kBlock];
#pragma GCC unroll 16
  for (int b = 0; b < kBlock; ++b) {
    encoder[b] = load(d_encoder + b * kLanes);
    decoder[b] = load(d_decoder + b * kLanes);
  }
  for (int64_t j = 0; j < count; ++j) {
    const Vec value = splat(pairs[j].value), d_value = splat(pairs[j].d_value);
    const int64_t row = (pairs[j].row - first) * stride;
#pragma GCC unroll 16
    for (int b = 0; b < kBlock; ++b) {
      encoder[b] = fma(d_value, load(centred + row + b * kLanes), encoder[b]);
      decoder[b] = fma(value, load(d_recons + row + b * kLanes), decoder[b]);
    }
  }
#pragma GCC unroll 16
  for (int b = 0; b < kBlock; ++b) {
    store(d_encoder + b * kLanes, encoder[b]);
    store(d_decoder + b * kLanes, decoder[b]);
  }
}

/// The same over `width` columns, a multiple of kLanes.
inline void add_columns(const Pair* pairs, int64_t count, int64_t first, const float* centred, const float* d_recons,
                        int64_t stride, int64_t width, float* d_encoder, float* d_decoder) {
  int64_t t = 0;
  const auto add = [&](auto block) {
    constexpr int kBlock = decltype(block)::value;
    for (; t + kBlock * kLanes <= width; t += kBlock * kLanes)
      add_pairs<kBlock>(pairs, count, first, centred + t, d_recons + t, stride, d_encoder + t, d_decoder + t);
  };
  add(Constant<kGradientBlock>{});
  add(Constant<4>{});
  add(Constant<1>{});
}

/// The gradient of one latent: over the rows where it was among the top k, and what AuxK adds to it.
inline float latent_gradient(const LatentsTask& task, int64_t latent, float* d_encoder, float* d_decoder) {
  memset(d_encoder, 0, static_cast<size_t>(task.stride) * 4);
  memset(d_decoder, 0, static_cast<size_t>(task.stride) * 4);
  const PairList& list = *task.main;
  add_columns(list.pairs + list.start[latent], list.start[latent + 1] - list.start[latent], 0, task.centred, list.d_recons,
              task.stride, task.stride, d_encoder, d_decoder);
  float d_bias = sum_d_values(list, latent);
  if (task.aux && task.aux_rank[latent] >= 0) {
    const int64_t at = task.aux_rank[latent] * task.stride;
    add_scaled(d_encoder, 1.0f, task.aux_part->d_encoder + at, task.stride);
    add_scaled(d_decoder, 1.0f, task.aux_part->d_decoder + at, task.stride);
    d_bias += sum_d_values(*task.aux, latent);
  }
  return d_bias;
}

constexpr int64_t kSegment = 64;  // rows whose parts lie in L1 together: 2 x 64 x kPart numbers are 32 KiB

inline int64_t aux_scratch_bytes(int64_t count) { return (count + kSegment * kPart) * 8; }

/// kPart columns of AuxK's gradients. A dead latent is active on a third of the rows, so the rows' parts are read from L1,
/// a segment of rows at a time, and it is the sums that come and go.
inline void aux_gradients(const AuxTask& task, int64_t t, void* scratch) {
  const int64_t width = task.stride - t < kPart ? task.stride - t : kPart;
  int64_t* next = static_cast<int64_t*>(scratch);
  float *centred = reinterpret_cast<float*>(next + task.count), *d_recons = centred + kSegment * kPart;
  for (int64_t j = 0; j < task.count; ++j) {
    next[j] = task.list->start[task.latents[j]];
    memset(task.d_encoder + j * task.stride + t, 0, static_cast<size_t>(width) * 4);
    memset(task.d_decoder + j * task.stride + t, 0, static_cast<size_t>(width) * 4);
  }
  for (int64_t first = 0; first < task.n_rows; first += kSegment) {
    const int64_t end = first + kSegment < task.n_rows ? first + kSegment : task.n_rows;
    for (int64_t row = first; row < end; ++row) {
      memcpy(centred + (row - first) * kPart, task.centred + row * task.stride + t, static_cast<size_t>(width) * 4);
      memcpy(d_recons + (row - first) * kPart, task.list->d_recons + row * task.stride + t, static_cast<size_t>(width) * 4);
    }
    for (int64_t j = 0; j < task.count; ++j) {
      if (j + 4 < task.count) {
        const int64_t ahead = (j + 4) * task.stride + t;
        prefetch_row(reinterpret_cast<const float*>(task.list->pairs + next[j + 4]), 2 * kPart);
        prefetch_row(task.d_encoder + ahead, width);
        prefetch_row(task.d_decoder + ahead, width);
      }
      const Pair* pairs = task.list->pairs + next[j];
      const int64_t left = task.list->start[task.latents[j] + 1] - next[j];
      int64_t count = 0;
      while (count < left && pairs[count].row < end) ++count;
      next[j] += count;
      add_columns(pairs, count, first, centred, d_recons, kPart, width, task.d_encoder + j * task.stride + t,
                  task.d_decoder + j * task.stride + t);
    }
  }
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
