// The noise stream: Philox4x32-10 (Salmon et al. 2011) and Box–Muller (1958).
//
// The same numbers as vae_fast/noise.py and torch.func._random, from the same counters.
#pragma once

#include "math.h"

namespace vae_fast {

struct Words {
  uint32_t x, y, z, w;
};

// Ten rounds on the counter (lo, hi, 0, 0).
VAE_FAST_INLINE Words philox(uint32_t lo, uint32_t hi, uint32_t k0, uint32_t k1) {
  uint32_t c0 = lo, c1 = hi, c2 = 0, c3 = 0;
#if defined(__clang__) || defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// v·2⁻³² + 2⁻³³ on (0, 1]; the product is exact, so this rounds as a fused multiply-add does.
// v becomes a float through its upper 31 bits, the lost one kept as a sticky bit: one rounding,
// and a signed conversion, which every instruction set has.
template <class F>
VAE_FAST_INLINE F uniform(typename Traits<F>::UInt v) {
  using I = typename Traits<F>::Int;
  const F large = to_float(bits_as<I>((v >> 1) | (v & 1u))) * 2.0f;
  const F small = to_float(bits_as<I>(v));
  return select(bits_as<I>(v) < 0, large, small) * 0x1p-32f + 0x1p-33f;
}

VAE_FAST_INLINE double uniform(uint32_t hi, uint32_t lo) {
  return hi * 0x1p-32 + (lo * 0x1p-64 + 0x1p-65);
}

// Two normals from two uniforms.
template <class F>
VAE_FAST_INLINE void box_muller(F u1, F u2, F& n0, F& n1) {
  const F radius = square_root(log_normal(u1) * -2.0f);
  F sine, cosine;
  sincos_turns(u2, sine, cosine);
  n0 = radius * cosine;
  n1 = radius * sine;
}
VAE_FAST_INLINE void box_muller(double u1, double u2, double& n0, double& n1) {
  const double radius = sqrt(-2.0 * log(u1));
  const double angle = 6.283185307179586476925286766559 * u2;
  n0 = radius * cos(angle);
  n1 = radius * sin(angle);
}

}  // namespace vae_fast
