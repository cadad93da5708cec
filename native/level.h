// What one dispatch level offers: plain functions over plain data, behind a table of pointers.
//
// A level is a translation unit of its own (level_*.cpp), compiled for its own instruction set. This header is all
// that the levels share with the rest, and it holds no code: an inline function compiled with AVX-512 flags could
// otherwise be the copy that the linker keeps for a CPU without AVX-512.
//
// Shapes: B rows (tokens), D = d_model, N = n_latents. Matrices are row-major. Work arrays over rows have `stride`
// floats a row, D rounded up to a multiple of 16 and zero beyond D; the caller's arrays have exactly D.
#pragma once

#include <cstdint>

namespace monosem {

/// Precision of the product that selects candidates. The values of latents are always canonical fp32 dot products.
enum class Precision : int32_t { fp32 = 0, bf16 = 1, int8 = 2 };

/// The encoder, packed for a level's product, and the terms of the bound on that product's error (README, "Interval").
///
/// The latents may be packed in any order: the arrays are indexed by a latent's *place*, and so are candidates.
struct PackedEncoder {
  const uint32_t* latent;  // [N] of a place; null: place and latent are the same
  uint32_t* panels;    // [n_panels][steps][panel_latents]
  float* scale;        // [N padded] real value of one unit of the packed integers; 1 for fp32 and bf16
  int32_t* offset;     // [N padded] int8: what shifting the rows by 128 adds to every product
  float* upper_bias;   // [N padded] latent_bias + bias_slack, less a latent's threshold if it has one; -inf beyond N
  float* bias_slack;   // [N padded]
  float* norm;         // [N padded] norm of the packed row
  float* rounding;     // [N padded] norm of (row - packed row), and the rounding of both sums
};

/// A pass over rows: select the top k latents, then decode, then the gradients of their values.
struct RowsTask {
  Precision precision;
  int64_t n_rows, d_model, stride, n_latents;
  const float* x;            // [B, D]
  const float* encoder;      // [N, D]
  const float* latent_bias;  // [N]
  const float* decoder;      // [N, D]; null: encode only
  const float* pre_bias;     // [D]
  PackedEncoder packed;
  const float* threshold;    // [N] not negative; null: 0
  bool poisoned;             // a weight is not finite: every value is NaN

  int64_t k;
  float* centred;    // [B, stride] x - pre_bias
  float* residual;   // [B, stride] recons - x
  int32_t* index;    // [B, k] by falling value, equal values by rising index
  float* value;      // [B, k] > 0 in the first `count` slots of a row, 0 behind them
  float* d_value;    // [B, k] residual . decoder[index], before the loss's factor
  int32_t* count;    // [B]
  double* squared;   // [B] |residual|^2

  int64_t auxk;               // 0: off
  int64_t n_dead;             // the dead latents have the first places
  float* aux_residual;        // [B, stride] recons_aux - (x - recons)
  int32_t* aux_index;         // [B, auxk] in no order
  float* aux_value;           // [B, auxk]
  float* aux_d_value;         // [B, auxk] aux_residual . decoder[aux_index]
  int32_t* aux_count;         // [B]
  double* aux_squared;        // [B] |aux_residual|^2
};

/// What a pass over rows cost, to be logged.
struct RowsStats {
  int64_t n_rescored;   // canonical dot products of the top k
  int64_t n_saturated;  // rows whose candidates outgrew their buffer and were scored exactly, latent by latent
  int64_t n_rerun;      // rows whose threshold started too high, so that they were swept once more
  int64_t n_recalled;   // chosen latents that are among the k of largest upper bounds on their row
  int64_t n_chosen;     // positive latents of the top k, on rows that were not saturated
  int64_t n_audited;    // latents of the true top k of the rows that were audited
  int64_t n_missed;     // of these, how many the product left out
  int64_t product_ns;   // in the product and its threshold test; in the end the mean of the threads
};

/// One active latent of one row, as the gradient of the latent sees it.
struct Pair {
  uint32_t row;
  float value;    // times the loss's factor
  float d_value;  // times the loss's factor
};

/// The active pairs of all latents, grouped by latent and by rising row within a latent.
struct PairList {
  const int64_t* start;  // [N + 1]
  const Pair* pairs;
  const float* d_recons;  // [B, stride] what `value` multiplies, for the decoder's gradient
};

/// AuxK's share of the gradients of some latents, each of which was active on many rows.
struct AuxTask {
  int64_t n_rows, stride;
  const float* centred;
  const PairList* list;
  const uint32_t* latents;        // [count], rising
  int64_t count;
  float *d_encoder, *d_decoder;  // [count, stride]
};

/// Gradients of latents out of pairs. Without AuxK, `aux` is null.
struct LatentsTask {
  int64_t d_model, stride, n_latents;
  const float* centred;
  const PairList* main;
  const PairList* aux;
  const AuxTask* aux_part;  // the latents of this part of all latents
  const int32_t* aux_rank;  // [N] place of a latent in aux_part; -1: it is not there
  const float* encoder;     // for the pre_bias gradient
};

constexpr int64_t kPart = 64;  // numbers of a row in a part of D

/// One application of gradients; see reference.apply_update.
struct UpdateTask {
  int64_t d_model;
  float beta1, beta2, epsilon;
  float step_size;        // lr / (1 - beta1^step)
  float second_scale;     // 1 / sqrt(1 - beta2^step)
  float ema;
  float* encoder;  float* encoder_first;  float* encoder_second;  float* encoder_average;  // average: null when off
  float* bias;     float* bias_first;     float* bias_second;     float* bias_average;
  float* decoder;  float* decoder_first;  float* decoder_second;  float* decoder_average;
};

struct Level {
  const char* name;
  int64_t panel_latents;
  bool has_low;  // int8, and mostly bf16; else they run as fp32

  /// 32-bit words a row takes when packed.
  int64_t (*packed_words)(Precision, int64_t d_model);
  int64_t (*tile_rows)(Precision);
  void (*pack_encoder)(Precision, const float* encoder, const float* latent_bias, const float* threshold,
                       int64_t n_latents, int64_t d_model, const PackedEncoder&, int64_t panel_begin, int64_t panel_end,
                       void* scratch);
  int64_t (*pack_scratch_bytes)(Precision, int64_t d_model);

  /// Rows [begin, end) of a task, at most `block_rows` of them, by one thread. `start` passes from block to block of a
  /// thread: the share of its norm at which a row's threshold starts (README, "Warm thresholds"), 0 to start cold.
  void (*rows)(const RowsTask&, int64_t begin, int64_t end, void* scratch, float& start, RowsStats&);
  int64_t (*rows_scratch_bytes)(const RowsTask&, int64_t block_rows);
  /// The same for all pre-activations above their latent's threshold instead of the top k: `count` has their true number
  /// even where it exceeds k, but such a row is not written.
  void (*threshold_rows)(const RowsTask&, int64_t begin, int64_t end, void* scratch, RowsStats&);
  /// One row latent by latent, by falling value; `ranks` has room for N.
  void (*threshold_row)(const RowsTask&, int64_t row, uint64_t* ranks, int64_t* index, float* value);

  /// out = pre_bias + sum_j value[j] decoder[index[j]].
  void (*decode_row)(const float* decoder, const float* pre_bias, int64_t d_model, const int64_t* index,
                     const float* value, int64_t count, float* out);
  /// out[j] = row . matrix[index[j]] + plus.
  void (*dots)(const float* row, const float* matrix, int64_t d_model, const int32_t* index, int64_t count, float plus,
               float* out);
  /// out[t] = sum of rows [begin, end) of matrix[., t], times `factor`.
  void (*column_sums)(const float* matrix, int64_t stride, int64_t d_model, int64_t begin, int64_t end, double* out);
  /// Sum over rows [begin, end) of |row - mean|^2.
  double (*spread)(const float* matrix, int64_t stride, int64_t d_model, int64_t begin, int64_t end, const float* mean);

  /// Columns [t, t + kPart) of an AuxTask.
  void (*aux_gradients)(const AuxTask&, int64_t t, void* scratch);
  int64_t (*aux_scratch_bytes)(int64_t count);
  /// Gradient of one latent: encoder and decoder rows of `stride` floats each, and its bias (returned).
  float (*latent_gradient)(const LatentsTask&, int64_t latent, float* d_encoder, float* d_decoder);
  /// sums[t] += factor * row[t].
  void (*add_scaled)(float* sums, float factor, const float* row, int64_t d_model);
  /// Removes the component of d_decoder along decoder; returns the squared norm of what is left.
  double (*project)(float* d_decoder, const float* decoder, int64_t d_model);
  double (*squared_norm)(const float* values, int64_t count);
  /// Adam, unit norm of the decoder row, moving average; `factor` is the clipping's.
  void (*update_latent)(const UpdateTask&, int64_t latent, const float* d_encoder, float d_bias,
                        const float* d_decoder, float factor);
  /// Adam and moving average of `count` numbers.
  void (*update_values)(const UpdateTask&, float* w, float* first, float* second, float* average, const float* gradient,
                        int64_t count, float factor);
};

// Null where the compiler has none; those of another architecture are not built.
const Level* level_amx();
const Level* level_avx512();
const Level* level_avxvnni();
const Level* level_avx2();
const Level* level_neon_mmla();
const Level* level_neon_dot();
const Level* level_neon();
const Level* level_portable();

}  // namespace monosem
