// Eager calls: checks, autograd and outputs in C++, since in Python they cost more than a small batch's
// arithmetic.
//
// Compiled against one torch and one Python, unlike everything else here: autograd has no stable ABI.
// It computes nothing. To the ops of vae_fast/ops.py it gives kernels that go on without Python where
// they can: to repeat what was launched on a GPU before, and past autograd. To eager calls it is a
// shortcut: to the passes of the stable library where they serve the CPU, else to the ops. Every result
// is the one that vae_fast/eager.py would give without it. Each function returns None, having done
// nothing, where the case is not plain; the caller then goes the long way, which knows every case.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/DistributionsHelper.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/profiler/stubs/base.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "passes.h"

namespace vae_fast {
namespace {

using at::Tensor;
using torch::autograd::collect_next_edges;
using torch::autograd::edge_list;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// Of the stable library, for good once it is loaded; to be used where passes_serve_cpu was seen.
const Passes* passes = nullptr;
// Read without the GIL.
std::atomic<bool> passes_serve_cpu = false, ops_serve_cpu = false, ops_serve_cuda = false;
PyObject* reused_empty_like = nullptr;  // vae_fast.buffers.empty_like
size_t smallest_reused = 0;             // bytes

// ---- views ---------------------------------------------------------------------------------------

View view(const Tensor& t) {
  if (!t.defined()) return {};
  return {true, t.data_ptr(), static_cast<ScalarType>(t.scalar_type()), t.dim(), t.sizes().data(),
          t.strides().data()};
}

// The dtype of what rows sum up.
at::ScalarType row_type(const Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Memory for results, past the dispatcher, which nobody watches where it is asked for.
Tensor empty(at::IntArrayRef sizes, at::ScalarType type) {
  return at::detail::empty_cpu(sizes, type);
}

// ---- what is plain -------------------------------------------------------------------------------

// Nobody watches or changes what PyTorch's dispatcher does.
bool unwatched() {
  return !c10::impl::TorchDispatchModeTLS::any_modes_set() && !at::hasCallbacks() &&
         !torch::jit::tracer::isTracing() &&
         !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::PreDispatch) &&
         !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// Whether fused kernels serve a device.
bool is_served(const Tensor& t) {
  return t.device().is_cpu() ? passes_serve_cpu || ops_serve_cpu : t.is_cuda() && ops_serve_cuda;
}
bool passes_serve(const Tensor& t) { return passes_serve_cpu && t.device().is_cpu(); }

// A tensor whose memory holds its values.
bool holds_values(const Tensor& t) {
  return t.defined() && t.layout() == at::kStrided && t.has_storage() && !t.is_neg() &&
         !t._is_zerotensor() && !t.unsafeGetTensorImpl()->is_python_dispatch();
}
// Such a tensor on a device that is served, or an undefined one.
bool owns_values(const Tensor& t) { return !t.defined() || (is_served(t) && holds_values(t)); }

// The tensor of a Python object, if it is such a one; undefined for None, null if neither.
const Tensor* plain(PyObject* object) {
  static const Tensor undefined;
  if (object == Py_None) return &undefined;
  if (!THPVariable_CheckExact(object)) return nullptr;
  const Tensor& t = THPVariable_Unpack(object);
  return owns_values(t) && !t._fw_grad(0).defined() ? &t : nullptr;
}

bool is_number(const Tensor& t) {
  const at::ScalarType type = t.defined() ? t.scalar_type() : at::kBool;
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}
bool is_data(const Tensor& t) { return is_number(t) && t.dim() > 0; }
bool is_beside(const Tensor& t, const Tensor& u) { return !t.defined() || t.device() == u.device(); }
// Whether a pass takes t beside tensors like u: of any dtype but fp64, which mixes with no other.
bool mixes(const Tensor& t, const Tensor& u) {
  return is_number(t) && row_type(t) == row_type(u) && is_beside(t, u);
}

// A likelihood's tensors. There may be no scale, and no mask.
struct Data {
  Tensor x, mean, scale, mask;
};

// Whether a scale has one value for all rows of each element, or one a row.
bool is_shared(const Tensor& scale, const Tensor& mean) {
  if (scale.dim() != mean.dim() || scale.numel() == 1) return false;
  const at::IntArrayRef event = scale.sizes().slice(1);
  return (scale.size(0) == 1 && event == mean.sizes().slice(1)) ||
         (scale.size(0) == mean.size(0) &&
          std::all_of(event.begin(), event.end(), [](int64_t n) { return n == 1; }));
}
// A scale in a shape that the passes know, as vae_fast/functional.py makes it: of one value, or of the
// event; of any other shape as it is.
Tensor fitted(const Tensor& scale, const Tensor& mean) {
  if (scale.dim() == 0 || scale.dim() > mean.dim() || scale.sizes() == mean.sizes()) return scale;
  if (scale.numel() == 1) return scale.reshape({});
  at::DimVector event(mean.sizes());
  event[0] = 1;
  const at::IntArrayRef to(event);
  // Of a single row it would have mean's shape, and not be the decoder's own.
  const bool of_event = mean.size(0) != 1 && at::is_expandable_to(scale.sizes(), to);
  return of_event && scale.sizes() != to ? scale.expand(to) : scale;
}
// A mask in x's shape, if it broadcasts to that.
Tensor spread(const Tensor& mask, const Tensor& x) {
  const bool other = mask.sizes() != x.sizes() && at::is_expandable_to(mask.sizes(), x.sizes());
  return other ? mask.expand(x.sizes()) : mask;
}
// Whether a likelihood's tensors are of dtypes and shapes that the passes know: but for the number of
// mean's rows. The scale may be a number.
bool fit(const Data& data, bool scaled, bool number) {
  const auto& [x, mean, scale, mask] = data;
  if (!x.defined() || x.dim() == 0 || !is_data(mean) || mean.dim() != x.dim()) return false;
  if (mask.defined() && (mask.scalar_type() != at::kBool || mask.sizes() != x.sizes())) return false;
  if (!is_beside(mask, mean) || !is_beside(x, mean)) return false;
  if (x.scalar_type() != at::kByte && !mixes(x, mean)) return false;
  if (scaled && !scale.defined() && !number) {  // packed along dimension 1
    return x.dim() >= 2 && mean.size(1) == 2 * x.size(1) &&
           mean.sizes().slice(2) == x.sizes().slice(2);
  }
  if (scaled != (scale.defined() || number)) return false;
  if (mean.sizes().slice(1) != x.sizes().slice(1)) return false;
  if (!scaled || number) return true;
  return mixes(scale, mean) &&
         (scale.dim() == 0 || scale.sizes() == mean.sizes() || is_shared(scale, mean));
}

// Terms of mean's rows, (B,) or (K, B).
bool is_row_term(const Tensor& t, const Tensor& x, const Tensor& mean) {
  return t.defined() && (t.dim() == 1 || (t.dim() == 2 && t.size(0) > 0)) &&
         t.size(-1) == x.size(0) && t.numel() == mean.size(0) &&
         t.scalar_type() == row_type(mean) && is_beside(t, mean);
}

// ---- autograd ------------------------------------------------------------------------------------

// A graph of the derivative would have to be differentiable in turn.
void refuse_graph() {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !at::GradMode::is_enabled(),
      "vae_fast: double backward (create_graph=True) is not supported by the fused kernels; "
      "differentiate the reference instead (vae_fast.use_backend(\"reference\"))");
}

// Whether a backward pass may write to memory of its own choice: not with batched gradients, say.
bool is_plain(const variable_list& tensors) {
  return unwatched() && std::all_of(tensors.begin(), tensors.end(), owns_values);
}
// Whether it may go straight to the passes.
bool is_for_passes(const variable_list& tensors) {
  return is_plain(tensors) && std::all_of(tensors.begin(), tensors.end(), [](const Tensor& t) {
           return !t.defined() || passes_serve(t);
         });
}

// ---- launches ------------------------------------------------------------------------------------

c10::OperatorHandle find(const std::string& op) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(("vae_fast::" + op).c_str(), "");
}

// An op of vae_fast/ops.py, and the numbers of its arguments of these names.
struct Op {
  std::string name;
  int64_t beta = -1, first_row = -1;

  explicit Op(std::string op) : name(std::move(op)) {
    const auto& arguments = find(name).schema().arguments();
    for (size_t i = 0; i < arguments.size(); ++i) {
      if (arguments[i].name() == "beta") beta = static_cast<int64_t>(i);
      if (arguments[i].name() == "first_row") first_row = static_cast<int64_t>(i);
    }
  }
};

using Arguments = at::ArrayRef<at::IValue>;

// Puts results in the place of an op's arguments, which are the last of a stack.
void answer(torch::jit::Stack& stack, Arguments arguments, torch::jit::Stack&& results) {
  torch::jit::drop(stack, arguments.size());
  std::move(results.begin(), results.end(), std::back_inserter(stack));
}

// What kernels/triton/repeat.py learned of a launch.
struct Launch {
  enum Kind : int64_t { input, output, kept, real, integer, number };  // in the order of repeat.py
  struct Output {
    at::DimVector sizes, strides;
    at::ScalarType type;
  };
  void* kernel = nullptr;  // none: only Python knows how to launch this one
  unsigned grid = 0, threads = 0, shared = 0;
  std::string range;  // empty: none
  std::vector<std::pair<Kind, int64_t>> parameters;
  variable_list kept_tensors;
  std::vector<Output> outputs;
};

// What follows a kernel's own parameters are Triton's, of which these kernels use none.
constexpr size_t kMostParameters = 64, kTritons = 4;
constexpr size_t kMostLaunches = 4096;  // then it starts anew
constexpr int kNoContext = 201;         // CUDA_ERROR_INVALID_CONTEXT

// All that a launch of an op follows from: of tensors all but values, and of an address whether it is a
// multiple of 16; every other argument but β; of first_row whether it needs 64 bits.
using Key = std::vector<int64_t>;
struct Hash {
  size_t operator()(const Key& key) const {
    uint64_t hash = 0;
    for (int64_t word : key) hash = (hash ^ static_cast<uint64_t>(word)) * 0x9E3779B97F4A7C15u + 1;
    return hash ^ hash >> 32;
  }
};
using Launches = std::unordered_map<Key, std::shared_ptr<const Launch>, Hash>;

// Who launches.
struct Driver {
  PyObject* learn;  // of kernels/triton/repeat.py
  int (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*,
                void**, void**);  // cuLaunchKernel
  int (*stream)(int32_t, void**);  // gives the current one
};

Key key_of(const Op& op, Arguments arguments, at::Device device) {
  Key key;
  key.reserve(128);
  key.push_back(device.index());
  for (int64_t i = 0; i < static_cast<int64_t>(arguments.size()); ++i) {
    const at::IValue& value = arguments[i];
    if (value.isTensor()) {
      const Tensor& t = value.toTensor();
      key.insert(key.end(), {static_cast<int64_t>(t.scalar_type()), t.dim(),
                             reinterpret_cast<intptr_t>(t.data_ptr()) % 16 == 0});
      key.insert(key.end(), t.sizes().begin(), t.sizes().end());
      key.insert(key.end(), t.strides().begin(), t.strides().end());
    } else if (i == op.beta) {
      continue;
    } else if (i == op.first_row) {
      key.push_back(value.toInt() != static_cast<int32_t>(value.toInt()));
    } else if (value.isDouble()) {
      int64_t bits = 0;
      const double number = value.toDouble();
      std::memcpy(&bits, &number, sizeof bits);
      key.push_back(bits);
    } else {
      key.push_back(value.isNone() ? -1 : value.isBool() ? value.toBool() : value.toInt());
    }
  }
  return key;
}

py::object python(const at::IValue& value) {
  if (value.isTensor()) return py::reinterpret_steal<py::object>(THPVariable_Wrap(value.toTensor()));
  if (value.isDouble()) return py::float_(value.toDouble());
  if (value.isBool()) return py::bool_(value.toBool());
  if (value.isInt()) return py::int_(value.toInt());
  if (value.isSymInt()) return py::cast(value.toSymInt());
  TORCH_INTERNAL_ASSERT(value.isNone(), "vae_fast: no op takes such an argument");
  return py::none();
}

// One tensor, or several.
torch::jit::Stack results_of(const py::object& made) {
  if (THPVariable_Check(made.ptr())) return {THPVariable_Unpack(made.ptr())};
  torch::jit::Stack results;
  for (const py::handle result : made) results.emplace_back(THPVariable_Unpack(result.ptr()));
  return results;
}

// A launch as repeat.py describes it, whose results these were.
Launch described(const py::tuple& facts, const torch::jit::Stack& results) {
  Launch launch;
  launch.grid = facts[1].cast<unsigned>();
  launch.threads = facts[2].cast<unsigned>();
  launch.shared = facts[3].cast<unsigned>();
  launch.range = facts[4].cast<std::string>();
  for (const py::handle parameter : facts[5]) {
    const auto [kind, number] = parameter.cast<std::pair<int64_t, int64_t>>();
    launch.parameters.emplace_back(static_cast<Launch::Kind>(kind), number);
  }
  if (launch.parameters.size() + kTritons > kMostParameters) return {};
  for (const py::handle t : facts[6]) launch.kept_tensors.push_back(THPVariable_Unpack(t.ptr()));
  for (const at::IValue& result : results) {
    const Tensor& t = result.toTensor();
    launch.outputs.push_back(
        {at::DimVector(t.sizes()), at::DimVector(t.strides()), t.scalar_type()});
  }
  launch.kernel = reinterpret_cast<void*>(facts[0].cast<uintptr_t>());
  return launch;
}

// The op's results; none where the thread has no context of the GPU yet. Triton gives it one.
torch::jit::Stack repeat(const Driver& driver, const Launch& launch, const Op& op,
                         Arguments arguments, at::Device device) {
  torch::jit::Stack results;
  // A GPU's allocator may be the user's.
  c10::Allocator* const allocator = device.is_cpu()
                                        ? c10::GetAllocator(at::kCPU)
                                        : at::detail::getCUDAHooks().getCUDADeviceAllocator();
  const c10::DispatchKeySet keys(device.is_cpu() ? c10::DispatchKey::CPU : c10::DispatchKey::CUDA);
  for (const Launch::Output& o : launch.outputs) {
    results.emplace_back(at::Tensor(
        at::detail::empty_strided_generic(o.sizes, o.strides, allocator, keys, o.type)));
  }
  std::array<int64_t, kMostParameters> values{};
  std::array<void*, kMostParameters> parameters;
  const size_t count = launch.parameters.size();
  const auto address = [](const Tensor& t) { return reinterpret_cast<intptr_t>(t.data_ptr()); };
  for (size_t i = 0; i < count; ++i) {
    const auto& [kind, number] = launch.parameters[i];
    switch (kind) {
      case Launch::input: values[i] = address(arguments[number].toTensor()); break;
      case Launch::output: values[i] = address(results[number].toTensor()); break;
      case Launch::kept: values[i] = address(launch.kept_tensors[number]); break;
      case Launch::integer: values[i] = arguments[number].toInt(); break;
      case Launch::number: values[i] = number; break;
      case Launch::real:
        const double value = arguments[number].toDouble();
        std::memcpy(&values[i], &value, sizeof value);
    }
  }
  for (size_t i = 0; i < count + kTritons; ++i) parameters[i] = &values[i];
  const auto* const nvtx = launch.range.empty() ? nullptr : torch::profiler::impl::cudaStubs();
  if (nvtx != nullptr) nvtx->rangePush(launch.range.c_str());
  const int error = driver.launch(launch.kernel, launch.grid, 1, 1, launch.threads, 1, 1,
                                  launch.shared, /*stream=*/nullptr, parameters.data(), nullptr);
  if (nvtx != nullptr) nvtx->rangePop();
  if (error == kNoContext) return {};
  TORCH_CHECK(error == 0, "vae_fast: ", op.name, ": cuLaunchKernel failed with CUDA error ", error,
              ", perhaps of an earlier kernel");
  return results;
}

// What an op whose launcher is Python's launched before is launched again: on the default stream, whose
// scratch memory launches share. Never freed: another thread may be in it, and at exit its tensors
// would outlive the GPU's allocator.
class Launcher final {
 public:
  Launcher(Op op, const Driver* driver) : op_(std::move(op)), driver_(driver) {}

  torch::jit::Stack launched(Arguments arguments) {
    const Tensor* first = nullptr;
    bool plain = true;
    for (const at::IValue& value : arguments) {
      plain = plain && !value.isSymInt();
      if (!value.isTensor()) continue;
      const Tensor& t = value.toTensor();
      first = first == nullptr ? &t : first;
      plain = plain && holds_values(t) && t.device() == first->device();
    }
    void* stream = nullptr;
    if (!plain || first == nullptr || driver_->stream(first->get_device(), &stream) != 0 ||
        stream != nullptr) {
      return by_python(arguments);
    }
    const at::Device device = first->device();
    const c10::DeviceGuard guard(device);
    Key key = key_of(op_, arguments, device);
    std::shared_ptr<const Launch> known;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = launches_.find(key);
      if (found != launches_.end()) known = found->second;
    }
    if (known == nullptr) return learned(std::move(key), arguments);
    if (known->kernel == nullptr) return by_python(arguments);
    torch::jit::Stack results = repeat(*driver_, *known, op_, arguments, device);
    return results.empty() ? by_python(arguments) : results;
  }

 private:
  // What repeat.py's learn returns: results of the launcher, and what repeats its launch, if wanted.
  std::pair<torch::jit::Stack, py::object> learn(bool wanted, Arguments arguments) const {
    py::tuple tuple(arguments.size() + 2);
    tuple[0] = op_.name;
    tuple[1] = wanted;
    for (size_t i = 0; i < arguments.size(); ++i) tuple[i + 2] = python(arguments[i]);
    const auto made = py::reinterpret_borrow<py::object>(driver_->learn)(*tuple).cast<py::tuple>();
    return {results_of(made[0]), made[1]};
  }

  torch::jit::Stack by_python(Arguments arguments) const {
    const py::gil_scoped_acquire gil;
    return learn(false, arguments).first;
  }

  torch::jit::Stack learned(Key&& key, Arguments arguments) {
    const py::gil_scoped_acquire gil;
    auto [results, facts] = learn(true, arguments);
    if (facts.ptr() == Py_False) return std::move(results);  // NOT_NOW
    auto launch = std::make_shared<const Launch>(
        facts.is_none() ? Launch() : described(facts.cast<py::tuple>(), results));  // None: NEVER
    Launches old;  // freed after the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    if (launches_.size() >= kMostLaunches) old.swap(launches_);
    launches_.emplace(std::move(key), std::move(launch));
    return std::move(results);
  }

  const Op op_;
  const Driver* const driver_;
  std::mutex mutex_;
  Launches launches_;
};

// The op's kernel.
class LaunchKernel final : public c10::OperatorKernel {
 public:
  explicit LaunchKernel(Launcher* launcher) : launcher_(launcher) {}
  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
    const Arguments arguments = torch::jit::last(*stack, op.schema().arguments().size());
    answer(*stack, arguments, launcher_->launched(arguments));
  }

 private:
  Launcher* launcher_;
};

// Kernels that this library gave the ops. When it takes them back, those before serve again. At exit it
// does not: others may still call.
class Kernels {
 public:
  void take_back() { delete std::exchange(library_, nullptr); }
  template <class Kernel>
  void give(const std::string& op, c10::DispatchKey key, Kernel kernel) {
    if (library_ == nullptr) {
      library_ = new torch::Library(torch::Library::IMPL, "vae_fast", std::nullopt, __FILE__,
                                    __LINE__);
    }
    library_->impl(op.c_str(), torch::dispatch(key, torch::CppFunction::makeFromBoxedFunctor(
                                                        std::make_unique<Kernel>(kernel))));
  }

 private:
  torch::Library* library_ = nullptr;
};
Kernels launch_kernels, autograd_kernels;

// ---- ops -----------------------------------------------------------------------------------------

// Calls an op below autograd.
torch::jit::Stack call(const c10::OperatorHandle& op, torch::jit::Stack stack) {
  const at::AutoDispatchBelowAutograd below;
  op.callBoxed(stack);
  return stack;
}

// Found at the first call: they are registered by then.
struct Ops {
  c10::OperatorHandle latent_forward = find("latent_forward");
  c10::OperatorHandle latent_backward = find("latent_backward");
  c10::OperatorHandle likelihood_forward = find("likelihood_forward");
  c10::OperatorHandle likelihood_backward = find("likelihood_backward");
  c10::OperatorHandle likelihood_forward_grad_ = find("likelihood_forward_grad_");
  c10::OperatorHandle likelihood_rescale_ = find("likelihood_rescale_");
  c10::OperatorHandle likelihood_rescale = find("likelihood_rescale");
  c10::OperatorHandle gaussian_kl_forward = find("gaussian_kl_forward");
  c10::OperatorHandle gaussian_kl_backward = find("gaussian_kl_backward");
};
const Ops& ops() {
  static const Ops ops;
  return ops;
}

variable_list tensors(const torch::jit::Stack& stack) {
  variable_list tensors;
  for (const at::IValue& value : stack) tensors.push_back(value.toTensor());
  return tensors;
}

at::IValue optional(const Tensor& t) { return t.defined() ? at::IValue(t) : at::IValue(); }

// The node that a pass leaves in the graph, with a State of plain data and the tensors that it saved.
// torch::autograd::Function would write it for us, but costs more than a small batch's arithmetic.
template <class Pass>
class Recorded final : public Node {
 public:
  using State = typename Pass::State;

  explicit Recorded(edge_list&& edges) : Node(std::move(edges)) {}

  void keep(const State& state, const std::array<Tensor, Pass::kSaved>& tensors) {
    state_ = state;
    for (size_t i = 0; i < Pass::kSaved; ++i) saved_[i] = {tensors[i], /*is_output=*/false};
  }

  std::string name() const override { return Pass::kName; }

  variable_list apply(variable_list&& gradients) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!any_defined(gradients)) return variable_list(Pass::kGradients);
    return Pass::backward(state_, unpacked(), gradients);
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& tensor : saved_) tensor.reset_data();
  }

  // Compiled autograd compares nodes by what they hold, and then traces the derivative with tensors
  // that stand for these. Those are not plain, and go to the ops.

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(name());
    args.collect(words());
    for (const SavedVariable& tensor : saved_) args.collect(tensor, /*is_output=*/false);
  }

  variable_list apply_with_saved(const variable_list& gradients,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    using torch::dynamo::autograd::IValuePacker;
    for (SavedVariable& tensor : saved_) swap.before(tensor);
    torch::dynamo::autograd::PackedArgs packed;
    packed.pack(unpacked());
    packed.pack(words());
    std::vector<at::TypePtr> types;
    for (const at::IValue& value : packed.vec()) types.push_back(value.type());
    const auto& compiler = torch::dynamo::autograd::getPyCompilerInterface();
    const std::string function =
        compiler->bind_function(swap.get_py_compiler(), name(), traced, types,
                                /*is_custom_function=*/true, /*is_traceable=*/true);
    const auto metadata = torch::dynamo::autograd::get_input_metadata(next_edges());
    variable_list results = compiler->call_function(
        swap.get_py_compiler(), "apply_functional", function, gradients, packed.vec(),
        IValuePacker<std::decay_t<decltype(metadata)>>::pack(metadata));
    for (SavedVariable& tensor : saved_) swap.after(tensor);
    return results;
  }

 private:
  static_assert(std::is_trivially_copyable_v<State> && sizeof(State) % sizeof(int64_t) == 0);

  static bool any_defined(const variable_list& tensors) {
    return std::any_of(tensors.begin(), tensors.end(),
                       [](const Tensor& tensor) { return tensor.defined(); });
  }

  variable_list unpacked() const {
    variable_list tensors;
    tensors.reserve(Pass::kSaved);
    for (const SavedVariable& tensor : saved_) tensors.push_back(tensor.unpack());
    return tensors;
  }

  std::vector<int64_t> words() const {
    std::vector<int64_t> words(sizeof(State) / sizeof(int64_t));
    std::memcpy(words.data(), &state_, sizeof(State));
    return words;
  }

  static variable_list traced(const variable_list& gradients,
                              const std::vector<at::IValue>& values) {
    if (!any_defined(gradients)) return variable_list(Pass::kGradients);
    torch::dynamo::autograd::PackedArgs packed(values);
    const auto saved = packed.unpack<variable_list>();
    const auto words = packed.unpack<std::vector<int64_t>>();
    State state;
    std::memcpy(&state, words.data(), sizeof(State));
    return Pass::backward(state, saved, gradients);
  }

  State state_{};
  std::array<SavedVariable, Pass::kSaved> saved_;
};

// A new node with edges to the tensors it differentiates by. torch counts nodes with std::shared_ptr up
// to 2.12, and from then on with its own pointer.
template <class Pass, class... Tensors>
auto record(const Tensors&... inputs) {
  using Made = Recorded<Pass>;
  if constexpr (std::is_same_v<decltype(torch::autograd::Edge::function), std::shared_ptr<Node>>) {
    return std::shared_ptr<Made>(new Made(collect_next_edges(inputs...)),
                                 [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<Made>(collect_next_edges(inputs...));
  }
}

// New memory for a gradient of t.
Tensor new_like(const Tensor& t) {
  if (!t.defined()) return {};
  if (!t.device().is_cpu() || !t.is_non_overlapping_and_dense()) return at::empty_like(t.detach());
  return at::detail::empty_strided_cpu(t.sizes(), t.strides(), t.scalar_type());
}

// Memory for a gradient, which may have been another's if it is large.
Tensor gradient_like(const Tensor& t) {
  if (!t.defined() || !t.device().is_cpu() || t.nbytes() < smallest_reused) return new_like(t);
  const py::gil_scoped_acquire gil;
  PyObject* const argument = THPVariable_Wrap(t);
  PyObject* const made = PyObject_CallFunctionObjArgs(reused_empty_like, argument, nullptr);
  Py_XDECREF(argument);
  if (made == nullptr) {
    python_error error;
    error.persist();
    throw error;
  }
  const Tensor gradient = THPVariable_Unpack(made);
  Py_DECREF(made);
  return gradient;
}

// The same, contiguous.
Tensor contiguous_like(const Tensor& t) {
  if (t.nbytes() >= smallest_reused) {
    const Tensor gradient = gradient_like(t);
    if (gradient.is_contiguous()) return gradient;
  }
  return empty(t.sizes(), t.scalar_type());
}

struct Latent {
  using State = LatentOptions;
  static constexpr const char* kName = "vae_fast::LatentBackward";
  static constexpr size_t kSaved = 3, kGradients = 2;

  static variable_list recorded(const Tensor& mu, const Tensor& scale, const Tensor& key,
                                const LatentOptions& options) {
    const auto node = record<Latent>(mu, scale);
    variable_list results = run(mu, scale, key, options);
    node->keep(options, {mu, scale, key});
    torch::autograd::set_history(results, node);
    return results;
  }

  static variable_list run(const Tensor& mu, const Tensor& scale, const Tensor& key,
                           const LatentOptions& options) {
    if (!passes_serve(mu)) {
      return tensors(call(ops().latent_forward,
                          {mu, scale, key, options.num_samples, options.first_row, options.param,
                           options.lo, options.hi, options.soft != 0, options.path != 0}));
    }
    at::DimVector shape(mu.sizes()), rows{mu.size(0)};
    if (options.num_samples > 0) {
      shape.insert(shape.begin(), options.num_samples);
      rows.insert(rows.begin(), options.num_samples);
    }
    const Tensor z = empty(shape, mu.scalar_type());
    const Tensor log_q = empty(rows, row_type(mu)), log_p = empty(rows, row_type(mu));
    passes->advise_huge_pages(view(z));
    passes->latent_forward(view(mu), view(scale), view(key), options, view(z), view(log_q),
                           view(log_p));
    return {z, log_q, log_p};
  }

  static variable_list backward(const LatentOptions& o, const variable_list& saved,
                                const variable_list& g) {
    refuse_graph();
    const Tensor &mu = saved[0], &scale = saved[1], &key = saved[2];
    const bool sampled = o.num_samples > 0;
    if (!is_for_passes(g) || !is_for_passes(saved) || !passes->is_straight(view(mu), 1) ||
        !passes->is_straight(view(scale), 1) ||
        (g[0].defined() && !passes->is_straight(view(g[0]), sampled ? 2 : 1))) {
      const torch::jit::Stack results =
          call(ops().latent_backward,
               {optional(g[0]), optional(g[1]), optional(g[2]), mu, scale, key, o.num_samples,
                o.first_row, o.param, o.lo, o.hi, o.soft != 0, o.path != 0});
      return {results[0].toTensor(), results[1].toTensor()};
    }
    const Tensor g_mu = contiguous_like(mu), g_scale = contiguous_like(scale);
    passes->advise_huge_pages(view(g_mu));
    passes->advise_huge_pages(view(g_scale));
    passes->latent_backward(view(g[0]), view(g[1]), view(g[2]), view(mu), view(scale), view(key), o,
                            view(g_mu), view(g_scale));
    return {g_mu, g_scale};
  }
};

bool differentiable(const Tensor& t) { return t.defined() && t.requires_grad(); }

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

// The rows' latent terms, if a loss is wanted; log_p may be missing.
struct Terms {
  Tensor log_q, log_p;
};
// What a likelihood's backward pass has to know.
struct LikelihoodState {
  Density model;
  double beta;
  Reduction reduction;
  int64_t samples;  // as dimension 0 of the rows, or 0 without that
  int64_t batch, learned, has_log_q, has_log_p;
};
LikelihoodState state_of(const Data& data, const Density& model, const Tensor& rows,
                         const Terms& terms, double beta, Reduction reduction) {
  return {model,
          beta,
          reduction,
          rows.defined() && rows.dim() == 2 ? rows.size(0) : 0,
          data.x.size(0),
          differentiable(data.scale),
          terms.log_q.defined(),
          terms.log_p.defined()};
}
LikelihoodOptions options_of(const LikelihoodState& state) {
  const auto& [likelihood, param, lo, hi, soft, df, x_mul, x_add] = state.model;
  return {state.beta, state.reduction, likelihood, param, lo, hi, soft != 0, df, x_mul, x_add,
          /*key=*/{}, /*first_row=*/0};
}
Tensor rows_like(const LikelihoodState& state, const Tensor& mean) {
  return state.samples > 0 ? empty({state.samples, state.batch}, row_type(mean))
                           : empty({mean.size(0)}, row_type(mean));
}
// As the ops take rows.
Tensor flat(const Tensor& rows) {
  return rows.defined() && rows.dim() > 1 ? rows.reshape({-1}) : rows;
}
Tensor loss_like(const LikelihoodState& state, const Tensor& nll) {
  if (state.reduction == Reduction::no_loss) return {};
  return state.reduction == Reduction::none ? empty({state.batch}, nll.scalar_type())
                                            : empty({}, nll.scalar_type());
}

// The rows that an op made, (N,).
Tensor in_rows(const LikelihoodState& state, const Tensor& rows) {
  const at::AutoDispatchBelowADInplaceOrView below;  // a result, no view of one
  return state.samples > 0 ? rows.view({state.samples, state.batch}) : rows;
}
// What the likelihood's forward ops take.
torch::jit::Stack stack_of(const Data& data, const Terms& terms, const LikelihoodState& state) {
  const Density& model = state.model;
  return {data.x, data.mean, optional(data.scale), optional(data.mask), optional(terms.log_q),
          optional(terms.log_p), state.beta, static_cast<int64_t>(state.reduction), model.likelihood,
          model.param, model.lo, model.hi, model.soft != 0, model.df, model.x_mul, model.x_add,
          at::IValue(), int64_t(0)};
}

// The likelihood, and the loss if there are terms, with its gradients in the backward pass. Nobody
// wants one for x.
struct Likelihood {
  using State = LikelihoodState;
  static constexpr const char* kName = "vae_fast::LikelihoodBackward";
  static constexpr size_t kSaved = 4, kGradients = 4;

  static variable_list recorded(const Data& data, const Terms& terms, const State& state) {
    const auto& [x, mean, scale, mask] = data;
    const auto node = record<Likelihood>(mean, scale, terms.log_q, terms.log_p);
    variable_list results = run(data, terms, state);
    node->keep(state, {x, mean, scale, mask});
    torch::autograd::set_history(results, node);
    return results;
  }

  // nll, and the loss or nothing.
  static variable_list run(const Data& data, const Terms& terms, const State& state) {
    const auto& [x, mean, scale, mask] = data;
    if (!passes_serve(mean)) {
      const variable_list results =
          tensors(call(ops().likelihood_forward, stack_of(data, terms, state)));
      return {in_rows(state, results[0]), results[1]};
    }
    const Tensor nll = rows_like(state, mean), loss = loss_like(state, nll);
    passes->likelihood_forward(view(x), view(mean), view(scale), view(mask), view(terms.log_q),
                               view(terms.log_p), options_of(state), view(nll), view(loss));
    return {nll, loss};
  }

  static variable_list backward(const State& state, const variable_list& saved,
                                const variable_list& g) {
    refuse_graph();
    const Tensor &x = saved[0], &mean = saved[1], &scale = saved[2], &mask = saved[3];
    const Density& model = state.model;
    if (!is_for_passes(g) || !is_for_passes(saved)) {
      torch::jit::Stack results =
          call(ops().likelihood_backward,
               {optional(flat(g[0])), optional(g[1]), x, mean, optional(scale), optional(mask),
                state.beta, static_cast<int64_t>(state.reduction), model.likelihood, model.param,
                model.lo, model.hi, model.soft != 0, model.df, model.x_mul, model.x_add,
                at::IValue(), int64_t(0), false, true, state.learned != 0});
      return gradients(state, results[1].toTensor(), results[2].toTensor(), results[3].toTensor(),
                       results[4].toTensor());
    }
    const Tensor g_mean = gradient_like(mean);
    const Tensor g_scale = state.learned ? gradient_like(scale) : Tensor();
    const bool terms = state.has_log_q;
    const Tensor g_log_q = terms ? rows_like(state, mean) : Tensor();
    const Tensor g_log_p = terms ? rows_like(state, mean) : Tensor();
    passes->likelihood_backward(view(g[0]), view(g[1]), view(x), view(mean), view(scale), view(mask),
                                options_of(state), {}, view(g_mean), view(g_scale), view(g_log_q),
                                view(g_log_p));
    return gradients(state, g_mean, g_scale, g_log_q, g_log_p);
  }

  // Those that are wanted, in the shapes of what they are of.
  static variable_list gradients(const State& state, const Tensor& g_mean, const Tensor& g_scale,
                                 const Tensor& g_log_q, const Tensor& g_log_p) {
    const auto rows = [&](bool wanted, const Tensor& g) {
      if (!wanted) return Tensor();
      return state.samples > 0 && g.dim() == 1 ? g.reshape({state.samples, state.batch}) : g;
    };
    return {g_mean, state.learned ? g_scale : Tensor(), rows(state.has_log_q, g_log_q),
            rows(state.has_log_p, g_log_p)};
  }
};

// Where the forward pass writes the gradients. Of one scale for all it makes the rows' shares; of one a
// row, too, and they are its gradient; of one for the event, `summed`, what they add up to.
struct Targets {
  Tensor g_mean, g_scale;
  bool shared = false, summed = false, inplace = false;
};
// The loss with its gradients, which the forward pass writes into `targets`.
struct Elbo {
  using State = LikelihoodState;
  static constexpr const char* kName = "vae_fast::ElboBackward";
  static constexpr size_t kSaved = 7, kGradients = 4;  // the gradients, and if summed what they are of

  static variable_list recorded(const Data& data, const Terms& terms, const State& state,
                                const Targets& targets) {
    const auto& [x, mean, scale, mask] = data;
    const auto node = record<Elbo>(mean, scale, terms.log_q, terms.log_p);
    // The node has its edges: after the bump, a view would make new ones of its own, without the hooks
    // of the old.
    if (targets.inplace) mean.unsafeGetTensorImpl()->bump_version();
    if (targets.inplace && targets.g_scale.defined()) scale.unsafeGetTensorImpl()->bump_version();
    Tensor nll, loss, g_shared;
    if (passes_serve(mean)) {
      nll = rows_like(state, mean), loss = loss_like(state, nll);
      if (targets.shared) g_shared = empty({mean.size(0)}, row_type(mean));
      passes->likelihood_forward_grad(view(x), view(mean), view(scale), view(mask),
                                      view(terms.log_q), view(terms.log_p), options_of(state),
                                      view(targets.g_mean), view(targets.g_scale), view(nll),
                                      view(loss), view(g_shared));
    } else {
      torch::jit::Stack stack = stack_of(data, terms, state);
      stack.emplace_back(targets.g_mean);
      stack.push_back(optional(targets.g_scale));
      const variable_list results =
          tensors(call(ops().likelihood_forward_grad_, std::move(stack)));
      nll = in_rows(state, results[0]), loss = results[1];
      if (targets.shared) g_shared = results[2];
    }
    Tensor g_scale = targets.g_scale;
    if (g_shared.defined() && scale.dim() > 0) {
      const at::AutoDispatchBelowADInplaceOrView below;
      g_scale = std::exchange(g_shared, Tensor()).view(scale.sizes());
    }
    if (targets.summed) {
      node->keep(state, {targets.g_mean, g_scale, g_shared, x, mean, scale, mask});
    } else {
      node->keep(state, {targets.g_mean, g_scale, g_shared});
    }
    variable_list results{nll, loss};
    torch::autograd::set_history(results, node);
    return results;
  }

  static variable_list backward(const State& state, const variable_list& saved,
                                const variable_list& g) {
    refuse_graph();
    Tensor g_mean = saved[0], g_scale = saved[1];
    const Tensor& g_shared = saved[2];
    const bool summed = saved[3].defined(), plain = is_plain(g) && is_plain(saved);
    if (summed && (g[0].defined() || !plain)) {
      // Rows that weigh differently: what is summed cannot be taken apart again.
      return Likelihood::backward(state, {saved.begin() + 3, saved.end()}, g);
    }
    const int64_t batch = state.batch, samples = g_mean.size(0) / std::max<int64_t>(batch, 1);
    if (!plain) {
      const torch::jit::Stack results =
          call(ops().likelihood_rescale,
               {g_mean, optional(g_scale), optional(g_shared), optional(flat(g[0])), optional(g[1]),
                state.beta, static_cast<int64_t>(state.reduction), samples, batch});
      const at::IValue& scale = results[g_shared.defined() ? 4 : 1];
      return Likelihood::gradients(state, results[0].toTensor(), scale.toTensor(),
                                   results[2].toTensor(), results[3].toTensor());
    }
    if (torch::autograd::get_current_graph_task_keep_graph()) {
      // Which may be walked again: leave what it saved as it is.
      g_mean = g_mean.clone();
      if (g_scale.defined()) g_scale = g_scale.clone();
    }
    if (!passes_serve(g_mean)) {
      const variable_list rows =
          tensors(call(ops().likelihood_rescale_,
                       {g_mean, optional(g_scale), optional(g_shared), optional(flat(g[0])),
                        optional(g[1]), state.beta, static_cast<int64_t>(state.reduction), samples,
                        batch}));
      return Likelihood::gradients(state, g_mean, g_shared.defined() ? rows[2] : g_scale, rows[0],
                                   rows[1]);
    }
    const Tensor g_log_q = rows_like(state, g_mean), g_log_p = rows_like(state, g_mean);
    const Tensor g_scalar = g_shared.defined() ? empty({}, g_shared.scalar_type()) : Tensor();
    passes->likelihood_rescale(view(g_mean), view(g_scale), view(g_shared), view(g[0]), view(g[1]),
                               state.beta, state.reduction, samples, batch, view(g_log_q),
                               view(g_log_p), view(g_scalar));
    return Likelihood::gradients(state, g_mean, g_shared.defined() ? g_scalar : g_scale, g_log_q,
                                 g_log_p);
  }
};

// KL(q‖p); of N(0, 1), the prior's tensors are undefined.
struct GaussianKl {
  using State = KlOptions;
  static constexpr const char* kName = "vae_fast::GaussianKlBackward";
  static constexpr size_t kSaved = 4, kGradients = 4;

  static Tensor recorded(const variable_list& t, const State& state) {
    const auto node = record<GaussianKl>(t[0], t[1], t[2], t[3]);
    const Tensor kl = run(t, state);
    node->keep(state, {t[0], t[1], t[2], t[3]});
    torch::autograd::set_history(variable_list{kl}, node);
    return kl;
  }

  static Tensor run(const variable_list& t, const State& state) {
    if (!passes_serve(t[0])) {
      return call(ops().gaussian_kl_forward, stack_of(t, state))[0].toTensor();
    }
    const Tensor kl = empty({t[0].size(0)}, row_type(t[0]));
    passes->gaussian_kl_forward(view(t[0]), view(t[1]), view(t[2]), view(t[3]), state, view(kl));
    return kl;
  }

  static variable_list backward(const State& state, const variable_list& saved,
                                const variable_list& g) {
    refuse_graph();
    variable_list gradients(kGradients);
    if (!is_for_passes(g) || !is_for_passes(saved)) {
      torch::jit::Stack stack = stack_of(saved, state);
      stack.insert(stack.begin(), g[0]);
      gradients = tensors(call(ops().gaussian_kl_backward, std::move(stack)));
      for (size_t i = 0; i < kGradients; ++i) {
        if (!saved[i].defined()) gradients[i] = Tensor();
      }
      return gradients;
    }
    for (size_t i = 0; i < kGradients; ++i) {
      gradients[i] = gradient_like(saved[i]);
      passes->advise_huge_pages(view(gradients[i]));
    }
    passes->gaussian_kl_backward(view(g[0]), view(saved[0]), view(saved[1]), view(saved[2]),
                                 view(saved[3]), state, view(gradients[0]), view(gradients[1]),
                                 view(gradients[2]), view(gradients[3]));
    return gradients;
  }

 private:
  static torch::jit::Stack stack_of(const variable_list& t, const State& state) {
    return {t[0],     t[1],     optional(t[2]), optional(t[3]), state.param, state.prior_param,
            state.lo, state.hi, state.soft != 0};
  }
};

// An op with a derivative, above autograd. Where nothing is to be differentiated, as in code that
// torch.compile made, it goes on to the kernel below; else vae_fast/ops.py records it.
class AutogradKernel final : public c10::OperatorKernel {
 public:
  explicit AutogradKernel(PyObject* recorded) : recorded_(recorded) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                  torch::jit::Stack* stack) {
    const Arguments arguments = torch::jit::last(*stack, op.schema().arguments().size());
    if (is_recorded(arguments)) return answer(*stack, arguments, recorded(keys, arguments));
    const at::AutoDispatchBelowAutograd below;
    op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
  }

 private:
  static bool is_recorded(Arguments arguments) {
    const bool graph = at::GradMode::is_enabled();
    return std::any_of(arguments.begin(), arguments.end(), [&](const at::IValue& value) {
      return value.isTensor() && ((graph && value.toTensor().requires_grad()) ||
                                  value.toTensor()._fw_grad(0).defined());
    });
  }

  torch::jit::Stack recorded(c10::DispatchKeySet keys, Arguments arguments) const {
    const py::gil_scoped_acquire gil;
    py::tuple tuple(arguments.size() + 1);
    tuple[0] = keys.raw_repr();
    for (size_t i = 0; i < arguments.size(); ++i) tuple[i + 1] = python(arguments[i]);
    return results_of(py::reinterpret_borrow<py::object>(recorded_)(*tuple));
  }

  PyObject* recorded_;  // for good: at exit there may be no Python to take it back
};

// ---- Python --------------------------------------------------------------------------------------

PyObject* wrapped(const variable_list& tensors) {
  PyObject* const tuple = PyTuple_New(static_cast<Py_ssize_t>(tensors.size()));
  for (size_t i = 0; tuple != nullptr && i < tensors.size(); ++i) {
    PyObject* const tensor = THPVariable_Wrap(tensors[i]);
    if (tensor == nullptr) {
      Py_DECREF(tuple);
      return nullptr;
    }
    PyTuple_SET_ITEM(tuple, i, tensor);
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

// The very draw of vae_fast/noise.py; on the CPU by what torch.randint is made of.
Tensor fresh_key(at::Device device) {
  const int64_t from = std::numeric_limits<int64_t>::min(), to = std::numeric_limits<int64_t>::max();
  if (!device.is_cpu()) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return at::randint(from, to, {2}, at::device(device).dtype(at::kLong)).view(at::kUInt64);
  }
  const Tensor key = empty({2}, at::kUInt64);
  at::uniform_int_from_to_distribution<int64_t> draw(static_cast<uint64_t>(to) -
                                                         static_cast<uint64_t>(from),
                                                     from);
  auto* const generator =
      at::check_generator<at::CPUGeneratorImpl>(at::detail::getDefaultCPUGenerator());
  const std::lock_guard<std::mutex> lock(generator->mutex_);
  auto* const words = static_cast<int64_t*>(key.data_ptr());
  for (int i = 0; i < 2; ++i) words[i] = draw(generator);
  return key;
}

// (mu, scale, key or None, num_samples, first_row, param, lo, hi, soft, path) -> (z, log_q, log_p) or
// None
PyObject* latent(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 10, "latent takes 10 arguments, got ", count);
  const Tensor *mu = plain(objects[0]), *scale = plain(objects[1]), *given = plain(objects[2]);
  if (!mu || !scale || !given || !unwatched() || !is_data(*mu) || !mixes(*scale, *mu) ||
      scale->sizes() != mu->sizes() ||
      (given->defined() &&
       (given->scalar_type() != at::kUInt64 || given->dim() != 1 || given->size(0) != 2 ||
        !is_beside(*given, *mu))) ||
      (passes_serve(*mu) &&
       (!passes->is_straight(view(*mu), 1) || !passes->is_straight(view(*scale), 1)))) {
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
    if (!key.defined()) key = fresh_key(m.device());
    const bool graph = at::GradMode::is_enabled() && (differentiable(m) || differentiable(s));
    results = graph ? Latent::recorded(m, s, key, options) : Latent::run(m, s, key, options);
  }
  return wrapped(results);
  END_HANDLE_TH_ERRORS
}

// What x, mean, scale, whether there is one, and mask hold: tensors, but for the scale a number or
// None, and for the mask None, too. A number is made a tensor by complete(), without the GIL.
constexpr Py_ssize_t kData = 5;
std::optional<Data> data_of(PyObject* const* objects) {
  const Tensor *x = plain(objects[0]), *mean = plain(objects[1]), *mask = plain(objects[4]);
  const bool number = PyFloat_CheckExact(objects[2]), scaled = objects[3] == Py_True;
  const Tensor* scale = plain(number ? Py_None : objects[2]);
  if (!x || !mean || !scale || !mask || !unwatched()) return std::nullopt;
  Data data{*x, *mean, *scale, *mask};
  if (x->defined() && mean->defined() && mean->dim() == x->dim()) {
    if (scale->defined()) data.scale = fitted(*scale, *mean);
    if (mask->defined()) data.mask = spread(*mask, *x);
  }
  return fit(data, scaled, number) ? std::optional(data) : std::nullopt;
}
void complete(Data& data, PyObject* scale) {
  if (!PyFloat_CheckExact(scale)) return;
  data.scale = at::scalar_tensor(PyFloat_AS_DOUBLE(scale),
                                 data.mean.options().dtype(row_type(data.mean)));
}

// (x, mean, scale, scaled, mask or None, rows or None, density...) -> nll or None
// Of samples that share rows of x there are `rows`, whose shape nll gets.
PyObject* nll(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  constexpr Py_ssize_t kArguments = kData + 1 + kDensity;
  TORCH_CHECK_TYPE(count == kArguments, "nll takes ", kArguments, " arguments, got ", count);
  std::optional<Data> data = data_of(objects);
  const Tensor* const rows = plain(objects[kData]);
  if (!data || !rows) Py_RETURN_NONE;
  const auto& [x, mean, scale, mask] = *data;
  if (rows->defined() ? !is_row_term(*rows, x, mean) : mean.size(0) != x.size(0)) Py_RETURN_NONE;
  const Density model = density_of(objects + kData + 1);
  if (PyErr_Occurred()) return nullptr;
  const LikelihoodState state = state_of(*data, model, *rows, {}, 0.0, Reduction::no_loss);
  const bool graph = at::GradMode::is_enabled() &&
                     (differentiable(x) || differentiable(mean) || differentiable(scale));
  if (graph && (x.requires_grad() || !mean.requires_grad())) Py_RETURN_NONE;
  variable_list results;
  {
    py::gil_scoped_release no_gil;
    complete(*data, objects[2]);
    results = graph ? Likelihood::recorded(*data, {}, state) : Likelihood::run(*data, {}, state);
  }
  return THPVariable_Wrap(results[0]);
  END_HANDLE_TH_ERRORS
}

// (x, mean, scale, scaled, mask or None, log_q, log_p or None, beta, reduction, check, density...)
// -> (nll, loss) or None.
// With a check the gradients overwrite mean and scale: a function of the five tensors that raises where
// that may not be. It is not asked where nothing at all is shared.
PyObject* elbo(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  constexpr Py_ssize_t kArguments = kData + 5 + kDensity;
  TORCH_CHECK_TYPE(count == kArguments, "elbo takes ", kArguments, " arguments, got ", count);
  std::optional<Data> data = data_of(objects);
  PyObject* const* const rest = objects + kData;
  const Tensor *log_q_ = plain(rest[0]), *log_p_ = plain(rest[1]);
  if (!data || !log_q_ || !log_p_) Py_RETURN_NONE;
  const auto& [x, mean, scale, mask] = *data;
  const Terms terms{*log_q_, *log_p_};
  const auto& [log_q, log_p] = terms;
  if (!is_row_term(log_q, x, mean) || (log_p.defined() && (!is_row_term(log_p, x, mean) ||
                                                           log_p.sizes() != log_q.sizes()))) {
    Py_RETURN_NONE;
  }
  const Density model = density_of(rest + 5);
  const double beta = PyFloat_AsDouble(rest[2]);
  const auto reduction = static_cast<Reduction>(PyLong_AsLongLong(rest[3]));
  if (PyErr_Occurred()) return nullptr;
  const LikelihoodState state = state_of(*data, model, log_q, terms, beta, reduction);
  const bool graph =
      at::GradMode::is_enabled() && (differentiable(x) || differentiable(mean) ||
                                     differentiable(scale) || differentiable(log_q) ||
                                     differentiable(log_p));
  if (graph && (x.requires_grad() || !mean.requires_grad())) Py_RETURN_NONE;
  // Where the forward pass writes the gradients, and why not elsewhere: functional.py knows.
  const bool one = scale.defined() && scale.dim() == 0;
  const auto is_half = [](const Tensor& t) { return t.defined() && t.scalar_type() == at::kHalf; };
  const bool full = state.learned && !one && scale.sizes() == mean.sizes();
  // One of the event, or a value a row: only the passes make its gradient here.
  const bool of_some = state.learned && !one && !full, summed = of_some && scale.size(0) == 1;
  const bool inplace = rest[4] != Py_None && !summed;
  const bool now = graph && !is_half(mean) && !is_half(scale) &&
                   (!of_some || passes_serve(mean)) && (reduction != Reduction::none || inplace);
  Targets targets;
  if (now) {
    targets.shared = state.learned && !full && !summed;
    targets.summed = summed;
    if (inplace) {
      const bool alone = owns_memory(mean, {&x, &scale, &log_q, &log_p}) &&
                         (!full || owns_memory(scale, {&x, &mean, &log_q, &log_p}));
      if (!alone) {
        PyObject* const tensor = PyFloat_CheckExact(objects[2]) ? Py_None : objects[2];
        PyObject* const checked = PyObject_CallFunctionObjArgs(
            rest[4], objects[0], objects[1], tensor, rest[0], rest[1], nullptr);
        if (checked == nullptr) return nullptr;
        Py_DECREF(checked);
      }
      // The same memory and version counter, but no view: autograd refuses to hand back a chunk that
      // was written to.
      targets.g_mean = mean.tensor_data();
      if (full) targets.g_scale = scale.tensor_data();
      targets.inplace = true;
    }
  }
  variable_list results;
  {
    py::gil_scoped_release no_gil;  // a GPU's memory may have to wait
    complete(*data, objects[2]);
    if (now && !inplace) {
      targets.g_mean = gradient_like(mean);
      if (full || summed) targets.g_scale = gradient_like(scale);
    }
    results = now     ? Elbo::recorded(*data, terms, state, targets)
              : graph ? Likelihood::recorded(*data, terms, state)
                      : Likelihood::run(*data, terms, state);
  }
  return wrapped(results);
  END_HANDLE_TH_ERRORS
}

// (mu, scale, prior's mu and scale or None, param, prior_param, lo, hi, soft) -> KL(q‖p) or None
PyObject* gaussian_kl(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 9, "gaussian_kl takes 9 arguments, got ", count);
  variable_list given;
  for (int i = 0; i < 4; ++i) {
    const Tensor* const t = plain(objects[i]);
    if (t == nullptr) Py_RETURN_NONE;
    given.push_back(*t);
  }
  const Tensor& mu = given[0];
  if (!unwatched() || !is_data(mu) || !given[1].defined() ||
      given[2].defined() != given[3].defined()) {
    Py_RETURN_NONE;
  }
  for (const Tensor& t : given) {
    if (t.defined() && (!mixes(t, mu) || t.sizes() != mu.sizes())) Py_RETURN_NONE;
  }
  const KlOptions options{PyLong_AsLongLong(objects[4]), PyLong_AsLongLong(objects[5]),
                          PyFloat_AsDouble(objects[6]), PyFloat_AsDouble(objects[7]),
                          PyObject_IsTrue(objects[8]) == 1};
  if (PyErr_Occurred()) return nullptr;
  Tensor kl;
  {
    py::gil_scoped_release no_gil;
    const bool graph = at::GradMode::is_enabled() &&
                       std::any_of(given.begin(), given.end(), differentiable);
    kl = graph ? GaussianKl::recorded(given, options) : GaussianKl::run(given, options);
  }
  return THPVariable_Wrap(kl);
  END_HANDLE_TH_ERRORS
}

// connect(empty_like, smallest, autograd): what makes gradients of `smallest` bytes or more on the CPU,
// and the Autograd kernels of vae_fast/ops.py by op.
PyObject* connect(PyObject*, PyObject* arguments) {
  HANDLE_TH_ERRORS
  Py_ssize_t smallest = 0;
  PyObject *empty_like = nullptr, *autograd = nullptr;
  if (!PyArg_ParseTuple(arguments, "OnO!", &empty_like, &smallest, &PyDict_Type, &autograd)) {
    return nullptr;
  }
  Py_INCREF(empty_like);
  reused_empty_like = empty_like;
  smallest_reused = static_cast<size_t>(smallest);
  autograd_kernels.take_back();
  for (const auto& [op, recorded] : py::reinterpret_borrow<py::dict>(autograd)) {
    for (const auto key : {c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutogradCUDA}) {
      autograd_kernels.give(op.cast<std::string>(), key, AutogradKernel(recorded.inc_ref().ptr()));
    }
  }
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// serve(address, passes, cpu, cuda): what vae_fast_passes() of the stable library returned, or 0 where
// it is not loaded; whether the passes serve the CPU, the ops do, and the ops serve CUDA devices.
PyObject* serve(PyObject*, PyObject* arguments) {
  unsigned long long address = 0;
  int by_passes = 0, cpu = 0, cuda = 0;
  if (!PyArg_ParseTuple(arguments, "Kppp", &address, &by_passes, &cpu, &cuda)) return nullptr;
  if (passes == nullptr) passes = reinterpret_cast<const Passes*>(static_cast<uintptr_t>(address));
  passes_serve_cpu = by_passes != 0 && passes != nullptr;
  ops_serve_cpu = cpu != 0;
  ops_serve_cuda = cuda != 0;
  Py_RETURN_NONE;
}

// repeat(key, ops, learn, launch, stream): launches of these ops, whose kernels for a dispatch key
// are launchers, are repeated. `learn` is kernels/triton/repeat.py's; the rest are the addresses of its
// driver(). Without arguments, no launch is repeated any more.
PyObject* repeat_launches(PyObject*, PyObject* arguments) {
  HANDLE_TH_ERRORS
  const char* key = nullptr;
  PyObject *ops = nullptr, *learn = nullptr;
  unsigned long long launch = 0, stream = 0;
  launch_kernels.take_back();
  if (PyTuple_GET_SIZE(arguments) == 0) Py_RETURN_NONE;
  if (!PyArg_ParseTuple(arguments, "sOOKK", &key, &ops, &learn, &launch, &stream)) return nullptr;
  Py_INCREF(learn);
  auto* const driver = new Driver;
  driver->learn = learn;
  driver->launch = reinterpret_cast<decltype(driver->launch)>(static_cast<uintptr_t>(launch));
  driver->stream = reinterpret_cast<decltype(driver->stream)>(static_cast<uintptr_t>(stream));
  for (const py::handle op : py::reinterpret_borrow<py::object>(ops)) {
    const auto name = op.cast<std::string>();
    launch_kernels.give(name, c10::parseDispatchKey(key), LaunchKernel(new Launcher(Op(name), driver)));
  }
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"connect", connect, METH_VARARGS, nullptr},
    {"repeat", repeat_launches, METH_VARARGS, nullptr},
    {"serve", serve, METH_VARARGS, nullptr},
    {"latent", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(latent)), METH_FASTCALL,
     nullptr},
    {"nll", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(nll)), METH_FASTCALL, nullptr},
    {"elbo", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(elbo)), METH_FASTCALL, nullptr},
    {"gaussian_kl", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(gaussian_kl)),
     METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "vae_fast._eager", nullptr, -1, methods, nullptr,
                      nullptr,               nullptr,           nullptr};

}  // namespace
}  // namespace vae_fast

PyMODINIT_FUNC PyInit__eager() { return PyModule_Create(&vae_fast::module); }
