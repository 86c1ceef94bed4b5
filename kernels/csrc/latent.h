// The latent pass on one row, or one piece of a row, held in L1.
//
// Included once per instruction set, into a namespace of its own: VAE_FAST_TARGET is the target
// attribute of these functions, and the element functions of math.h are inlined into them.

// ε of `calls` counters: eps[4·i + lane]. Works in blocks of 16 counters: the tables lo and hi are
// readable, and eps writable, up to the next multiple.
template <class F>
VAE_FAST_TARGET void noise_tile(int64_t calls, const uint32_t* lo, const uint32_t* hi, uint32_t k0,
                                uint32_t k1, float* eps) {
  using U = typename Traits<F>::UInt;
  constexpr int width = Traits<F>::width;
  for (int64_t first = 0; first < calls; first += 16) {
    uint32_t word[4][16];
#pragma omp simd
    for (int i = 0; i < 16; ++i) {
      const Words v = philox(lo[first + i], hi[first + i], k0, k1);
      word[0][i] = v.x;
      word[1][i] = v.y;
      word[2][i] = v.z;
      word[3][i] = v.w;
    }
    float lane[4][16];
    for (int pair = 0; pair < 4; pair += 2) {
      for (int i = 0; i < 16; i += width) {
        U a, b;
        std::memcpy(&a, &word[pair][i], sizeof(a));
        std::memcpy(&b, &word[pair + 1][i], sizeof(b));
        F n0, n1;
        box_muller(uniform<F>(a), uniform<F>(b), n0, n1);
        std::memcpy(&lane[pair][i], &n0, sizeof(n0));
        std::memcpy(&lane[pair + 1][i], &n1, sizeof(n1));
      }
    }
    float* out = eps + 4 * first;
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 4; ++j) out[4 * i + j] = lane[j][i];
    }
  }
}

// fp64: eps[2·i + lane].
template <class F>
VAE_FAST_TARGET void noise_tile(int64_t calls, const uint32_t* lo, const uint32_t* hi, uint32_t k0,
                                uint32_t k1, double* eps) {
  for (int64_t i = 0; i < calls; ++i) {
    const Words v = philox(lo[i], hi[i], k0, k1);
    box_muller(uniform(v.x, v.y), uniform(v.z, v.w), eps[2 * i], eps[2 * i + 1]);
  }
}

// z = μ + σε; returns Σ(½ε² + log σ) and Σ½z², the non-constant parts of −log q and −log p.
template <class F, Param P>
VAE_FAST_TARGET LatentTerms<ScalarOf<F>> latent_forward_row(int64_t n, const ScalarOf<F>* mu,
                                                  const ScalarOf<F>* scale, const ScalarOf<F>* eps,
                                                  ScalarOf<F>* z) {
  using T = ScalarOf<F>;
  F q{}, p{};
  for_lanes<F>(n, [&](At<F> at) VAE_FAST_LAMBDA {
    const Scale<F, P> s(at.load(scale, T(1)));
    const F e = at.load(eps);
    const F sample = at.load(mu) + s.sigma() * e;
    at.store(z, sample);
    q += at.keep(e * e * T(0.5) + s.log_sigma);
    p += at.keep(sample * sample * T(0.5));
  });
  return {sum_lanes(q), sum_lanes(p)};
}

// Adds one sample's gradients: h = g_z − g_p·z, ∂μ = h, ∂(log σ) = σεh − g_q.
template <class F, Param P>
VAE_FAST_TARGET void latent_backward_row(int64_t n, const ScalarOf<F>* mu, const ScalarOf<F>* scale,
                                         const ScalarOf<F>* eps, const ScalarOf<F>* g_z,
                                         ScalarOf<F> g_q, ScalarOf<F> g_p, ScalarOf<F>* g_mu,
                                         ScalarOf<F>* g_scale) {
  using T = ScalarOf<F>;
  for_lanes<F>(n, [&](At<F> at) VAE_FAST_LAMBDA {
    const Scale<F, P> s(at.load(scale, T(1)));
    const F noise = s.sigma() * at.load(eps);
    const F h = at.load(g_z) - (at.load(mu) + noise) * g_p;
    at.store(g_mu, at.load(g_mu) + h);
    at.store(g_scale, at.load(g_scale) + (noise * h - g_q) * s.slope);
  });
}

template <class F>
LatentKernels<ScalarOf<F>> latent_kernels(Param param) {
  switch (param) {
#define VAE_FAST_CASE(P) \
  case Param::P:         \
    return {noise_tile<F>, latent_forward_row<F, Param::P>, latent_backward_row<F, Param::P>};
    VAE_FAST_CASE(logvar)
    VAE_FAST_CASE(logstd)
    VAE_FAST_CASE(std)
    VAE_FAST_CASE(var)
    VAE_FAST_CASE(softplus)
#undef VAE_FAST_CASE
  }
  return {};
}
