// Includes the header VAE_FAST_KERNELS once per instruction set, into a namespace of its own, so that
// its loops are compiled for each. VAE_FAST_TARGET is the target attribute of its functions; the
// element functions of math.h are inlined into them. To Clang, a vector that such a function passes by
// value to one without the attribute, or gets from it, is an error; not from one lambda to the next.
//
// VAE_FAST_SELECT(fn, args) then returns fn<F>(args) of the best set that this machine has, F being
// its vector of floats. With VAE_FAST_X86_64_LEVEL (1, 3 or 4 of the x86-64 psABI) the floats' loops
// are compiled for that set alone, in half the time: a library for machines that have it, as
// vae_fast/_build.py tells them.

#include "cpu.h"

#if !defined(__x86_64__)
#define VAE_FAST_SELECT(FN, ...) return base::FN<f32x4>(__VA_ARGS__);
#elif !defined(VAE_FAST_X86_64_LEVEL)
#define VAE_FAST_AVX512
#define VAE_FAST_AVX2
#define VAE_FAST_SELECT(FN, ...)                                     \
  if (kIsa == Isa::avx512) return avx512::FN<f32x16>(__VA_ARGS__); \
  if (kIsa == Isa::avx2) return avx2::FN<f32x8>(__VA_ARGS__);      \
  return base::FN<f32x4>(__VA_ARGS__);
#elif VAE_FAST_X86_64_LEVEL == 4
#define VAE_FAST_AVX512
#define VAE_FAST_SELECT(FN, ...) return avx512::FN<f32x16>(__VA_ARGS__);
#elif VAE_FAST_X86_64_LEVEL == 3
#define VAE_FAST_AVX2
#define VAE_FAST_SELECT(FN, ...) return avx2::FN<f32x8>(__VA_ARGS__);
#elif VAE_FAST_X86_64_LEVEL == 1
#define VAE_FAST_SELECT(FN, ...) return base::FN<f32x4>(__VA_ARGS__);
#else
#error "VAE_FAST_X86_64_LEVEL must be 1, 3 or 4"
#endif

namespace vae_fast {
#if defined(VAE_FAST_AVX512)
#if defined(__clang__)  // it does not know the preference, has it anyhow, and would drop all of this
#define VAE_FAST_TARGET __attribute__((target("arch=x86-64-v4")))
#else
#define VAE_FAST_TARGET __attribute__((target("arch=x86-64-v4,prefer-vector-width=512")))
#endif
namespace avx512 {
#include VAE_FAST_KERNELS
}  // namespace avx512
#undef VAE_FAST_TARGET
#endif
#if defined(VAE_FAST_AVX2)
#define VAE_FAST_TARGET __attribute__((target("arch=x86-64-v3")))
namespace avx2 {
#include VAE_FAST_KERNELS
}  // namespace avx2
#undef VAE_FAST_TARGET
#endif
#define VAE_FAST_TARGET
namespace base {  // SSE2 on x86-64, NEON on AArch64; all of fp64
#include VAE_FAST_KERNELS
}  // namespace base
#undef VAE_FAST_TARGET
}  // namespace vae_fast
