// The likelihood pass on some rows, or one piece of a row.
//
// Included once per instruction set (each_isa.h).

// A row's terms are Σ −log p(x|m, τ), and for one scale a row its gradient Σw·∂/∂s. With gradients
// writes g_mean and, for a scale of each element, g_scale, for the row's weight w. Outputs may alias
// the inputs element for element, unless they are streamed past the caches.
template <class F, class S, Family family, Param P, bool kScalar, bool kGradient>
VAE_FAST_TARGET void likelihood_rows(int64_t rows, int64_t n, const Model<ScalarOf<F>>& model,
                                     Rows<const S> x, Rows<const S> mean, Rows<const S> scale,
                                     Rows<const ScalarOf<F>> row_scale,
                                     Rows<const ScalarOf<F>> weight, Rows<S> g_mean,
                                     Rows<S> g_scale, bool stream,
                                     LikelihoodTerms<ScalarOf<F>>* terms) {
  using T = ScalarOf<F>;
  const auto store = [stream](auto at, S* p, F v) VAE_FAST_LAMBDA {
    if (stream) {
      at.stream(p, v);
    } else {
      at.store(p, v);
    }
  };
  const Model<T> constants = model;
  for (int64_t row = 0; row < rows; ++row) {
    const T w = kGradient ? *weight[row] : T(0);
    LikelihoodTerms<T> sum{T(0), T(0)};
    for (int64_t begin = 0; begin < n; begin += kTile) {  // so that no lane adds up many terms
      const int64_t count = std::min(n - begin, kTile);
      const S *const xs = x[row] + begin, *const means = mean[row] + begin;
      S* const to_mean = kGradient ? g_mean[row] + begin : nullptr;
      S* const to_scale = kGradient && !kScalar ? g_scale[row] + begin : nullptr;
      F values{}, g_scalar{};
      const auto body = [&](auto at, const auto& s) VAE_FAST_LAMBDA {
        const Element<F, family> e(at.load(xs), at.load(means), s, constants);
        values += at.keep(e.value);
        if constexpr (kGradient) {
          store(at, to_mean, e.d_x * -w);
          if constexpr (has_scale(family)) {
            const F g = e.d_log_scale(s.slope * w);
            if constexpr (kScalar) {
              g_scalar += at.keep(g);
            } else {
              store(at, to_scale, g);
            }
          }
        }
      };
      if constexpr (kScalar) {
        const Scale<F, P> shared(splat<F>(*row_scale[row]));
        for_lanes<F>(count, [&](auto at) VAE_FAST_LAMBDA { body(at, shared); });
      } else {
        for_scales<F, P, /*kInverse=*/true>(count, scale[row] + begin, body);
      }
      sum.value += sum_lanes(values);
      sum.g_scale += sum_lanes(g_scalar);
    }
    sum.value += constants.constant * static_cast<T>(n);
    terms[row] = sum;
  }
  if (stream) finish_stream();
}

// A backward pass runs the kernel with gradients, and has no use for the values.
template <class F, class S, Family family, Param P>
LikelihoodKernel<ScalarOf<F>, S> likelihood_kernel(bool scalar, bool gradient) {
  if constexpr (has_scale(family)) {
    if (!scalar) {
      return gradient ? likelihood_rows<F, S, family, P, false, true>
                      : likelihood_rows<F, S, family, P, false, false>;
    }
  }
  return gradient ? likelihood_rows<F, S, family, P, true, true>
                  : likelihood_rows<F, S, family, P, true, false>;
}

// The Gaussian reads any parameter as it is.
template <class F, class S>
LikelihoodKernel<ScalarOf<F>, S> gaussian_kernel(Param param, bool scalar, bool gradient) {
  switch (param) {
#define VAE_FAST_CASE(P) \
  case Param::P:         \
    return likelihood_kernel<F, S, Family::gaussian, Param::P>(scalar, gradient);
    VAE_FAST_CASE(logvar)
    VAE_FAST_CASE(logstd)
    VAE_FAST_CASE(std)
    VAE_FAST_CASE(var)
    VAE_FAST_CASE(softplus)
#undef VAE_FAST_CASE
  }
  return nullptr;
}
template <class F>
LikelihoodKernel<ScalarOf<F>, Bf16> gaussian_bf16_kernel(Param param, bool scalar, bool gradient) {
  return gaussian_kernel<F, Bf16>(param, scalar, gradient);
}

// For the other families the scale is prepared as log σ.
template <class F>
LikelihoodKernel<ScalarOf<F>> likelihood_kernel(Family family, Param param, bool scalar,
                                                bool gradient) {
  using T = ScalarOf<F>;
  switch (family) {
    case Family::gaussian:
      return gaussian_kernel<F, T>(param, scalar, gradient);
#define VAE_FAST_CASE(NAME) \
  case Family::NAME:        \
    return likelihood_kernel<F, T, Family::NAME, Param::logstd>(scalar, gradient);
    VAE_FAST_CASE(laplace)
    VAE_FAST_CASE(bernoulli)
    VAE_FAST_CASE(logistic)
    VAE_FAST_CASE(student_t)
    VAE_FAST_CASE(squared_error)
#undef VAE_FAST_CASE
  }
  return nullptr;
}
