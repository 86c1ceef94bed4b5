// KL(q‖p) of diagonal Gaussians, and the importance weights of K samples.
//
// Included once per instruction set (each_isa.h).

// Adds Σ ½(e^t − 1 − t) + ½d² to kl, with t = 2·log(σ_q/σ_p) and d = (μ_q − μ_p)/σ_p.
template <class F>
VAE_FAST_TARGET void kl_tile(int64_t n, const ScalarOf<F>* mu, const ScalarOf<F>* log_scale,
                             const ScalarOf<F>* prior_mu, const ScalarOf<F>* prior_log_scale,
                             ScalarOf<F>* kl) {
  using T = ScalarOf<F>;
  F sum{};
  for_lanes<F>(n, [&](auto at) VAE_FAST_LAMBDA {
    const F log_p = at.load(prior_log_scale);
    const ExpMinusOne<F> ratio((at.load(log_scale) - log_p) * T(2));
    const F d = exp_of(-log_p).times(at.load(mu) - at.load(prior_mu));
    sum += at.keep((ratio.minus_t + d * d) * T(0.5));
  });
  *kl += sum_lanes(sum);
}

// ∂μ_q = d/σ_p, which is −∂μ_p, ∂(log σ_q) = e^t − 1 and ∂(log σ_p) = −(e^t − 1) − d², all times the
// row's weight.
template <class F>
VAE_FAST_TARGET void kl_gradient_tile(int64_t n, ScalarOf<F> weight, const ScalarOf<F>* mu,
                                      const ScalarOf<F>* log_scale, const ScalarOf<F>* prior_mu,
                                      const ScalarOf<F>* prior_log_scale, ScalarOf<F>* g_mu,
                                      ScalarOf<F>* g_log_scale, ScalarOf<F>* g_prior_log_scale) {
  using T = ScalarOf<F>;
  for_lanes<F>(n, [&](auto at) VAE_FAST_LAMBDA {
    const F log_p = at.load(prior_log_scale);
    const ExpMinusOne<F> ratio((at.load(log_scale) - log_p) * T(2));
    const auto inverse = exp_of(-log_p);
    const F d = inverse.times(at.load(mu) - at.load(prior_mu));
    at.store(g_mu, inverse.times(d) * weight);
    at.store(g_log_scale, ratio.value * weight);
    at.store(g_prior_log_scale, (ratio.value + d * d) * -weight);
  });
}

template <class F>
KlKernels<ScalarOf<F>> kl_kernels() {
  return {kl_tile<F>, kl_gradient_tile<F>};
}

// weights[k·pitch + i] holds log w on entry and softmax_k of it afterwards; bound = −log mean_k w.
template <class F>
VAE_FAST_TARGET void importance_tile(int64_t samples, int64_t n, int64_t pitch,
                                     ScalarOf<F>* weights, ScalarOf<F>* bound) {
  using T = ScalarOf<F>;
  for_lanes<F>(n, [&](auto at) VAE_FAST_LAMBDA {
    F largest = at.load(weights);
    for (int64_t k = 1; k < samples; ++k) {
      const F v = at.load(weights + k * pitch);
      largest = select(v > largest, v, largest);
    }
    // An infinite one cannot be taken off.
    largest = select(absolute(largest) < T(INFINITY), largest, F{});
    F sum{};
    for (int64_t k = 0; k < samples; ++k) {
      const F w = exp_any(at.load(weights + k * pitch) - largest);
      at.store(weights + k * pitch, w);
      sum += w;
    }
    for (int64_t k = 0; k < samples; ++k) {
      at.store(weights + k * pitch, at.load(weights + k * pitch) / sum);
    }
    at.store(bound, -largest - log_any(sum / static_cast<T>(samples)));
  });
}

template <class F>
ImportanceKernel<ScalarOf<F>> importance_kernel() {
  return importance_tile<F>;
}
