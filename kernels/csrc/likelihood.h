// The likelihood pass on some rows, or one piece of a row.
//
// Included once per instruction set (each_isa.h).

// Adds to a row's terms Σ −log p(x|m, τ), and for one scale a row its gradient Σw·∂/∂s. With gradients
// writes g_mean and, for a scale of each element, g_scale, for the row's weight w; without a g_scale,
// which a kernel with bounds may lack, only g_mean. That of an event's log σ is added to the sums.
// Outputs may alias the inputs element for element, unless they are streamed past the caches; then
// finish_stream() must follow.
template <class F, class S, class X, Family family, Param P, ScaleKind kScale, bool kMasked,
          bool kGradient>
VAE_FAST_TARGET void likelihood_rows(int64_t rows, int64_t n, const Model<ScalarOf<F>>& model,
                                     Rows<const X> x, Rows<const S> mean, Rows<const S> scale,
                                     Rows<const ScalarOf<F>> row_scale,
                                     EventScale<ScalarOf<F>> event_scale,
                                     Rows<const uint8_t> mask, Rows<const ScalarOf<F>> weight,
                                     Rows<S> g_mean, Rows<S> g_scale, bool past_caches,
                                     LikelihoodTerms<ScalarOf<F>>* terms) {
  using T = ScalarOf<F>;
  constexpr bool kRow = kScale == ScaleKind::row, kEvent = kScale == ScaleKind::event;
  constexpr bool kShared = kRow || kEvent;  // no element has a scale of its own
  constexpr Factor kFactor = family == Family::gaussian ? Factor::precision : Factor::inverse;
  const Model<T> constants = model;
  const F lo = F{} + model.lo, hi = F{} + model.hi;
  for (int64_t row = 0; row < rows; ++row) {
    const T w = kGradient ? *weight[row] : T(0);
    LikelihoodTerms<T> sum{T(0), T(0)};
    T terms_kept = 0;
    for (int64_t begin = 0; begin < n; begin += kTile) {  // so that no lane adds up many terms
      const int64_t count = std::min(n - begin, kTile);
      const X* const xs = x[row] + begin;
      const S* const means = mean[row] + begin;
      const S* const scales = kShared ? nullptr : scale[row] + begin;
      // Processors fetch by themselves what lies one behind the other, but stop where pages end, which a
      // tile of each tensor about fills, and look no further ahead than a few vectors of this loop. So
      // the loop that computes a tile's factors, which reads nothing else, fetches the rest of the tile;
      // and the loop over elements the next tile's scales, or all of it if nothing has factors.
      const bool same_row = begin + kTile < n;
      const int64_t next = same_row ? row : std::min(row + 1, rows - 1);
      const int64_t from = same_row ? begin + kTile : 0;
      const auto fetch_tile = [&](int64_t i) VAE_FAST_LAMBDA {
        __builtin_prefetch(xs + i);
        __builtin_prefetch(means + i);
      };
      const X* const next_xs = x[next] + from;
      const S* const next_means = mean[next] + from;
      const S* const next_scales = kShared ? nullptr : scale[next] + from;
      const auto fetch_next = [&](int64_t i) VAE_FAST_LAMBDA {
        if constexpr (kShared || !has_factors<F>(P)) {
          __builtin_prefetch(next_xs + i);
          __builtin_prefetch(next_means + i);
        }
        if constexpr (!kShared) __builtin_prefetch(next_scales + i);
      };
      S* const to_mean = kGradient ? g_mean[row] + begin : nullptr;
      S* const to_scale = g_scale.data != nullptr ? g_scale[row] + begin : nullptr;
      F values{}, g_scalar{}, kept{};
      const auto datum = [&](auto at) VAE_FAST_LAMBDA {
        if constexpr (!std::is_same_v<X, uint8_t>) return at.load(xs);
        return at.load(xs) * constants.mul + constants.add;
      };
      const auto body = [&](auto past, auto at, const auto& s, const auto& raw) VAE_FAST_LAMBDA {
        const auto store = [&](S* p, F v) VAE_FAST_LAMBDA {
          if (past) {
            at.stream(p, v);
          } else {
            at.store(p, v);
          }
        };
        fetch_next(at.i);
        const Element<F, family> e(datum(at), at.load(means), s, constants);
        values += at.keep(e.value);
        if constexpr (kMasked) kept += at.keep(splat<F>(T(1)));
        if constexpr (kGradient) {
          store(to_mean, e.d_x * -w);
          if constexpr (has_scale(family)) {
            const F g = e.d_log_scale(s.slope * w);
            if constexpr (kRow) {
              g_scalar += at.keep(g);
            } else if constexpr (kEvent) {
              if (event_scale.sums != nullptr) at.add(event_scale.sums + begin, g);
            } else if (kScale == ScaleKind::each || to_scale != nullptr) {
              store(to_scale, raw.gradient(g));
            }
          }
        }
      };
      const auto run_as = [&](auto past, const auto& each) VAE_FAST_LAMBDA {
        if constexpr (kRow) {
          const F s = splat<F>(*row_scale[row]);
          const Scale<F, P> shared(s);
          each(count, [&](auto at) VAE_FAST_LAMBDA {
            body(past, at, shared, Unbounded<F>{s});
          });
        } else if constexpr (kEvent) {
          each(count, [&](auto at) VAE_FAST_LAMBDA {
            const F log_sigma = at.load(event_scale.log_sigma + begin);
            const ResolvedScale<F> s{log_sigma, at.load(event_scale.root + begin)};
            body(past, at, s, Unbounded<F>{log_sigma});
          });
        } else {
          const auto run_row = [&](int64_t, const auto& each_scale) VAE_FAST_LAMBDA {
            each_scale([&](auto at, const auto& s, const auto& raw) VAE_FAST_LAMBDA {
              body(past, at, s, raw);
            });
          };
          const auto run_within = [&](const auto& bound) VAE_FAST_LAMBDA {
            for_scales<F, P, kFactor>(1, count, Rows<const S>{scales, count}, bound, run_row, each,
                                      fetch_tile);
          };
          if constexpr (kScale == ScaleKind::bounded) {
            run_within([&](F s) VAE_FAST_LAMBDA { return Bounded<F>(s, lo, hi); });
          } else {
            run_within(NoBound<F>{});
          }
        }
      };
      const auto run = [&](const auto& each) VAE_FAST_LAMBDA {
        if constexpr (kGradient && family == Family::gaussian && kScale == ScaleKind::each) {
          // The most used loop has no test in every vector; two of each would take long to compile.
          past_caches ? run_as(std::true_type{}, each) : run_as(std::false_type{}, each);
        } else {
          run_as(past_caches, each);
        }
      };
      if constexpr (kMasked) {
        run(MaskedLanes<F>{mask[row] + begin});
        terms_kept += sum_lanes(kept);
      } else {
        run(EveryLane<F>{});
      }
      sum.value += sum_lanes(values);
      sum.g_scale += sum_lanes(g_scalar);
    }
    sum.value += constants.constant * (kMasked ? terms_kept : static_cast<T>(n));
    terms[row].value += sum.value;
    terms[row].g_scale += sum.g_scale;
  }
}

// A backward pass runs the kernel with gradients, and has no use for the values.
template <class F, class S, class X, Family family, Param P, ScaleKind kScale, bool kMasked>
LikelihoodKernel<ScalarOf<F>, S, X> likelihood_kernel(bool gradient) {
  return gradient ? likelihood_rows<F, S, X, family, P, kScale, kMasked, true>
                  : likelihood_rows<F, S, X, family, P, kScale, kMasked, false>;
}
template <class F, class S, class X, Family family, Param P, ScaleKind kScale>
LikelihoodKernel<ScalarOf<F>, S, X> likelihood_kernel(LikelihoodVariant variant) {
  if constexpr (std::is_same_v<S, X> && std::is_same_v<X, ScalarOf<F>> && kScale != ScaleKind::each) {
    if (variant.masked) {
      return likelihood_kernel<F, S, X, family, P, kScale, true>(variant.gradient);
    }
  }
  return likelihood_kernel<F, S, X, family, P, kScale, false>(variant.gradient);
}
template <class F, class S, class X, Family family, Param P>
LikelihoodKernel<ScalarOf<F>, S, X> likelihood_kernel(LikelihoodVariant variant) {
  if constexpr (has_scale(family)) {
    if (variant.scale == ScaleKind::each) {
      return likelihood_kernel<F, S, X, family, P, ScaleKind::each>(variant);
    }
    if (variant.scale == ScaleKind::bounded) {
      return likelihood_kernel<F, S, X, family, P, ScaleKind::bounded>(variant);
    }
    if constexpr (P == Param::logstd) {
      if (variant.scale == ScaleKind::event) {
        return likelihood_kernel<F, S, X, family, P, ScaleKind::event>(variant);
      }
    }
  }
  return likelihood_kernel<F, S, X, family, P, ScaleKind::row>(variant);
}

// The Gaussian reads any parameter as it is; beside data stored otherwise an exponential one.
template <class F, class S, class X>
LikelihoodKernel<ScalarOf<F>, S, X> gaussian_kernel(Param param, LikelihoodVariant variant) {
  switch (param) {
#define VAE_FAST_CASE(P)                                                          \
  case Param::P:                                                                  \
    if constexpr (std::is_same_v<X, S> || is_exponential(Param::P)) {              \
      return likelihood_kernel<F, S, X, Family::gaussian, Param::P>(variant);     \
    }                                                                             \
    break;
    VAE_FAST_CASE(logvar)
    VAE_FAST_CASE(logstd)
    VAE_FAST_CASE(std)
    VAE_FAST_CASE(var)
    VAE_FAST_CASE(softplus)
#undef VAE_FAST_CASE
  }
  return nullptr;
}
// That without a mask for tensors which are not stored as what the kernel computes with; null if there
// is none.
template <class F, class As>
LikelihoodKernel<ScalarOf<F>, typename As::S, typename As::X> gaussian_kernel(
    As, Param param, LikelihoodVariant variant) {
  return gaussian_kernel<F, typename As::S, typename As::X>(param, variant);
}

// The other families read exponential ones; any other is prepared as log σ.
template <class F, Family family>
LikelihoodKernel<ScalarOf<F>> family_kernel(Param param, LikelihoodVariant variant) {
  using T = ScalarOf<F>;
  if constexpr (has_scale(family)) {
    if (param == Param::logvar) {
      return likelihood_kernel<F, T, T, family, Param::logvar>(variant);
    }
  }
  return likelihood_kernel<F, T, T, family, Param::logstd>(variant);
}

template <class F>
LikelihoodKernel<ScalarOf<F>> likelihood_kernel(Family family, Param param,
                                                LikelihoodVariant variant) {
  using T = ScalarOf<F>;
  switch (family) {
    case Family::gaussian:
      return gaussian_kernel<F, T, T>(param, variant);
#define VAE_FAST_CASE(NAME) \
  case Family::NAME:        \
    return family_kernel<F, Family::NAME>(param, variant);
    VAE_FAST_CASE(laplace)
    VAE_FAST_CASE(bernoulli)
    VAE_FAST_CASE(logistic)
    VAE_FAST_CASE(student_t)
    VAE_FAST_CASE(squared_error)
#undef VAE_FAST_CASE
  }
  return nullptr;
}
