// The noise stream: Philox4x32-10 (Salmon et al. 2011) and Box–Muller (1958).
//
// The same numbers as vae_fast/noise.py and torch.func._random, from the same counters.
#pragma once

#include "math.h"

namespace vae_fast {

template <class U>
struct Words {
  U x, y, z, w;
};

// The 64-bit product of the low halves, also for vectors of 64-bit lanes. On x86 that is one
// instruction, which GCC 12 does not find by itself.
VAE_FAST_INLINE uint64_t multiply_low(uint64_t a, uint32_t b) { return (a & 0xffffffffu) * b; }
#if defined(VAE_FAST_GCC_X86)
typedef long long i64x8 __attribute__((vector_size(64)));
VAE_FAST_INLINE u64x2 multiply_low(u64x2 a, uint32_t b) {
  return (u64x2)__builtin_ia32_pmuludq128((i32x4)a, (i32x4)(u64x2{} + b));
}
VAE_FAST_INLINE u64x4 multiply_low(u64x4 a, uint32_t b) {
  return (u64x4)__builtin_ia32_pmuludq256((i32x8)a, (i32x8)(u64x4{} + b));
}
VAE_FAST_INLINE u64x8 multiply_low(u64x8 a, uint32_t b) {
  return (u64x8)__builtin_ia32_pmuludq512_mask((i32x16)a, (i32x16)(u64x8{} + b), i64x8{}, 255);
}
#else
template <class U>
VAE_FAST_INLINE U multiply_low(U a, uint32_t b) {
  return (a & 0xffffffffu) * (U{} + b);
}
#endif

// The high half of each lane in its low half, which is all that multiply_low and the callers read. A
// shuffle, since on x86 the port that shifts is the one that multiplies.
VAE_FAST_INLINE uint64_t high_half(uint64_t v) { return v >> 32; }
VAE_FAST_INLINE u64x2 high_half(u64x2 v) {
  const u32x4 u = bits_as<u32x4>(v);
  return bits_as<u64x2>(VAE_FAST_SHUFFLE(u, u, 1, 1, 3, 3));
}
VAE_FAST_INLINE u64x4 high_half(u64x4 v) {
  const u32x8 u = bits_as<u32x8>(v);
  return bits_as<u64x4>(VAE_FAST_SHUFFLE(u, u, 1, 1, 3, 3, 5, 5, 7, 7));
}
VAE_FAST_INLINE u64x8 high_half(u64x8 v) {
  const u32x16 u = bits_as<u32x16>(v);
  return bits_as<u64x8>(VAE_FAST_SHUFFLE(u, u, 1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11, 13, 13, 15, 15));
}

// The low halves of `low` and of `high`, each of the latter above one of the former. Shuffles again;
// for AVX-512 one with a mask, where GCC sees two.
VAE_FAST_INLINE u32x4 join_low_halves(u64x2 low, u64x2 high) {
  return VAE_FAST_SHUFFLE(bits_as<u32x4>(low), bits_as<u32x4>(high), 0, 4, 2, 6);
}
VAE_FAST_INLINE u32x8 join_low_halves(u64x4 low, u64x4 high) {
  return VAE_FAST_SHUFFLE(bits_as<u32x8>(low), bits_as<u32x8>(high), 0, 8, 2, 10, 4, 12, 6, 14);
}
VAE_FAST_INLINE u32x16 join_low_halves(u64x8 low, u64x8 high) {
  const u32x16 u = bits_as<u32x16>(high);
  const u32x16 above = VAE_FAST_SHUFFLE(u, u, 0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14);
  return VAE_FAST_SHUFFLE(bits_as<u32x16>(low), above, 0, 17, 2, 19, 4, 21, 6, 23, 8, 25, 10, 27, 12,
                          29, 14, 31);
}

// Third counter words, which keep the streams of one key apart.
constexpr uint32_t kNormalStream = 0, kUniformStream = 1;

// Ten rounds on the 128-bit counters (counter, stream, 0), for a stream of 0 or 1, U being uint64_t or
// a vector of it. The words are the low halves of what comes out; the high ones hold nothing of use.
// Several counters go through the rounds side by side, since the rounds of one wait for each other.
#if defined(__clang__)
#define VAE_FAST_UNROLL _Pragma("unroll")
#else
#define VAE_FAST_UNROLL _Pragma("GCC unroll 9")
#endif
template <int kCount, class U>
VAE_FAST_INLINE void philox(const U (&counters)[kCount], uint32_t k0, uint32_t k1, uint32_t stream,
                            Words<U> (&words)[kCount]) {
  VAE_FAST_UNROLL
  for (int i = 0; i < kCount; ++i) {
    // Of the first round's two products one is that of the stream.
    const U first = multiply_low(counters[i], 0xD2511F53u);
    words[i] = {high_half(counters[i]) ^ k0, U{} + stream * 0xCD9E8D57u, high_half(first) ^ k1, first};
  }
  VAE_FAST_UNROLL
  for (int round = 1; round < 10; ++round) {
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
    VAE_FAST_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const Words<U> w = words[i];
      const U p0 = multiply_low(w.x, 0xD2511F53u), p1 = multiply_low(w.z, 0xCD9E8D57u);
      words[i] = {high_half(p1) ^ w.y ^ k0, p1, high_half(p0) ^ w.w ^ k1, p0};
    }
  }
}

// v·2⁻³² + 2⁻³³ on (0, 1], times a power of two; the product is exact, so this rounds as a fused
// multiply-add does.
template <class F>
VAE_FAST_INLINE F uniform(typename Traits<F>::UInt v, float times = 1.0f) {
  return to_float(v) * (times * 0x1p-32f) + times * 0x1p-33f;
}

VAE_FAST_INLINE double uniform(uint32_t hi, uint32_t lo) {
  return hi * 0x1p-32 + (lo * 0x1p-64 + 0x1p-65);
}

// Two normals from two words.
template <class F>
VAE_FAST_INLINE void box_muller(typename Traits<F>::UInt a, typename Traits<F>::UInt b, F& n0, F& n1) {
  const F radius = square_root(log_normal_times<-2>(uniform<F>(a)));
  F sine, cosine;
  sincos_turns(uniform<F>(b, kTurn<F>), sine, cosine);
  n0 = radius * cosine;
  n1 = radius * sine;
}
// And from two uniforms.
VAE_FAST_INLINE void box_muller(double u1, double u2, double& n0, double& n1) {
  const double radius = sqrt(-2.0 * log(u1));
  const double angle = 6.283185307179586476925286766559 * u2;
  n0 = radius * cos(angle);
  n1 = radius * sin(angle);
}

}  // namespace vae_fast
