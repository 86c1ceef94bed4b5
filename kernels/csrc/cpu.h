// What the passes' files share: the instruction set, and the kernels that prepare their operands.
#pragma once

#include "lanes.h"

namespace vae_fast {

enum class Isa { base, avx2, avx512 };
extern const Isa kIsa;  // the best one that this machine has

// The bounds of a raw scale parameter.
struct Clamp {
  double lo, hi;
  bool soft;
  bool active() const { return lo > -INFINITY || hi < INFINITY; }
};

// Loops over one straight run of n elements.
template <class T>
struct TileKernels {
  // Raw scales, kept within their bounds, as such or as log σ; slope receives the derivative of what
  // is written by the raw scale. `to` may be `from`.
  void (*prepare_scale)(int64_t n, const Clamp& clamp, bool log, const T* from, T* to, T* slope);
  // The same as log σ, and 1/√σ.
  void (*resolve_scale)(int64_t n, const Clamp& clamp, const T* from, T* log_sigma, T* slope,
                        T* root);
  // (level + u)·mul + add of stored levels; without u, no noise is added.
  void (*levels)(int64_t n, const uint8_t* from, const float* u, T mul, T add, T* to);
  // Writes a gradient past the caches, times the slope of a prepared scale if there is one.
  void (*stream)(int64_t n, const T* from, const T* slope, T* to);
};
template <class T>
TileKernels<T> tile_kernels(Param param);

// The Gaussian's kernel, without a mask, on tensors that are not stored as what it computes with; null
// if there is none.
template <class S, class X>
LikelihoodKernel<float, S, X> gaussian_kernel(Stored<S, X>, Param param, LikelihoodVariant variant);

struct StorageKernels {
  void (*widen_bf16)(const Bf16* from, int64_t n, float* to);
  void (*narrow_bf16)(const float* from, int64_t n, Bf16* to);
  void (*widen_fp16)(const Fp16* from, int64_t n, float* to);
  void (*narrow_fp16)(const float* from, int64_t n, Fp16* to);
  // The uniform noise of `calls` Philox calls from `counter` on: u[4·i + lane], writable up to the
  // next multiple of 16 calls.
  void (*uniform)(int64_t calls, uint64_t counter, uint32_t k0, uint32_t k1, float* u);
};
extern const StorageKernels kStorage;

}  // namespace vae_fast
