// The ops of vae_fast/ops.py for the CPU: outputs are allocated here and written by the passes.
//
// Written against LibTorch's stable ABI, so one binary serves every torch ≥ 2.10.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "passes.h"

namespace vae_fast {
namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

View view(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  return {true, const_cast<void*>(t.const_data_ptr()), t.scalar_type(),
          static_cast<int64_t>(sizes.size()), sizes.data(), strides.data()};
}
View view(const OptionalTensor& t) { return t ? view(*t) : View{}; }

ScalarType accumulation_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Of a tensor that is written, whose memory others may share until then (copy on write).
View written(const Tensor& t) {
  t.mutable_data_ptr();
  return view(t);
}
View written(const OptionalTensor& t) { return t ? written(*t) : View{}; }

// ---- what the passes rely on -----------------------------------------------------------------
//
// The functions of the package check far more, and name the argument; these are for those who call
// the ops themselves, or load a program that does.

void check(bool fits, const char* what) { STD_TORCH_CHECK(fits, "vae_fast: ", what); }

bool same_sizes(const Tensor& a, const Tensor& b) {
  const auto left = a.sizes(), right = b.sizes();
  return std::equal(left.begin(), left.end(), right.begin(), right.end());
}

void check_key(const Tensor& key) {
  check(key.scalar_type() == ScalarType::UInt64 && key.dim() == 1 && key.size(0) == 2,
        "key must be two uint64");
}

void check_latent(const Tensor& mu, const Tensor& scale, const Tensor& key) {
  check(mu.dim() > 0, "mu must have a batch dimension");
  check(scale.dim() == 0 || same_sizes(scale, mu), "scale must be 0-dim or of mu's shape");
  check_key(key);
}

// A value a row, in the type that the passes compute with; an empty tensor stands for none.
void check_rows(const OptionalTensor& t, int64_t rows, ScalarType type) {
  if (!t || t->numel() == 0) return;
  check(t->numel() == rows && t->scalar_type() == type, "a tensor must have a value a row");
}

void check_likelihood(const Tensor& x, const Tensor& mean, const OptionalTensor& scale,
                      const OptionalTensor& mask, const OptionalTensor& key) {
  const int64_t dim = mean.dim();
  check(dim > 0 && x.dim() == dim, "mean must have as many dimensions as x");
  check(x.size(0) == 0 ? mean.size(0) == 0 : mean.size(0) % x.size(0) == 0,
        "mean must have K rows for each one of x");
  for (int64_t d = 1; d < dim; ++d) {
    const bool packed = d == 1 && !scale && mean.size(d) == 2 * x.size(d);
    check(packed || mean.size(d) == x.size(d), "mean must be of x's event");
  }
  if (scale && scale->dim() > 0) {
    bool full = scale->dim() == dim, row = full && scale->size(0) == mean.size(0);
    bool event = full && scale->size(0) == 1;
    for (int64_t d = 0; full && d < dim; ++d) full = scale->size(d) == mean.size(d);
    for (int64_t d = 1; row && d < dim; ++d) row = scale->size(d) == 1;
    for (int64_t d = 1; event && d < dim; ++d) event = scale->size(d) == mean.size(d);
    check(full || row || event, "scale must be 0-dim, of mean's shape, (N, 1, ...) or (1, *event)");
  }
  if (mask) {
    check(mask->scalar_type() == ScalarType::Bool && same_sizes(*mask, x),
          "mask must be bool, of x's shape");
  }
  if (key) check_key(*key);
}

void check_kl(const Tensor& mu, const Tensor& scale, const OptionalTensor& prior_mu,
              const OptionalTensor& prior_scale) {
  check(mu.dim() > 0, "mu must have a batch dimension");
  check(same_sizes(scale, mu) && (!prior_mu || same_sizes(*prior_mu, mu)) &&
            (!prior_scale || same_sizes(*prior_scale, mu)),
        "scale and the prior's tensors must have mu's shape");
}

// ---- outputs ---------------------------------------------------------------------------------

Tensor empty(const Sizes& sizes, ScalarType type) {
  Sizes strides(sizes);
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  Tensor out(handle);
  advise_huge_pages(view(out));
  return out;
}

// Stands for an output that is not wanted.
Tensor none(ScalarType type) { return empty({0}, type); }

// torch.empty_like: a gradient in its tensor's memory order.
Tensor gradient_like(const Tensor& t) {
  Tensor out = torch::stable::empty_like(t);
  advise_huge_pages(view(out));
  return out;
}

Tensor straight(const Tensor& t, int64_t event_from = 1) {
  return is_straight(view(t), event_from) ? t : torch::stable::contiguous(t);
}

Tensor loss_for(const Tensor& x, const Tensor& nll, Reduction reduction) {
  if (reduction == Reduction::no_loss) return none(nll.scalar_type());
  return empty(reduction == Reduction::none ? Sizes{x.size(0)} : Sizes{}, nll.scalar_type());
}

bool is_scalar(const OptionalTensor& scale) { return scale && scale->dim() == 0; }

// ---- the ops ---------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> latent_forward_op(Tensor mu, Tensor scale, Tensor key,
                                                     int64_t num_samples, int64_t first_row,
                                                     int64_t param, double lo, double hi,
                                                     bool soft, bool path) {
  check_latent(mu, scale, key);
  const auto sizes = mu.sizes();
  Sizes shape(sizes.begin(), sizes.end()), rows{mu.size(0)};
  if (num_samples > 0) {
    shape.insert(shape.begin(), num_samples);
    rows.insert(rows.begin(), num_samples);
  }
  const Tensor z = empty(shape, mu.scalar_type());
  const Tensor log_q = empty(rows, accumulation_type(mu)), log_p = empty(rows, accumulation_type(mu));
  mu = straight(mu);
  scale = straight(scale);
  latent_forward(view(mu), view(scale), view(key),
                 {num_samples, first_row, param, lo, hi, soft, path}, view(z), view(log_q),
                 view(log_p));
  return {z, log_q, log_p};
}

std::tuple<Tensor, Tensor> latent_backward_op(OptionalTensor g_z, OptionalTensor g_log_q,
                                              OptionalTensor g_log_p, Tensor mu, Tensor scale,
                                              Tensor key, int64_t num_samples, int64_t first_row,
                                              int64_t param, double lo, double hi, bool soft,
                                              bool path) {
  check_latent(mu, scale, key);
  const int64_t samples = std::max<int64_t>(num_samples, 1), rows = samples * mu.size(0);
  if (g_z) check(g_z->numel() == samples * mu.numel(), "g_z must be of z's shape");
  check_rows(g_log_q, rows, accumulation_type(mu));
  check_rows(g_log_p, rows, accumulation_type(mu));
  const auto sizes = mu.sizes();
  const Sizes shape(sizes.begin(), sizes.end());
  const Tensor g_mu = empty(shape, mu.scalar_type());
  const Tensor g_scale = empty(scale.dim() == 0 ? Sizes{} : shape, scale.scalar_type());
  mu = straight(mu);
  scale = straight(scale);
  if (g_z) g_z = straight(*g_z, num_samples > 0 ? 2 : 1);
  latent_backward(view(g_z), view(g_log_q), view(g_log_p), view(mu), view(scale), view(key),
                  {num_samples, first_row, param, lo, hi, soft, path}, view(g_mu), view(g_scale));
  return {g_mu, g_scale};
}

std::tuple<Tensor, Tensor> likelihood_forward_op(
    Tensor x, Tensor mean, OptionalTensor scale, OptionalTensor mask, OptionalTensor log_q,
    OptionalTensor log_p, double beta, int64_t reduction, int64_t likelihood, int64_t param,
    double lo, double hi, bool soft, double df, double x_mul, double x_add, OptionalTensor key,
    int64_t first_row) {
  check_likelihood(x, mean, scale, mask, key);
  check_rows(log_q, mean.size(0), accumulation_type(mean));
  check_rows(log_p, mean.size(0), accumulation_type(mean));
  const LikelihoodOptions options{beta, static_cast<Reduction>(reduction), likelihood, param, lo,
                                  hi,   soft, df, x_mul, x_add, view(key), first_row};
  const Tensor nll = empty({mean.size(0)}, accumulation_type(mean));
  const Tensor loss = loss_for(x, nll, options.reduction);
  likelihood_forward(view(x), view(mean), view(scale), view(mask), view(log_q), view(log_p),
                     options, view(nll),
                     options.reduction == Reduction::no_loss ? View{} : view(loss));
  return {nll, loss};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> likelihood_backward_op(
    OptionalTensor g_nll, OptionalTensor g_loss, Tensor x, Tensor mean, OptionalTensor scale,
    OptionalTensor mask, double beta, int64_t reduction, int64_t likelihood, int64_t param,
    double lo, double hi, bool soft, double df, double x_mul, double x_add, OptionalTensor key,
    int64_t first_row, bool need_x, bool need_mean, bool need_scale) {
  check_likelihood(x, mean, scale, mask, key);
  check_rows(g_nll, mean.size(0), accumulation_type(mean));
  if (g_loss && g_loss->numel() != 1) check_rows(g_loss, x.size(0), accumulation_type(mean));
  const LikelihoodOptions options{beta, static_cast<Reduction>(reduction), likelihood, param, lo,
                                  hi,   soft, df, x_mul, x_add, view(key), first_row};
  const auto gradient = [](bool need, const Tensor& t) {
    return need ? gradient_like(t) : none(t.scalar_type());
  };
  need_scale = need_scale && scale;
  const Tensor g_x = gradient(need_x, x), g_mean = gradient(need_mean, mean);
  const Tensor g_scale = gradient(need_scale, scale ? *scale : mean);
  const Tensor g_log_q = empty({mean.size(0)}, accumulation_type(mean));
  const Tensor g_log_p = empty({mean.size(0)}, accumulation_type(mean));
  likelihood_backward(view(g_nll), view(g_loss), view(x), view(mean), view(scale), view(mask),
                      options, need_x ? view(g_x) : View{}, need_mean ? view(g_mean) : View{},
                      need_scale ? view(g_scale) : View{}, view(g_log_q), view(g_log_p));
  return {g_x, g_mean, g_scale, g_log_q, g_log_p};
}

std::tuple<Tensor, Tensor, Tensor> likelihood_forward_grad_op(
    Tensor x, Tensor mean, OptionalTensor scale, OptionalTensor mask, OptionalTensor log_q,
    OptionalTensor log_p, double beta, int64_t reduction, int64_t likelihood, int64_t param,
    double lo, double hi, bool soft, double df, double x_mul, double x_add, OptionalTensor key,
    int64_t first_row, Tensor g_mean, OptionalTensor g_scale) {
  check_likelihood(x, mean, scale, mask, key);
  check_rows(log_q, mean.size(0), accumulation_type(mean));
  check_rows(log_p, mean.size(0), accumulation_type(mean));
  check(same_sizes(g_mean, mean) && (!g_scale || (scale && same_sizes(*g_scale, *scale))),
        "gradients must have their tensors' shapes");
  const LikelihoodOptions options{beta, static_cast<Reduction>(reduction), likelihood, param, lo,
                                  hi,   soft, df, x_mul, x_add, view(key), first_row};
  const Tensor nll = empty({mean.size(0)}, accumulation_type(mean));
  const Tensor loss = loss_for(x, nll, options.reduction);
  const Tensor g_shared =
      is_scalar(scale) ? empty({mean.size(0)}, nll.scalar_type()) : none(nll.scalar_type());
  likelihood_forward_grad(view(x), view(mean), view(scale), view(mask), view(log_q), view(log_p),
                          options, written(g_mean), written(g_scale), view(nll),
                          options.reduction == Reduction::no_loss ? View{} : view(loss),
                          is_scalar(scale) ? view(g_shared) : View{});
  return {nll, loss, g_shared};
}

std::tuple<Tensor, Tensor, Tensor> likelihood_rescale_op(Tensor g_mean, OptionalTensor g_scale,
                                                         OptionalTensor g_shared,
                                                         OptionalTensor g_nll,
                                                         OptionalTensor g_loss, double beta,
                                                         int64_t reduction, int64_t samples,
                                                         int64_t batch) {
  const ScalarType type = accumulation_type(g_mean);
  const int64_t rows = samples * batch;
  check(g_mean.size(0) == rows && (!g_scale || g_scale->size(0) == rows),
        "gradients must have K·B rows");
  check_rows(g_shared, rows, type);
  check_rows(g_nll, rows, type);
  const Tensor g_log_q = empty({rows}, type), g_log_p = empty({rows}, type);
  const Tensor g_scalar = g_shared ? empty({}, type) : none(type);
  likelihood_rescale(written(g_mean), written(g_scale), view(g_shared), view(g_nll), view(g_loss),
                     beta, static_cast<Reduction>(reduction), samples, batch, view(g_log_q),
                     view(g_log_p), g_shared ? view(g_scalar) : View{});
  return {g_log_q, g_log_p, g_scalar};
}

Tensor gaussian_kl_forward_op(Tensor mu, Tensor scale, OptionalTensor prior_mu,
                              OptionalTensor prior_scale, int64_t param, int64_t prior_param,
                              double lo, double hi, bool soft) {
  check_kl(mu, scale, prior_mu, prior_scale);
  const Tensor kl = empty({mu.size(0)}, accumulation_type(mu));
  gaussian_kl_forward(view(mu), view(scale), view(prior_mu), view(prior_scale),
                      {param, prior_param, lo, hi, soft}, view(kl));
  return kl;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gaussian_kl_backward_op(
    Tensor g_kl, Tensor mu, Tensor scale, OptionalTensor prior_mu, OptionalTensor prior_scale,
    int64_t param, int64_t prior_param, double lo, double hi, bool soft) {
  check_kl(mu, scale, prior_mu, prior_scale);
  check_rows(g_kl, mu.size(0), accumulation_type(mu));
  const auto optional = [&](const OptionalTensor& t) {
    return t ? gradient_like(*t) : none(mu.scalar_type());
  };
  const Tensor g_mu = gradient_like(mu), g_scale = gradient_like(scale);
  const Tensor g_prior_mu = optional(prior_mu), g_prior_scale = optional(prior_scale);
  gaussian_kl_backward(view(g_kl), view(mu), view(scale), view(prior_mu), view(prior_scale),
                       {param, prior_param, lo, hi, soft}, view(g_mu), view(g_scale),
                       prior_mu ? view(g_prior_mu) : View{},
                       prior_scale ? view(g_prior_scale) : View{});
  return {g_mu, g_scale, g_prior_mu, g_prior_scale};
}

std::tuple<Tensor, Tensor> importance_forward_op(Tensor nll, Tensor log_q, OptionalTensor log_p,
                                                 double beta) {
  check(log_q.dim() == 2 && nll.numel() == log_q.numel() &&
            (!log_p || log_p->numel() == log_q.numel()),
        "nll, log_q and log_p must have a value for each of K samples of B rows");
  const Tensor bound = empty({log_q.size(1)}, nll.scalar_type());
  const Tensor weights = empty({log_q.size(0), log_q.size(1)}, nll.scalar_type());
  importance_forward(view(nll), view(log_q), view(log_p), beta, view(bound), view(weights));
  return {bound, weights};
}

}  // namespace
}  // namespace vae_fast

STABLE_TORCH_LIBRARY_IMPL(vae_fast, CPU, m) {
  m.impl("latent_forward", TORCH_BOX(&vae_fast::latent_forward_op));
  m.impl("latent_backward", TORCH_BOX(&vae_fast::latent_backward_op));
  m.impl("likelihood_forward", TORCH_BOX(&vae_fast::likelihood_forward_op));
  m.impl("likelihood_backward", TORCH_BOX(&vae_fast::likelihood_backward_op));
  m.impl("likelihood_forward_grad_", TORCH_BOX(&vae_fast::likelihood_forward_grad_op));
  m.impl("likelihood_rescale_", TORCH_BOX(&vae_fast::likelihood_rescale_op));
  m.impl("gaussian_kl_forward", TORCH_BOX(&vae_fast::gaussian_kl_forward_op));
  m.impl("gaussian_kl_backward", TORCH_BOX(&vae_fast::gaussian_kl_backward_op));
  m.impl("importance_forward", TORCH_BOX(&vae_fast::importance_forward_op));
}
