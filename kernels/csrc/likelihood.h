// The Gaussian likelihood pass on some rows, or one piece of a row.
//
// Included once per instruction set, as latent.h is.

// A row's terms are Σ(½r² + log τ + ½log 2π), r = (x − m)/τ, and for a scalar scale, which is read
// once, its gradient Σw(1 − r²)·d(log τ)/ds. With gradients writes g_mean = −w·r/τ and, for a full
// scale, g_scale = w(1 − r²)·d(log τ)/ds, for the row's weight w. Outputs may alias the inputs element
// for element, unless they are streamed past the caches.
template <class F, Param P, bool kScalar, bool kGradient>
VAE_FAST_TARGET void likelihood_rows(int64_t rows, int64_t n, Rows<const ScalarOf<F>> x,
                                     Rows<const ScalarOf<F>> mean, Rows<const ScalarOf<F>> scale,
                                     Rows<const ScalarOf<F>> weight, Rows<ScalarOf<F>> g_mean,
                                     Rows<ScalarOf<F>> g_scale, bool stream,
                                     LikelihoodTerms<ScalarOf<F>>* terms) {
  using T = ScalarOf<F>;
  const auto store = [stream](At<F> at, T* p, F v) VAE_FAST_LAMBDA {
    if (stream) {
      at.stream(p, v);
    } else {
      at.store(p, v);
    }
  };
  const F shared = splat<F>(kScalar ? *scale[0] : T(1));
  for (int64_t row = 0; row < rows; ++row) {
    const T w = kGradient ? *weight[row] : T(0);
    LikelihoodTerms<T> sum{T(0), T(0)};
    for (int64_t begin = 0; begin < n; begin += kTile) {  // so that no lane adds up many terms
      F squares{}, logs{}, g_scalar{};
      for_lanes<F>(std::min(n - begin, kTile), [&](At<F> at) VAE_FAST_LAMBDA {
        const Scale<F, P> s(kScalar ? shared : at.load(scale[row] + begin, T(1)));
        const auto inverse = s.inverse();
        const F r = inverse.times(at.load(x[row] + begin) - at.load(mean[row] + begin));
        const F r2 = r * r;
        squares += at.keep(r2);
        logs += at.keep(s.log_sigma);
        if constexpr (kGradient) {
          store(at, g_mean[row] + begin, inverse.times(r) * -w);
          const F slope = s.slope * w;
          const F g = slope - r2 * slope;
          if constexpr (kScalar) {
            g_scalar += at.keep(g);
          } else {
            store(at, g_scale[row] + begin, g);
          }
        }
      });
      sum.value += sum_lanes(squares) * T(0.5) + sum_lanes(logs);
      sum.g_scale += sum_lanes(g_scalar);
    }
    sum.value += static_cast<T>(kHalfLog2Pi) * static_cast<T>(n);
    terms[row] = sum;
  }
  if (stream) finish_stream();
}

// A backward pass runs the kernel with gradients, and has no use for the values.
template <class F, Param P>
LikelihoodKernel<ScalarOf<F>> likelihood_kernel(bool scalar, bool gradient) {
  if (gradient) {
    return scalar ? likelihood_rows<F, P, true, true> : likelihood_rows<F, P, false, true>;
  }
  return scalar ? likelihood_rows<F, P, true, false> : likelihood_rows<F, P, false, false>;
}

template <class F>
LikelihoodKernel<ScalarOf<F>> likelihood_kernel(Param param, bool scalar, bool gradient) {
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
