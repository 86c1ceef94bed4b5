// Eager calls on the CPU: checks, autograd and outputs in C++, since in Python they cost more than a
// small batch's arithmetic.
//
// Compiled against one torch and one Python, unlike everything else here: autograd has no stable ABI.
// It holds no kernel, only this shortcut to the passes of the stable library, and every result is the
// one that vae_fast/eager.py would give without it. Each function takes the arguments of the function
// of that name there and returns None, having done nothing, where the case is not plain; the caller
// then goes the long way, which knows every case.

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include "passes.h"

namespace vae_fast {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

const Passes* passes = nullptr;
PyObject* reused_empty_like = nullptr;  // vae_fast.buffers.empty_like
size_t smallest_reused = 0;             // bytes

// ---- views ---------------------------------------------------------------------------------------

View view(const Tensor& t) {
  if (!t.defined()) return {};
  return {true, t.data_ptr(), static_cast<ScalarType>(t.scalar_type()), t.dim(), t.sizes().data(),
          t.strides().data()};
}

at::TensorOptions row_options(const Tensor& t) {
  return t.options().dtype(t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

// ---- what is plain -------------------------------------------------------------------------------

// Nobody watches or changes what PyTorch's dispatcher does.
bool unwatched() {
  return !c10::impl::TorchDispatchModeTLS::any_modes_set() && !at::hasCallbacks() &&
         !torch::jit::tracer::isTracing() &&
         !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::PreDispatch) &&
         !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// A CPU tensor whose memory holds its values, or an undefined one.
bool owns_values(const Tensor& t) {
  return !t.defined() ||
         (t.device().is_cpu() && t.layout() == at::kStrided && t.has_storage() && !t.is_neg() &&
          !t._is_zerotensor() && !t.unsafeGetTensorImpl()->is_python_dispatch());
}

// The tensor of a Python object, if it is such a one; undefined for None, null if neither.
const Tensor* plain(PyObject* object) {
  static const Tensor undefined;
  if (object == Py_None) return &undefined;
  if (!THPVariable_CheckExact(object)) return nullptr;
  const Tensor& t = THPVariable_Unpack(object);
  return owns_values(t) && !t._fw_grad(0).defined() ? &t : nullptr;
}

bool is_data(const Tensor& t) {
  const at::ScalarType type = t.defined() ? t.scalar_type() : at::kBool;
  return (type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf) &&
         t.dim() > 0;
}
// Whether a likelihood's tensors are all of one dtype, but for an x of levels, with a scale for each
// element, a fixed one for all, or none where there is none (not `scaled`).
bool fit(const Tensor& x, const Tensor& mean, const Tensor& scale, bool scaled) {
  if (!x.defined() || x.dim() == 0 || !is_data(mean)) return false;
  if (x.scalar_type() != at::kByte && x.scalar_type() != mean.scalar_type()) return false;
  if (!scaled) return !scale.defined() && mean.sizes() == x.sizes();
  if (scale.defined()) {
    const bool same = scale.scalar_type() == mean.scalar_type();
    const bool fixed = scale.dim() == 0 && !scale.requires_grad() &&
                       (same || scale.scalar_type() == row_options(mean).dtype().toScalarType());
    return (fixed || (same && scale.sizes() == x.sizes())) && mean.sizes() == x.sizes();
  }
  // Packed along dimension 1.
  return x.dim() >= 2 && mean.dim() == x.dim() && mean.size(0) == x.size(0) &&
         mean.size(1) == 2 * x.size(1) && mean.sizes().slice(2) == x.sizes().slice(2);
}
bool is_row_term(const Tensor& t, const Tensor& mean) {
  return t.defined() && t.dim() == 1 && t.size(0) == mean.size(0) &&
         t.scalar_type() == (mean.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

// ---- autograd ------------------------------------------------------------------------------------

// What a node keeps besides tensors, as a list of integers: compiled autograd has to compare it.
template <class Options>
struct Kept {
  static_assert(std::is_trivially_copyable_v<Options> && sizeof(Options) % sizeof(int64_t) == 0);
  static constexpr size_t kWords = sizeof(Options) / sizeof(int64_t);

  static void keep(AutogradContext* ctx, const Options& options) {
    std::vector<int64_t> words(kWords);
    std::memcpy(words.data(), &options, sizeof(Options));
    ctx->saved_data["options"] = std::move(words);
  }
  static Options of(AutogradContext* ctx) {
    const std::vector<int64_t> words = ctx->saved_data["options"].toIntVector();
    Options options;
    std::memcpy(&options, words.data(), sizeof(Options));
    return options;
  }
};

// A graph of the derivative would have to be differentiable in turn.
void refuse_graph() {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !at::GradMode::is_enabled(),
      "vae_fast: double backward (create_graph=True) is not supported by the fused kernels; "
      "differentiate the reference instead (vae_fast.use_backend(\"reference\"))");
}

// Whether a backward pass may go straight to the passes: not with batched gradients, say.
bool is_plain(const variable_list& gradients) {
  return unwatched() && std::all_of(gradients.begin(), gradients.end(), owns_values);
}

// Calls an op of vae_fast/ops.py below autograd.
torch::jit::Stack call(const char* op, torch::jit::Stack stack) {
  const at::AutoDispatchBelowAutograd below;
  c10::Dispatcher::singleton().findSchemaOrThrow(op, "").callBoxed(stack);
  return stack;
}

at::IValue optional(const Tensor& t) { return t.defined() ? at::IValue(t) : at::IValue(); }

struct Latent : torch::autograd::Function<Latent> {
  static constexpr bool is_traceable = true;  // fakes are not plain, and go to the ops

  static variable_list forward(AutogradContext* ctx, const Tensor& mu, const Tensor& scale,
                               const Tensor& key, const LatentOptions& options) {
    ctx->save_for_backward({mu, scale, key});
    Kept<LatentOptions>::keep(ctx, options);
    ctx->set_materialize_grads(false);
    return run(mu, scale, key, options);
  }

  static variable_list run(const Tensor& mu, const Tensor& scale, const Tensor& key,
                           const LatentOptions& options) {
    at::DimVector shape(mu.sizes()), rows{mu.size(0)};
    if (options.num_samples > 0) {
      shape.insert(shape.begin(), options.num_samples);
      rows.insert(rows.begin(), options.num_samples);
    }
    Tensor z = at::empty(shape, mu.options());
    Tensor log_q = at::empty(rows, row_options(mu)), log_p = at::empty(rows, row_options(mu));
    passes->advise_huge_pages(view(z));
    passes->latent_forward(view(mu), view(scale), view(key), options, view(z), view(log_q),
                           view(log_p));
    return {z, log_q, log_p};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& g) {
    if (!g[0].defined() && !g[1].defined() && !g[2].defined()) return {{}, {}, {}, {}};
    refuse_graph();
    const LatentOptions o = Kept<LatentOptions>::of(ctx);
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &mu = saved[0], &scale = saved[1], &key = saved[2];
    const bool sampled = o.num_samples > 0;
    if (!is_plain(g) || !is_plain(saved) || !passes->is_straight(view(mu), 1) ||
        !passes->is_straight(view(scale), 1) ||
        (g[0].defined() && !passes->is_straight(view(g[0]), sampled ? 2 : 1))) {
      const torch::jit::Stack results =
          call("vae_fast::latent_backward",
               {optional(g[0]), optional(g[1]), optional(g[2]), mu, scale, key, o.num_samples,
                o.first_row, o.param, o.lo, o.hi, o.soft != 0, o.path != 0});
      return {results[0].toTensor(), results[1].toTensor(), {}, {}};
    }
    const Tensor g_mu = at::empty(mu.sizes(), mu.options());
    const Tensor g_scale = at::empty(scale.sizes(), scale.options());
    passes->advise_huge_pages(view(g_mu));
    passes->advise_huge_pages(view(g_scale));
    passes->latent_backward(view(g[0]), view(g[1]), view(g[2]), view(mu), view(scale), view(key), o,
                            view(g_mu), view(g_scale));
    return {g_mu, g_scale, {}, {}};
  }
};

// Memory for a gradient of t; needs the GIL.
Tensor gradient_like(const Tensor& t) {
  if (!t.defined()) return {};
  if (t.nbytes() < smallest_reused) return at::empty_like(t.detach());
  PyObject* const argument = THPVariable_Wrap(t);
  PyObject* const made = PyObject_CallFunctionObjArgs(reused_empty_like, argument, nullptr);
  Py_XDECREF(argument);
  if (made == nullptr) throw python_error();
  const Tensor gradient = THPVariable_Unpack(made);
  Py_DECREF(made);
  return gradient;
}

bool differentiable(const Tensor& t) { return t.defined() && t.requires_grad(); }

std::optional<Tensor> if_defined(const Tensor& t) {
  return t.defined() ? std::optional(t) : std::nullopt;
}

// A density, by the names of LikelihoodOptions.
struct Density {
  int64_t likelihood, param;
  double lo, hi;
  int64_t soft;
  double df, x_mul, x_add;
};
constexpr Py_ssize_t kDensity = 8;  // objects that it is made of, in that order
Density density_of(PyObject* const* objects) {
  return {PyLong_AsLongLong(objects[0]),       PyLong_AsLongLong(objects[1]),
          PyFloat_AsDouble(objects[2]),        PyFloat_AsDouble(objects[3]),
          PyObject_IsTrue(objects[4]) == 1,    PyFloat_AsDouble(objects[5]),
          PyFloat_AsDouble(objects[6]),        PyFloat_AsDouble(objects[7])};
}
// Its options, where no loss is wanted.
LikelihoodOptions likelihood_options(const Density& model) {
  LikelihoodOptions options{};
  options.reduction = Reduction::no_loss;
  options.likelihood = model.likelihood;
  options.param = model.param;
  options.lo = model.lo;
  options.hi = model.hi;
  options.soft = model.soft != 0;
  options.df = model.df;
  options.x_mul = model.x_mul;
  options.x_add = model.x_add;
  return options;
}

struct NllState {
  Density model;
  int64_t learned;  // the scale, if there is one apart
};

// The likelihood alone, with its gradients in the backward pass. Nobody wants one for x.
struct Nll : torch::autograd::Function<Nll> {
  static constexpr bool is_traceable = true;  // fakes are not plain, and go to the ops

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& mean,
                        const std::optional<Tensor>& scale, const Density& model) {
    ctx->save_for_backward({x, mean, scale.value_or(Tensor())});
    Kept<NllState>::keep(ctx, {model, scale && scale->requires_grad()});
    ctx->set_materialize_grads(false);
    return evaluate(x, mean, scale.value_or(Tensor()), model);
  }

  static Tensor evaluate(const Tensor& x, const Tensor& mean, const Tensor& scale,
                         const Density& model) {
    const Tensor nll = at::empty({mean.size(0)}, row_options(mean));
    passes->likelihood_forward(view(x), view(mean), view(scale), {}, {}, {},
                               likelihood_options(model), view(nll), {});
    return nll;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& g) {
    if (!g[0].defined()) return {{}, {}, {}, {}};
    refuse_graph();
    const auto [model, learned] = Kept<NllState>::of(ctx);
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &mean = saved[1], &scale = saved[2];
    const LikelihoodOptions options = likelihood_options(model);
    if (!is_plain(g) || !is_plain(saved)) {
      const torch::jit::Stack results =
          call("vae_fast::likelihood_backward",
               {optional(g[0]), at::IValue(), x, mean, optional(scale), at::IValue(), 0.0,
                static_cast<int64_t>(options.reduction), model.likelihood, model.param, model.lo,
                model.hi, options.soft, model.df, model.x_mul, model.x_add, at::IValue(),
                options.first_row, false, true, learned != 0});
      return {{}, results[1].toTensor(), learned ? results[2].toTensor() : Tensor(), {}};
    }
    Tensor g_mean, g_scale;
    {
      const py::gil_scoped_acquire gil;
      g_mean = gradient_like(mean);
      if (learned) g_scale = gradient_like(scale);
    }
    passes->likelihood_backward(view(g[0]), {}, view(x), view(mean), view(scale), {}, options, {},
                                view(g_mean), view(g_scale), {}, {});
    return {{}, g_mean, g_scale, {}};
  }
};

// The loss with its gradients, which the forward pass writes into `targets`.
struct ElboState {
  double beta;
  Reduction reduction;
  int64_t batch, has_log_p;
};
struct Targets {
  Tensor g_mean, g_scale;
  bool inplace = false;
};

struct Elbo : torch::autograd::Function<Elbo> {
  static constexpr bool is_traceable = true;  // fakes are not plain, and go to the ops

  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& mean,
                               const std::optional<Tensor>& scale, const Tensor& log_q,
                               const std::optional<Tensor>& log_p,
                               const LikelihoodOptions& options, const Targets& targets) {
    // Here autograd knows the edges to them: after the bump, a view would make a new one of its own,
    // without the hooks of the old.
    if (targets.inplace) mean.unsafeGetTensorImpl()->bump_version();
    if (targets.inplace && targets.g_scale.defined()) scale->unsafeGetTensorImpl()->bump_version();
    const Tensor nll = at::empty({mean.size(0)}, row_options(mean));
    const Tensor loss = loss_like(nll, x, options);
    passes->likelihood_forward_grad(view(x), view(mean), scale ? view(*scale) : View{}, {},
                                    view(log_q), log_p ? view(*log_p) : View{}, options,
                                    view(targets.g_mean),
                                    view(targets.g_scale), view(nll), view(loss), {});
    ctx->save_for_backward({targets.g_mean, targets.g_scale});
    Kept<ElboState>::keep(ctx, {options.beta, options.reduction, x.size(0), log_p.has_value()});
    ctx->set_materialize_grads(false);
    return {nll, loss};
  }

  static variable_list evaluate(const Tensor& x, const Tensor& mean, const Tensor& scale,
                                const Tensor& log_q, const Tensor& log_p,
                                const LikelihoodOptions& options) {
    const Tensor nll = at::empty({mean.size(0)}, row_options(mean));
    const Tensor loss = loss_like(nll, x, options);
    passes->likelihood_forward(view(x), view(mean), view(scale), {}, view(log_q), view(log_p),
                               options, view(nll), view(loss));
    return {nll, loss};
  }

  static Tensor loss_like(const Tensor& nll, const Tensor& x, const LikelihoodOptions& options) {
    return options.reduction == Reduction::none ? at::empty({x.size(0)}, nll.options())
                                                : at::empty({}, nll.options());
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& g) {
    if (!g[0].defined() && !g[1].defined()) return {{}, {}, {}, {}, {}, {}, {}};
    refuse_graph();
    const auto [beta, reduction, batch, has_log_p] = Kept<ElboState>::of(ctx);
    variable_list saved = ctx->get_saved_variables();
    Tensor &g_mean = saved[0], &g_scale = saved[1];
    const int64_t rows = g_mean.size(0), samples = rows / std::max<int64_t>(batch, 1);
    if (!is_plain(g) || !is_plain(saved)) {
      const torch::jit::Stack results =
          call("vae_fast::likelihood_rescale",
               {g_mean, optional(g_scale), at::IValue(), optional(g[0]), optional(g[1]), beta,
                static_cast<int64_t>(reduction), samples, batch});
      return {{}, results[0].toTensor(), g_scale.defined() ? results[1].toTensor() : Tensor(),
              results[2].toTensor(), has_log_p ? results[3].toTensor() : Tensor(), {}, {}};
    }
    if (torch::autograd::get_current_graph_task_keep_graph()) {
      // Which may be walked again: leave what it saved as it is.
      g_mean = g_mean.clone();
      if (g_scale.defined()) g_scale = g_scale.clone();
    }
    const Tensor g_log_q = at::empty({rows}, row_options(g_mean));
    const Tensor g_log_p = at::empty({rows}, row_options(g_mean));
    passes->likelihood_rescale(view(g_mean), view(g_scale), {}, view(g[0]), view(g[1]), beta,
                               reduction, samples, batch, view(g_log_q), view(g_log_p), {});
    return {{}, g_mean, g_scale, g_log_q, has_log_p ? g_log_p : Tensor(), {}, {}};
  }
};

// ---- Python --------------------------------------------------------------------------------------

PyObject* wrapped(const variable_list& tensors) {
  PyObject* const tuple = PyTuple_New(static_cast<Py_ssize_t>(tensors.size()));
  for (size_t i = 0; tuple != nullptr && i < tensors.size(); ++i) {
    PyTuple_SET_ITEM(tuple, i, THPVariable_Wrap(tensors[i]));
  }
  return tuple;
}

// Whether t, a result that is no view, has memory of its own: none of the others shares it.
bool owns_memory(const Tensor& t, std::initializer_list<const Tensor*> others) {
  return t.grad_fn() && !t.is_view() && t.is_non_overlapping_and_dense() &&
         std::all_of(others.begin(), others.end(), [&](const Tensor* other) {
           return !other->defined() || other->storage().data() != t.storage().data();
         });
}

// (mu, scale, key or None, num_samples, first_row, param, lo, hi, soft, path) -> (z, log_q, log_p) or
// None
PyObject* latent(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 10, "latent takes 10 arguments, got ", count);
  const Tensor *mu = plain(objects[0]), *scale = plain(objects[1]), *given = plain(objects[2]);
  if (!mu || !scale || !given || !unwatched() || !is_data(*mu) || !scale->defined() ||
      scale->scalar_type() != mu->scalar_type() || scale->sizes() != mu->sizes() ||
      (given->defined() &&
       (given->scalar_type() != at::kUInt64 || given->dim() != 1 || given->size(0) != 2)) ||
      !passes->is_straight(view(*mu), 1) || !passes->is_straight(view(*scale), 1)) {
    Py_RETURN_NONE;
  }
  const LatentOptions options{PyLong_AsLongLong(objects[3]), PyLong_AsLongLong(objects[4]),
                              PyLong_AsLongLong(objects[5]), PyFloat_AsDouble(objects[6]),
                              PyFloat_AsDouble(objects[7]), PyObject_IsTrue(objects[8]) == 1,
                              PyObject_IsTrue(objects[9]) == 1};
  if (PyErr_Occurred()) return nullptr;
  const Tensor m = *mu, s = *scale;
  Tensor key = *given;
  variable_list results;
  {
    py::gil_scoped_release no_gil;
    if (!key.defined()) {  // the very draw of vae_fast/noise.py
      key = at::randint(std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max(), {2},
                        at::kLong)
                .view(at::kUInt64);
    }
    const bool graph = at::GradMode::is_enabled() && (differentiable(m) || differentiable(s));
    results = graph ? Latent::apply(m, s, key, options) : Latent::run(m, s, key, options);
  }
  return wrapped(results);
  END_HANDLE_TH_ERRORS
}

// A likelihood's x, mean and scale, of objects that are tensors, or for the scale a number or None.
struct Data {
  Tensor x, mean, scale;
};
std::optional<Data> data_of(PyObject* const* objects, bool scaled) {
  const Tensor *x = plain(objects[0]), *mean = plain(objects[1]);
  const bool number = PyFloat_CheckExact(objects[2]);
  const Tensor* scale = plain(number ? Py_None : objects[2]);
  if (!x || !mean || !scale || !unwatched()) return std::nullopt;
  Data data{*x, *mean, *scale};
  if (number && data.mean.defined()) {
    data.scale = at::scalar_tensor(PyFloat_AS_DOUBLE(objects[2]), row_options(data.mean));
  }
  return fit(data.x, data.mean, data.scale, scaled) ? std::optional(data) : std::nullopt;
}

// (x, mean, scale, scaled, density...) -> nll or None
PyObject* nll(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 4 + kDensity, "nll takes ", 4 + kDensity, " arguments, got ", count);
  const std::optional<Data> data = data_of(objects, objects[3] == Py_True);
  if (!data) Py_RETURN_NONE;
  const auto& [x, mean, scale] = *data;
  const Density model = density_of(objects + 4);
  if (PyErr_Occurred()) return nullptr;
  const bool graph = at::GradMode::is_enabled() &&
                     (differentiable(x) || differentiable(mean) || differentiable(scale));
  if (graph && (x.requires_grad() || !mean.requires_grad())) Py_RETURN_NONE;
  Tensor result;
  {
    py::gil_scoped_release no_gil;
    result = graph ? Nll::apply(x, mean, if_defined(scale), model)
                   : Nll::evaluate(x, mean, scale, model);
  }
  return THPVariable_Wrap(result);
  END_HANDLE_TH_ERRORS
}

// (x, mean, scale, scaled, log_q, log_p or None, beta, reduction, check, density...) -> (nll, loss) or
// None.
// With a check the gradients overwrite mean and scale: a function of the five tensors that raises where
// that may not be. It is not asked where nothing at all is shared.
PyObject* elbo(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 9 + kDensity, "elbo takes ", 9 + kDensity, " arguments, got ", count);
  const std::optional<Data> data = data_of(objects, objects[3] == Py_True);
  const Tensor *log_q_ = plain(objects[4]), *log_p_ = plain(objects[5]);
  if (!data || !log_q_ || !log_p_) Py_RETURN_NONE;
  const auto& [x, mean, scale] = *data;
  const Tensor log_q = *log_q_, log_p = *log_p_;
  if (!is_row_term(log_q, mean) || (log_p.defined() && !is_row_term(log_p, mean))) Py_RETURN_NONE;
  const bool inplace = objects[8] != Py_None;
  LikelihoodOptions options = likelihood_options(density_of(objects + 9));
  options.beta = PyFloat_AsDouble(objects[6]);
  options.reduction = static_cast<Reduction>(PyLong_AsLongLong(objects[7]));
  if (PyErr_Occurred()) return nullptr;
  const bool graph =
      at::GradMode::is_enabled() && (differentiable(x) || differentiable(mean) ||
                                     differentiable(scale) || differentiable(log_q) ||
                                     differentiable(log_p));
  if (!graph) {
    variable_list results;
    {
      py::gil_scoped_release no_gil;
      results = Elbo::evaluate(x, mean, scale, log_q, log_p, options);
    }
    return wrapped(results);
  }
  // Where the gradients are not written by the forward pass, for the reasons given in functional.py.
  if (x.requires_grad() || !mean.requires_grad() || mean.scalar_type() == at::kHalf ||
      (options.reduction == Reduction::none && !inplace)) {
    Py_RETURN_NONE;
  }
  Targets targets;
  const bool learned = differentiable(scale);
  if (inplace) {
    const bool alone = owns_memory(mean, {&x, &scale, &log_q, &log_p}) &&
                       (!learned || owns_memory(scale, {&x, &mean, &log_q, &log_p}));
    if (!alone) {
      PyObject* const tensor = PyFloat_CheckExact(objects[2]) ? Py_None : objects[2];
      PyObject* const checked = PyObject_CallFunctionObjArgs(
          objects[8], objects[0], objects[1], tensor, objects[4], objects[5], nullptr);
      if (checked == nullptr) return nullptr;
      Py_DECREF(checked);
    }
    // The same memory and version counter, but no view: autograd refuses to hand back a chunk that was
    // written to.
    targets = {mean.tensor_data(), learned ? scale.tensor_data() : Tensor(), /*inplace=*/true};
  } else {
    targets = {gradient_like(mean), learned ? gradient_like(scale) : Tensor(), /*inplace=*/false};
  }
  variable_list results;
  {
    py::gil_scoped_release no_gil;
    results = Elbo::apply(x, mean, if_defined(scale), log_q, if_defined(log_p), options, targets);
  }
  return wrapped(results);
  END_HANDLE_TH_ERRORS
}

// connect(address, empty_like, smallest): what vae_fast_passes() of the stable library returned, and
// what makes gradients of `smallest` bytes or more.
PyObject* connect(PyObject*, PyObject* arguments) {
  PyObject* address = nullptr;
  Py_ssize_t smallest = 0;
  if (!PyArg_ParseTuple(arguments, "OOn", &address, &reused_empty_like, &smallest)) return nullptr;
  passes = static_cast<const Passes*>(PyLong_AsVoidPtr(address));
  if (passes == nullptr) return nullptr;
  Py_INCREF(reused_empty_like);
  smallest_reused = static_cast<size_t>(smallest);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"connect", connect, METH_VARARGS, nullptr},
    {"latent", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(latent)), METH_FASTCALL,
     nullptr},
    {"nll", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(nll)), METH_FASTCALL, nullptr},
    {"elbo", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(elbo)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "vae_fast._eager", nullptr, -1, methods, nullptr,
                      nullptr,               nullptr,           nullptr};

}  // namespace
}  // namespace vae_fast

PyMODINIT_FUNC PyInit__eager() { return PyModule_Create(&vae_fast::module); }
