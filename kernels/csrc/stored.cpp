// The likelihood's loops on tensors in storage of other types, which they read and write as it is: in a
// file of its own, which is compiled beside the others.

#define VAE_FAST_KERNELS "likelihood.h"
#include "each_isa.h"

namespace vae_fast {

#define VAE_FAST_STORED(S, X)                                                                       \
  template <>                                                                                       \
  LikelihoodKernel<float, S, X> gaussian_kernel(Stored<S, X> as, Param param,                       \
                                                LikelihoodVariant variant) {                        \
    VAE_FAST_SELECT(gaussian_kernel, as, param, variant)                                            \
  }
VAE_FAST_STORED(Bf16, Bf16)
VAE_FAST_STORED(Bf16, float)
VAE_FAST_STORED(Bf16, uint8_t)
VAE_FAST_STORED(float, uint8_t)
#undef VAE_FAST_STORED

}  // namespace vae_fast
