#include "step.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "threads.h"
#include "workspace.h"

namespace monosem {
namespace {

constexpr double kFired = 1e-3;        // types.FIRED_THRESHOLD
constexpr int64_t kLatentBlock = 64;   // latents whose contribution to pre_bias is summed apart, whatever the threads
constexpr int64_t kAuxLatents = 4096;  // latents whose AuxK gradients are held at once
constexpr int64_t kRowBlock = 256;     // rows of a column sum, likewise
constexpr int64_t kProbe = 32;         // rows that say whether a batch is sparse
constexpr int64_t kTileBytes = 768 << 10;  // packed rows of a block: they stay in L2 while the panels pass

/// Where the thresholds of each thread's next block start, as a share of a row's norm: handed on from call to call, among
/// calls of the same kind. Only the time that a call takes depends on it.
class Starts {
 public:
  float* of(const RowsTask& task, int64_t n_threads) {
    const Kind kind{task.precision, task.n_latents, task.d_model, task.k};
    if (kind != kind_) starts_.clear();
    kind_ = kind;
    if (starts_.size() < static_cast<size_t>(n_threads)) starts_.resize(static_cast<size_t>(n_threads), 0.0f);
    return starts_.data();
  }
  void forget() { starts_.clear(); }

 private:
  using Kind = std::tuple<Precision, int64_t, int64_t, int64_t>;
  Kind kind_{};
  std::vector<float> starts_;
};

struct Workspace {
  Buffer panels, encoder_terms, offset, places, threshold;
  Buffer centred, residual, index, value, d_value, count, squared;
  Buffer aux_residual, aux_index, aux_value, aux_d_value, aux_count, aux_squared;
  Buffer starts, pairs, aux_starts, aux_pairs, histogram;
  Buffer aux_latents, aux_rank, aux_encoder, aux_decoder;
  Buffer sums, partial, audit;
  std::vector<Buffer> threads;
  Starts first_thresholds;

  template <class Visit>
  void each(Visit visit) {
    for (Buffer* b : {&panels, &encoder_terms, &offset, &places, &threshold, &centred, &residual, &index, &value, &d_value, &count, &squared,
                      &aux_residual, &aux_index, &aux_value, &aux_d_value, &aux_count, &aux_squared, &starts, &pairs,
                      &aux_starts, &aux_pairs, &histogram, &aux_latents, &aux_rank, &aux_encoder, &aux_decoder, &sums,
                      &partial, &audit})
      visit(*b);
    for (Buffer& b : threads) visit(b);
  }
};

thread_local Workspace workspace;
thread_local Times times;

/// Adds the time of its own life to one of `times`.
class Timer {
 public:
  explicit Timer(double& total_ms) : total_ms_(total_ms), start_(Clock::now()) {}
  Timer(const Timer&) = delete;
  ~Timer() { total_ms_ += std::chrono::duration<double, std::milli>(Clock::now() - start_).count(); }

 private:
  using Clock = std::chrono::steady_clock;
  double& total_ms_;
  Clock::time_point start_;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t padded(int64_t d) { return ceil_div(d, 16) * 16; }

/// One scratch area a thread, allocated before the threads start: nothing may throw inside a parallel region.
std::vector<char*> thread_scratch(int64_t bytes) {
  const size_t n = static_cast<size_t>(max_threads());
  if (workspace.threads.size() < n) workspace.threads.resize(n);
  std::vector<char*> areas;
  for (size_t i = 0; i < n; ++i) areas.push_back(workspace.threads[i].take<char>(bytes));
  return areas;
}

/// Runs body(i, scratch) for i in [0, count), in any order.
template <class Body>
void parallel(int64_t count, int64_t scratch_bytes, Body body) {
  const std::vector<char*> areas = thread_scratch(scratch_bytes);
  each_index(count, [&](int64_t i) { body(i, areas[static_cast<size_t>(thread_number())]); });
}

struct Packed {
  PackedEncoder encoder;
  bool poisoned;
};

Packed pack(const Level& l, Precision precision, const Shape& shape, const Weights& w, const uint32_t* places,
            const float* threshold = nullptr) {
  times = {};
  const Timer timer(times.pack);
  const int64_t n_panels = ceil_div(shape.n_latents, l.panel_latents), n = n_panels * l.panel_latents;
  float* terms = workspace.encoder_terms.take<float>(5 * n);
  const PackedEncoder packed{places, workspace.panels.take<uint32_t>(n * l.packed_words(precision, shape.d_model)),
                             terms, workspace.offset.take<int32_t>(n), terms + n, terms + 2 * n, terms + 3 * n,
                             terms + 4 * n};
  const int64_t chunk = 4, scratch = l.pack_scratch_bytes(precision, shape.d_model);
  parallel(ceil_div(n_panels, chunk), scratch, [&](int64_t i, char* area) {
    l.pack_encoder(precision, w.encoder, w.latent_bias, threshold, shape.n_latents, shape.d_model, packed, i * chunk,
                   std::min(n_panels, (i + 1) * chunk), area);
  });
  bool finite = true;
  for (int64_t i = 0; i < shape.n_latents; ++i)
    finite &= std::isfinite(packed.upper_bias[i]) && std::isfinite(packed.norm[i] + packed.rounding[i]);
  return {packed, !finite};
}

/// The latents of each place: the dead ones first, in panels of their own.
const uint32_t* dead_first(const bool* dead, int64_t n_latents) {
  uint32_t* latent = workspace.places.take<uint32_t>(n_latents);
  int64_t place = 0;
  for (const bool wanted : {true, false})
    for (int64_t i = 0; i < n_latents; ++i)
      if (dead[i] == wanted) latent[place++] = static_cast<uint32_t>(i);
  return latent;
}

/// A task with the arrays of a selection; decoder and auxk still off.
RowsTask selection(const Shape& shape, const Weights& w, const float* x, Precision precision, int64_t k,
                   const Packed& packed) {
  RowsTask task{};
  task.precision = precision;
  task.n_rows = shape.batch;
  task.d_model = shape.d_model;
  task.stride = padded(shape.d_model);
  task.n_latents = shape.n_latents;
  task.x = x;
  task.encoder = w.encoder;
  task.latent_bias = w.latent_bias;
  task.pre_bias = w.pre_bias;
  task.packed = packed.encoder;
  task.poisoned = packed.poisoned;
  task.k = k;
  task.centred = workspace.centred.take<float>(shape.batch * task.stride);
  task.index = workspace.index.take<int32_t>(shape.batch * k);
  task.value = workspace.value.take<float>(shape.batch * k);
  task.count = workspace.count.take<int32_t>(shape.batch);
  return task;
}

/// Rows of a block: whole tiles that stay in L2 while the panels pass, about as many blocks for each thread.
int64_t block_rows(const Level& l, const RowsTask& task, int64_t n_rows) {
  const int64_t tile_rows = l.tile_rows(task.precision);
  const int64_t tile_bytes = l.packed_words(task.precision, task.d_model) * 4 * tile_rows;
  const int64_t n_threads = max_threads();
  const int64_t most = std::clamp<int64_t>(kTileBytes / tile_bytes, 1, 100) * tile_rows;
  const int64_t n_blocks = ceil_div(ceil_div(n_rows, most), n_threads) * n_threads;
  return ceil_div(ceil_div(n_rows, n_blocks), tile_rows) * tile_rows;
}

RowsStats run_rows(const Level& l, const RowsTask& task) {
  const Timer timer(times.rows);
  const int64_t n_threads = max_threads(), rows = block_rows(l, task, task.n_rows);
  float* starts = workspace.first_thresholds.of(task, n_threads);
  std::vector<RowsStats> stats(static_cast<size_t>(ceil_div(task.n_rows, rows)));
  parallel(static_cast<int64_t>(stats.size()), l.rows_scratch_bytes(task, rows), [&](int64_t i, char* area) {
    l.rows(task, i * rows, std::min(task.n_rows, (i + 1) * rows), area, starts[thread_number()],
           stats[static_cast<size_t>(i)]);
  });
  RowsStats total{};
  for (const RowsStats& s : stats) {
    total.n_rescored += s.n_rescored;
    total.n_saturated += s.n_saturated;
    total.n_rerun += s.n_rerun;
    total.n_recalled += s.n_recalled;
    total.n_chosen += s.n_chosen;
    total.product_ns += s.product_ns;
  }
  total.product_ns /= n_threads;
  return total;
}

/// Counts the latents of the true top k of the audited rows, and those of them that `task` has not selected.
void audit(const Level& l, const RowsTask& task, const Audit& wanted, RowsStats& stats) {
  const int64_t n = task.n_latents, block = kLatentBlock, n_blocks = ceil_div(n, block);
  float* scores = workspace.audit.take<float>(wanted.count * n);
  parallel(n_blocks, block * 4, [&](int64_t i, char* area) {
    int32_t* latents = reinterpret_cast<int32_t*>(area);
    const int64_t begin = i * block, count = std::min(n, begin + block) - begin;
    std::iota(latents, latents + count, static_cast<int32_t>(begin));
    for (int64_t r = 0; r < wanted.count; ++r)
      l.dots(task.centred + wanted.rows[r] * task.stride, task.encoder, task.d_model, latents, count, 0, scores + r * n + begin);
  });
  for (int64_t r = 0; r < wanted.count; ++r) {
    float* score = scores + r * n;
    const int64_t first = wanted.rows[r] * task.k, count = task.count[wanted.rows[r]];
    if (count && std::isnan(task.value[first])) continue;
    const float least = count == task.k ? task.value[first + count - 1] : 0;
    std::vector<int32_t> top, chosen(task.index + first, task.index + first + count);
    for (int64_t i = 0; i < n; ++i) {
      score[i] += task.latent_bias[i];
      if (score[i] >= least && score[i] > 0) top.push_back(static_cast<int32_t>(i));
    }
    std::stable_sort(top.begin(), top.end(), [score](int32_t a, int32_t b) { return score[a] > score[b]; });
    top.resize(std::min(top.size(), static_cast<size_t>(task.k)));
    std::sort(chosen.begin(), chosen.end());
    stats.n_audited += static_cast<int64_t>(top.size());
    for (const int32_t latent : top) stats.n_missed += !std::binary_search(chosen.begin(), chosen.end(), latent);
  }
}

/// The active latents of each row: slots [start(row), start(row) + count[row]).
struct Actives {
  const int64_t* starts;  // [B]; null: k slots a row
  int64_t k;
  const int32_t* count;   // [B]
  const int32_t* index;
  const float *value, *d_value;

  int64_t start(int64_t row) const { return starts ? starts[row] : row * k; }
};

/// Counting sort of the active (row, latent) pairs by latent, values times `factor`.
PairList group_by_latent(const Shape& shape, const Actives& actives, const float* d_recons, double factor, Buffer& starts,
                         Buffer& pairs) {
  const int32_t* index = actives.index;
  const Timer timer(times.group);
  const int64_t n = shape.n_latents, n_parts = std::min<int64_t>(max_threads(), 16);
  const auto part = [&](int64_t p) { return shape.batch * p / n_parts; };
  int64_t* start = starts.take<int64_t>(n + 1);
  int64_t* next = workspace.histogram.take<int64_t>(n_parts * n);
  const auto each = [&](int64_t p, auto visit) {
    for (int64_t row = part(p); row < part(p + 1); ++row)
      for (int64_t j = actives.start(row); j < actives.start(row) + actives.count[row]; ++j) visit(row, j);
  };
  parallel(n_parts, 1, [&](int64_t p, char*) {
    std::fill(next + p * n, next + (p + 1) * n, 0);
    each(p, [&](int64_t, int64_t j) { ++next[p * n + index[j]]; });
  });
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) {
    start[i] = total;
    for (int64_t p = 0; p < n_parts; ++p) total += std::exchange(next[p * n + i], total);
  }
  start[n] = total;
  Pair* sorted = pairs.take<Pair>(total);
  const float f = static_cast<float>(factor);
  parallel(n_parts, 1, [&](int64_t p, char*) {
    each(p, [&](int64_t row, int64_t j) {
      sorted[next[p * n + index[j]]++] = {static_cast<uint32_t>(row), actives.value[j] * f, actives.d_value[j] * f};
    });
  });
  return {start, sorted, d_recons};
}

double total(const double* values, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += values[i];
  return sum;
}

/// Column sums of a work array over rows, in blocks of rows whose number does not depend on the threads.
double* column_sums(const Level& l, const Shape& shape, const float* matrix) {
  const int64_t n_blocks = ceil_div(shape.batch, kRowBlock), d = shape.d_model;
  double* partial = workspace.partial.take<double>(n_blocks * d);
  parallel(n_blocks, 1, [&](int64_t i, char*) {
    l.column_sums(matrix, padded(d), d, i * kRowBlock, std::min(shape.batch, (i + 1) * kRowBlock), partial + i * d);
  });
  double* sums = workspace.sums.take<double>(d);
  std::fill(sums, sums + d, 0.0);
  for (int64_t i = 0; i < n_blocks; ++i)
    for (int64_t t = 0; t < d; ++t) sums[t] += partial[i * d + t];
  return sums;
}

/// sum |e - mean_batch(e)|^2, e = -residual.
double error_spread(const Level& l, const RowsTask& task, const double* sums) {
  const int64_t n_blocks = ceil_div(task.n_rows, kRowBlock);
  std::vector<float> mean(static_cast<size_t>(task.d_model));
  for (size_t t = 0; t < mean.size(); ++t) mean[t] = static_cast<float>(sums[t] / static_cast<double>(task.n_rows));
  std::vector<double> parts(static_cast<size_t>(n_blocks));
  parallel(n_blocks, 1, [&](int64_t i, char*) {
    parts[static_cast<size_t>(i)] = l.spread(task.residual, task.stride, task.d_model, i * kRowBlock,
                                             std::min(task.n_rows, (i + 1) * kRowBlock), mean.data());
  });
  return total(parts.data(), n_blocks);
}

/// AuxK's gradients of the next latents from `begin` on, at most kAuxLatents of them; returns where the rest begins.
int64_t next_aux_part(const Level& l, LatentsTask& task, AuxTask& aux, int64_t n_rows, int64_t begin) {
  uint32_t* latents = workspace.aux_latents.take<uint32_t>(kAuxLatents);
  int32_t* rank = workspace.aux_rank.take<int32_t>(task.n_latents);
  int64_t end = begin, count = 0;
  for (; end < task.n_latents && (count < kAuxLatents || end % kLatentBlock); ++end) {
    const bool active = task.aux->start[end] < task.aux->start[end + 1];
    if (active && count == kAuxLatents) break;
    rank[end] = active ? static_cast<int32_t>(count) : -1;
    if (active) latents[count++] = static_cast<uint32_t>(end);
  }
  if (end < task.n_latents) {  // whole blocks only
    end = end / kLatentBlock * kLatentBlock;
    while (count && latents[count - 1] >= end) --count;
  }
  aux = {n_rows, task.stride, task.centred, task.aux, latents, count,
         workspace.aux_encoder.take<float>(count * task.stride), workspace.aux_decoder.take<float>(count * task.stride)};
  task.aux_part = &aux;
  task.aux_rank = rank;
  parallel(ceil_div(task.stride, kPart), l.aux_scratch_bytes(count),
           [&](int64_t part, char* area) { l.aux_gradients(aux, part * kPart, area); });
  return end;
}

/// Visits every latent's gradient by blocks and adds up d_bias encoder; visit(latent, d_encoder, d_bias, d_decoder).
template <class Visit>
std::vector<double> each_gradient(const Level& l, LatentsTask task, int64_t n_rows, Visit visit) {
  const Timer timer(times.latents);
  const int64_t n_blocks = ceil_div(task.n_latents, kLatentBlock), d = task.d_model;
  float* partial = workspace.partial.take<float>(n_blocks * d);
  AuxTask aux;
  for (int64_t begin = 0, end = task.n_latents; begin < task.n_latents; begin = end) {
    end = task.aux ? next_aux_part(l, task, aux, n_rows, begin) : task.n_latents;
    const int64_t first = begin / kLatentBlock;
    parallel(ceil_div(end, kLatentBlock) - first, 2 * task.stride * 4, [&](int64_t i, char* area) {
      const int64_t block = first + i, last = std::min(end, (block + 1) * kLatentBlock);
      float* d_encoder = reinterpret_cast<float*>(area);
      float* d_decoder = d_encoder + task.stride;
      float* sums = partial + block * d;
      std::fill(sums, sums + d, 0.0f);
      for (int64_t latent = block * kLatentBlock; latent < last; ++latent) {
        const float d_bias = l.latent_gradient(task, latent, d_encoder, d_decoder);
        if (d_bias != 0) l.add_scaled(sums, d_bias, task.encoder + latent * d, d);
        visit(latent, d_encoder, d_bias, d_decoder);
      }
    });
  }
  std::vector<double> sums(static_cast<size_t>(d), 0.0);
  for (int64_t block = 0; block < n_blocks; ++block)
    for (int64_t t = 0; t < d; ++t) sums[static_cast<size_t>(t)] += partial[block * d + t];
  return sums;
}

/// Everything of a step before the latents' gradients: terms of the loss, and the pairs that make the gradients.
struct Forward {
  RowsTask task;
  Terms terms;
  PairList main, aux;
  bool has_aux;
  double factor;                        // of the mse: d mse / d recons = factor * residual
  std::vector<double> d_recons_sums;    // [D] sum over the batch of d mse / d recons
};

Forward forward(const Level& l, const Shape& shape, const Weights& w, const float* x, Precision precision, const Loss& loss,
                const bool* dead, const Audit& wanted) {
  Forward f{};
  const int64_t batch = shape.batch, n_dead = loss.auxk ? std::count(dead, dead + shape.n_latents, true) : 0;
  const uint32_t* places = n_dead ? dead_first(dead, shape.n_latents) : nullptr;
  RowsTask& task = f.task = selection(shape, w, x, precision, loss.k, pack(l, precision, shape, w, places));
  task.decoder = w.decoder;
  task.residual = workspace.residual.take<float>(batch * task.stride);
  task.d_value = workspace.d_value.take<float>(batch * loss.k);
  task.squared = workspace.squared.take<double>(batch);
  task.auxk = std::min(loss.auxk, n_dead);
  if (task.auxk) {
    task.n_dead = n_dead;
    task.aux_residual = workspace.aux_residual.take<float>(batch * task.stride);
    task.aux_index = workspace.aux_index.take<int32_t>(batch * task.auxk);
    task.aux_value = workspace.aux_value.take<float>(batch * task.auxk);
    task.aux_d_value = workspace.aux_d_value.take<float>(batch * task.auxk);
    task.aux_count = workspace.aux_count.take<int32_t>(batch);
    task.aux_squared = workspace.aux_squared.take<double>(batch);
  }
  f.terms.stats = run_rows(l, task);
  audit(l, task, wanted, f.terms.stats);
  if (f.terms.stats.n_missed) {
    const RowsStats found = f.terms.stats;
    f = forward(l, shape, w, x, Precision::fp32, loss, dead, {});
    f.terms.stats.n_audited = found.n_audited;
    f.terms.stats.n_missed = found.n_missed;
    return f;
  }

  const double n_elements = static_cast<double>(batch) * static_cast<double>(shape.d_model);
  f.factor = 2 * loss.mse_scale / n_elements;
  f.terms.mse = loss.mse_scale * total(task.squared, batch) / n_elements;
  f.main = group_by_latent(shape, {nullptr, loss.k, task.count, task.index, task.value, task.d_value}, task.residual, f.factor,
                           workspace.starts, workspace.pairs);
  const double* sums = column_sums(l, shape, task.residual);
  for (int64_t t = 0; t < shape.d_model; ++t) f.d_recons_sums.push_back(sums[t] * f.factor);
  if (task.auxk) {
    const double spread = error_spread(l, task, sums);
    // As a float, like every implementation: a quotient beyond fp32 is not finite either.
    f.terms.auxiliary = static_cast<double>(static_cast<float>(total(task.aux_squared, batch) / spread));
    f.terms.auxk_dropped = !std::isfinite(f.terms.auxiliary);
    f.has_aux = !f.terms.auxk_dropped;
    if (f.has_aux)
      f.aux = group_by_latent(
          shape, {nullptr, task.auxk, task.aux_count, task.aux_index, task.aux_value, task.aux_d_value}, task.aux_residual,
          2 * loss.auxk_coef / spread, workspace.aux_starts, workspace.aux_pairs);
  }
  return f;
}

int64_t count_fired(const RowsTask& task, int64_t* n_fired) {
  std::fill(n_fired, n_fired + task.n_latents, 0);
  int64_t n_active = 0;
  for (int64_t row = 0; row < task.n_rows; ++row)
    for (int64_t j = row * task.k; j < row * task.k + task.count[row]; ++j) {
      n_fired[task.index[j]] += static_cast<double>(task.value[j]) > kFired;
      n_active += task.value[j] > 0;
    }
  return n_active;
}

UpdateTask update_task(int64_t d_model, const Weights& w, const Weights& first, const Weights& second,
                       const Weights& average, const Update& u) {
  const double correction1 = 1 - std::pow(u.beta1, static_cast<double>(u.step));
  const double correction2 = 1 - std::pow(u.beta2, static_cast<double>(u.step));
  UpdateTask t{};
  t.d_model = d_model;
  t.beta1 = static_cast<float>(u.beta1);
  t.beta2 = static_cast<float>(u.beta2);
  t.epsilon = static_cast<float>(u.epsilon);
  t.step_size = static_cast<float>(u.lr / correction1);
  t.second_scale = static_cast<float>(1 / std::sqrt(correction2));
  t.ema = static_cast<float>(u.ema);
  t.encoder = w.encoder, t.encoder_first = first.encoder, t.encoder_second = second.encoder;
  t.bias = w.latent_bias, t.bias_first = first.latent_bias, t.bias_second = second.latent_bias;
  t.decoder = w.decoder, t.decoder_first = first.decoder, t.decoder_second = second.decoder;
  t.encoder_average = average.encoder, t.bias_average = average.latent_bias, t.decoder_average = average.decoder;
  return t;
}

LatentsTask latents_task(const Forward& f, const Weights& w) {
  return {f.task.d_model, f.task.stride, f.task.n_latents, f.task.centred, &f.main, f.has_aux ? &f.aux : nullptr,
          nullptr,          nullptr,       w.encoder};
}

/// d pre_bias = sum of d recons - encoder^T sum of d pre-activations.
void pre_bias_gradient(const std::vector<double>& d_recons_sums, const std::vector<double>& through_encoder, float* gradient) {
  for (size_t t = 0; t < through_encoder.size(); ++t)
    gradient[t] = static_cast<float>(d_recons_sums[t] - through_encoder[t]);
}

/// Visits every latent's gradient and writes it out; returns what goes through the encoder to pre_bias.
std::vector<double> write_gradients(const Level& l, const LatentsTask& task, int64_t n_rows, const Weights& gradients) {
  const int64_t d = task.d_model;
  return each_gradient(l, task, n_rows, [&](int64_t i, const float* d_encoder, float d_bias, const float* d_decoder) {
    std::copy(d_encoder, d_encoder + d, gradients.encoder + i * d);
    std::copy(d_decoder, d_decoder + d, gradients.decoder + i * d);
    gradients.latent_bias[i] = d_bias;
  });
}

/// Projects a latent's decoder gradient; returns the squared norm of its whole gradient.
double project(const Level& l, const Weights& w, int64_t i, int64_t d, const float* d_encoder, float d_bias,
               float* d_decoder) {
  return l.project(d_decoder, w.decoder + i * d, d) + l.squared_norm(d_encoder, d) + double{d_bias} * double{d_bias};
}

}  // namespace

RowsStats topk_encode(const Shape& shape, const Weights& w, const float* x, Precision precision, int64_t k,
                      const Audit& wanted, int64_t* index, float* value) {
  const Level& l = level();
  if (shape.batch == 0) return {};
  const RowsTask task = selection(shape, w, x, precision, k, pack(l, precision, shape, w, nullptr));
  RowsStats stats = run_rows(l, task);
  audit(l, task, wanted, stats);
  if (stats.n_missed) {
    const RowsStats found = stats;
    stats = topk_encode(shape, w, x, Precision::fp32, k, {}, index, value);
    stats.n_audited = found.n_audited;
    stats.n_missed = found.n_missed;
    return stats;
  }
  std::copy(task.index, task.index + shape.batch * k, index);
  std::copy(task.value, task.value + shape.batch * k, value);
  return stats;
}

std::optional<Exceeding> threshold_encode(const Shape& shape, const Weights& w, const float* x, Precision precision,
                                          const float* threshold) {
  const Level& l = level();
  const int64_t most = std::clamp<int64_t>(shape.n_latents / 16, 1, 1024), first = std::min<int64_t>(shape.batch, kProbe);
  float* positive = workspace.threshold.take<float>(shape.n_latents);
  for (int64_t i = 0; i < shape.n_latents; ++i) positive[i] = std::max(threshold[i], 0.0f);
  RowsTask task = selection(shape, w, x, precision, most, pack(l, precision, shape, w, nullptr, positive));
  task.threshold = positive;
  const auto run = [&](int64_t begin, int64_t end) {
    const Timer timer(times.rows);
    const int64_t rows = end > begin ? block_rows(l, task, end - begin) : 1;
    std::vector<RowsStats> stats(static_cast<size_t>(ceil_div(end - begin, rows)));
    parallel(ceil_div(end - begin, rows), l.rows_scratch_bytes(task, rows), [&](int64_t i, char* area) {
      l.threshold_rows(task, begin + i * rows, std::min(end, begin + (i + 1) * rows), area, stats[static_cast<size_t>(i)]);
    });
  };
  run(0, first);
  if (std::count_if(task.count, task.count + first, [&](int32_t n) { return n > most; }) * 4 > first) return std::nullopt;
  run(first, shape.batch);

  Exceeding found{0, nullptr, nullptr};
  for (int64_t row = 0; row < shape.batch; ++row) found.width = std::max<int64_t>(found.width, task.count[row]);
  found.index.reset(new int64_t[static_cast<size_t>(shape.batch * found.width)]());
  found.value.reset(new float[static_cast<size_t>(shape.batch * found.width)]());
  parallel(shape.batch, shape.n_latents * 8, [&](int64_t row, char* area) {
    int64_t* index = found.index.get() + row * found.width;
    float* value = found.value.get() + row * found.width;
    if (task.count[row] > most) return l.threshold_row(task, row, reinterpret_cast<uint64_t*>(area), index, value);
    std::copy(task.index + row * most, task.index + row * most + task.count[row], index);
    std::copy(task.value + row * most, task.value + row * most + task.count[row], value);
  });
  return found;
}

void decode(const Shape& shape, const Weights& w, const int64_t* index, const float* value, int64_t k, float* recons) {
  const Level& l = level();
  parallel(ceil_div(shape.batch, 64), 1, [&](int64_t block, char*) {
    for (int64_t row = block * 64; row < std::min(shape.batch, (block + 1) * 64); ++row) {
      int64_t count = k;
      while (count && value[row * k + count - 1] == 0) --count;
      l.decode_row(w.decoder, w.pre_bias, shape.d_model, index + row * k, value + row * k, count, recons + row * shape.d_model);
    }
  });
}

Terms topk_gradients(const Shape& shape, const Weights& w, const float* x, Precision precision, const Loss& loss,
                     const bool* dead, const Audit& wanted, const Weights& gradients, int64_t* n_fired) {
  const Level& l = level();
  Forward f = forward(l, shape, w, x, precision, loss, dead, wanted);
  f.terms.n_active = count_fired(f.task, n_fired);
  const std::vector<double> through_encoder = write_gradients(l, latents_task(f, w), shape.batch, gradients);
  pre_bias_gradient(f.d_recons_sums, through_encoder, gradients.pre_bias);
  return f.terms;
}

void sparse_gradients(const Shape& shape, const Weights& w, const float* x, const int64_t* index, const float* value,
                      int64_t k, const float* d_recons, double d_active, const Weights& gradients) {
  const Level& l = level();
  const int64_t batch = shape.batch, d = shape.d_model, stride = padded(d);
  times = {};
  float* centred = workspace.centred.take<float>(batch * stride);
  float* d_rows = workspace.residual.take<float>(batch * stride);
  int32_t* count = workspace.count.take<int32_t>(batch);
  parallel(batch, 1, [&](int64_t row, char*) {
    for (int64_t t = 0; t < d; ++t) centred[row * stride + t] = x[row * d + t] - w.pre_bias[t];
    std::fill(centred + row * stride + d, centred + (row + 1) * stride, 0.0f);
    std::copy(d_recons + row * d, d_recons + (row + 1) * d, d_rows + row * stride);
    std::fill(d_rows + row * stride + d, d_rows + (row + 1) * stride, 0.0f);
    count[row] = static_cast<int32_t>(std::count_if(value + row * k, value + (row + 1) * k, [](float v) { return v > 0; }));
  });
  std::vector<int64_t> starts(static_cast<size_t>(batch) + 1, 0);
  for (int64_t row = 0; row < batch; ++row)
    starts[static_cast<size_t>(row) + 1] = starts[static_cast<size_t>(row)] + count[row];
  int32_t* active = workspace.index.take<int32_t>(starts.back());
  float* active_value = workspace.value.take<float>(starts.back());
  float* d_value = workspace.d_value.take<float>(starts.back());
  parallel(batch, 1, [&](int64_t row, char*) {
    const int64_t start = starts[static_cast<size_t>(row)];
    int64_t at = start;
    for (int64_t j = row * k; j < (row + 1) * k; ++j)
      if (value[j] > 0) {
        active[at] = static_cast<int32_t>(index[j]);
        active_value[at++] = value[j];
      }
    l.dots(d_rows + row * stride, w.decoder, d, active + start, count[row], static_cast<float>(d_active), d_value + start);
  });
  const PairList pairs = group_by_latent(shape, {starts.data(), 0, count, active, active_value, d_value}, d_rows, 1,
                                         workspace.starts, workspace.pairs);
  const double* sums = column_sums(l, shape, d_rows);
  const std::vector<double> d_recons_sums(sums, sums + d);
  const LatentsTask task{d, stride, shape.n_latents, centred, &pairs, nullptr, nullptr, nullptr, w.encoder};
  pre_bias_gradient(d_recons_sums, write_gradients(l, task, batch, gradients), gradients.pre_bias);
}

StepResult topk_step(const Shape& shape, const Weights& w, const float* x, Precision precision, const Loss& loss,
                     const bool* dead, const Audit& wanted, int64_t* n_fired, const Weights& first, const Weights& second,
                     const Weights& average, const Update& u) {
  const Level& l = level();
  const int64_t d = shape.d_model, n_blocks = ceil_div(shape.n_latents, kLatentBlock);
  Forward f = forward(l, shape, w, x, precision, loss, dead, wanted);
  f.terms.n_active = count_fired(f.task, n_fired);
  const UpdateTask update = update_task(d, w, first, second, average, u);
  std::vector<double> squares(static_cast<size_t>(n_blocks), 0.0);
  const std::vector<double> through_encoder = each_gradient(
      l, latents_task(f, w), shape.batch, [&](int64_t i, const float* d_encoder, float d_bias, float* d_decoder) {
        squares[static_cast<size_t>(i / kLatentBlock)] += project(l, w, i, d, d_encoder, d_bias, d_decoder);
        l.update_latent(update, i, d_encoder, d_bias, d_decoder, 1.0f);
      });
  std::vector<float> d_pre_bias(static_cast<size_t>(d));
  pre_bias_gradient(f.d_recons_sums, through_encoder, d_pre_bias.data());
  const double norm = std::sqrt(total(squares.data(), n_blocks) + l.squared_norm(d_pre_bias.data(), d));
  l.update_values(update, w.pre_bias, first.pre_bias, second.pre_bias, average.pre_bias, d_pre_bias.data(), d, 1.0f);
  return {f.terms, norm};
}

double apply_update(const Shape& shape, const Weights& w, const Weights& gradients, const Weights& first,
                    const Weights& second, const Weights& average, const Update& u) {
  const Level& l = level();
  const int64_t d = shape.d_model, n = shape.n_latents, n_blocks = ceil_div(n, kLatentBlock);
  const UpdateTask task = update_task(d, w, first, second, average, u);
  const bool clips = std::isfinite(u.clip_norm);
  double* squares = workspace.partial.take<double>(n_blocks);
  const auto update_block = [&](int64_t block, float factor) {
    for (int64_t i = block * kLatentBlock; i < std::min(n, (block + 1) * kLatentBlock); ++i)
      l.update_latent(task, i, gradients.encoder + i * d, gradients.latent_bias[i], gradients.decoder + i * d, factor);
  };
  parallel(n_blocks, 1, [&](int64_t block, char*) {
    squares[block] = 0;
    for (int64_t i = block * kLatentBlock; i < std::min(n, (block + 1) * kLatentBlock); ++i) {
      squares[block] +=
          project(l, w, i, d, gradients.encoder + i * d, gradients.latent_bias[i], gradients.decoder + i * d);
    }
    if (!clips) update_block(block, 1.0f);
  });
  const double norm = std::sqrt(total(squares, n_blocks) + l.squared_norm(gradients.pre_bias, d));
  // NaN must stay NaN, as it does where the norm is divided by: the comparison is false for it.
  const float factor = !clips || norm <= u.clip_norm ? 1.0f : static_cast<float>(u.clip_norm / norm);
  if (clips) parallel(n_blocks, 1, [&](int64_t block, char*) { update_block(block, factor); });
  l.update_values(task, w.pre_bias, first.pre_bias, second.pre_bias, average.pre_bias, gradients.pre_bias, d, factor);
  return norm;
}

const Times& last_times() { return times; }

void fill_workspace(int byte) {
  workspace.each([byte](Buffer& b) { b.fill(byte); });
}

void release_workspace() {
  workspace.each([](Buffer& b) { b.release(); });
  workspace.first_thresholds.forget();
}

}  // namespace monosem
