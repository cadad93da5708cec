// The kernels without Python, for the sanitizers: every level, awkward shapes, and a plain double-precision definition.
// Arrays have exactly the size that the kernels are promised, so that one float too many is caught.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "step.h"

namespace {

using namespace monosem;

struct Arrays {
  std::vector<float> encoder, latent_bias, decoder, pre_bias;
  Arrays(int64_t n, int64_t d, float value = 0)
      : encoder(static_cast<size_t>(n * d), value), latent_bias(static_cast<size_t>(n), value),
        decoder(static_cast<size_t>(n * d), value), pre_bias(static_cast<size_t>(d), value) {}
  Weights view() { return {encoder.data(), latent_bias.data(), decoder.data(), pre_bias.data()}; }
  std::vector<std::vector<float>*> parts() { return {&encoder, &latent_bias, &decoder, &pre_bias}; }
};

struct Case {
  Shape shape;
  Loss loss;
  int64_t n_dead;
};

std::mt19937 generator(0);

void fill(std::vector<float>& values, float scale) {
  std::normal_distribution<float> normal;
  for (float& v : values) v = scale * normal(generator);
}

Arrays random_weights(int64_t n, int64_t d) {
  Arrays w(n, d);
  for (auto* part : w.parts()) fill(*part, 0.3f);
  return w;
}

[[noreturn]] void fail(const char* what, const Case& c) {
  std::fprintf(stderr, "%s: %s is wrong at batch %lld, d_model %lld, n_latents %lld, k %lld, auxk %lld, dead %lld\n",
               level().name, what, static_cast<long long>(c.shape.batch), static_cast<long long>(c.shape.d_model),
               static_cast<long long>(c.shape.n_latents), static_cast<long long>(c.loss.k),
               static_cast<long long>(c.loss.auxk), static_cast<long long>(c.n_dead));
  std::exit(1);
}

struct Gradients {
  std::vector<double> encoder, latent_bias, decoder, pre_bias;
};

/// Gradients in double, from the formulas: index lists by sorting, nothing shared with the kernels.
struct Truth : Gradients {
  Gradients without_auxk;
  std::vector<std::vector<double>> pre;  // [B][N] pre-activations
  double mse = 0;

  Truth(const Case& c, const Arrays& w, const std::vector<float>& x, const std::vector<char>& dead) {
    const size_t n = static_cast<size_t>(c.shape.n_latents), d = static_cast<size_t>(c.shape.d_model);
    const size_t batch = static_cast<size_t>(c.shape.batch);
    encoder.resize(n * d), decoder.resize(n * d), latent_bias.resize(n), pre_bias.resize(d);
    pre.assign(batch, std::vector<double>(n));
    std::vector<std::vector<double>> error(batch, std::vector<double>(d));
    for (size_t b = 0; b < batch; ++b)
      for (size_t i = 0; i < n; ++i) {
        const float *row = &x[b * d], *bias = w.pre_bias.data(), *encoder_row = &w.encoder[i * d];
        double sum = w.latent_bias[i];
        for (size_t t = 0; t < d; ++t) sum += (double{row[t]} - bias[t]) * encoder_row[t];
        pre[b][i] = sum;
      }
    const auto top = [&](size_t b, size_t k, bool only_dead) {
      std::vector<size_t> order;
      for (size_t i = 0; i < n; ++i)
        if (!only_dead || dead[i]) order.push_back(i);
      std::stable_sort(order.begin(), order.end(), [&](size_t i, size_t j) { return pre[b][i] > pre[b][j]; });
      order.resize(std::min(k, order.size()));
      std::erase_if(order, [&](size_t i) { return !(pre[b][i] > 0); });
      return order;
    };
    const auto add = [&](size_t b, const std::vector<size_t>& latents, const std::vector<double>& d_recons, bool through_bias) {
      for (size_t i : latents) {
        double d_value = 0;
        for (size_t t = 0; t < d; ++t) d_value += d_recons[t] * w.decoder[i * d + t];
        latent_bias[i] += d_value;
        for (size_t t = 0; t < d; ++t) {
          decoder[i * d + t] += pre[b][i] * d_recons[t];
          encoder[i * d + t] += d_value * (double{x[b * d + t]} - w.pre_bias[t]);
          pre_bias[t] -= d_value * w.encoder[i * d + t];
        }
      }
      if (through_bias)
        for (size_t t = 0; t < d; ++t) pre_bias[t] += d_recons[t];
    };
    const double elements = static_cast<double>(batch * d);
    std::vector<double> mean(d), d_recons(d);
    for (size_t b = 0; b < batch; ++b) {
      const auto latents = top(b, static_cast<size_t>(c.loss.k), false);
      for (size_t t = 0; t < d; ++t) {
        double recons = w.pre_bias[t];
        for (size_t i : latents) recons += pre[b][i] * w.decoder[i * d + t];
        error[b][t] = x[b * d + t] - recons;
        mean[t] += error[b][t] / static_cast<double>(batch);
        d_recons[t] = -2 * c.loss.mse_scale * error[b][t] / elements;
        mse += c.loss.mse_scale * error[b][t] * error[b][t] / elements;
      }
      add(b, latents, d_recons, true);
    }
    without_auxk = *this;
    if (!c.loss.auxk || !c.n_dead) return;
    double spread = 0;
    for (size_t b = 0; b < batch; ++b)
      for (size_t t = 0; t < d; ++t) spread += std::pow(error[b][t] - mean[t], 2);
    for (size_t b = 0; b < batch; ++b) {
      const auto latents = top(b, static_cast<size_t>(c.loss.auxk), true);
      for (size_t t = 0; t < d; ++t) {
        double residual = -error[b][t];
        for (size_t i : latents) residual += pre[b][i] * w.decoder[i * d + t];
        d_recons[t] = 2 * c.loss.auxk_coef * residual / spread;
      }
      add(b, latents, d_recons, false);
    }
  }
};

/// One case, its numbers, and what should come out: made once for all levels and precisions.
struct Trial {
  Case c;
  Arrays w;
  std::vector<float> x;
  std::vector<char> dead;
  Truth truth;

  explicit Trial(const Case& given)
      : c(given), w(random_weights(c.shape.n_latents, c.shape.d_model)), x(random_rows(c)), dead(random_dead(c)),
        truth(c, w, x, dead) {}

  static std::vector<float> random_rows(const Case& c) {
    std::vector<float> x(static_cast<size_t>(c.shape.batch * c.shape.d_model));
    fill(x, 1);
    return x;
  }
  static std::vector<char> random_dead(const Case& c) {
    std::vector<char> dead(static_cast<size_t>(c.shape.n_latents), 0);
    std::fill_n(dead.begin(), c.n_dead, char{1});
    std::shuffle(dead.begin(), dead.end(), generator);
    return dead;
  }
};

void expect_near(const char* what, const Case& c, const std::vector<float>& ours, const std::vector<double>& truth) {
  double error = 0, size = 0;
  for (size_t i = 0; i < ours.size(); ++i) {
    error += std::pow(ours[i] - truth[i], 2);
    size += std::pow(truth[i], 2);
  }
  if (!(std::sqrt(error) <= 1e-5 * std::sqrt(size) + 1e-7)) fail(what, c);
}

/// Without AuxK, the gradients of the step come out of its latents as well; slots of value 0 have indices from nowhere.
void check_sparse_gradients(const Trial& trial, std::vector<int64_t> index, const std::vector<float>& value,
                            const std::vector<float>& recons) {
  const Case& c = trial.c;
  const std::vector<float>& x = trial.x;
  for (size_t j = 0; j < index.size(); ++j)
    if (value[j] == 0) index[j] = int64_t{1} << 40;
  std::vector<float> d_recons(x.size());
  const double factor = 2 * c.loss.mse_scale / static_cast<double>(x.size());
  for (size_t j = 0; j < x.size(); ++j) d_recons[j] = static_cast<float>(factor * (double{recons[j]} - x[j]));
  Arrays gradients(c.shape.n_latents, c.shape.d_model, NAN), weights = trial.w;
  sparse_gradients(c.shape, weights.view(), x.data(), index.data(), value.data(), c.loss.k, d_recons.data(), 0,
                   gradients.view());
  const Gradients& truth = trial.truth.without_auxk;
  expect_near("encoder gradient of given latents", c, gradients.encoder, truth.encoder);
  expect_near("latent_bias gradient of given latents", c, gradients.latent_bias, truth.latent_bias);
  expect_near("decoder gradient of given latents", c, gradients.decoder, truth.decoder);
  expect_near("pre_bias gradient of given latents", c, gradients.pre_bias, truth.pre_bias);
}

/// Everything above the thresholds comes out, and nothing else, up to what fp32 cannot tell.
void check_thresholds(const Trial& trial, Precision precision, float low) {
  const Case& c = trial.c;
  const auto [batch, d, n] = c.shape;
  std::vector<float> threshold(static_cast<size_t>(n));
  for (size_t i = 0; i < threshold.size(); ++i) threshold[i] = low + static_cast<float>(i % 5) - 1;
  Arrays weights = trial.w;
  const auto found = threshold_encode(c.shape, weights.view(), trial.x.data(), precision, threshold.data());
  if (!found) return;
  for (int64_t b = 0; b < batch; ++b) {
    std::vector<double> missing = trial.truth.pre[static_cast<size_t>(b)];
    for (size_t i = 0; i < missing.size(); ++i) missing[i] -= std::max(threshold[i], 0.0f);
    for (int64_t j = b * found->width; j < (b + 1) * found->width; ++j) {
      if (found->value[static_cast<size_t>(j)] == 0) continue;
      double& above = missing[static_cast<size_t>(found->index[static_cast<size_t>(j)])];
      if (above < -1e-4) fail("a latent below its threshold", c);
      above = 0;
    }
    for (const double above : missing)
      if (above > 1e-4) fail("a latent above its threshold", c);
  }
}

void check(const Trial& trial, Precision precision) {
  const Case& c = trial.c;
  const auto [batch, d, n] = c.shape;
  Arrays w = trial.w;
  const std::vector<float>& x = trial.x;
  const bool* dead_flags = reinterpret_cast<const bool*>(trial.dead.data());

  Arrays gradients(n, d, NAN);
  std::vector<int64_t> fired(static_cast<size_t>(n), -1), rows = {0, batch - 1};
  const Audit audit{rows.data(), 2};
  const Terms terms =
      topk_gradients(c.shape, w.view(), x.data(), precision, c.loss, dead_flags, audit, gradients.view(), fired.data());
  if (terms.stats.n_missed || (terms.n_active == batch * c.loss.k && terms.stats.n_audited != 2 * c.loss.k)) fail("audit", c);
  const Truth& truth = trial.truth;
  if (!(std::abs(terms.mse - truth.mse) <= 1e-5 * truth.mse)) fail("mse", c);
  expect_near("encoder gradient", c, gradients.encoder, truth.encoder);
  expect_near("latent_bias gradient", c, gradients.latent_bias, truth.latent_bias);
  expect_near("decoder gradient", c, gradients.decoder, truth.decoder);
  expect_near("pre_bias gradient", c, gradients.pre_bias, truth.pre_bias);

  // One visit a latent gives the same bits as gradients out and then an update.
  Arrays first(n, d), second(n, d), average(n, d), w2 = w, first2 = first, second2 = second, average2 = average;
  const Update update{1, 1e-3, 0.9, std::numeric_limits<double>::infinity(), 0.9, 0.999, 6.25e-10};
  apply_update(c.shape, w.view(), gradients.view(), first.view(), second.view(), average.view(), update);
  topk_step(c.shape, w2.view(), x.data(), precision, c.loss, dead_flags, audit, fired.data(), first2.view(),
            second2.view(), average2.view(), update);
  for (size_t p = 0; p < 4; ++p)
    if (*w.parts()[p] != *w2.parts()[p] || *average.parts()[p] != *average2.parts()[p]) fail("step", c);

  // The product's precision changes no latent and no bit of a value.
  Arrays original = trial.w;
  std::vector<int64_t> index(static_cast<size_t>(batch * c.loss.k)), index_fp32 = index;
  std::vector<float> value(index.size()), value_fp32 = value, recons(x.size());
  const RowsStats stats = topk_encode(c.shape, original.view(), x.data(), precision, c.loss.k, {}, index.data(),
                                      value.data());
  topk_encode(c.shape, original.view(), x.data(), Precision::fp32, c.loss.k, {}, index_fp32.data(), value_fp32.data());
  if (index != index_fp32 || value != value_fp32) fail("the precision: it", c);
  if (stats.n_recalled * 10 < stats.n_chosen * 9) fail("the product: it alone", c);
  decode(c.shape, original.view(), index.data(), value.data(), c.loss.k, recons.data());
  check_sparse_gradients(trial, index, value, recons);
  for (const float low : {0.0f, 4.0f}) check_thresholds(trial, precision, low);
}

/// Inputs that leave the ordinary path: rows that are not finite, and rows whose candidates all tie.
void check_strange_rows(Precision precision) {
  const Case c{{9, 20, 2500}, {7, 1, 16, 1.0 / 32}, 700};
  Arrays w(c.shape.n_latents, c.shape.d_model, 0.5f), gradients(c.shape.n_latents, c.shape.d_model);
  std::vector<float> x(static_cast<size_t>(c.shape.batch * c.shape.d_model), 1.0f);
  x[3] = std::numeric_limits<float>::quiet_NaN();
  x[25] = std::numeric_limits<float>::infinity();
  x[45] = 3e38f;
  std::vector<char> dead(static_cast<size_t>(c.shape.n_latents), 0);
  std::fill_n(dead.begin(), c.n_dead, char{1});
  std::vector<int64_t> fired(dead.size());
  const Terms terms = topk_gradients(c.shape, w.view(), x.data(), precision, c.loss,
                                     reinterpret_cast<const bool*>(dead.data()), {}, gradients.view(), fired.data());
  if (!std::isnan(terms.mse) || !terms.auxk_dropped) fail("a loss of rows that are not finite", c);
  if (terms.stats.n_saturated == 0) fail("the count of saturated rows", c);
}

}  // namespace

/// Prints the levels of this machine, then checks those that are named, or all.
int main(int n_arguments, char** arguments) {
  const std::vector<Case> cases = {
      {{1, 1, 1}, {1, 1, 0, 0}, 0},          {{7, 3, 40}, {40, 0.7, 8, 0.1}, 40},    {{19, 13, 77}, {5, 0.7, 8, 0.1}, 20},
      {{50, 33, 333}, {10, 1, 500, 0.1}, 90}, {{130, 64, 1000}, {32, 1, 64, 0.1}, 300}, {{5, 257, 129}, {3, 1, 4, 0.1}, 2},
      {{300, 17, 2100}, {9, 1, 30, 0.1}, 1000}, {{9, 801, 260}, {5, 1, 4, 0.1}, 10},  // several slices of int8
  };
  const std::vector<Trial> trials(cases.begin(), cases.end());
  std::vector<std::string> names(arguments + 1, arguments + n_arguments);
  for (const char* const* name = level_names(); *name; ++name) {
    std::printf("%s%s", *name, name[1] ? " " : "\n");
    if (n_arguments == 1) names.emplace_back(*name);
  }
  for (const std::string& name : names) {
    if (!set_level(name.c_str())) {
      std::fprintf(stderr, "there is no level %s here\n", name.c_str());
      return 1;
    }
    for (const Precision precision : {Precision::fp32, Precision::bf16, Precision::int8}) {
      const size_t n_trials = precision == Precision::fp32 || level().has_low ? trials.size() : 3;
      for (size_t i = 0; i < n_trials; ++i) check(trials[i], precision);
      check_strange_rows(precision);
    }
    std::printf("%s: ok\n", name.c_str());
  }
  release_workspace();
}
