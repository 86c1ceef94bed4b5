// What the loops of latent.h and likelihood.h share: iteration in vectors of F, the kernels' types,
// and the table that a pass picks its functions from.
#pragma once

#include <algorithm>

#include "math.h"
#include "philox.h"

namespace vae_fast {

template <class F>
using ScalarOf = typename Traits<F>::Scalar;

template <class T>
__attribute__((noinline)) inline void load_partial(const T* p, int64_t count, int width, T fill,
                                                   T* lane) {
  for (int j = 0; j < width; ++j) lane[j] = j < count ? p[j] : fill;
}
template <class T>
__attribute__((noinline)) inline void store_partial(T* p, int64_t count, const T* lane) {
  for (int64_t j = 0; j < count; ++j) p[j] = lane[j];
}

// The vector of elements i, i+1, ... of a row that has `left` elements from i on. In the last,
// partial one, the lanes beyond the row load `fill`, store nothing and add nothing.
template <class F>
struct At {
  using T = ScalarOf<F>;
  static constexpr int width = Traits<F>::width;
  int64_t i, left;
  VAE_FAST_INLINE bool whole() const { return __builtin_expect(left >= width, 1); }
  VAE_FAST_INLINE F load(const T* p, T fill = T(0)) const {
    F v;
    if (whole()) {
      std::memcpy(&v, p + i, sizeof(v));
    } else {
      T lane[width];
      load_partial(p + i, left, width, fill, lane);
      std::memcpy(&v, lane, sizeof(v));
    }
    return v;
  }
  VAE_FAST_INLINE void store(T* p, F v) const {
    if (whole()) {
      std::memcpy(p + i, &v, sizeof(v));
    } else {
      T lane[width];
      std::memcpy(lane, &v, sizeof(v));
      store_partial(p + i, left, lane);
    }
  }
  VAE_FAST_INLINE F keep(F v) const {
    if (!whole()) {
      T lane[width];
      store(lane - i, v);
      load_partial(lane, left, width, T(0), lane);
      std::memcpy(&v, lane, sizeof(v));
    }
    return v;
  }
};

// On the loop bodies, so that they are compiled for their caller's instruction set.
#define VAE_FAST_LAMBDA __attribute__((always_inline))

template <class F, class Body>
VAE_FAST_INLINE void for_lanes(int64_t n, const Body& body) {
  for (int64_t i = 0; i < n; i += Traits<F>::width) body(At<F>{i, n - i});
}

template <class T>
struct LatentTerms {
  T q, p;
};

template <class T>
struct LikelihoodTerms {
  T value, g_scale;
};

enum class Mode : int { forward, backward, forward_grad };

template <class T>
struct LatentKernels {
  void (*noise)(int64_t calls, const uint32_t* lo, const uint32_t* hi, uint32_t k0, uint32_t k1,
                T* eps);
  LatentTerms<T> (*forward)(int64_t n, const T* mu, const T* scale, const T* eps, T* z);
  void (*backward)(int64_t n, const T* mu, const T* scale, const T* eps, const T* g_z, T g_q, T g_p,
                   T* g_mu, T* g_scale);
};

template <class T>
using LikelihoodPiece = LikelihoodTerms<T> (*)(int64_t n, const T* x, const T* mean, const T* scale,
                                               T weight, T* g_mean, T* g_scale);

}  // namespace vae_fast
