// The table that a level hands out: its functions, with the products that it has.

inline int64_t packed_words(Precision precision, int64_t d) {
  if (kHasBf16 && precision == Precision::bf16) return LowProduct::words(d);
  return Fp32Product::words(d);
}

inline int64_t pack_scratch_bytes(Precision precision, int64_t d) {
  return kPanel * row_pitch(packed_words(precision, d)) * 4;
}

inline void pack_encoder(Precision precision, const float* encoder, const float* latent_bias, int64_t n_latents, int64_t d,
                         const PackedEncoder& packed, int64_t begin, int64_t end, void* scratch) {
  uint32_t* rows = static_cast<uint32_t*>(scratch);
  if (kHasBf16 && precision == Precision::bf16)
    pack_panels<LowProduct>(encoder, latent_bias, n_latents, d, packed, begin, end, rows);
  else
    pack_panels<Fp32Product>(encoder, latent_bias, n_latents, d, packed, begin, end, rows);
}

inline void rows(const RowsTask& task, int64_t begin, int64_t end, void* scratch, RowsStats& stats) {
  if (kHasBf16 && task.precision == Precision::bf16)
    process_rows<LowProduct>(task, begin, end, scratch, stats);
  else
    process_rows<Fp32Product>(task, begin, end, scratch, stats);
}

inline int64_t rows_scratch_bytes(const RowsTask& task, int64_t block_rows) {
  Arena arena{nullptr};
  take_scratch(arena, task, packed_words(task.precision, task.d_model), block_rows);
  return arena.used;
}

inline void decode_row(const float* decoder, const float* pre_bias, int64_t d, const int64_t* index, const float* value,
                       int64_t count, float* out) {
  memcpy(out, pre_bias, static_cast<size_t>(d) * 4);
  add_rows(out, decoder, d, index, value, count);
}

const Level kLevel = {MONOSEM_LEVEL_NAME, kTileRows,    kPanel,        kHasBf16,     false,       packed_words,
                      pack_encoder,       pack_scratch_bytes, rows,    rows_scratch_bytes, decode_row, column_sums,
                      spread,             aux_gradients,      aux_scratch_bytes,  latent_gradient,    add_scaled, project,   squared_norm, update_latent,
                      update_values};
