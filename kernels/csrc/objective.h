// KL(q‖p) of diagonal Gaussians, and the importance weights of K samples.
//
// Included once per instruction set (each_isa.h).

// What q is to p, which is N(0, 1) unless kPrior: t = 2·log(σ_q/σ_p), d = (μ_q − μ_p)/σ_p and d/σ_p.
template <class F, bool kPrior>
struct Ratio {
  using T = ScalarOf<F>;
  F t, d, slope;
  template <class At>
  VAE_FAST_INLINE Ratio(const At& at, const T* mu, const T* log_scale, const T* prior_mu,
                        const T* prior_log_scale) {
    if constexpr (kPrior) {
      const F log_p = at.load(prior_log_scale);
      const auto inverse = exp_of(-log_p);
      t = (at.load(log_scale) - log_p) * T(2);
      d = inverse.times(at.load(mu) - at.load(prior_mu));
      slope = inverse.times(d);
    } else {
      t = at.load(log_scale) * T(2);
      d = slope = at.load(mu);
    }
  }
};

// ½(e^t − 1 − t) + ½d².
template <class F, bool kPrior>
VAE_FAST_TARGET void kl_terms(int64_t n, const ScalarOf<F>* mu, const ScalarOf<F>* log_scale,
                              const ScalarOf<F>* prior_mu, const ScalarOf<F>* prior_log_scale,
                              ScalarOf<F>* terms) {
  for_lanes<F>(n, [&](auto at) VAE_FAST_LAMBDA {
    const Ratio<F, kPrior> q(at, mu, log_scale, prior_mu, prior_log_scale);
    at.store(terms, (ExpMinusOne<F>(q.t).minus_t + q.d * q.d) * ScalarOf<F>(0.5));
  });
}

// Adds n terms of each row to its sum: rows one behind the other,
template <class F>
VAE_FAST_TARGET void add_rows(int64_t rows, int64_t n, const ScalarOf<F>* terms,
                              ScalarOf<F>* sums) {
  for (int64_t row = 0; row < rows; ++row, terms += n) {
    if (n < Traits<F>::width) {
      ScalarOf<F> sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += terms[i];
      sums[row] += sum;
    } else {
      F sum{};
      for_lanes<F>(n, [&](auto at) VAE_FAST_LAMBDA { sum += at.load(terms); });
      sums[row] += sum_lanes(sum);
    }
  }
}
// or the first terms of all rows, then the second.
template <class F>
VAE_FAST_TARGET void add_columns(int64_t rows, int64_t n, const ScalarOf<F>* terms,
                                 ScalarOf<F>* sums) {
  for_lanes<F>(rows, [&](auto at) VAE_FAST_LAMBDA {
    F sum{};
    for (int64_t i = 0; i < n; ++i) sum += at.load(terms + i * rows);
    at.store(sums, at.load(sums) + sum);
  });
}

// Each of some values n times, one behind the other. The last vector may end behind them.
template <class F>
VAE_FAST_TARGET void repeat_each(int64_t rows, int64_t n, const ScalarOf<F>* values,
                                 ScalarOf<F>* to) {
  constexpr int width = Traits<F>::width;
  for (int64_t row = 0; row < rows; ++row, to += n) {
    const auto fill = [&](int64_t i) VAE_FAST_LAMBDA {
      At<F, false>{i, width}.store(to, splat<F>(values[row]));
    };
    for (int64_t i = 0; i < n; i += width) fill(i);
  }
}

// ∂μ_q = d/σ_p, which is −∂μ_p, ∂(log σ_q) = e^t − 1 and ∂(log σ_p) = −(e^t − 1) − d², these two times
// their slopes by the raw scales, all times a weight.
template <class F, bool kPrior>
VAE_FAST_TARGET void kl_gradient(int64_t n, const ScalarOf<F>* weights, const ScalarOf<F>* mu,
                                 const ScalarOf<F>* log_scale, const ScalarOf<F>* scale_slope,
                                 const ScalarOf<F>* prior_mu, const ScalarOf<F>* prior_log_scale,
                                 const ScalarOf<F>* prior_slope, ScalarOf<F>* g_mu,
                                 ScalarOf<F>* g_scale, ScalarOf<F>* g_prior_mu,
                                 ScalarOf<F>* g_prior_scale) {
  for_lanes<F>(n, [&](auto at) VAE_FAST_LAMBDA {
    const Ratio<F, kPrior> q(at, mu, log_scale, prior_mu, prior_log_scale);
    const F weight = at.load(weights), ratio = ExpMinusOne<F>(q.t).value;
    at.store(g_mu, q.slope * weight);
    at.store(g_scale, product_or_zero(ratio * weight, at.load(scale_slope)));
    if constexpr (kPrior) {
      at.store(g_prior_mu, q.slope * -weight);
      const F g_log_scale = (ratio + q.d * q.d) * -weight;
      at.store(g_prior_scale, product_or_zero(g_log_scale, at.load(prior_slope)));
    }
  });
}

template <class F>
KlKernels<ScalarOf<F>> kl_kernels(bool prior) {
  const auto terms = prior ? kl_terms<F, true> : kl_terms<F, false>;
  const auto gradient = prior ? kl_gradient<F, true> : kl_gradient<F, false>;
  return {terms, add_rows<F>, add_columns<F>, repeat_each<F>, gradient};
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
