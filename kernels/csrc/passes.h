// The passes on the CPU, over views of memory that the caller owns.
//
// What they compute stands in vae_fast/reference.py; what their arguments mean, in vae_fast/ops.py.
// Absent views stand for what is not given or not wanted.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

namespace vae_fast {

using torch::headeronly::ScalarType;

// A tensor's memory. Sizes and strides, in elements, are the owner's and outlive the view.
struct View {
  bool present = false;
  void* data = nullptr;  // may be null for an empty tensor
  ScalarType type = ScalarType::Float;
  int64_t dim = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;

  explicit operator bool() const { return present; }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t d = 0; d < dim; ++d) n *= sizes[d];
    return n;
  }
};

inline int64_t element_size(ScalarType type) {
  if (type == ScalarType::Bool || type == ScalarType::Byte) return 1;
  if (type == ScalarType::Double || type == ScalarType::UInt64) return 8;
  return type == ScalarType::Float ? 4 : 2;
}

struct LatentOptions {
  int64_t num_samples, first_row, param;
  double lo, hi;
  int64_t soft, path;  // flags; as wide as the rest, lest there be padding to compare
};

// The order is the op schema's integer code; vae_fast/ops.py holds the same list.
enum class Reduction : int64_t { mean, sum, none, no_loss };

struct LikelihoodOptions {
  double beta;
  Reduction reduction;
  int64_t likelihood, param;
  double lo, hi;
  bool soft;
  double df, x_mul, x_add;
  View key;  // of the dequantization, if x is to be dequantized
  int64_t first_row;
};

struct KlOptions {
  int64_t param, prior_param;
  double lo, hi;
  int64_t soft;  // a flag, as wide as the rest
};

// Whether the latent pass can read a tensor in place: its elements lie along one stride per row. The
// dimensions before `event_from` are samples and rows.
bool is_straight(const View& t, int64_t event_from = 1);

// Outputs z, log_q, log_p, g_mu and g_scale are contiguous.
void latent_forward(const View& mu, const View& scale, const View& key, const LatentOptions& options,
                    const View& z, const View& log_q, const View& log_p);
void latent_backward(const View& g_z, const View& g_log_q, const View& g_log_p, const View& mu,
                     const View& scale, const View& key, const LatentOptions& options,
                     const View& g_mu, const View& g_scale);

// nll, loss, g_log_q, g_log_p and g_shared are contiguous, one value a row. Without `loss` none is
// computed.
void likelihood_forward(const View& x, const View& mean, const View& scale, const View& mask,
                        const View& log_q, const View& log_p, const LikelihoodOptions& options,
                        const View& nll, const View& loss);
void likelihood_backward(const View& g_nll, const View& g_loss, const View& x, const View& mean,
                         const View& scale, const View& mask, const LikelihoodOptions& options,
                         const View& g_x, const View& g_mean, const View& g_scale,
                         const View& g_log_q, const View& g_log_p);
void likelihood_forward_grad(const View& x, const View& mean, const View& scale, const View& mask,
                             const View& log_q, const View& log_p,
                             const LikelihoodOptions& options, const View& g_mean,
                             const View& g_scale, const View& nll, const View& loss,
                             const View& g_shared);
void likelihood_rescale(const View& g_mean, const View& g_scale, const View& g_shared,
                        const View& g_nll, const View& g_loss, double beta, Reduction reduction,
                        int64_t samples, int64_t batch, const View& g_log_q, const View& g_log_p,
                        const View& g_scalar);

// kl is contiguous. The prior's tensors are absent for N(0, 1).
void gaussian_kl_forward(const View& mu, const View& scale, const View& prior_mu,
                         const View& prior_scale, const KlOptions& options, const View& kl);
void gaussian_kl_backward(const View& g_kl, const View& mu, const View& scale, const View& prior_mu,
                          const View& prior_scale, const KlOptions& options, const View& g_mu,
                          const View& g_scale, const View& g_prior_mu, const View& g_prior_scale);
void importance_forward(const View& nll, const View& log_q, const View& log_p, double beta,
                        const View& bound, const View& weights);

// Asks for huge pages behind an output of several megabytes: fresh memory of the data's size costs
// more in page faults than the pass that fills it, and huge pages fault 512 times less often.
void advise_huge_pages(const View& t);

// What eager.cpp, a library of its own, calls of the above.
struct Passes {
  decltype(&vae_fast::is_straight) is_straight;
  decltype(&vae_fast::latent_forward) latent_forward;
  decltype(&vae_fast::latent_backward) latent_backward;
  decltype(&vae_fast::likelihood_forward) likelihood_forward;
  decltype(&vae_fast::likelihood_backward) likelihood_backward;
  decltype(&vae_fast::likelihood_forward_grad) likelihood_forward_grad;
  decltype(&vae_fast::likelihood_rescale) likelihood_rescale;
  decltype(&vae_fast::gaussian_kl_forward) gaussian_kl_forward;
  decltype(&vae_fast::gaussian_kl_backward) gaussian_kl_backward;
  decltype(&vae_fast::advise_huge_pages) advise_huge_pages;
};

}  // namespace vae_fast

extern "C" __attribute__((visibility("default"))) const vae_fast::Passes* vae_fast_passes();
