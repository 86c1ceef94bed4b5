// The instruction set that the passes run in, and what they share of it.
//
// Each pass's loops are compiled for every instruction set (each_isa.h), and the best one is chosen
// when the library is loaded.

#include "cpu.h"

#include "passes.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace vae_fast {
namespace {

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("bmi2");
#if defined(VAE_FAST_GCC_X86)  // fp16 is converted by it there; Clang 13 does not know the name
  avx2 = avx2 && __builtin_cpu_supports("f16c");
#endif
  if (avx2) return Isa::avx2;
#endif
  return Isa::base;
}

}  // namespace

const Isa kIsa = best_isa();

}  // namespace vae_fast

#define VAE_FAST_KERNELS "tile.h"
#include "each_isa.h"

namespace vae_fast {

template <>
TileKernels<float> tile_kernels(Param param) {
  VAE_FAST_SELECT(tile_kernels, param)
}
template <>
TileKernels<double> tile_kernels(Param param) {
  return base::tile_kernels<double>(param);
}

namespace {
StorageKernels storage_kernels() { VAE_FAST_SELECT(storage_kernels) }
}  // namespace
const StorageKernels kStorage = storage_kernels();

void advise_huge_pages(const View& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t(1) << 21;
  const uintptr_t bytes = t.numel() * element_size(t.type), data = reinterpret_cast<uintptr_t>(t.data);
  if (bytes < 2 * kHuge) return;
  const uintptr_t begin = (data + kHuge - 1) & ~(kHuge - 1), end = (data + bytes) & ~(kHuge - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)t;
#endif
}

}  // namespace vae_fast

const vae_fast::Passes* vae_fast_passes() {
  static const vae_fast::Passes passes = {
      vae_fast::is_straight,         vae_fast::latent_forward,
      vae_fast::latent_backward,     vae_fast::likelihood_forward,
      vae_fast::likelihood_backward, vae_fast::likelihood_forward_grad,
      vae_fast::likelihood_rescale,  vae_fast::gaussian_kl_forward,
      vae_fast::gaussian_kl_backward, vae_fast::advise_huge_pages};
  return &passes;
}
