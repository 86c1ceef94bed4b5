// KL(q‖p) and the importance-weighted bound of passes.h: the loops of objective.h over tiles.

#define VAE_FAST_KERNELS "objective.h"
#include "each_isa.h"
#include "operand.h"
#include "parallel.h"
#include "passes.h"

#include <vector>

namespace vae_fast {
namespace {

template <class T>
KlKernels<T> kl_kernels();
template <>
KlKernels<double> kl_kernels() {
  return base::kl_kernels<double>();
}
template <>
KlKernels<float> kl_kernels() {
  VAE_FAST_SELECT(kl_kernels)
}

template <class T>
ImportanceKernel<T> importance_kernel();
template <>
ImportanceKernel<double> importance_kernel() {
  return base::importance_kernel<double>();
}
template <>
ImportanceKernel<float> importance_kernel() {
  VAE_FAST_SELECT(importance_kernel)
}

// q and p by rows, tile by tile, with both scales as log σ. Without a prior, p = N(0, 1).
template <class T>
struct Kl {
  Operand mu, scale, prior_mu, prior_scale, g_mu, g_scale, g_prior_mu, g_prior_scale;
  Event event;
  int64_t rows, size;
  Clamp clamp;
  TileKernels<T> posterior, prior;
  KlKernels<T> kernels = kl_kernels<T>();

  Kl(const View& mu_, const View& scale_, const View& prior_mu_, const View& prior_scale_,
     const KlOptions& options)
      : mu(operand(mu_)),
        scale(operand(scale_)),
        event(event_of(mu_)),
        rows(mu_.sizes[0]),
        size(event.numel()),
        clamp{options.lo, options.hi, options.soft},
        posterior(tile_kernels<T>(static_cast<Param>(options.param))),
        prior(tile_kernels<T>(static_cast<Param>(options.prior_param))) {
    if (prior_mu_) prior_mu = operand(prior_mu_);
    if (prior_scale_) prior_scale = operand(prior_scale_);
  }

  void fuse() {
    event.fuse<8>({&mu, &scale, &prior_mu, &prior_scale, &g_mu, &g_scale, &g_prior_mu,
                   &g_prior_scale},
                  /*reorder=*/true);
  }

  // The operands of n elements of a row, and the derivatives of the two log σ by the raw scales.
  struct Tile {
    alignas(64) T mu_buffer[kTile], log_scale[kTile], slope[kTile];
    alignas(64) T prior_mu_buffer[kTile], prior_log_scale[kTile], prior_slope[kTile];
    const T *mu, *prior_mu;
  };

  template <class Fn>
  void for_rows(const Fn& fn) const {
    parallel_parts(rows, size, [&](const auto& parts) {
      Tile tile;
      std::fill(tile.prior_mu_buffer, tile.prior_mu_buffer + kTile, T(0));
      std::fill(tile.prior_log_scale, tile.prior_log_scale + kTile, T(0));
      tile.prior_mu = tile.prior_mu_buffer;
      parts([&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
          for (int64_t begin = 0; begin < size; begin += kTile) {
            const int64_t n = std::min(size - begin, kTile);
            load(tile, row, begin, n);
            fn(tile, row, begin, n);
          }
        }
      });
    });
  }

 private:
  void load(Tile& tile, int64_t row, int64_t begin, int64_t n) const {
    tile.mu = event.load(mu, row, begin, n, tile.mu_buffer);
    const T* const raw = event.load(scale, row, begin, n, tile.log_scale);
    posterior.prepare_scale(n, clamp, true, raw, tile.log_scale, tile.slope);
    if (!prior_mu) return;
    constexpr Clamp kUnclamped{-INFINITY, INFINITY, false};
    tile.prior_mu = event.load(prior_mu, row, begin, n, tile.prior_mu_buffer);
    const T* const prior_raw = event.load(prior_scale, row, begin, n, tile.prior_log_scale);
    prior.prepare_scale(n, kUnclamped, true, prior_raw, tile.prior_log_scale, tile.prior_slope);
  }
};

template <class T>
void kl_forward_as(const View& mu, const View& scale, const View& prior_mu, const View& prior_scale,
                   const KlOptions& options, const View& kl) {
  Kl<T> pass(mu, scale, prior_mu, prior_scale, options);
  pass.fuse();
  T* const out = data_of<T>(kl);
  std::fill(out, out + pass.rows, T(0));
  pass.for_rows([&](const typename Kl<T>::Tile& tile, int64_t row, int64_t, int64_t n) {
    pass.kernels.forward(n, tile.mu, tile.log_scale, tile.prior_mu, tile.prior_log_scale,
                         out + row);
  });
}

template <class T>
void kl_backward_as(const View& g_kl, const View& mu, const View& scale, const View& prior_mu,
                    const View& prior_scale, const KlOptions& options, const View& g_mu,
                    const View& g_scale, const View& g_prior_mu, const View& g_prior_scale) {
  Kl<T> pass(mu, scale, prior_mu, prior_scale, options);
  pass.g_mu = operand(g_mu);
  pass.g_scale = operand(g_scale);
  if (prior_mu) {
    pass.g_prior_mu = operand(g_prior_mu);
    pass.g_prior_scale = operand(g_prior_scale);
  }
  pass.fuse();
  const RowValues<T> weight(g_kl, pass.rows);
  pass.for_rows([&](const typename Kl<T>::Tile& tile, int64_t row, int64_t begin, int64_t n) {
    alignas(64) T mu_tile[kTile], scale_tile[kTile], prior_tile[kTile];
    pass.kernels.backward(n, weight[row], tile.mu, tile.log_scale, tile.prior_mu,
                          tile.prior_log_scale, mu_tile, scale_tile, prior_tile);
    const auto store = [&](const Operand& to, const T* from) {
      pass.event.store(to, row, begin, n, from);
    };
    store(pass.g_mu, mu_tile);
    scale_by(tile.slope, n, scale_tile);
    store(pass.g_scale, scale_tile);
    if (!prior_mu) return;
    for (int64_t i = 0; i < n; ++i) mu_tile[i] = -mu_tile[i];
    store(pass.g_prior_mu, mu_tile);
    scale_by(tile.prior_slope, n, prior_tile);
    store(pass.g_prior_scale, prior_tile);
  });
}

template <class T>
void importance_as(const View& nll, const View& log_q, const View& log_p, double beta,
                   const View& bound, const View& weights) {
  const int64_t samples = weights.sizes[0], batch = weights.sizes[1];
  const RowValues<T> t(nll, batch), q(log_q, batch), p(log_p, batch);
  const T b = static_cast<T>(beta);
  T* const w = data_of<T>(weights);
  const ImportanceKernel<T> kernel = importance_kernel<T>();
  const int64_t grain = std::max<int64_t>(64, kGrain / std::max<int64_t>(samples, 1));
  torch::stable::parallel_for(0, batch, grain, [&](int64_t first, int64_t last) {
    for (int64_t k = 0; k < samples; ++k) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t n = k * batch + i;
        w[n] = -(t[n] + b * (q[n] - p[n]));
      }
    }
    kernel(samples, last - first, batch, w + first, data_of<T>(bound) + first);
  });
}

}  // namespace

void gaussian_kl_forward(const View& mu, const View& scale, const View& prior_mu,
                         const View& prior_scale, const KlOptions& options, const View& kl) {
  const auto run = is_double(mu) ? kl_forward_as<double> : kl_forward_as<float>;
  run(mu, scale, prior_mu, prior_scale, options, kl);
}

void gaussian_kl_backward(const View& g_kl, const View& mu, const View& scale, const View& prior_mu,
                          const View& prior_scale, const KlOptions& options, const View& g_mu,
                          const View& g_scale, const View& g_prior_mu, const View& g_prior_scale) {
  const auto run = is_double(mu) ? kl_backward_as<double> : kl_backward_as<float>;
  run(g_kl, mu, scale, prior_mu, prior_scale, options, g_mu, g_scale, g_prior_mu, g_prior_scale);
}

void importance_forward(const View& nll, const View& log_q, const View& log_p, double beta,
                        const View& bound, const View& weights) {
  const auto run = is_double(nll) ? importance_as<double> : importance_as<float>;
  run(nll, log_q, log_p, beta, bound, weights);
}

}  // namespace vae_fast
