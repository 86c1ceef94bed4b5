// The latent pass on some rows, or one piece of a row, held in L1.
//
// Included once per instruction set (each_isa.h).

// ε of `calls` counters from `counter` on: eps[4·i + lane]. Works in blocks of as many counters as a
// vector has lanes, and eps is writable up to the next multiple.
template <class F>
VAE_FAST_TARGET void noise_tile(int64_t calls, uint64_t counter, uint32_t k0, uint32_t k1,
                                const Ahead& ahead, float* eps) {
  using U = typename Traits<F>::UInt;
  constexpr int64_t kBlock = 4 * Traits<F>::width;
  philox_blocks<F>(calls, counter, k0, k1, kNormalStream,
                   [&](int64_t i, U a, U b, U c, U d) VAE_FAST_LAMBDA {
    ahead.fetch(i * kBlock * sizeof(float), kBlock * sizeof(float));
    F x, y, z, w;
    box_muller<F>(a, b, x, y);
    box_muller<F>(c, d, z, w);
    store_transposed(x, y, z, w, eps + i * kBlock);
  });
}

// fp64: eps[2·i + lane].
template <class F>
VAE_FAST_TARGET void noise_tile(int64_t calls, uint64_t counter, uint32_t k0, uint32_t k1,
                                const Ahead&, double* eps) {
  for (int64_t i = 0; i < calls; ++i) {
    const uint64_t counters[1] = {counter + i};
    Words<uint64_t> words[1];
    philox(counters, k0, k1, kNormalStream, words);
    const Words<uint64_t> v = words[0];
    box_muller(uniform(uint32_t(v.x), uint32_t(v.y)), uniform(uint32_t(v.z), uint32_t(v.w)),
               eps[2 * i], eps[2 * i + 1]);
  }
}

// z = μ + σε; takes Σ(½ε² + log σ) and Σ½z² off the rows' log q and log p.
template <class F, Param P>
VAE_FAST_TARGET void latent_forward_rows(int64_t rows, int64_t n, Rows<const ScalarOf<F>> mu,
                                         Rows<const ScalarOf<F>> scale,
                                         Rows<const ScalarOf<F>> eps, Rows<ScalarOf<F>> z,
                                         ScalarOf<F>* log_q, ScalarOf<F>* log_p) {
  using T = ScalarOf<F>;
  const auto run = [&](int64_t row, const auto& each_scale) VAE_FAST_LAMBDA {
    const T *const mus = mu[row], *const noise = eps[row];
    T* const to = z[row];
    F q{}, p{};
    each_scale([&](auto at, const auto& s, const auto&) VAE_FAST_LAMBDA {
      const F e = at.load(noise);
      const F sample = at.load(mus) + s.sigma() * e;
      at.store(to, sample);
      q += at.keep(e * e * T(0.5) + s.log_sigma);
      p += at.keep(sample * sample * T(0.5));
    });
    log_q[row] -= sum_lanes(q);
    log_p[row] -= sum_lanes(p);
  };
  for_scales<F, P, Factor::sigma>(rows, n, scale, NoBound<F>{}, run);
}

// One sample's gradients: h = g_z − g_p·z, ∂μ = h, ∂(log σ) = σεh − g_q; added to what is there, or
// in its place. With kPath, log q depends on z alone: h = g_z − g_p·z − g_q·ε/σ, ∂(log σ) = σεh.
template <class F, Param P, bool kPath>
VAE_FAST_TARGET void latent_backward_rows(int64_t rows, int64_t n, Rows<const ScalarOf<F>> mu,
                                          Rows<const ScalarOf<F>> scale,
                                          Rows<const ScalarOf<F>> eps,
                                          Rows<const ScalarOf<F>> g_z,
                                          Rows<const ScalarOf<F>> g_q,
                                          Rows<const ScalarOf<F>> g_p, Rows<ScalarOf<F>> g_mu,
                                          Rows<ScalarOf<F>> g_scale, bool add) {
  using T = ScalarOf<F>;
  const auto run = [&](int64_t row, const auto& each_scale) VAE_FAST_LAMBDA {
    const T row_q = *g_q[row], row_p = *g_p[row];
    const T *const mus = mu[row], *const noise = eps[row], *const upstream = g_z[row];
    T *const to_mu = g_mu[row], *const to_scale = g_scale[row];
    each_scale([&](auto at, const auto& s, const auto&) VAE_FAST_LAMBDA {
      const F e = at.load(noise), shift = s.sigma() * e;
      F h = at.load(upstream) - (at.load(mus) + shift) * row_p;
      if constexpr (kPath) h -= s.inverse().times(e) * row_q;
      const F g = s.times_slope(kPath ? shift * h : shift * h - row_q);
      at.store(to_mu, add ? at.load(to_mu) + h : h);
      at.store(to_scale, add ? at.load(to_scale) + g : g);
    });
  };
  if constexpr (kPath) {  // both multiplies and divides
    for (int64_t row = 0; row < rows; ++row) {
      run(row, [&](const auto& body) VAE_FAST_LAMBDA {
        for_lanes<F>(n, [&](auto at) VAE_FAST_LAMBDA {
          const F raw = at.load(scale[row], T(1));
          body(at, Scale<F, P>(raw), Unbounded<F>{raw});
        });
      });
    }
  } else {
    for_scales<F, P, Factor::sigma>(rows, n, scale, NoBound<F>{}, run);
  }
}

template <class F>
LatentKernels<ScalarOf<F>> latent_kernels(Param param, bool path) {
  switch (param) {
#define VAE_FAST_CASE(P) \
  case Param::P:         \
    return {noise_tile<F>, latent_forward_rows<F, Param::P>,                                \
            path ? latent_backward_rows<F, Param::P, true>                                  \
                 : latent_backward_rows<F, Param::P, false>};
    VAE_FAST_CASE(logvar)
    VAE_FAST_CASE(logstd)
    VAE_FAST_CASE(std)
    VAE_FAST_CASE(var)
    VAE_FAST_CASE(softplus)
#undef VAE_FAST_CASE
  }
  return {};
}
