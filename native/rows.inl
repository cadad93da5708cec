// One visit of a block of rows: centre, pack, sweep, score the candidates canonically, decode, error, value gradients.

constexpr int64_t kAuxRows = 128;  // rows of AuxK that are visited by latents at a time: they stay in L2

/// Rows a block holds, rounded up to whole tiles.
inline int64_t whole_tiles(int64_t rows, int64_t tile_rows) { return (rows + tile_rows - 1) / tile_rows * tile_rows; }

inline int64_t capacity_for(int64_t k) { return (2 * k + 192 + kPanel + 15) / 16 * 16; }

/// Hands out 64-byte aligned arrays from one allocation; with a null base it only counts.
struct Arena {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(base + used);
    used += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return base ? p : nullptr;
  }
};

/// One (row of the block, latent) pair, kept in the order in which pairs are visited: latent by latent.
struct Visit {
  uint32_t row;
  uint32_t slot;  // of the row's candidates, or of its selected latents
};

/// The visits [begin, end) of one latent.
struct Run {
  uint32_t latent, begin, end;
};

struct RowsScratch {
  uint32_t* tiles;
  uint32_t* words;
  float *row_norm, *row_rounding, *row_scale;
  float* sums;             // [rows][kPanel]
  uint32_t* which;         // [tiles]
  float* started;          // [rows] where T of the top k started
  float* floor;            // [rows] a proven T: the least lower bound of k latents; 0 where fewer than k are active
  Candidates top, aux;
  uint64_t* ranks;         // [largest capacity] keys being selected
  Visit* visits;           // [rows x largest capacity]
  Run* runs;               // [at most N]
  uint32_t* bucket;        // [N + 1]
  uint32_t* place_of;      // [N] the places of the dead latents
  uint32_t* slots;         // [rows][auxk] the places of the selected ones
  float* part;             // [n_dead][kPart]
  uint64_t* key_at;        // [n_dead]
  uint64_t* chosen;        // [n_dead / 64, rounded up] a bit a place; zero between rows
};

inline Candidates take_candidates(Arena& arena, int64_t rows, int64_t k) {
  Candidates c;
  c.k = k;
  c.capacity = k ? capacity_for(k) : 0;
  c.upper = arena.take<float>(rows * c.capacity);
  c.index = arena.take<uint32_t>(rows * c.capacity);
  c.count = arena.take<int32_t>(rows);
  c.threshold = arena.take<float>(rows + kLanes);  // read by whole vectors
  c.keys = arena.take<uint32_t>(c.capacity);
  return c;
}

inline RowsScratch take_scratch(Arena& arena, const RowsTask& task, int64_t steps, int64_t tile_rows, int64_t block_rows) {
  const int64_t rows = whole_tiles(block_rows, tile_rows), k = task.k > task.auxk ? task.k : task.auxk;
  RowsScratch s;
  s.tiles = arena.take<uint32_t>(rows * steps);
  s.words = arena.take<uint32_t>(tile_rows * row_pitch(steps));
  s.row_norm = arena.take<float>(rows + kLanes);
  s.row_rounding = arena.take<float>(rows + kLanes);
  s.row_scale = arena.take<float>(rows);
  s.sums = arena.take<float>(rows * kPanel);
  s.which = arena.take<uint32_t>(rows / tile_rows);
  s.started = arena.take<float>(rows);
  s.floor = arena.take<float>(rows);
  s.top = take_candidates(arena, rows, task.k);
  s.aux = take_candidates(arena, rows, task.auxk);
  s.ranks = arena.take<uint64_t>(capacity_for(k));
  const int64_t n_visits = block_rows * capacity_for(k);
  s.visits = arena.take<Visit>(n_visits);
  s.runs = arena.take<Run>(n_visits < task.n_latents ? n_visits : task.n_latents);
  s.bucket = arena.take<uint32_t>(task.n_latents + 1);
  s.place_of = arena.take<uint32_t>(task.auxk ? task.n_latents : 0);
  s.slots = arena.take<uint32_t>(block_rows * task.auxk);
  s.key_at = arena.take<uint64_t>(task.auxk ? task.n_dead : 0);
  s.chosen = arena.take<uint64_t>(task.auxk ? task.n_dead / 64 + 1 : 0);
  s.part = arena.take<float>(task.auxk ? task.n_dead * kPart : 0);
  return s;
}

/// x - pre_bias of rows [begin, end), and the rows packed for the product; T starts at `start` of a row's norm.
template <class Product>
void centre_and_pack(const RowsTask& task, int64_t begin, int64_t end, int64_t steps, float start, RowsScratch& s) {
  constexpr int64_t kRows = Product::kRows;
  const int64_t d = task.d_model, pitch = row_pitch(steps), rows = whole_tiles(end - begin, kRows);
  for (int64_t i = 0; i < rows; ++i) {
    uint32_t* words = s.words + i % kRows * pitch;
    s.row_norm[i] = s.row_rounding[i] = s.row_scale[i] = 0;
    s.top.count[i] = s.aux.count[i] = 0;
    s.top.threshold[i] = s.aux.threshold[i] = __builtin_inff();
    if (begin + i < end) {
      float* centred = task.centred + (begin + i) * task.stride;
      const float* x = task.x + (begin + i) * d;
      each_vector(d, [&](int64_t t, auto at) { at.store(centred + t, at.load(x + t) - at.load(task.pre_bias + t)); });
      memset(centred + d, 0, static_cast<size_t>(task.stride - d) * 4);
      RowBound bound;
      Product::round(centred, d, words, bound);
      s.row_norm[i] = bound.norm + bound.rounding;
      s.row_rounding[i] = bound.rounding;
      s.row_scale[i] = bound.scale;
      if (s.row_norm[i] < __builtin_inff()) {
        s.aux.threshold[i] = kLeast;
        s.top.threshold[i] = start * s.row_norm[i] > kLeast ? start * s.row_norm[i] : kLeast;
      }
    } else {
      memset(words, 0, static_cast<size_t>(steps) * 4);
    }
    s.started[i] = s.top.threshold[i];
    if (i % kRows == kRows - 1) Product::pack_tile(s.words, pitch, steps, s.tiles + i / kRows * steps * kRows);
  }
}

inline float canonical(const RowsTask& task, const float* centred, int64_t latent) {
  return dot(task.encoder + latent * task.d_model, centred, task.d_model) + task.latent_bias[latent];
}

/// Sorts the pairs (row i, slot j), j < count(i), by `latent(i, j)`, those of one latent by row; returns the number of
/// runs. Visited so, each row of the encoder or decoder is fetched
/// once a block, and the block's own rows come from L2.
template <class Count, class Latent>
int64_t order_visits(RowsScratch& s, int64_t n_rows, int64_t n_latents, Count count, Latent latent) {
  memset(s.bucket, 0, static_cast<size_t>(n_latents + 1) * 4);
  for (int64_t i = 0; i < n_rows; ++i)
    for (int64_t j = 0; j < count(i); ++j) ++s.bucket[latent(i, j) + 1];
  int64_t n_runs = 0;
  for (int64_t l = 0; l < n_latents; ++l) {
    const uint32_t begin = s.bucket[l], n = s.bucket[l + 1];
    if (n) s.runs[n_runs++] = {static_cast<uint32_t>(l), begin, begin + n};
    s.bucket[l + 1] = begin + n;
  }
  for (int64_t i = 0; i < n_rows; ++i)
    for (int64_t j = 0; j < count(i); ++j)
      s.visits[s.bucket[latent(i, j)]++] = {static_cast<uint32_t>(i), static_cast<uint32_t>(j)};
  return n_runs;
}

/// take(visit, latent, rows[visit.row] . matrix[latent]) for every visit, latent by latent, two rows at a time, with the
/// latents that come next on their way.
template <class Take>
inline void each_dot(const RowsScratch& s, int64_t n_runs, const float* matrix, const float* rows, int64_t stride, int64_t d,
                     Take take) {
  for (int64_t r = 0; r < n_runs; ++r) {
    if (r + 3 < n_runs) prefetch_row(matrix + s.runs[r + 3].latent * d, d);
    const auto [latent, begin, end] = s.runs[r];
    const float* row = matrix + latent * d;
    uint32_t v = begin;
    for (; v + 2 <= end; v += 2) {
      const Visit one = s.visits[v], two = s.visits[v + 1];
      const Dots both = two_dots(row, rows + one.row * stride, rows + two.row * stride, d);
      take(one, latent, both.first);
      take(two, latent, both.second);
    }
    if (v < end) take(s.visits[v], latent, dot(row, rows + s.visits[v].row * stride, d));
  }
}

/// Moves the k candidates with the largest upper bounds to the front.
inline void largest_first(float* upper, uint32_t* index, int64_t count, int64_t k, RowsScratch& s) {
  for (int64_t j = 0; j < count; ++j) s.ranks[j] = rank_key(upper[j], index[j]);
  kth_largest(s.ranks, count, k);
  for (int64_t j = 0; j < count; ++j) {
    upper[j] = from_bits(static_cast<uint32_t>(s.ranks[j] >> 32));
    index[j] = ~static_cast<uint32_t>(s.ranks[j]);
  }
}

/// Moves the k candidates of largest upper bound to the front of their row and turns places into latents. Returns a proven
/// T of the row: the least lower bound of those k, 0 where there are fewer.
inline float rank_candidates(const Block& block, Candidates& c, int64_t row, RowsScratch& s) {
  float* upper = c.upper + row * c.capacity;
  uint32_t* index = c.index + row * c.capacity;
  const int64_t count = c.count[row];
  float floor = 0;
  if (count > c.k) largest_first(upper, index, count, c.k, s);
  if (count >= c.k) {
    floor = __builtin_inff();
    for (int64_t j = 0; j < c.k; ++j) {
      const float lower = upper[j] - interval(block, row, index[j]);
      floor = lower < floor ? lower : floor;
    }
  }
  if (block.packed->latent)
    for (int64_t j = 0; j < count; ++j) index[j] = block.packed->latent[index[j]];
  return floor > 0 ? floor : 0;
}

/// Whether a row's T started no higher than the k-th largest lower bound, so that its candidates hold the top k.
inline bool is_confirmed(const RowsScratch& s, int64_t i) {
  return s.started[i] == kLeast || s.top.threshold[i] > s.started[i] || s.floor[i] >= s.started[i];
}

/// Sweeps a block for its candidates, twice the rows whose T started too high. Then sets `start` for the next block: three
/// standard deviations below the mean of T / norm, so that few rows start too high.
template <class Product>
void find_candidates(const RowsTask& task, const Block& block, int64_t n_rows, RowsScratch& s, float& start,
                     RowsStats& stats) {
  constexpr int64_t kRows = Product::kRows;
  auto* sums = reinterpret_cast<TileSums<Product>*>(s.sums);
  int64_t n_tiles = whole_tiles(n_rows, kRows) / kRows;
  for (int64_t t = 0; t < n_tiles; ++t) s.which[t] = static_cast<uint32_t>(t);
  sweep<Product>(block, s.top, task.auxk ? &s.aux : nullptr, s.which, n_tiles, sums);
  int64_t n_failed = 0;
  n_tiles = 0;
  for (int64_t i = 0; i < n_rows; ++i) {
    s.floor[i] = rank_candidates(block, s.top, i, s);
    if (task.auxk) rank_candidates(block, s.aux, i, s);
    const bool failed = !is_confirmed(s, i);
    s.top.threshold[i] = failed ? kLeast : __builtin_inff();
    if (!failed) continue;
    s.top.count[i] = 0;
    ++n_failed;
    const uint32_t tile = static_cast<uint32_t>(i / kRows);
    if (n_tiles == 0 || s.which[n_tiles - 1] != tile) s.which[n_tiles++] = tile;
  }
  if (n_failed) {
    sweep<Product>(block, s.top, nullptr, s.which, n_tiles, sums);
    for (int64_t i = 0; i < n_rows; ++i)
      if (s.top.threshold[i] < __builtin_inff() || s.top.count[i] < 0) s.floor[i] = rank_candidates(block, s.top, i, s);
  }
  stats.n_rerun += n_failed;
  double sum = 0, squares = 0;
  for (int64_t i = 0; i < n_rows; ++i) {
    const double share = s.row_norm[i] > 0 && s.row_norm[i] < __builtin_inff() ? s.floor[i] / s.row_norm[i] : 0;
    sum += share;
    squares += share * share;
  }
  const double n = static_cast<double>(n_rows), mean = sum / n, variance = squares / n - mean * mean;
  start = static_cast<float>(mean - 3 * __builtin_sqrt(variance > 0 ? variance : 0));
}

/// Replaces upper bounds by canonical values as far as needed: for the first k candidates of each row, then for what
/// could still reach the least of those values; the rest is dropped. Candidates lose their order.
inline void score(const RowsTask& task, const float* centred, int64_t first, int64_t end, Candidates& c, RowsScratch& s,
                  RowsStats& stats) {
  const int64_t n_rows = end - first;
  const auto count = [&](int64_t i) { return int64_t{c.count[first + i]}; };
  const auto score_slots = [&](int64_t from, auto n_slots) {  // n_slots(i) slots of each row, from `from` on
    const int64_t n_runs = order_visits(s, n_rows, task.n_latents, n_slots, [&](int64_t i, int64_t j) {
      return c.index[(first + i) * c.capacity + from + j];
    });
    each_dot(s, n_runs, task.encoder, centred + first * task.stride, task.stride, task.d_model,
             [&](const Visit& visit, uint32_t latent, float value) {
               c.upper[(first + visit.row) * c.capacity + from + visit.slot] = value + task.latent_bias[latent];
               ++stats.n_rescored;
             });
  };
  score_slots(0, [&](int64_t i) { return count(i) < c.k ? count(i) : c.k; });
  for (int64_t i = first; i < end; ++i) {
    if (c.count[i] <= c.k) continue;
    float* value = c.upper + i * c.capacity;
    uint32_t* index = c.index + i * c.capacity;
    float to_beat = __builtin_inff();
    for (int64_t j = 0; j < c.k; ++j) to_beat = value[j] < to_beat ? value[j] : to_beat;
    int64_t kept = c.k;
    for (int64_t j = c.k; j < c.count[i]; ++j)
      if (!(value[j] < to_beat)) index[kept++] = index[j];
    c.count[i] = static_cast<int32_t>(kept);
  }
  score_slots(c.k, [&](int64_t i) { return count(i) > c.k ? count(i) - c.k : 0; });
}

/// Keys of the top k of the latents at the first places by canonical values alone, for a row whose candidates saturated their buffer.
inline int64_t select_exactly(const RowsTask& task, const float* centred, int64_t k, int64_t n_places, int64_t capacity,
                              uint64_t* ranks) {
  uint64_t least = 0;
  int64_t count = 0;
  for (int64_t place = 0; place < n_places; ++place) {
    const int64_t latent = latent_at(task.packed, place);
    const float value = canonical(task, centred, latent);
    if (!(value > 0)) continue;
    const uint64_t key = rank_key(value, static_cast<uint32_t>(latent));
    if (key < least) continue;
    ranks[count++] = key;
    if (count == capacity) {
      least = kth_largest(ranks, count, k);
      count = k;
    }
  }
  if (count > k) kth_largest(ranks, count, k);
  return count < k ? count : k;
}

/// Fills s.ranks with the keys of a row's top k, in no order that may be relied on; returns how many there are.
inline int64_t select(const RowsTask& task, const float* centred, Candidates& c, int64_t i, int64_t n_places,
                      RowsScratch& s, RowsStats& stats) {
  if (c.count[i] < 0) {
    ++stats.n_saturated;
    return select_exactly(task, centred, c.k, n_places, c.capacity, s.ranks);
  }
  const float* value = c.upper + i * c.capacity;
  const uint32_t* index = c.index + i * c.capacity;
  int64_t count = 0;
  for (int64_t j = 0; j < c.count[i]; ++j)
    if (value[j] > 0) s.ranks[count++] = rank_key(value[j], index[j]);
  const uint64_t least = count > c.k ? kth_largest(s.ranks, count, c.k) : 0;
  for (int64_t j = 0; j < c.count[i] && j < c.k; ++j)
    stats.n_recalled += value[j] > 0 && rank_key(value[j], index[j]) >= least;
  stats.n_chosen += count < c.k ? count : c.k;
  return count < c.k ? count : c.k;
}

/// Writes the selected latents of a row; what is not filled is latent 0 with value 0.
inline void write_row(const uint64_t* ranks, int64_t count, int64_t k, int32_t* index, float* value) {
  for (int64_t j = 0; j < count; ++j) {
    index[j] = static_cast<int32_t>(~static_cast<uint32_t>(ranks[j]));
    value[j] = from_bits(static_cast<uint32_t>(ranks[j] >> 32));
  }
  memset(index + count, 0, static_cast<size_t>(k - count) * 4);
  memset(value + count, 0, static_cast<size_t>(k - count) * 4);
}

/// A row with a number that is not finite: NaN in the k lowest latents, and so in the loss and in the gradients.
inline int64_t poison(int64_t k, int64_t n_latents, int32_t* index, float* value) {
  for (int64_t j = 0; j < k; ++j) {
    index[j] = static_cast<int32_t>(j < n_latents ? j : 0);
    value[j] = __builtin_nanf("");
  }
  return k;
}

inline bool is_finite(const RowsTask& task, const RowsScratch& s, int64_t i) {
  return s.row_norm[i] < __builtin_inff() && !task.poisoned;
}

/// Selects a row's latents, decodes them and differentiates the squared error by their values.
inline void finish_row(const RowsTask& task, int64_t row, int64_t i, RowsScratch& s, RowsStats& stats) {
  const float* centred = task.centred + row * task.stride;
  int32_t* index = task.index + row * task.k;
  float* value = task.value + row * task.k;
  int64_t count = 0;
  if (is_finite(task, s, i)) {
    count = select(task, centred, s.top, i, task.n_latents, s, stats);
    sort_falling(s.ranks, count);
    write_row(s.ranks, count, task.k, index, value);
  } else {
    count = poison(task.k, task.n_latents, index, value);
  }
  task.count[row] = static_cast<int32_t>(count);
  if (!task.decoder) return;

  const int64_t d = task.d_model;
  float* residual = task.residual + row * task.stride;
  each_vector(task.stride, [&](int64_t t, auto at) { at.store(residual + t, -at.load(centred + t)); });
  add_rows(residual, task.decoder, d, index, value, count);
  float* d_value = task.d_value + row * task.k;
  for (int64_t j = 0; j < count; ++j) d_value[j] = dot(residual, task.decoder + index[j] * d, d);
  task.squared[row] = squared_norm(residual, d);
}

/// sums += values of the decoder's rows, for kPart columns that lie together in `part`, in the order of the latents.
inline void add_parts(float* sums, const float* part, int64_t width, const uint32_t* slot, const float* value, int64_t count) {
  if (width < kPart) {
    for (int64_t j = 0; j < count; ++j) add_scaled(sums, value[j], part + slot[j] * kPart, width);
    return;
  }
  constexpr int kVectors = kPart / kLanes;
  Vec acc[kVectors];
  for (int v = 0; v < kVectors; ++v) acc[v] = load(sums + v * kLanes);
  for (int64_t j = 0; j < count; ++j) {
    const Vec factor = splat(value[j]);
    const float* row = part + slot[j] * kPart;
    if (j + 6 < count)
      for (int v = 0; v < kPart; v += 16) __builtin_prefetch(part + slot[j + 6] * kPart + v);
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) acc[v] = fma(factor, load(row + v * kLanes), acc[v]);
  }
  for (int v = 0; v < kVectors; ++v) store(sums + v * kLanes, acc[v]);
}

/// recons_aux on top of `residual`, by parts of D: the dead latents' part of the decoder fits L2, and a row's sums registers.
inline void decode_aux(const RowsTask& task, int64_t n_rows, const int32_t* count, const uint32_t* slot, const float* value,
                       float* residual, RowsScratch& s) {
  const int64_t d = task.d_model, k = task.auxk;
  for (int64_t t = 0; t < d; t += kPart) {
    const int64_t width = d - t < kPart ? d - t : kPart;
    for (int64_t place = 0; place < task.n_dead; ++place)
      memcpy(s.part + place * kPart, task.decoder + latent_at(task.packed, place) * d + t, static_cast<size_t>(width) * 4);
    for (int64_t i = 0; i < n_rows; ++i)
      add_parts(residual + i * task.stride + t, s.part, width, slot + i * k, value + i * k, count[i]);
  }
}

/// Brings the keys of a row's dead latents into the order of their places, so that sums over them have one order.
inline void order_by_place(RowsScratch& s, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    const uint32_t place = s.place_of[~static_cast<uint32_t>(s.ranks[j])];
    s.key_at[place] = s.ranks[j];
    s.chosen[place / 64] |= uint64_t{1} << place % 64;
  }
  int64_t n = 0;
  for (int64_t word = 0; n < count; ++word) {
    for (uint64_t bits = s.chosen[word]; bits; bits &= bits - 1) s.ranks[n++] = s.key_at[word * 64 + __builtin_ctzll(bits)];
    s.chosen[word] = 0;
  }
}

/// AuxK for a block: select among the dead, model the error with them, differentiate. A row has hundreds of
/// dead latents and a dead latent many of the rows, so this goes by latent, where finish_row goes by row.
inline void finish_aux(const RowsTask& task, int64_t begin, int64_t n_rows, RowsScratch& s, RowsStats& stats) {
  const int64_t d = task.d_model, k = task.auxk;
  float* residual = task.aux_residual + begin * task.stride;
  float *value = task.aux_value + begin * k, *d_value = task.aux_d_value + begin * k;
  int32_t *index = task.aux_index + begin * k, *count = task.aux_count + begin;
  RowsStats aux_stats{};
  for (int64_t place = 0; place < task.n_dead; ++place)
    s.place_of[latent_at(task.packed, place)] = static_cast<uint32_t>(place);
  memset(s.chosen, 0, static_cast<size_t>(task.n_dead / 64 + 1) * 8);
  for (int64_t i = 0; i < n_rows; ++i) {
    count[i] = 0;
    if (is_finite(task, s, i)) {
      const float* centred = task.centred + (begin + i) * task.stride;
      count[i] = static_cast<int32_t>(select(task, centred, s.aux, i, task.n_dead, s, aux_stats));
      order_by_place(s, count[i]);
      for (int64_t j = 0; j < count[i]; ++j) s.slots[i * k + j] = s.place_of[~static_cast<uint32_t>(s.ranks[j])];
      write_row(s.ranks, count[i], k, index + i * k, value + i * k);
    }
    // recons_aux - (x - recons) starts at -(x - recons), which is the residual.
    memcpy(residual + i * task.stride, task.residual + (begin + i) * task.stride, static_cast<size_t>(task.stride) * 4);
  }
  stats.n_saturated += aux_stats.n_saturated;
  decode_aux(task, n_rows, count, s.slots, value, residual, s);
  for (int64_t first = 0; first < n_rows; first += kAuxRows) {
    const int64_t rows = n_rows - first < kAuxRows ? n_rows - first : kAuxRows;
    const int64_t n_runs = order_visits(
        s, rows, task.n_latents, [&](int64_t i) { return count[first + i]; },
        [&](int64_t i, int64_t j) { return static_cast<uint32_t>(index[(first + i) * k + j]); });
    each_dot(s, n_runs, task.decoder, residual + first * task.stride, task.stride, d,
             [&](const Visit& visit, uint32_t, float value) { d_value[(first + visit.row) * k + visit.slot] = value; });
  }
  for (int64_t i = 0; i < n_rows; ++i) task.aux_squared[begin + i] = squared_norm(residual + i * task.stride, d);
}

/// Nanoseconds on a clock that only goes forward.
inline int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t{t.tv_sec} * 1'000'000'000 + t.tv_nsec;
}

template <class Product>
void process_rows(const RowsTask& task, int64_t begin, int64_t end, void* scratch, float& start, RowsStats& stats) {
  const int64_t steps = Product::words(task.d_model), n_rows = end - begin;
  Arena arena{static_cast<char*>(scratch)};
  RowsScratch s = take_scratch(arena, task, steps, Product::kRows, n_rows);
  centre_and_pack<Product>(task, begin, end, steps, start, s);
  const Block block{&task.packed, s.tiles, s.row_norm, s.row_rounding, s.row_scale,
                    (task.n_latents + kPanel - 1) / kPanel, steps, task.n_dead};
  const int64_t started = now_ns();
  if (!task.poisoned) find_candidates<Product>(task, block, n_rows, s, start, stats);
  stats.product_ns += now_ns() - started;
  const float* centred = task.centred + begin * task.stride;
  score(task, centred, 0, n_rows, s.top, s, stats);
  for (int64_t i = 0; i < n_rows; ++i) finish_row(task, begin + i, i, s, stats);
  if (!task.auxk) return;
  RowsStats aux_stats{};
  for (int64_t i = 0; i < n_rows; i += kAuxRows)
    score(task, centred, i, i + kAuxRows < n_rows ? i + kAuxRows : n_rows, s.aux, s, aux_stats);
  finish_aux(task, begin, n_rows, s, stats);
}

/// Keys of all values above their thresholds, of one row, latent by latent; with null `ranks` it only counts.
inline int64_t exceed_exactly(const RowsTask& task, const float* centred, uint64_t* ranks) {
  int64_t count = 0;
  for (int64_t latent = 0; latent < task.n_latents; ++latent) {
    const float value = canonical(task, centred, latent);
    if (!(value > task.threshold[latent])) continue;
    if (ranks) ranks[count] = rank_key(value, static_cast<uint32_t>(latent));
    ++count;
  }
  return count;
}

inline void threshold_row(const RowsTask& task, int64_t row, uint64_t* ranks, int64_t* index, float* value) {
  const int64_t count = exceed_exactly(task, task.centred + row * task.stride, ranks);
  sort_falling(ranks, count);
  for (int64_t j = 0; j < count; ++j) {
    index[j] = static_cast<int64_t>(~static_cast<uint32_t>(ranks[j]));
    value[j] = from_bits(static_cast<uint32_t>(ranks[j] >> 32));
  }
}

template <class Product>
void process_thresholds(const RowsTask& task, int64_t begin, int64_t end, void* scratch, RowsStats& stats) {
  const int64_t steps = Product::words(task.d_model), n_rows = end - begin;
  Arena arena{static_cast<char*>(scratch)};
  RowsScratch s = take_scratch(arena, task, steps, Product::kRows, n_rows);
  s.top.k = INT64_MAX;  // no candidate is ever dropped for others
  centre_and_pack<Product>(task, begin, end, steps, 0.0f, s);
  const Block block{&task.packed, s.tiles, s.row_norm, s.row_rounding, s.row_scale,
                    (task.n_latents + kPanel - 1) / kPanel, steps, 0};
  const int64_t n_tiles = whole_tiles(n_rows, Product::kRows) / Product::kRows;
  for (int64_t t = 0; t < n_tiles; ++t) s.which[t] = static_cast<uint32_t>(t);
  if (!task.poisoned)
    sweep<Product>(block, s.top, nullptr, s.which, n_tiles, reinterpret_cast<TileSums<Product>*>(s.sums));
  const float* centred = task.centred + begin * task.stride;
  score(task, centred, 0, n_rows, s.top, s, stats);
  for (int64_t i = 0; i < n_rows; ++i) {
    int32_t* index = task.index + (begin + i) * task.k;
    float* value = task.value + (begin + i) * task.k;
    int64_t count = 0;
    if (!is_finite(task, s, i)) {
      count = poison(1, task.n_latents, index, value);
    } else if (s.top.count[i] < 0) {
      ++stats.n_saturated;
      count = exceed_exactly(task, centred + i * task.stride, nullptr);
      if (count <= task.k) exceed_exactly(task, centred + i * task.stride, s.ranks);
    } else {
      const int64_t first = i * s.top.capacity;
      for (int64_t j = first; j < first + s.top.count[i]; ++j)
        if (s.top.upper[j] > task.threshold[s.top.index[j]]) s.ranks[count++] = rank_key(s.top.upper[j], s.top.index[j]);
    }
    task.count[begin + i] = static_cast<int32_t>(count);
    if (!is_finite(task, s, i) || count > task.k) continue;
    sort_falling(s.ranks, count);
    write_row(s.ranks, count, task.k, index, value);
  }
}
