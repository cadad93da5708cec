// The table that a level hands out: its functions, with the products that it has.

template <class Body>
inline auto with_product(Precision precision, Body body) {
  if (kHasLow && precision == Precision::bf16) return body(Bf16Product{});
  if (kHasLow && precision == Precision::int8) return body(Int8Product{});
  return body(Fp32Product{});
}

inline int64_t packed_words(Precision precision, int64_t d) {
  return with_product(precision, [&](auto product) { return decltype(product)::words(d); });
}

inline int64_t tile_rows(Precision precision) {
  return with_product(precision, [](auto product) { return int64_t{decltype(product)::kRows}; });
}

inline int64_t pack_scratch_bytes(Precision precision, int64_t d) {
  return kPanel * row_pitch(packed_words(precision, d)) * 4;
}

inline void pack_encoder(Precision precision, const float* encoder, const float* latent_bias, const float* threshold,
                         int64_t n_latents, int64_t d, const PackedEncoder& packed, int64_t begin, int64_t end,
                         void* scratch) {
  with_product(precision, [&](auto product) {
    pack_panels<decltype(product)>(encoder, latent_bias, threshold, n_latents, d, packed, begin, end,
                                   static_cast<uint32_t*>(scratch));
  });
}

inline void rows(const RowsTask& task, int64_t begin, int64_t end, void* scratch, float& start, RowsStats& stats) {
  with_product(task.precision,
               [&](auto product) { process_rows<decltype(product)>(task, begin, end, scratch, start, stats); });
}

inline int64_t rows_scratch_bytes(const RowsTask& task, int64_t block_rows) {
  Arena arena{nullptr};
  take_scratch(arena, task, packed_words(task.precision, task.d_model), tile_rows(task.precision), block_rows);
  return arena.used;
}

inline void threshold_rows(const RowsTask& task, int64_t begin, int64_t end, void* scratch, RowsStats& stats) {
  with_product(task.precision,
               [&](auto product) { process_thresholds<decltype(product)>(task, begin, end, scratch, stats); });
}

inline void decode_row(const float* decoder, const float* pre_bias, int64_t d, const int64_t* index, const float* value,
                       int64_t count, float* out) {
  memcpy(out, pre_bias, static_cast<size_t>(d) * 4);
  add_rows(out, decoder, d, index, value, count);
}

const Level kLevel = {MONOSEM_LEVEL_NAME, kPanel,        kHasLow,     packed_words, tile_rows,
                      pack_encoder,       pack_scratch_bytes, rows,    rows_scratch_bytes, threshold_rows, threshold_row, decode_row, dots, column_sums,
                      spread,             aux_gradients,      aux_scratch_bytes,  latent_gradient,    add_scaled, project,   squared_norm, update_latent,
                      update_values};
