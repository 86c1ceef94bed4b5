// Tensors as the passes see them: rows of elements with strides, and freshly allocated outputs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace vae_fast {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- tensors as rows of elements ---------------------------------------------------------------

constexpr int64_t kTile = 1024;        // elements worked on at once, in L1
constexpr int64_t kPiece = 8 * kTile;  // elements of a row that one unit of parallel work covers
constexpr int64_t kGrain = 16384;      // elements that make another thread worth waking

template <class Fn>
auto with_type(ScalarType type, Fn fn) {
  switch (type) {
    case ScalarType::Float:
      return fn(float{});
    case ScalarType::Double:
      return fn(double{});
    case ScalarType::BFloat16:
      return fn(BFloat16{});
    case ScalarType::Half:
      return fn(Half{});
    default:
      STD_TORCH_CHECK(false, "vae_fast: unsupported dtype");
  }
}

template <class T>
constexpr ScalarType type_of = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;

int64_t element_size(ScalarType type) {
  if (type == ScalarType::Bool) return 1;
  return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
}

// One operand of a pass: rows of elements, an element reached through the event's dimensions.
struct Operand {
  bool present = false;
  char* data = nullptr;  // null for an empty tensor, too
  ScalarType type = ScalarType::Float;
  int64_t row_stride = 0;
  std::vector<int64_t> strides;  // in elements, one per event dimension

  explicit operator bool() const { return present; }
  char* at(int64_t offset) const { return data + offset * element_size(type); }
};

// n elements of a straight run, as T.
template <class T>
__attribute__((noinline)) void gather(const Operand& o, int64_t offset, int64_t stride, int64_t n, T* to) {
  with_type(o.type, [&](auto tag) {
    using S = decltype(tag);
    const S* from = reinterpret_cast<const S*>(o.at(offset));
    if (stride == 1) {
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(from[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(from[i * stride]);
    }
  });
}
template <class T>
__attribute__((noinline)) void scatter(const Operand& o, int64_t offset, int64_t stride, int64_t n, const T* from) {
  with_type(o.type, [&](auto tag) {
    using S = decltype(tag);
    S* to = reinterpret_cast<S*>(o.at(offset));
    if (stride == 1) {
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<S>(from[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) to[i * stride] = static_cast<S>(from[i]);
    }
  });
}

// The first dimensions of `t` before `event_from` must be one row dimension.
Operand operand(const Tensor& t, int64_t event_from = 1) {
  Operand o;
  o.present = true;
  o.data = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
  o.type = t.scalar_type();
  const auto strides = t.strides();
  o.row_stride = event_from == 0 ? 0 : strides[event_from - 1];
  for (int64_t d = event_from; d < t.dim(); ++d) o.strides.push_back(strides[d]);
  return o;
}

std::vector<int64_t> event_sizes(const Tensor& t, int64_t event_from) {
  return {t.sizes().begin() + event_from, t.sizes().end()};
}

// The dimensions shared by the operands of a pass, fused wherever all of them allow it.
struct Event {
  std::vector<int64_t> sizes;

  int64_t numel() const {
    int64_t n = 1;
    for (int64_t s : sizes) n *= s;
    return n;
  }

  // Likelihood terms are summed, so their order is free: `reorder` sorts the dimensions by the first
  // operand's strides, which reads channels-last tensors in memory order.
  void fuse(std::initializer_list<Operand*> all, bool reorder) {
    std::vector<Operand*> operands;
    for (Operand* o : all) {
      if (*o) operands.push_back(o);
    }
    std::vector<int> order;
    for (int d = 0; d < static_cast<int>(sizes.size()); ++d) {
      if (sizes[d] != 1) order.push_back(d);
    }
    if (reorder) {
      const auto& first = operands.front()->strides;
      std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return first[a] > first[b]; });
    }
    std::vector<int64_t> fused;
    std::vector<std::vector<int64_t>> strides(operands.size());
    for (int d : order) {
      bool joins = !fused.empty();
      for (size_t i = 0; joins && i < operands.size(); ++i) {
        joins = strides[i].back() == operands[i]->strides[d] * sizes[d];
      }
      if (joins) {
        fused.back() *= sizes[d];
        for (size_t i = 0; i < operands.size(); ++i) strides[i].back() = operands[i]->strides[d];
      } else {
        fused.push_back(sizes[d]);
        for (size_t i = 0; i < operands.size(); ++i) strides[i].push_back(operands[i]->strides[d]);
      }
    }
    if (fused.empty()) {
      fused.push_back(1);
      for (auto& s : strides) s.push_back(1);
    }
    for (size_t i = 0; i < operands.size(); ++i) operands[i]->strides = strides[i];
    sizes = fused;
  }

  // Calls fn(offset in elements, stride, first, count) for each straight run of [begin, begin + n).
  template <class Fn>
  void runs(const Operand& o, int64_t row, int64_t begin, int64_t n, const Fn& fn) const {
    const int64_t inner = sizes.back(), stride = o.strides.back();
    for (int64_t done = 0; done < n;) {
      const int64_t element = begin + done;
      int64_t offset = row * o.row_stride + (element % inner) * stride;
      int64_t rest = element / inner;
      for (int64_t d = static_cast<int64_t>(sizes.size()) - 2; d >= 0; --d) {
        offset += (rest % sizes[d]) * o.strides[d];
        rest /= sizes[d];
      }
      const int64_t count = std::min(n - done, inner - element % inner);
      fn(offset, stride, done, count);
      done += count;
    }
  }

  template <class T>
  bool direct(const Operand& o) const {
    return sizes.size() == 1 && o.type == type_of<T> && (o.strides[0] == 1 || sizes[0] == 1);
  }

  // Elements as T: in place where they already are so, else gathered into `buffer`.
  template <class T>
  const T* load(const Operand& o, int64_t row, int64_t begin, int64_t n, T* buffer) const {
    if (direct<T>(o)) return reinterpret_cast<const T*>(o.at(row * o.row_stride + begin));
    runs(o, row, begin, n, [&](int64_t offset, int64_t stride, int64_t first, int64_t count) {
      gather(o, offset, stride, count, buffer + first);
    });
    return buffer;
  }

  // Where a kernel may write elements: the operand's memory itself or `buffer`, then store().
  template <class T>
  T* target(const Operand& o, int64_t row, int64_t begin, T* buffer) const {
    return direct<T>(o) ? reinterpret_cast<T*>(o.at(row * o.row_stride + begin)) : buffer;
  }
  template <class T>
  void store(const Operand& o, int64_t row, int64_t begin, int64_t n, const T* from) const {
    if (direct<T>(o)) {
      T* to = reinterpret_cast<T*>(o.at(row * o.row_stride + begin));
      if (to != from) std::memcpy(to, from, n * sizeof(T));
      return;
    }
    runs(o, row, begin, n, [&](int64_t offset, int64_t stride, int64_t first, int64_t count) {
      scatter(o, offset, stride, count, from + first);
    });
  }
};

// torch.clamp of a tile, and its gradient: 1 on the closed interval, 0 outside. NaN passes through.
struct Clamp {
  double lo, hi;
  bool active() const { return lo > -INFINITY || hi < INFINITY; }
  template <class T>
  T of(T s) const {
    s = s < static_cast<T>(lo) ? static_cast<T>(lo) : s;
    return s > static_cast<T>(hi) ? static_cast<T>(hi) : s;
  }
  template <class T>
  bool outside(T s) const {
    return s < static_cast<T>(lo) || s > static_cast<T>(hi);
  }
  // Clamps n elements into `to`, which may be `from`, and marks those whose gradient is zero.
  template <class T>
  const T* apply(const T* from, int64_t n, T* to, bool* zero) const {
    for (int64_t i = 0; i < n; ++i) {
      zero[i] = outside(from[i]);
      to[i] = of(from[i]);
    }
    return to;
  }
};

template <class T>
void zero_where(const bool* zero, int64_t n, T* g) {
  for (int64_t i = 0; i < n; ++i) g[i] = zero[i] ? T(0) : g[i];
}

// ---- outputs ---------------------------------------------------------------------------------

// Fresh memory of the data's size costs more in page faults than the pass that fills it: ask for
// huge pages, which fault 512 times less often.
void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t(1) << 21;
  if (bytes < int64_t(2 * kHuge)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHuge - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                     ScalarType type) {
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  Tensor out(handle);
  advise_huge_pages(out.mutable_data_ptr(), out.numel() * element_size(type));
  return out;
}

Tensor empty(const std::vector<int64_t>& sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  return empty_strided(sizes, strides, type);
}

// Stands for an output that is not wanted.
Tensor none(ScalarType type) { return empty({0}, type); }

template <class T>
T* data_of(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

bool is_double(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }

// torch.empty_like: a gradient in its tensor's memory order.
Tensor gradient_like(const Tensor& t) {
  Tensor out = torch::stable::empty_like(t);
  advise_huge_pages(out.mutable_data_ptr(), out.numel() * element_size(t.scalar_type()));
  return out;
}

// A fixed binary tree over fixed blocks: the same bits for any number of threads.
template <class T, class Fn>
T tree_sum(int64_t begin, int64_t end, const Fn& term) {
  if (end - begin <= 64) {
    T sum = 0;
    for (int64_t i = begin; i < end; ++i) sum += term(i);
    return sum;
  }
  const int64_t middle = begin + (end - begin) / 2;
  return tree_sum<T>(begin, middle, term) + tree_sum<T>(middle, end, term);
}

template <class T>
T scalar_value(const Tensor& t) {
  return with_type(t.scalar_type(), [&](auto tag) {
    return static_cast<T>(*static_cast<const decltype(tag)*>(t.const_data_ptr()));
  });
}

Tensor scalar_tensor(double value, ScalarType type) {
  Tensor out = empty({}, type);
  with_type(type, [&](auto tag) {
    using S = decltype(tag);
    *static_cast<S*>(out.mutable_data_ptr()) = static_cast<S>(value);
  });
  return out;
}

// A one-dimensional fp32 or fp64 tensor of per-row values, or nothing.
template <class T>
struct RowValues {
  const T* data = nullptr;
  int64_t stride = 0;

  RowValues() = default;
  // 0-dim tensors give every row the same value.
  explicit RowValues(const OptionalTensor& t) {
    if (!t) return;
    STD_TORCH_CHECK(t->scalar_type() == type_of<T>, "vae_fast: per-row tensors must have the accumulation dtype");
    STD_TORCH_CHECK(t->dim() <= 1, "vae_fast: per-row tensors must be flat");
    data = static_cast<const T*>(t->const_data_ptr());
    stride = t->dim() == 0 ? 0 : t->stride(0);
  }
  T operator[](int64_t i) const { return data ? data[i * stride] : T(0); }
};

Tensor flat(const Tensor& t) {
  if (t.dim() <= 1) return t;
  const std::array<int64_t, 1> shape{-1};
  return torch::stable::reshape(t, {shape.data(), 1});
}
OptionalTensor flat(const OptionalTensor& t) { return t ? OptionalTensor(flat(*t)) : t; }

}  // namespace
}  // namespace vae_fast
