// One application of gradients: the decoder's projection, Adam, unit norm, moving average (Gao et al. 2024, section 2).

inline double project(float* d_decoder, const float* decoder, int64_t d) {
  add_scaled(d_decoder, -dot(d_decoder, decoder, d), decoder, d);
  return squared_norm(d_decoder, d);
}

struct Adam {
  Vec beta1, beta2, rest1, rest2, step_size, second_scale, epsilon;
  explicit Adam(const UpdateTask& task)
      : beta1(splat(task.beta1)), beta2(splat(task.beta2)), rest1(splat(1 - task.beta1)), rest2(splat(1 - task.beta2)),
        step_size(splat(task.step_size)), second_scale(splat(task.second_scale)), epsilon(splat(task.epsilon)) {}

  /// The new parameter; the moments are updated in place.
  Vec step(Vec w, Vec& first, Vec& second, Vec gradient) const {
    first = fma(beta1, first, rest1 * gradient);
    second = fma(beta2, second, rest2 * (gradient * gradient));
    return w - step_size * first / fma(root(second), second_scale, epsilon);
  }
};

inline void average_into(float* average, const float* w, int64_t d, float ema) {
  const Vec keep = splat(ema), take = splat(1 - ema);
  each_vector(d, [&](int64_t t, auto at) {
    at.store(average + t, fma(keep, at.load(average + t), take * at.load(w + t)));
  });
}

inline void update_values(const UpdateTask& task, float* w, float* first, float* second, float* average,
                          const float* gradient, int64_t count, float factor) {
  const Adam adam(task);
  const Vec scale = splat(factor);
  each_vector(count, [&](int64_t t, auto at) {
    Vec m = at.load(first + t), v = at.load(second + t);
    const Vec updated = adam.step(at.load(w + t), m, v, scale * at.load(gradient + t));
    at.store(w + t, updated);
    at.store(first + t, m);
    at.store(second + t, v);
  });
  if (average) average_into(average, w, count, task.ema);
}

inline void update_latent(const UpdateTask& task, int64_t latent, const float* d_encoder, float d_bias,
                          const float* d_decoder, float factor) {
  const int64_t d = task.d_model, at = latent * d;
  update_values(task, task.encoder + at, task.encoder_first + at, task.encoder_second + at,
                task.encoder_average ? task.encoder_average + at : nullptr, d_encoder, d, factor);
  update_values(task, task.bias + latent, task.bias_first + latent, task.bias_second + latent,
                task.bias_average ? task.bias_average + latent : nullptr, &d_bias, 1, factor);
  float* decoder = task.decoder + at;
  update_values(task, decoder, task.decoder_first + at, task.decoder_second + at, nullptr, d_decoder, d, factor);
  const Vec norm = splat(__builtin_sqrtf(dot(decoder, decoder, d)));
  each_vector(d, [&](int64_t t, auto v) { v.store(decoder + t, v.load(decoder + t) / norm); });
  if (task.decoder_average) average_into(task.decoder_average + at, decoder, d, task.ema);
}
