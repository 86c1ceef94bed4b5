// What the loops of latent.h and likelihood.h share: iteration in vectors of F, the kernels' types,
// and the table that a pass picks its functions from.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>
#include <utility>

#include "elements.h"
#include "math.h"
#include "philox.h"

namespace vae_fast {

constexpr int64_t kTile = 1024;  // elements worked on at once, in L1

template <class F>
using ScalarOf = typename Traits<F>::Scalar;

// The first of some rows, and how far apart they are.
template <class T>
struct Rows {
  T* data;
  int64_t pitch;
  VAE_FAST_INLINE T* operator[](int64_t row) const { return data + row * pitch; }
};

// A bf16 or fp16 in memory; in a register it is a float.
enum class Bf16 : uint16_t {};
enum class Fp16 : uint16_t {};

// The vector of elements i, i+1, ... of a row. Of the last, partial one (kPart) only `left` elements
// exist: the lanes beyond them load `fill`, store nothing and add nothing.
template <class F, bool kPart>
struct At {
  using T = ScalarOf<F>;
  int64_t i, left;
  VAE_FAST_INLINE F load(const T* p, T fill = T(0)) const { return read(p + i, splat<F>(fill)); }
  VAE_FAST_INLINE F load(const Bf16* p, T fill = T(0)) const {
    using H = typename Traits<F>::UShort;
    const uint16_t bits = static_cast<uint16_t>(bits_as<uint32_t>(fill) >> 16);
    const H v = read(reinterpret_cast<const uint16_t*>(p + i), H{} + bits);
    return bits_as<F>(widen_lanes<typename Traits<F>::UInt>(v) << 16);
  }
  VAE_FAST_INLINE F load(const Fp16* p) const {
    using H = typename Traits<F>::UShort;
    return from_fp16<F>(read(reinterpret_cast<const uint16_t*>(p + i), H{}));
  }
  VAE_FAST_INLINE F load(const uint8_t* p) const {
    if constexpr (Traits<F>::width == 1) {
      return static_cast<T>(p[i]);
    } else {
      uint8_t part[Traits<F>::width] = {};
      if constexpr (kPart) std::memcpy(part, p + i, left);
      return to_float(widen_bytes<F>(kPart ? part : p + i));
    }
  }
  VAE_FAST_INLINE void store(T* p, F v) const { write(p + i, v); }
  VAE_FAST_INLINE void add(T* p, F v) const { store(p, load(p) + v); }
  VAE_FAST_INLINE void store(Bf16* p, F v) const {
    write(reinterpret_cast<uint16_t*>(p + i), bf16(v));
  }
  VAE_FAST_INLINE void store(Fp16* p, F v) const {
    write(reinterpret_cast<uint16_t*>(p + i), to_fp16(v));
  }
  // Past the caches where there is an instruction for it; p + i must be aligned to a whole vector.
  VAE_FAST_INLINE void stream(T* p, F v) const {
    if constexpr (kPart) {
      store(p, v);
    } else {
      store_past_caches(p + i, v);
    }
  }
  VAE_FAST_INLINE void stream(Bf16* p, F v) const {
    if constexpr (kPart) {
      store(p, v);
    } else {
      store_past_caches(reinterpret_cast<uint16_t*>(p + i), bf16(v));
    }
  }
  VAE_FAST_INLINE F keep(F v) const {
    if constexpr (kPart && Traits<F>::width > 1) {
      typename Traits<F>::Int lane;
      for (int j = 0; j < Traits<F>::width; ++j) lane[j] = j;
      v = select(lane < static_cast<int>(left), v, F{});
    }
    return v;
  }

 private:
  template <class V, class S>
  VAE_FAST_INLINE V read(const S* p, V fill) const {
    if constexpr (kPart) return load_part(p, left, fill);
    V v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  template <class V, class S>
  VAE_FAST_INLINE void write(S* p, V v) const {
    if constexpr (kPart) {
      store_part(p, left, v);
    } else {
      std::memcpy(p, &v, sizeof(v));
    }
  }
  VAE_FAST_INLINE static auto bf16(F v) {
    return narrow_lanes<typename Traits<F>::UShort>(bf16_bits<F, typename Traits<F>::UInt>(v));
  }
};

// The same under a mask of lanes, all of whose bits are set or none: those that it leaves out store 0
// and add nothing, whatever was loaded and came of it.
template <class F, bool kPart>
struct MaskedAt : At<F, kPart> {
  using I = typename Traits<F>::Int;
  using Base = At<F, kPart>;
  I mask;
  VAE_FAST_INLINE MaskedAt(int64_t i, int64_t left, I mask_) : Base{i, left}, mask(mask_) {}
  template <class S>
  VAE_FAST_INLINE void store(S* p, F v) const {
    Base::store(p, keep(v));
  }
  template <class S>
  VAE_FAST_INLINE void stream(S* p, F v) const {
    Base::stream(p, keep(v));
  }
  VAE_FAST_INLINE void add(ScalarOf<F>* p, F v) const { Base::add(p, keep(v)); }
  VAE_FAST_INLINE F keep(F v) const { return bits_as<F>(bits_as<I>(v) & mask); }
};

// In each quarter of four lanes, from lane kFrom on: one of a, one of b, ... or two and two.
template <int kFrom, int kRun, class F, int... i>
VAE_FAST_INLINE F interleave(F a, F b, std::integer_sequence<int, i...>) {
  constexpr int w = Traits<F>::width;
  return VAE_FAST_SHUFFLE(
      a, b, (i / 4 * 4 + kFrom + (kRun == 1 ? i % 4 / 2 + i % 2 * w : i % 2 + i % 4 / 2 * w))...);
}

// Transposes every quarter of (x, y, z, w), four lanes of each, and stores the four vectors.
template <class F>
VAE_FAST_INLINE void store_transposed(F x, F y, F z, F w, float* to) {
  constexpr std::make_integer_sequence<int, Traits<F>::width> lanes;
  const F xy_low = interleave<0, 1>(x, y, lanes), xy_high = interleave<2, 1>(x, y, lanes);
  const F zw_low = interleave<0, 1>(z, w, lanes), zw_high = interleave<2, 1>(z, w, lanes);
  const F out[4] = {interleave<0, 2>(xy_low, zw_low, lanes),
                    interleave<2, 2>(xy_low, zw_low, lanes),
                    interleave<0, 2>(xy_high, zw_high, lanes),
                    interleave<2, 2>(xy_high, zw_high, lanes)};
  std::memcpy(to, out, sizeof(out));
}

// On the loop bodies, so that they are compiled for their caller's instruction set.
#define VAE_FAST_LAMBDA __attribute__((always_inline))

template <class F, class Body>
VAE_FAST_INLINE void for_lanes(int64_t n, const Body& body) {
  constexpr int width = Traits<F>::width;
  int64_t i = 0;
  for (; i + width <= n; i += width) body(At<F, false>{i, width});
  if (i < n) body(At<F, true>{i, n - i});
}

// Functions that call body(at) for the vectors of n elements, all of them or those that a mask of bytes
// keeps.
template <class F>
struct EveryLane {
  template <class Body>
  VAE_FAST_INLINE void operator()(int64_t n, const Body& body) const {
    for_lanes<F>(n, body);
  }
};
template <class F>
struct MaskedLanes {
  const uint8_t* mask;
  template <class Body>
  VAE_FAST_INLINE void operator()(int64_t n, const Body& body) const {
    constexpr int width = Traits<F>::width;
    int64_t i = 0;
    for (; i + width <= n; i += width) {
      body(MaskedAt<F, false>(i, width, mask_lanes<F>(mask + i)));
    }
    if (i < n) {
      uint8_t last[width] = {};
      std::memcpy(last, mask + i, n - i);
      body(MaskedAt<F, true>(i, n - i, mask_lanes<F>(last)));
    }
  }
};

// Whether scales have factors that are computed ahead of what needs them.
template <class F>
constexpr bool has_factors(Param p) {
  return is_exponential(p) && std::is_same_v<ScalarOf<F>, float>;
}

// Writes the factors of n raw scales and returns whether all of these were moderate (math.h); else, or
// where σ is no exponential, what is written is nothing of use. A loop of its own, since the processor
// overlaps an exponential better with others than with what needs it. It calls meanwhile(i) for
// every vector: what is to be fetched from memory arrives while it computes.
template <class F, Param P, Factor kFactor, class S, class Bound, class Meanwhile>
VAE_FAST_INLINE bool moderate_factors(int64_t n, const S* scale, const Bound& bound,
                                      ScalarOf<F>* to, const Meanwhile& meanwhile) {
  if constexpr (has_factors<F>(P)) {
    typename Traits<F>::UInt places{};
    for_lanes<F>(n, [&](auto at) VAE_FAST_LAMBDA {
      meanwhile(at.i);
      const Scale<F, P> s(bound(at.load(scale)).kept);
      const ModerateExp<F> e(kFactor == Factor::sigma     ? s.log_sigma
                             : kFactor == Factor::inverse ? -s.log_sigma
                                                          : -s.log_variance);
      places |= e.place;
      at.store(to, e.value);
    });
    return !any_lane(places & ~(ModerateExp<F>::kPlaces - 1));
  }
  return false;
}

struct Nothing {  // to do meanwhile
  VAE_FAST_INLINE void operator()(int64_t) const {}
};

// Calls fn(row, each_scale) for some rows of n raw scales, kTile of these at most, and each_scale(body)
// calls body(at, scale, raw) for the row's vectors, after bound(raw) has made them Bounded or
// Unbounded. What comes of a row does not depend on others.
template <class F, Param P, Factor kFactor, class S, class Bound, class Fn, class Each = EveryLane<F>,
          class Meanwhile = Nothing>
VAE_FAST_INLINE void for_scales(int64_t rows, int64_t n, Rows<const S> scale, const Bound& bound,
                                const Fn& fn, const Each& each = {},
                                const Meanwhile& meanwhile = {}) {
  using T = ScalarOf<F>;
  alignas(64) T factors[kTile];
  bool moderate[kTile];
  for (int64_t row = 0; row < rows; ++row) {
    T* const factor = factors + row * n;
    moderate[row] = moderate_factors<F, P, kFactor>(n, scale[row], bound, factor, meanwhile);
  }
  for (int64_t row = 0; row < rows; ++row) {
    const T* const factor = factors + row * n;
    if (__builtin_expect(moderate[row], 1)) {  // whose loop gets the registers
      fn(row, [&](const auto& body) VAE_FAST_LAMBDA {
        each(n, [&](auto at) VAE_FAST_LAMBDA {
          const auto raw = bound(at.load(scale[row], T(1)));
          body(at, ModerateScale<F, P, kFactor>(raw.kept, at.load(factor, T(1))), raw);
        });
      });
    } else {
      fn(row, [&](const auto& body) VAE_FAST_LAMBDA {
        each(n, [&](auto at) VAE_FAST_LAMBDA {
          const auto raw = bound(at.load(scale[row], T(1)));
          body(at, Scale<F, P>(raw.kept), raw);
        });
      });
    }
  }
}
// A bound of for_scales.
template <class F>
struct NoBound {
  VAE_FAST_INLINE Unbounded<F> operator()(F s) const { return {s}; }
};

// Calls body(i, x, y, z, w) with the words of as many Philox counters as a vector has lanes, for
// i = 0, 1, ... blocks from `counter` on; of the last block some may not be wanted.
//
// Philox works on 64-bit lanes, two vectors a block. The counters are dealt to the 32-bit lanes such
// that transposing the 128-bit quarters of (x, y, z, w), which is cheap, puts them in order: lane
// 4·q + m holds counter m·width/4 + q. Several blocks are worked on at once, as many as there are
// registers for, since one is a single chain of ten times a product, a shuffle and a sum, each of which
// has to wait for the last.
template <class F, class Body>
VAE_FAST_INLINE void philox_blocks(int64_t calls, uint64_t counter, uint32_t k0, uint32_t k1,
                                   uint32_t stream, const Body& body) {
  using L = typename Traits<F>::ULong;
  constexpr int width = Traits<F>::width, kAtOnce = width == 16 ? 4 : 2;
  L even;
  for (int i = 0; i < width / 2; ++i) even[i] = counter + i % 2 * (width / 2) + i / 2;
  const auto block = [&](int64_t i, const Words<L>& a, const Words<L>& b) VAE_FAST_LAMBDA {
    body(i, join_low_halves(a.x, b.x), join_low_halves(a.y, b.y), join_low_halves(a.z, b.z),
         join_low_halves(a.w, b.w));
  };
  const int64_t blocks = (calls + width - 1) / width;
  int64_t i = 0;
  const auto run = [&](auto count) VAE_FAST_LAMBDA {
    constexpr int kBlocks = decltype(count)::value;
    for (; i + kBlocks <= blocks; i += kBlocks, even += kBlocks * width) {
      L counters[2 * kBlocks];
      VAE_FAST_UNROLL
      for (int j = 0; j < kBlocks; ++j) {
        counters[2 * j] = even + j * width;
        counters[2 * j + 1] = even + (j * width + width / 4);
      }
      Words<L> words[2 * kBlocks];
      philox(counters, k0, k1, stream, words);
      VAE_FAST_UNROLL
      for (int j = 0; j < kBlocks; ++j) block(i + j, words[2 * j], words[2 * j + 1]);
    }
  };
  run(std::integral_constant<int, kAtOnce>{});
  run(std::integral_constant<int, 1>{});
}

template <class T>
struct LikelihoodTerms {
  T value, g_scale;
};

// Memory that is wanted next. It is fetched while noise is made, which takes long and reads none.
struct Ahead {
  static constexpr int kMost = 5;
  int count = 0;
  const char* from[kMost];
  int64_t stretch[kMost];  // bytes for each byte of noise

  // n elements of each of some rows, unless they lie too far apart.
  template <class T>
  void add(Rows<T> wanted, int64_t rows, int64_t n) {
    const bool dense = rows == 1 || wanted.pitch <= n;
    if (!wanted.data || (!dense && wanted.pitch > 2 * n)) return;
    from[count] = reinterpret_cast<const char*>(wanted.data);
    stretch[count++] = dense ? 1 : 2;  // half of a packed tensor
  }
  // What belongs to some bytes of the noise.
  VAE_FAST_INLINE void fetch(int64_t begin, int64_t bytes) const {
    for (int j = 0; j < count; ++j) {
      const char* const first = from[j] + begin * stretch[j];
      for (int64_t b = 0; b < bytes * stretch[j]; b += 64) __builtin_prefetch(first + b);
    }
  }
};

template <class T>
struct LatentKernels {
  void (*noise)(int64_t calls, uint64_t counter, uint32_t k0, uint32_t k1, const Ahead& ahead,
                T* eps);
  void (*forward)(int64_t rows, int64_t n, Rows<const T> mu, Rows<const T> scale,
                  Rows<const T> eps, Rows<T> z, T* log_q, T* log_p);
  void (*backward)(int64_t rows, int64_t n, Rows<const T> mu, Rows<const T> scale,
                   Rows<const T> eps, Rows<const T> g_z, Rows<const T> g_q, Rows<const T> g_p,
                   Rows<T> g_mu, Rows<T> g_scale, bool add);
};

// Of a likelihood's scale: one value a row, one an element of the event for all rows, or one an
// element; and whether the kernel itself keeps the last in bounds.
enum class ScaleKind { row, event, each, bounded };

// A scale of the event: log σ and 1/√σ of each element, and the sums that its ∂log σ is added to, if
// that is wanted.
template <class T>
struct EventScale {
  const T *log_sigma, *root;
  T* sums;
};

// On elements stored as S, and data stored as X: floats, or bytes that are levels. The mask is that of
// the elements which count, if not all do. Gradients may be written past the caches.
template <class T, class S = T, class X = S>
using LikelihoodKernel = void (*)(int64_t rows, int64_t n, const Model<T>& model, Rows<const X> x,
                                  Rows<const S> mean, Rows<const S> scale, Rows<const T> row_scale,
                                  EventScale<T> event_scale, Rows<const uint8_t> mask,
                                  Rows<const T> weight, Rows<S> g_mean, Rows<S> g_scale,
                                  bool past_caches, LikelihoodTerms<T>* terms);
// One of them.
struct LikelihoodVariant {
  ScaleKind scale;
  bool masked;  // not with ScaleKind::each
  bool gradient;
};
// What tensors are stored as.
template <class S_, class X_ = S_>
struct Stored {
  using S = S_;
  using X = X_;
};

template <class T>
struct KlKernels {
  void (*terms)(int64_t n, const T* mu, const T* log_scale, const T* prior_mu,
                const T* prior_log_scale, T* terms);
  void (*add_rows)(int64_t rows, int64_t n, const T* terms, T* sums);
  void (*add_columns)(int64_t rows, int64_t n, const T* terms, T* sums);
  void (*repeat_each)(int64_t rows, int64_t n, const T* values, T* to);
  void (*gradient)(int64_t n, const T* weights, const T* mu, const T* log_scale,
                   const T* scale_slope, const T* prior_mu, const T* prior_log_scale,
                   const T* prior_slope, T* g_mu, T* g_scale, T* g_prior_mu, T* g_prior_scale);
};

template <class T>
using ImportanceKernel = void (*)(int64_t samples, int64_t n, int64_t pitch, T* weights, T* bound);

}  // namespace vae_fast
