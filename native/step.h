// The training step: what runs on which thread, in which order, in which memory. No arithmetic of its own beyond sums.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "level.h"

namespace monosem {

struct Weights {  // or anything of their shape; rows of d_model floats, contiguous
  float* encoder;
  float* latent_bias;
  float* decoder;
  float* pre_bias;
};

struct Shape {
  int64_t batch, d_model, n_latents;
};

/// Rows whose selection is compared with their true top k, by the canonical value of every latent. A product that left one
/// out is not to be trusted: all rows are selected once more, by the exact fp32 product. RowsStats says what was found.
struct Audit {
  const int64_t* rows;
  int64_t count;
};

struct Loss {
  int64_t k;
  double mse_scale;
  int64_t auxk;
  double auxk_coef;
};

struct Terms {
  double mse, auxiliary;
  bool auxk_dropped;
  int64_t n_active;  // positive values in the batch
  RowsStats stats;
};

struct Update {
  int64_t step;
  double lr, ema;
  double clip_norm;  // infinite: off
  double beta1, beta2, epsilon;
};

/// The level in use: the best that the CPU has, or the one last forced.
const Level& level();
/// Forces a level by name, "auto" undoes it; false if this CPU or this build has no such level.
bool set_level(const char* name);
/// The names that set_level accepts here, best first, null-terminated.
const char* const* level_names();

RowsStats topk_encode(const Shape&, const Weights&, const float* x, Precision, int64_t k, const Audit&, int64_t* index,
                      float* value);
/// All pre-activations above max(threshold, 0), a row of `width` slots each by falling value, 0 behind them. Nothing where
/// it would not be sparse: more than a quarter of the first rows have above a sixteenth of the latents (or above 1,024).
struct Exceeding {
  int64_t width;
  std::unique_ptr<int64_t[]> index;
  std::unique_ptr<float[]> value;
};
std::optional<Exceeding> threshold_encode(const Shape&, const Weights&, const float* x, Precision, const float* threshold);
void decode(const Shape&, const Weights&, const int64_t* index, const float* value, int64_t k, float* recons);
Terms topk_gradients(const Shape&, const Weights&, const float* x, Precision, const Loss&, const bool* dead,
                     const Audit&, const Weights& gradients, int64_t* n_fired);
/// Gradients of a loss through `recons` = decode(latents), whose gradient by recons is `d_recons` [B, D], and of
/// d_active times the sum of the active values. Slots whose value is not positive are skipped, whatever their index.
void sparse_gradients(const Shape&, const Weights&, const float* x, const int64_t* index, const float* value, int64_t k,
                      const float* d_recons, double d_active, const Weights& gradients);
/// Returns the gradient's norm; `gradients` are used up. `average` has null pointers when it is off.
double apply_update(const Shape&, const Weights&, const Weights& gradients, const Weights& first, const Weights& second,
                    const Weights& average, const Update&);

/// topk_gradients and apply_update without clipping in one visit of each latent, with the same bits and no gradients.
struct StepResult {
  Terms terms;
  double norm;
};
StepResult topk_step(const Shape&, const Weights&, const float* x, Precision, const Loss&, const bool* dead,
                     const Audit&, int64_t* n_fired, const Weights& first, const Weights& second, const Weights& average, const Update&);

/// Milliseconds of the parts of this thread's last call.
struct Times {
  double pack, rows, group, latents;
};
const Times& last_times();

/// Scratch memory is kept from call to call, one set a calling thread. Filling it shows that nothing relies on it.
void fill_workspace(int byte);
void release_workspace();

}  // namespace monosem
