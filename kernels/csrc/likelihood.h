// The Gaussian likelihood pass on one piece of a row.
//
// Included once per instruction set, as latent.h is.

// Returns Σ(½r² + log τ), r = (x − m)/τ, and with gradients writes g_mean = −w·r/τ and
// g_scale = w(1 − r²)·d(log τ)/ds for the row's weight w. A scalar scale is read once, and its
// gradient is returned as a sum. Outputs may alias the inputs element for element.
template <class F, Param P, bool kScalar, bool kGradient>
VAE_FAST_TARGET LikelihoodTerms<ScalarOf<F>> likelihood_piece(int64_t n, const ScalarOf<F>* x,
                                                    const ScalarOf<F>* mean,
                                                    const ScalarOf<F>* scale, ScalarOf<F> weight,
                                                    ScalarOf<F>* g_mean, ScalarOf<F>* g_scale) {
  using T = ScalarOf<F>;
  F value{}, g_scalar{};
  const F shared = splat<F>(*scale);
  for_lanes<F>(n, [&](At<F> at) VAE_FAST_LAMBDA {
    const Scale<F, P> s(kScalar ? shared : at.load(scale, T(1)));
    const auto inverse = s.inverse();
    const F r = inverse.times(at.load(x) - at.load(mean));
    value += at.keep(r * r * T(0.5) + s.log_sigma);
    if constexpr (kGradient) {
      at.store(g_mean, inverse.times(r) * -weight);
      const F g = (T(1) - r * r) * (s.slope * weight);
      if constexpr (kScalar) {
        g_scalar += at.keep(g);
      } else {
        at.store(g_scale, g);
      }
    }
  });
  return {sum_lanes(value), sum_lanes(g_scalar)};
}

// A backward pass runs the kernel with gradients, and has no use for the values.
template <class F, Param P>
LikelihoodPiece<ScalarOf<F>> likelihood_kernel(bool scalar, bool gradient) {
  if (gradient) {
    return scalar ? likelihood_piece<F, P, true, true> : likelihood_piece<F, P, false, true>;
  }
  return scalar ? likelihood_piece<F, P, true, false> : likelihood_piece<F, P, false, false>;
}

template <class F>
LikelihoodPiece<ScalarOf<F>> likelihood_kernel(Param param, bool scalar, bool gradient) {
  switch (param) {
#define VAE_FAST_CASE(P) \
  case Param::P:         \
    return likelihood_kernel<F, Param::P>(scalar, gradient);
    VAE_FAST_CASE(logvar)
    VAE_FAST_CASE(logstd)
    VAE_FAST_CASE(std)
    VAE_FAST_CASE(var)
    VAE_FAST_CASE(softplus)
#undef VAE_FAST_CASE
  }
  return nullptr;
}
