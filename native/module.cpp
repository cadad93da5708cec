// Python's door: arrays come in through DLPack, shapes are checked here, nothing is copied or converted.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <limits>
#include <string>
#include <vector>

#include "step.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Matrix = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Vector = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Indices = nb::ndarray<int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Counts = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Mask = nb::ndarray<bool, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using WeightsArrays = nb::typed<nb::tuple, Matrix, Vector, Matrix, Vector>;

[[noreturn]] void refuse(const std::string& message) { throw nb::value_error(message.c_str()); }

template <class Array>
Array cast(nb::handle h) {
  return nb::cast<Array>(h, /* convert */ false);
}

/// The four arrays of a monosem.types.Weights, all of the shapes that `shape` says.
monosem::Weights weights(nb::tuple t, const monosem::Shape& shape) {
  const auto encoder = cast<Matrix>(t[0]), decoder = cast<Matrix>(t[2]);
  const auto latent_bias = cast<Vector>(t[1]), pre_bias = cast<Vector>(t[3]);
  const size_t n = static_cast<size_t>(shape.n_latents), d = static_cast<size_t>(shape.d_model);
  if (encoder.shape(0) != n || encoder.shape(1) != d || decoder.shape(0) != n || decoder.shape(1) != d ||
      latent_bias.shape(0) != n || pre_bias.shape(0) != d)
    refuse("weights must be encoder [n, d], latent_bias [n], decoder [n, d], pre_bias [d] with one n and one d");
  return {encoder.data(), latent_bias.data(), decoder.data(), pre_bias.data()};
}

monosem::Shape shape_of(nb::tuple t, size_t batch) {
  const auto encoder = cast<Matrix>(t[0]);
  if (encoder.shape(0) > std::numeric_limits<int32_t>::max() || batch > std::numeric_limits<int32_t>::max())
    refuse("n_latents and the batch must be below 2^31");
  return {static_cast<int64_t>(batch), static_cast<int64_t>(encoder.shape(1)), static_cast<int64_t>(encoder.shape(0))};
}

monosem::Weights optional_weights(nb::object t, const monosem::Shape& shape) {
  return t.is_none() ? monosem::Weights{} : weights(nb::cast<nb::tuple>(t), shape);
}

/// The precision of the product; what this CPU has no instruction for runs as fp32.
monosem::Precision precision_named(const std::string& name, const monosem::Shape& shape) {
  constexpr int64_t kLargestInt8 = 65'000;  // d_model below which 32-bit sums cannot overflow
  if (!monosem::level().has_low || name == "fp32") return monosem::Precision::fp32;
  return name == "int8" && shape.d_model < kLargestInt8 ? monosem::Precision::int8 : monosem::Precision::bf16;
}

monosem::Shape batch_shape(nb::tuple t, const Matrix& x) {
  const monosem::Shape shape = shape_of(t, x.shape(0));
  if (static_cast<int64_t>(x.shape(1)) != shape.d_model) refuse("x must be [batch, d_model] with the weights' d_model");
  return shape;
}

nb::dict as_dict(const monosem::RowsStats& stats) {
  nb::dict d;
  d["n_rescored"] = stats.n_rescored;
  d["n_saturated"] = stats.n_saturated;
  d["n_rerun"] = stats.n_rerun;
  d["n_audited"] = stats.n_audited;
  d["n_missed"] = stats.n_missed;
  d["recall"] = nb::none();
  if (stats.n_audited) d["recall"] = 1 - static_cast<double>(stats.n_missed) / static_cast<double>(stats.n_audited);
  d["product_s"] = 1e-9 * static_cast<double>(stats.product_ns);
  return d;
}

/// Rows to audit; none where nothing is given.
monosem::Audit audit_of(nb::object given, const monosem::Shape& shape) {
  if (given.is_none()) return {nullptr, 0};
  const Counts rows = cast<Counts>(given);
  const int64_t count = static_cast<int64_t>(rows.shape(0));
  for (int64_t i = 0; i < count; ++i)
    if (rows.data()[i] < 0 || rows.data()[i] >= shape.batch) refuse("a row to audit is outside the batch");
  return {rows.data(), count};
}

nb::dict topk_encode(Matrix x, nb::tuple w, int64_t k, const std::string& precision, Indices index, Matrix value,
                     nb::object audit) {
  const monosem::Shape shape = batch_shape(w, x);
  const monosem::Weights arrays = weights(w, shape);
  if (k < 1 || k > shape.n_latents) refuse("k must be between 1 and n_latents");
  const size_t batch = x.shape(0), width = static_cast<size_t>(k);
  if (index.shape(0) != batch || index.shape(1) != width || value.shape(0) != batch || value.shape(1) != width)
    refuse("index and value must be [batch, k]");
  const monosem::Audit rows = audit_of(audit, shape);
  monosem::RowsStats stats;
  {
    nb::gil_scoped_release release;
    stats = monosem::topk_encode(shape, arrays, x.data(), precision_named(precision, shape), k, rows, index.data(), value.data());
  }
  return as_dict(stats);
}

/// A tensor of torch that owns `data`.
template <class T>
nb::ndarray<nb::pytorch, T, nb::ndim<2>> owned(std::unique_ptr<T[]> data, size_t rows, size_t columns) {
  T* raw = data.release();
  return {raw, {rows, columns}, nb::capsule(raw, [](void* p) noexcept { delete[] static_cast<T*>(p); })};
}

nb::object threshold_encode(Matrix x, nb::tuple w, Vector threshold, const std::string& precision) {
  const monosem::Shape shape = batch_shape(w, x);
  const monosem::Weights arrays = weights(w, shape);
  if (threshold.shape(0) != static_cast<size_t>(shape.n_latents)) refuse("threshold must be [n_latents]");
  std::optional<monosem::Exceeding> found;
  {
    nb::gil_scoped_release release;
    found = monosem::threshold_encode(shape, arrays, x.data(), precision_named(precision, shape), threshold.data());
  }
  if (!found) return nb::none();
  const size_t width = static_cast<size_t>(found->width);
  return nb::make_tuple(owned(std::move(found->index), x.shape(0), width), owned(std::move(found->value), x.shape(0), width));
}

void check_index(int64_t index, const monosem::Shape& shape) {
  if (index < 0 || index >= shape.n_latents)
    refuse("index " + std::to_string(index) + " is outside 0.." + std::to_string(shape.n_latents - 1));
}

void decode(Indices index, Matrix value, nb::tuple w, Matrix recons) {
  const monosem::Shape shape = batch_shape(w, recons);
  const monosem::Weights arrays = weights(w, shape);
  if (index.shape(0) != recons.shape(0) || value.shape(0) != recons.shape(0) || index.shape(1) != value.shape(1))
    refuse("indices and values must be [batch, k] with one batch and one k");
  for (size_t j = 0; j < index.size(); ++j) check_index(index.data()[j], shape);
  nb::gil_scoped_release release;
  monosem::decode(shape, arrays, index.data(), value.data(), static_cast<int64_t>(index.shape(1)), recons.data());
}

void sparse_gradients(Matrix x, nb::tuple w, Indices index, Matrix value, Matrix d_recons, double d_active,
                      nb::tuple gradients) {
  const monosem::Shape shape = batch_shape(w, x);
  const monosem::Weights arrays = weights(w, shape), out = weights(gradients, shape);
  if (d_recons.shape(0) != x.shape(0) || d_recons.shape(1) != x.shape(1)) refuse("d_recons must be of the shape of x");
  if (index.shape(0) != x.shape(0) || value.shape(0) != x.shape(0) || index.shape(1) != value.shape(1))
    refuse("indices and values must be [batch, k] with the batch of x and one k");
  for (size_t j = 0; j < index.size(); ++j)
    if (value.data()[j] > 0) check_index(index.data()[j], shape);
  nb::gil_scoped_release release;
  monosem::sparse_gradients(shape, arrays, x.data(), index.data(), value.data(), static_cast<int64_t>(index.shape(1)),
                            d_recons.data(), d_active, out);
}

/// The arguments that topk_gradients and topk_step share, checked.
struct StepArguments {
  monosem::Shape shape;
  monosem::Weights weights;
  monosem::Loss loss;

  StepArguments(const Matrix& x, nb::tuple w, const Mask& dead, const Counts& n_fired, monosem::Loss l)
      : shape(batch_shape(w, x)), weights(::weights(w, shape)), loss(l) {
    if (loss.k < 1 || loss.k > shape.n_latents) refuse("k must be between 1 and n_latents");
    if (loss.auxk < 0) refuse("auxk must not be negative");
    if (shape.batch < 1) refuse("the batch is empty; give at least one row");
    const size_t n = static_cast<size_t>(shape.n_latents);
    if (dead.shape(0) != n || n_fired.shape(0) != n) refuse("dead and n_fired must be [n_latents]");
  }
};

nb::tuple as_tuple(const monosem::Terms& t) {
  return nb::make_tuple(t.mse, t.auxiliary, t.auxk_dropped, t.n_active, as_dict(t.stats));
}

nb::tuple topk_gradients(Matrix x, nb::tuple w, Mask dead, int64_t k, double mse_scale, int64_t auxk, double auxk_coef,
                         const std::string& precision, Counts n_fired, nb::tuple gradients, nb::object audit) {
  const StepArguments a(x, w, dead, n_fired, {k, mse_scale, auxk, auxk_coef});
  const monosem::Weights out = weights(gradients, a.shape);
  const monosem::Audit rows = audit_of(audit, a.shape);
  monosem::Terms terms;
  {
    nb::gil_scoped_release release;
    terms = monosem::topk_gradients(a.shape, a.weights, x.data(), precision_named(precision, a.shape), a.loss, dead.data(), rows, out,
                                    n_fired.data());
  }
  return as_tuple(terms);
}

nb::tuple topk_step(Matrix x, nb::tuple w, Mask dead, int64_t k, double mse_scale, int64_t auxk, double auxk_coef,
                    const std::string& precision, Counts n_fired, nb::tuple first, nb::tuple second, nb::object average,
                    int64_t step, double lr, double ema, double beta1, double beta2, double epsilon,
                    nb::object audit) {
  const StepArguments a(x, w, dead, n_fired, {k, mse_scale, auxk, auxk_coef});
  const monosem::Weights m = weights(first, a.shape), v = weights(second, a.shape);
  const monosem::Weights mean = optional_weights(average, a.shape);
  const monosem::Audit rows = audit_of(audit, a.shape);
  monosem::StepResult result;
  {
    nb::gil_scoped_release release;
    result = monosem::topk_step(a.shape, a.weights, x.data(), precision_named(precision, a.shape), a.loss, dead.data(),
                                rows, n_fired.data(), m, v, mean,
                                {step, lr, ema, std::numeric_limits<double>::infinity(), beta1, beta2, epsilon});
  }
  return nb::make_tuple(as_tuple(result.terms), result.norm);
}

double apply_update(nb::tuple w, nb::tuple gradients, nb::tuple first, nb::tuple second, nb::object average, int64_t step,
                    double lr, double ema, double beta1, double beta2, double epsilon, double clip_norm) {
  const monosem::Shape shape = shape_of(w, 0);
  const monosem::Weights arrays = weights(w, shape), g = weights(gradients, shape), m = weights(first, shape);
  const monosem::Weights v = weights(second, shape);
  const monosem::Weights a = optional_weights(average, shape);
  nb::gil_scoped_release release;
  return monosem::apply_update(shape, arrays, g, m, v, a, {step, lr, ema, clip_norm, beta1, beta2, epsilon});
}

nb::dict timings() {
  const monosem::Times& t = monosem::last_times();
  nb::dict d;
  d["pack"] = t.pack;
  d["rows"] = t.rows;
  d["group"] = t.group;
  d["latents"] = t.latents;
  return d;
}

std::vector<std::string> levels() {
  std::vector<std::string> names;
  for (const char* const* name = monosem::level_names(); *name; ++name) names.emplace_back(*name);
  return names;
}

void set_level(const std::string& name) {
  if (monosem::set_level(name.c_str())) return;
  std::string known = "auto";
  for (const std::string& n : levels()) known += ", " + n;
  refuse("level is '" + name + "'; this machine has " + known);
}

}  // namespace

NB_MODULE(_native, m) {
  m.def("topk_encode", &topk_encode, "x"_a, "weights"_a, "k"_a, "precision"_a, "index"_a, "value"_a,
        "audit"_a = nb::none());
  m.def("threshold_encode", &threshold_encode, "x"_a, "weights"_a, "threshold"_a, "precision"_a,
        "Indices and values, or None where they would not be sparse.");
  m.def("decode", &decode, "index"_a, "value"_a, "weights"_a, "recons"_a);
  m.def("sparse_gradients", &sparse_gradients, "x"_a, "weights"_a, "index"_a, "value"_a, "d_recons"_a, "d_active"_a,
        "gradients"_a);
  m.def("topk_gradients", &topk_gradients, "x"_a, "weights"_a, "dead"_a, "k"_a, "mse_scale"_a, "auxk"_a, "auxk_coef"_a,
        "precision"_a, "n_fired"_a, "gradients"_a, "audit"_a = nb::none());
  m.def("topk_step", &topk_step, "x"_a, "weights"_a, "dead"_a, "k"_a, "mse_scale"_a, "auxk"_a, "auxk_coef"_a,
        "precision"_a, "n_fired"_a, "first"_a, "second"_a, "average"_a.none(), "step"_a, "lr"_a, "ema"_a, "beta1"_a,
        "beta2"_a, "epsilon"_a, "audit"_a = nb::none());
  m.def("apply_update", &apply_update, "weights"_a, "gradients"_a, "first"_a, "second"_a, "average"_a.none(), "step"_a,
        "lr"_a, "ema"_a, "beta1"_a, "beta2"_a, "epsilon"_a, "clip_norm"_a);
  m.def("has_low", [] { return monosem::level().has_low; }, "Whether the level in use has products below fp32.");
  m.def("level", [] { return std::string(monosem::level().name); }, "The dispatch level in use.");
  m.def("levels", &levels, "The dispatch levels of this machine, best first.");
  m.def("set_level", &set_level, "name"_a, "Forces a dispatch level; 'auto' undoes it.");
  m.def("timings", &timings, "Milliseconds of the parts of this thread's last call.");
  m.def("fill_workspace", &monosem::fill_workspace, "byte"_a, "Overwrites the scratch memory of this thread.");
  m.def("release_workspace", &monosem::release_workspace, "Frees the scratch memory of this thread.");
}
