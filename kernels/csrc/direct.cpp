// The ops as plain Python functions: what eager calls on small CPU tensors use, since PyTorch's
// dispatcher and checks in Python cost more than a small batch's arithmetic.
//
// Python's limited API and DLPack's exchange API (torch.Tensor.__dlpack_c_exchange_api__) are both
// stable binary interfaces, so this part too serves every Python and torch that have them. Each
// function takes the arguments of its op and returns its outputs, None in place of one that is not
// wanted. It returns plain None, having written nothing, unless all tensors are plain, small CPU
// tensors in layouts that the passes use in place; the caller then calls the op.

#if __has_include(<Python.h>)
#include <Python.h>
#endif
#if defined(Py_LIMITED_API) && defined(PyMODINIT_FUNC) && !defined(Py_GIL_DISABLED)

#include <algorithm>
#include <exception>

#include "passes.h"

namespace vae_fast {
namespace {

// ---- the part of DLPack 1's binary interface that is needed here -------------------------------

struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  uint32_t major, minor;
  void* older_version;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*view_of_object)(void* object, DLTensor* out);  // null where there is none
  void* current_stream;
};

constexpr uint32_t kDLPackMajor = 1;
constexpr int32_t kDLCPU = 1;
enum DLTypeCode { kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4, kDLBool = 6 };

int (*view_of_object)(void* object, DLTensor* out) = nullptr;

// ---- what is used of Python and torch ----------------------------------------------------------

// Beyond, the dispatcher's cost vanishes, and the ops know better how to allocate.
constexpr int64_t kMostElements = 1 << 20;

PyObject *tensor_type, *parameter_type, *empty_like;
PyObject *is_neg_name, *new_empty_name;
PyObject* float_keywords;  // {"dtype": torch.float32}

// An owned reference, null after an error.
class Object {
 public:
  explicit Object(PyObject* object = nullptr) : object_(object) {}
  Object(Object&& other) : object_(other.release()) {}
  Object& operator=(Object&& other) {
    Py_XDECREF(object_);
    object_ = other.release();
    return *this;
  }
  ~Object() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
  PyObject* release() {
    PyObject* const object = object_;
    object_ = nullptr;
    return object;
  }

 private:
  PyObject* object_;
};

bool type_of(const DLTensor& d, ScalarType& type) {
  if (d.type_lanes != 1) return false;
  switch (d.type_code << 8 | d.type_bits) {
    case kDLFloat << 8 | 16:
      type = ScalarType::Half;
      return true;
    case kDLFloat << 8 | 32:
      type = ScalarType::Float;
      return true;
    case kDLFloat << 8 | 64:
      type = ScalarType::Double;
      return true;
    case kDLBfloat << 8 | 16:
      type = ScalarType::BFloat16;
      return true;
    case kDLBool << 8 | 8:
      type = ScalarType::Bool;
      return true;
    case kDLUInt << 8 | 64:
      type = ScalarType::UInt64;
      return true;
    default:
      return false;
  }
}

// Absent unless the object is a plain CPU tensor: subclasses and tensors without memory of their own
// are the dispatcher's. May leave a Python error set.
View view(PyObject* object) {
  View t;
  DLTensor d;
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if ((type != tensor_type && type != parameter_type) || view_of_object(object, &d) != 0 ||
      d.device_type != kDLCPU || !type_of(d, t.type)) {
    return t;
  }
  t.data = static_cast<char*>(d.data) + d.byte_offset;
  t.dim = d.ndim;
  t.sizes = d.shape;
  t.strides = d.strides;
  t.present = d.data != nullptr || t.numel() == 0;
  return t;
}

// ---- arguments ---------------------------------------------------------------------------------

// Reads the arguments of a call from left to right. After the first one that will not do, what it
// returns is of no use, and good() is false.
class Arguments {
 public:
  Arguments(PyObject* const* objects, Py_ssize_t count) : next_(objects), end_(objects + count) {}

  // Whether all arguments were read, and were good.
  bool good() const { return good_ && next_ == end_; }

  // A tensor whose values the forward pass has seen, or None.
  View known(PyObject** taken = nullptr) {
    PyObject* const object = take();
    if (taken != nullptr) *taken = object;
    if (object == nullptr || object == Py_None) return {};
    const View t = view(object);
    if (!t.present || t.numel() > kMostElements) good_ = false;
    return t;
  }

  // Any tensor, or None.
  View tensor(PyObject** taken = nullptr) {
    const View t = known(taken);
    if (!t.present || !good_) return t;
    // A lazily negated tensor's memory holds the opposite of its values.
    const Object negated(PyObject_CallMethodObjArgs(next_[-1], is_neg_name, nullptr));
    if (negated.get() != Py_False) good_ = false;
    return t;
  }

  int64_t integer() {
    PyObject* const object = take();
    return object ? PyLong_AsLongLong(object) : 0;
  }
  double number() {
    PyObject* const object = take();
    return object ? PyFloat_AsDouble(object) : 0.0;
  }

 private:
  PyObject* take() {
    if (next_ == end_) good_ = false;
    return good_ ? *next_++ : nullptr;
  }

  PyObject* const* next_;
  PyObject* const* end_;
  bool good_ = true;
};

LatentOptions latent_options(Arguments& in) {
  LatentOptions o;
  o.num_samples = in.integer();
  o.first_row = in.integer();
  o.param = in.integer();
  o.lo = in.number();
  o.hi = in.number();
  return o;
}

LikelihoodOptions likelihood_options(Arguments& in) {
  LikelihoodOptions o;
  o.beta = in.number();
  o.reduction = static_cast<Reduction>(in.integer());
  o.param = in.integer();
  o.lo = in.number();
  o.hi = in.number();
  return o;
}

// ---- results -----------------------------------------------------------------------------------

// The outputs of a call, as tensors that torch allocates.
class Outputs {
 public:
  static constexpr int kMost = 5;

  // Of t's shape and dtype, contiguous or, with any_order, in t's memory order.
  View like(PyObject* object, const View& t, bool any_order = false) {
    if (any_order || is_contiguous(t)) {
      return add(PyObject_CallFunctionObjArgs(empty_like, object, nullptr));
    }
    return of_shape(object, t, 0);
  }
  // Of t's shape and dtype, contiguous, with a first dimension of `samples` unless that is 0.
  View of_shape(PyObject* object, const View& t, int64_t samples) {
    const int64_t extra = samples > 0 ? 1 : 0;
    Object shape(PyTuple_New(t.dim + extra));
    if (extra) PyTuple_SetItem(shape.get(), 0, PyLong_FromLongLong(samples));
    for (int64_t d = 0; d < t.dim; ++d) {
      PyTuple_SetItem(shape.get(), d + extra, PyLong_FromLongLong(t.sizes[d]));
    }
    return add(PyObject_CallMethodObjArgs(object, new_empty_name, shape.get(), nullptr));
  }
  // One value a row, (count,) or (samples, count), in the accumulation dtype; 0-dim for count < 0.
  View rows(PyObject* object, const View& t, int64_t count, int64_t samples = 0) {
    Object shape(count < 0     ? PyTuple_New(0)
                 : samples > 0 ? Py_BuildValue("(LL)", samples, count)
                               : PyLong_FromLongLong(count));
    if (t.type == ScalarType::Float || t.type == ScalarType::Double) {  // no dtype to parse: faster
      return add(PyObject_CallMethodObjArgs(object, new_empty_name, shape.get(), nullptr));
    }
    const Object method(PyObject_GetAttr(object, new_empty_name));
    const Object arguments(PyTuple_Pack(1, shape.get()));
    if (method.get() == nullptr || arguments.get() == nullptr) return add(nullptr);
    return add(PyObject_Call(method.get(), arguments.get(), float_keywords));
  }
  // An output that is not wanted.
  View none() {
    Py_INCREF(Py_None);
    objects_[count_++] = Object(Py_None);
    return {};
  }

  // Runs a pass without the interpreter's lock and returns the outputs as a tuple.
  template <class Pass>
  PyObject* after(const Pass& pass) {
    if (failed_ || PyErr_Occurred()) return nullptr;
    std::exception_ptr thrown;
    Py_BEGIN_ALLOW_THREADS;
    try {
      pass();
    } catch (...) {
      thrown = std::current_exception();
    }
    Py_END_ALLOW_THREADS;
    if (thrown) return raise(thrown);
    PyObject* const tuple = PyTuple_New(count_);
    for (int i = 0; tuple != nullptr && i < count_; ++i) {
      PyTuple_SetItem(tuple, i, objects_[i].release());
    }
    return tuple;
  }

 private:
  static bool is_contiguous(const View& t) {
    int64_t stride = 1;
    for (int64_t d = t.dim; d-- > 0; stride *= t.sizes[d]) {
      if (t.sizes[d] != 1 && t.strides[d] != stride) return false;
    }
    return true;
  }
  View add(PyObject* object) {
    const View t = object == nullptr ? View{} : view(object);
    if (!t.present) {
      failed_ = true;
      if (object != nullptr && !PyErr_Occurred()) {
        PyErr_SetString(PyExc_RuntimeError, "vae_fast: torch made something else than a CPU tensor");
      }
    }
    objects_[count_++] = Object(object);
    return t;
  }
  static PyObject* raise(const std::exception_ptr& thrown) {
    try {
      std::rethrow_exception(thrown);
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    } catch (...) {
      PyErr_SetString(PyExc_RuntimeError, "vae_fast: unknown C++ exception");
    }
    return nullptr;
  }

  Object objects_[kMost];
  int count_ = 0;
  bool failed_ = false;
};

// Leaves the call to the op.
PyObject* refuse() {
  PyErr_Clear();
  Py_RETURN_NONE;
}

// ---- the ops -----------------------------------------------------------------------------------

PyObject* py_latent_forward(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  Arguments in(objects, count);
  PyObject* like;
  const View mu = in.tensor(&like), scale = in.tensor(), key = in.tensor();
  const LatentOptions options = latent_options(in);
  if (!in.good() || !is_straight(mu) || !is_straight(scale)) return refuse();
  const int64_t samples = options.num_samples;
  Outputs out;
  const View z = samples > 0 ? out.of_shape(like, mu, samples) : out.like(like, mu);
  const View log_q = out.rows(like, mu, mu.sizes[0], samples);
  const View log_p = out.rows(like, mu, mu.sizes[0], samples);
  return out.after([&] { latent_forward(mu, scale, key, options, z, log_q, log_p); });
}

PyObject* py_latent_backward(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  Arguments in(objects, count);
  PyObject *like_mu, *like_scale;
  const View g_z = in.tensor(), g_log_q = in.tensor(), g_log_p = in.tensor();
  const View mu = in.known(&like_mu), scale = in.known(&like_scale), key = in.known();
  const LatentOptions options = latent_options(in);
  if (!in.good() || !is_straight(mu) || !is_straight(scale) ||
      (g_z && !is_straight(g_z, options.num_samples > 0 ? 2 : 1))) {
    return refuse();
  }
  Outputs out;
  const View g_mu = out.like(like_mu, mu), g_scale = out.like(like_scale, scale);
  return out.after([&] {
    latent_backward(g_z, g_log_q, g_log_p, mu, scale, key, options, g_mu, g_scale);
  });
}

PyObject* py_likelihood_forward_grad(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  Arguments in(objects, count);
  PyObject* like;
  const View x = in.tensor(), mean = in.tensor(&like), scale = in.tensor(), mask = in.tensor();
  const View log_q = in.tensor(), log_p = in.tensor();
  const LikelihoodOptions options = likelihood_options(in);
  const View g_mean = in.known(), g_scale = in.known();
  if (!in.good()) return refuse();
  Outputs out;
  const View nll = out.rows(like, mean, mean.sizes[0]);
  const View loss = out.rows(like, mean, options.reduction == Reduction::none ? x.sizes[0] : -1);
  const bool scalar = scale && scale.dim == 0;
  const View g_shared = scalar ? out.rows(like, mean, mean.sizes[0]) : out.none();
  return out.after([&] {
    likelihood_forward_grad(x, mean, scale, mask, log_q, log_p, options, g_mean, g_scale, nll, loss,
                            g_shared);
  });
}

PyObject* py_likelihood_rescale(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  Arguments in(objects, count);
  PyObject* like;
  const View g_mean = in.known(&like), g_scale = in.known(), g_shared = in.known();
  const View g_nll = in.tensor(), g_loss = in.tensor();
  const double beta = in.number();
  const auto reduction = static_cast<Reduction>(in.integer());
  const int64_t samples = in.integer(), batch = in.integer();
  if (!in.good()) return refuse();
  Outputs out;
  const View g_log_q = out.rows(like, g_mean, samples * batch);
  const View g_log_p = out.rows(like, g_mean, samples * batch);
  const View g_scalar = g_shared ? out.rows(like, g_mean, -1) : out.none();
  return out.after([&] {
    likelihood_rescale(g_mean, g_scale, g_shared, g_nll, g_loss, beta, reduction, samples, batch,
                       g_log_q, g_log_p, g_scalar);
  });
}

// ---- checks ------------------------------------------------------------------------------------

bool same_sizes(const View& a, const View& b) {
  return a.dim == b.dim && std::equal(a.sizes, a.sizes + a.dim, b.sizes);
}
bool is_row_term(const View& t, const View& x) {
  return t.present && t.dim == 1 && t.sizes[0] == x.sizes[0] &&
         t.type == (x.type == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
}
bool is_data(const View& t) {
  return t.present && t.dim > 0 && t.type != ScalarType::Bool && t.type != ScalarType::UInt64;
}
PyObject* answer(bool plain) {
  PyErr_Clear();
  return PyBool_FromLong(plain);
}

// (mu, scale, key or None): whether reparameterize has nothing more to check.
PyObject* py_is_plain_latent(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  Arguments in(objects, count);
  const View mu = in.known(), scale = in.known(), key = in.known();
  return answer(
      in.good() && is_data(mu) && scale && same_sizes(mu, scale) && mu.type == scale.type &&
      (!key || (key.type == ScalarType::UInt64 && key.dim == 1 && key.sizes[0] == 2)));
}

// (x, mean, scale or None, log_q, log_p): the same for fused_elbo. Without a scale, mean is packed.
PyObject* py_is_plain_likelihood(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  Arguments in(objects, count);
  const View x = in.known(), mean = in.known(), scale = in.known();
  const View log_q = in.known(), log_p = in.known();
  if (!in.good() || !is_data(x) || !mean || mean.type != x.type || !is_row_term(log_q, x) ||
      !is_row_term(log_p, x)) {
    return answer(false);
  }
  if (scale) return answer(scale.type == x.type && same_sizes(x, mean) && same_sizes(x, scale));
  return answer(x.dim > 1 && mean.dim == x.dim && mean.sizes[0] == x.sizes[0] &&
                mean.sizes[1] == 2 * x.sizes[1] &&
                std::equal(x.sizes + 2, x.sizes + x.dim, mean.sizes + 2));
}

// connect(torch): must come before any other call.
PyObject* py_connect(PyObject*, PyObject* torch) {
  tensor_type = PyObject_GetAttrString(torch, "Tensor");
  if (tensor_type == nullptr) return nullptr;
  const Object capsule(PyObject_GetAttrString(tensor_type, "__dlpack_c_exchange_api__"));
  if (capsule.get() == nullptr) return nullptr;
  const auto* api = static_cast<const DLPackExchangeAPI*>(
      PyCapsule_GetPointer(capsule.get(), "dlpack_exchange_api"));
  if (api == nullptr) return nullptr;
  if (api->major != kDLPackMajor || api->view_of_object == nullptr) {
    PyErr_SetString(PyExc_ImportError, "torch offers no DLPack 1 exchange of views");
    return nullptr;
  }
  const Object nn(PyObject_GetAttrString(torch, "nn"));
  if (nn.get() == nullptr) return nullptr;
  parameter_type = PyObject_GetAttrString(nn.get(), "Parameter");
  empty_like = PyObject_GetAttrString(torch, "empty_like");
  is_neg_name = PyUnicode_InternFromString("is_neg");
  new_empty_name = PyUnicode_InternFromString("new_empty");
  const Object float32(PyObject_GetAttrString(torch, "float32"));
  if (PyErr_Occurred()) return nullptr;
  float_keywords = Py_BuildValue("{s:O}", "dtype", float32.get());
  if (float_keywords == nullptr) return nullptr;
  view_of_object = api->view_of_object;
  Py_RETURN_NONE;
}

#define VAE_FAST_METHOD(NAME) \
  {#NAME, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_##NAME)), METH_FASTCALL, nullptr}
PyMethodDef methods[] = {{"connect", py_connect, METH_O, nullptr},
                         VAE_FAST_METHOD(is_plain_latent),
                         VAE_FAST_METHOD(is_plain_likelihood),
                         VAE_FAST_METHOD(latent_forward),
                         VAE_FAST_METHOD(latent_backward),
                         VAE_FAST_METHOD(likelihood_forward_grad),
                         VAE_FAST_METHOD(likelihood_rescale),
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "vae_fast._cpu", nullptr, -1, methods,
                      nullptr,               nullptr,         nullptr, nullptr};

}  // namespace
}  // namespace vae_fast

PyMODINIT_FUNC PyInit__cpu() { return PyModule_Create(&vae_fast::module); }

#endif
