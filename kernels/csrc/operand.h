// Tensors as the passes see them: views of somebody's memory, and rows of elements with strides.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu.h"
#include "passes.h"

namespace vae_fast {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// ---- tensors as rows of elements ---------------------------------------------------------------

constexpr int64_t kPiece = 8 * kTile;  // elements of a row that one unit of parallel work covers

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
template <>
constexpr ScalarType type_of<Bf16> = ScalarType::BFloat16;
template <>
constexpr ScalarType type_of<uint8_t> = ScalarType::Byte;

inline bool is_double(const View& t) { return t.type == ScalarType::Double; }

// The sizes or strides of a tensor's dimensions.
struct Dims {
  static constexpr int64_t kMax = 64;

  Dims() {}
  Dims(const Dims& other) { *this = other; }
  Dims& operator=(const Dims& other) {
    count_ = other.count_;
    std::copy_n(other.value_, count_, value_);
    return *this;
  }

  void push_back(int64_t value) {
    STD_TORCH_CHECK(count_ < kMax, "vae_fast: too many dimensions");
    value_[count_++] = value;
  }
  void append(const int64_t* values, int64_t from, int64_t to) {
    for (int64_t d = from; d < to; ++d) push_back(values[d]);
  }
  int64_t size() const { return count_; }
  bool empty() const { return count_ == 0; }
  const int64_t* data() const { return value_; }
  int64_t operator[](int64_t d) const { return value_[d]; }
  int64_t& operator[](int64_t d) { return value_[d]; }
  int64_t back() const { return value_[count_ - 1]; }
  int64_t& back() { return value_[count_ - 1]; }

 private:
  int64_t count_ = 0, value_[kMax];
};

// One operand of a pass: rows of elements, an element reached through the event's dimensions.
struct Operand {
  bool present = false;
  char* data = nullptr;  // null for an empty tensor, too
  ScalarType type = ScalarType::Float;
  int64_t row_stride = 0;
  Dims strides;           // in elements, one per event dimension
  bool straight = false;  // of a fused event: a row's elements lie along one stride, that of the last

  explicit operator bool() const { return present; }
  char* at(int64_t offset) const { return data + offset * element_size(type); }
};

template <class S, class T>
VAE_FAST_INLINE S narrow(T value) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    return BFloat16(static_cast<uint16_t>(bf16_bits<float, uint32_t>(static_cast<float>(value))),
                    BFloat16::from_bits());
  } else {
    return static_cast<S>(value);
  }
}

// Elements of an operand: `rows` straight runs of `count`, element j of run i at i·pitch + j·stride
// from `offset` on.
struct Block {
  int64_t offset, pitch, rows, stride, count;
};
inline Block run_of(int64_t offset, int64_t stride, int64_t count) {
  return {offset, 0, 1, stride, count};
}

// Calls fn(where an element lies, its place in order) for all elements of a block, the longer side in
// the inner loop: the runs of a channels-last image beside one that is not are as short as its channels.
template <class Fn>
VAE_FAST_INLINE void for_elements(const Block& b, const Fn& fn) {
  const auto [offset, pitch, rows, stride, count] = b;
  if (rows > count) {
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t i = 0; i < rows; ++i) fn(offset + i * pitch + j * stride, i * count + j);
    }
  } else {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < count; ++j) fn(offset + i * pitch + j * stride, i * count + j);
    }
  }
}

// Whether a loop of vectors, or a copy, turns a straight run of S into one of T.
template <class S>
constexpr bool is_half = std::is_same_v<S, BFloat16> || std::is_same_v<S, Half>;
template <class S, class T>
constexpr bool converts_runs = std::is_same_v<S, T> || (is_half<S> && std::is_same_v<T, float>) ||
                               (std::is_same_v<S, float> && is_half<T>);
template <class T>
void convert_run(const T* from, int64_t n, T* to) {
  if (n > 0) std::memcpy(to, from, n * sizeof(T));
}
inline void convert_run(const BFloat16* from, int64_t n, float* to) {
  kStorage.widen_bf16(reinterpret_cast<const Bf16*>(from), n, to);
}
inline void convert_run(const Half* from, int64_t n, float* to) {
  kStorage.widen_fp16(reinterpret_cast<const Fp16*>(from), n, to);
}
inline void convert_run(const float* from, int64_t n, BFloat16* to) {
  kStorage.narrow_bf16(from, n, reinterpret_cast<Bf16*>(to));
}
inline void convert_run(const float* from, int64_t n, Half* to) {
  kStorage.narrow_fp16(from, n, reinterpret_cast<Fp16*>(to));
}
// Whether all places of a run, or all runs, are the same elements in memory.
inline bool repeats(const Block& b) {
  return (b.stride == 0 && b.count >= b.rows) || (b.pitch == 0 && b.rows > 1);
}
// The first n elements over and over, up to `all` of them.
template <class T>
void repeat(int64_t n, int64_t all, T* to) {
  for (int64_t more; n < all; n += more) {
    more = std::min(n, all - n);
    std::memcpy(to + n, to, more * sizeof(T));
  }
}
template <class S, class T>
void gather_repeated(const S* from, const Block& b, T* to) {
  constexpr int64_t kFew = 64;  // one by one, before copies are worth a call
  from += b.offset;
  if (b.stride == 0) {
    for (int64_t i = 0; i < b.rows; ++i) {
      const int64_t few = std::min(b.count, kFew);
      std::fill_n(to + i * b.count, few, static_cast<T>(from[i * b.pitch]));
      repeat(few, b.count, to + i * b.count);
    }
    return;
  }
  for (int64_t j = 0; j < b.count; ++j) to[j] = static_cast<T>(from[j * b.stride]);
  repeat(b.count, b.rows * b.count, to);
}
// Whether a block is of runs long enough to be worth a call each.
inline bool is_runs(const Block& b) {
  constexpr int64_t kShort = 16;
  return b.stride == 1 && (b.rows == 1 || b.count >= kShort);
}

// The elements of a block as T, in order; and elements in order to where the block lies.
template <class T>
__attribute__((noinline)) void gather(const Operand& o, const Block& b, T* to) {
  with_type(o.type, [&](auto tag) {
    using S = decltype(tag);
    const S* const from = reinterpret_cast<const S*>(o.data);
    if (repeats(b)) return gather_repeated(from, b, to);
    if constexpr (converts_runs<S, T>) {
      if (is_runs(b)) {
        for (int64_t i = 0; i < b.rows; ++i) {
          convert_run(from + b.offset + i * b.pitch, b.count, to + i * b.count);
        }
        return;
      }
    }
    for_elements(b, [&](int64_t at, int64_t i) { to[i] = static_cast<T>(from[at]); });
  });
}
template <class T>
__attribute__((noinline)) void scatter(const Operand& o, const Block& b, const T* from) {
  with_type(o.type, [&](auto tag) {
    using S = decltype(tag);
    S* const to = reinterpret_cast<S*>(o.data);
    if constexpr (converts_runs<T, S>) {
      if (is_runs(b)) {
        for (int64_t i = 0; i < b.rows; ++i) {
          convert_run(from + i * b.count, b.count, to + b.offset + i * b.pitch);
        }
        return;
      }
    }
    for_elements(b, [&](int64_t at, int64_t i) { to[at] = narrow<S>(from[i]); });
  });
}
// Bytes as they are: those of a straight run in place, others in `buffer`.
inline const uint8_t* gather_bytes(const Operand& o, const Block& b, uint8_t* buffer) {
  const uint8_t* const from = reinterpret_cast<const uint8_t*>(o.data);
  if (b.rows == 1 && b.stride == 1) return from + b.offset;
  if (repeats(b)) {
    gather_repeated(from, b, buffer);
    return buffer;
  }
  for_elements(b, [&](int64_t at, int64_t i) { buffer[i] = from[at]; });
  return buffer;
}

// The dimensions of `t` before `event_from` must be one row dimension.
Operand operand(const View& t, int64_t event_from = 1) {
  Operand o;
  o.present = t.present;
  o.data = static_cast<char*>(t.data);
  o.type = t.type;
  o.row_stride = event_from == 0 ? 0 : t.strides[event_from - 1];
  o.strides.append(t.strides, event_from, t.dim);
  return o;
}

// The dimensions shared by the operands of a pass, fused wherever all of them allow it.
struct Event {
  Dims sizes;

  int64_t numel() const {
    int64_t n = 1;
    for (int64_t d = 0; d < sizes.size(); ++d) n *= sizes[d];
    return n;
  }

  // Likelihood terms are summed, so their order is free: `reorder` sorts the dimensions by the first
  // operand's strides, which reads channels-last tensors in memory order.
  template <size_t kCount>
  void fuse(const std::array<Operand*, kCount>& all, bool reorder) {
    Operand* operands[kCount] = {};
    int count = 0;
    for (Operand* o : all) {
      if (*o) operands[count++] = o;
    }
    Dims order;
    for (int64_t d = 0; d < sizes.size(); ++d) {
      if (sizes[d] != 1) order.push_back(d);
    }
    if (reorder) {  // an insertion sort, which is stable
      const Dims& first = operands[0]->strides;
      for (int64_t i = 1; i < order.size(); ++i) {
        for (int64_t j = i; j > 0 && first[order[j - 1]] < first[order[j]]; --j) {
          std::swap(order[j - 1], order[j]);
        }
      }
    }
    Dims fused, strides[kCount];
    for (int64_t i = 0; i < order.size(); ++i) {
      const int64_t d = order[i];
      bool joins = !fused.empty();
      for (int o = 0; joins && o < count; ++o) {
        joins = strides[o].back() == operands[o]->strides[d] * sizes[d];
      }
      if (!joins) {
        fused.push_back(1);
        for (int o = 0; o < count; ++o) strides[o].push_back(0);
      }
      fused.back() *= sizes[d];
      for (int o = 0; o < count; ++o) strides[o].back() = operands[o]->strides[d];
    }
    if (fused.empty()) {
      fused.push_back(1);
      for (int o = 0; o < count; ++o) strides[o].push_back(1);
    }
    sizes = fused;
    for (int o = 0; o < count; ++o) {
      operands[o]->strides = strides[o];
      operands[o]->straight = true;
      for (int64_t d = 0; d + 1 < sizes.size(); ++d) {
        operands[o]->straight &= strides[o][d] == strides[o][d + 1] * sizes[d + 1];
      }
    }
  }

  // Calls fn(block, first) for the elements [begin, begin + n) of a row in blocks, the innermost two
  // dimensions as far as they go; `first` counts from begin.
  template <class Fn>
  void blocks(const Operand& o, int64_t row, int64_t begin, int64_t n, const Fn& fn) const {
    if (o.straight) {
      const int64_t stride = o.strides.back();
      return fn(run_of(row * o.row_stride + begin * stride, stride, n), 0);
    }
    const int64_t last = static_cast<int64_t>(sizes.size()) - 1;
    const int64_t inner = sizes[last], outer = last > 0 ? sizes[last - 1] : 1;
    const int64_t stride = o.strides[last], pitch = last > 0 ? o.strides[last - 1] : 0;
    for (int64_t done = 0; done < n;) {
      const int64_t j = (begin + done) % inner, i = (begin + done) / inner % outer;
      int64_t offset = row * o.row_stride + i * pitch + j * stride;
      int64_t rest = (begin + done) / inner / outer;
      for (int64_t d = last - 2; d >= 0; --d) {
        offset += (rest % sizes[d]) * o.strides[d];
        rest /= sizes[d];
      }
      const bool whole = j == 0 && n - done >= inner;
      const int64_t rows = whole ? std::min((n - done) / inner, outer - i) : 1;
      const int64_t count = whole ? inner : std::min(n - done, inner - j);
      fn(Block{offset, pitch, rows, stride, count}, done);
      done += rows * count;
    }
  }

  template <class T>
  bool direct(const Operand& o) const {
    return o.type == type_of<T> && o.straight && (o.strides.back() == 1 || numel() == 1);
  }

  // Elements as T: in place where they already are so, else gathered into `buffer`.
  template <class T>
  const T* load(const Operand& o, int64_t row, int64_t begin, int64_t n, T* buffer) const {
    if (direct<T>(o)) return reinterpret_cast<const T*>(o.at(row * o.row_stride + begin));
    blocks(o, row, begin, n, [&](const Block& b, int64_t first) { gather(o, b, buffer + first); });
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
      if (n > 0 && to != from) std::memcpy(to, from, n * sizeof(T));
      return;
    }
    blocks(o, row, begin, n, [&](const Block& b, int64_t first) { scatter(o, b, from + first); });
  }
};

Event event_of(const View& t, int64_t event_from = 1) {
  Event event;
  event.sizes.append(t.sizes, event_from, t.dim);
  return event;
}

// g·slope, and 0 where either is 0, whatever the other: outside its bounds a scale's gradient may be
// infinite, and the slope of a masked scale may be anything.
template <class T>
void scale_by(const T* slope, int64_t n, T* g) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) g[i] = product_or_zero(g[i], slope[i]);
}

// ---- outputs and per-row values ----------------------------------------------------------------

// A contiguous output that a kernel writes as T: in place, or in a buffer that store() converts.
template <class T>
struct Output : Operand {
  explicit Output(const View& t) : Operand(operand(t, 0)) {}
  T* target(int64_t at_, T* buffer) const {
    return type == type_of<T> ? reinterpret_cast<T*>(at(at_)) : buffer;
  }
  void store(int64_t at_, int64_t n, const T* from) const {
    if (type != type_of<T>) scatter(*this, run_of(at_, 1, n), from);
  }
};

template <class T>
T* data_of(const View& t) {
  return static_cast<T*>(t.data);
}

// A fixed binary tree over fixed blocks: the same bits for any number of threads. A block is added up
// in eight sums, none of which waits for another.
template <class T, class Fn>
T tree_sum(int64_t begin, int64_t end, const Fn& term) {
  constexpr int64_t kSums = 8;
  if (end - begin > 8 * kSums) {
    const int64_t middle = begin + (end - begin) / 2;
    return tree_sum<T>(begin, middle, term) + tree_sum<T>(middle, end, term);
  }
  T sums[kSums] = {};
  for (; end - begin >= kSums; begin += kSums) {
    for (int64_t i = 0; i < kSums; ++i) sums[i] += term(begin + i);
  }
  for (int64_t i = 0; i < end - begin; ++i) sums[i] += term(begin + i);
  for (int64_t half = kSums / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

template <class T>
T scalar_value(const View& t) {
  return with_type(t.type, [&](auto tag) {
    return static_cast<T>(*static_cast<const decltype(tag)*>(t.data));
  });
}

void store_scalar(const View& t, double value) {
  with_type(t.type, [&](auto tag) {
    using S = decltype(tag);
    *static_cast<S*>(t.data) = static_cast<S>(value);
  });
}

// The values of rows n = k·B + b, of shape (B,), (K, B) or () for the same value in every row, in the
// accumulation dtype; zeros if there are none.
template <class T>
struct RowValues {
  const T* data = &zero;
  int64_t batch, stride = 0, sample_stride = 0;
  bool even = true;  // one stride for all rows
  static constexpr T zero = 0;

  RowValues(const View& t, int64_t batch_) : batch(std::max<int64_t>(batch_, 1)) {
    if (!t.present || t.numel() == 0) return;
    STD_TORCH_CHECK(t.type == type_of<T>,
                    "vae_fast: per-row tensors must have the accumulation dtype");
    data = static_cast<const T*>(t.data);
    if (t.dim > 0) stride = t.strides[t.dim - 1];
    if (t.dim == 2) {
      sample_stride = t.strides[0];
      even = t.sizes[0] == 1 || sample_stride == batch * stride;
    }
  }
  const T* at(int64_t n) const {
    return data + (even ? n * stride : n / batch * sample_stride + n % batch * stride);
  }
  T operator[](int64_t n) const { return *at(n); }
  Rows<const T> from(int64_t n) const { return {at(n), stride}; }
};

}  // namespace
}  // namespace vae_fast
