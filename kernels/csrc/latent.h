// The latent pass on some rows, or one piece of a row, held in L1.
//
// Included once per instruction set, into a namespace of its own: VAE_FAST_TARGET is the target
// attribute of these functions, and the element functions of math.h are inlined into them.

// ε of `calls` counters from `counter` on: eps[4·i + lane]. Works in blocks of as many counters as a
// vector has lanes, and eps is writable up to the next multiple.
//
// Philox works on 64-bit lanes, two vectors a block. The counters are dealt to the 32-bit lanes such
// that transposing the 128-bit quarters of (x, y, z, w), which is cheap, puts ε in order: lane
// 4·q + m holds counter m·width/4 + q.
template <class F>
VAE_FAST_TARGET void noise_tile(int64_t calls, uint64_t counter, uint32_t k0, uint32_t k1,
                                float* eps) {
  using U = typename Traits<F>::UInt;
  using L = typename Traits<F>::ULong;
  constexpr int width = Traits<F>::width;
  L even;
  for (int i = 0; i < width / 2; ++i) even[i] = counter + i % 2 * (width / 2) + i / 2;
  for (int64_t first = 0; first < calls; first += width, even += width, eps += 4 * width) {
    const Words<L> a = philox(even, k0, k1), b = philox(even + width / 4, k0, k1);
    const auto join = [](L low, L high) VAE_FAST_LAMBDA {
      return uniform<F>(bits_as<U>((low & 0xffffffffu) | (high << 32)));
    };
    F x, y, z, w;
    box_muller(join(a.x, b.x), join(a.y, b.y), x, y);
    box_muller(join(a.z, b.z), join(a.w, b.w), z, w);
    store_transposed(x, y, z, w, eps);
  }
}

// fp64: eps[2·i + lane].
template <class F>
VAE_FAST_TARGET void noise_tile(int64_t calls, uint64_t counter, uint32_t k0, uint32_t k1,
                                double* eps) {
  for (int64_t i = 0; i < calls; ++i) {
    const Words<uint64_t> v = philox(counter + i, k0, k1);
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
  for (int64_t row = 0; row < rows; ++row) {
    F q{}, p{};
    for_lanes<F>(n, [&](At<F> at) VAE_FAST_LAMBDA {
      const Scale<F, P> s(at.load(scale[row], T(1)));
      const F e = at.load(eps[row]);
      const F sample = at.load(mu[row]) + s.sigma() * e;
      at.store(z[row], sample);
      q += at.keep(e * e * T(0.5) + s.log_sigma);
      p += at.keep(sample * sample * T(0.5));
    });
    log_q[row] -= sum_lanes(q);
    log_p[row] -= sum_lanes(p);
  }
}

// One sample's gradients: h = g_z − g_p·z, ∂μ = h, ∂(log σ) = σεh − g_q; added to what is there, or
// in its place.
template <class F, Param P>
VAE_FAST_TARGET void latent_backward_rows(int64_t rows, int64_t n, Rows<const ScalarOf<F>> mu,
                                          Rows<const ScalarOf<F>> scale,
                                          Rows<const ScalarOf<F>> eps,
                                          Rows<const ScalarOf<F>> g_z,
                                          Rows<const ScalarOf<F>> g_q,
                                          Rows<const ScalarOf<F>> g_p, Rows<ScalarOf<F>> g_mu,
                                          Rows<ScalarOf<F>> g_scale, bool add) {
  using T = ScalarOf<F>;
  for (int64_t row = 0; row < rows; ++row) {
    const T row_q = *g_q[row], row_p = *g_p[row];
    for_lanes<F>(n, [&](At<F> at) VAE_FAST_LAMBDA {
      const Scale<F, P> s(at.load(scale[row], T(1)));
      const F noise = s.sigma() * at.load(eps[row]);
      const F h = at.load(g_z[row]) - (at.load(mu[row]) + noise) * row_p;
      const F g = (noise * h - row_q) * s.slope;
      at.store(g_mu[row], add ? at.load(g_mu[row]) + h : h);
      at.store(g_scale[row], add ? at.load(g_scale[row]) + g : g);
    });
  }
}

template <class F>
LatentKernels<ScalarOf<F>> latent_kernels(Param param) {
  switch (param) {
#define VAE_FAST_CASE(P) \
  case Param::P:         \
    return {noise_tile<F>, latent_forward_rows<F, Param::P>, latent_backward_rows<F, Param::P>};
    VAE_FAST_CASE(logvar)
    VAE_FAST_CASE(logstd)
    VAE_FAST_CASE(std)
    VAE_FAST_CASE(var)
    VAE_FAST_CASE(softplus)
#undef VAE_FAST_CASE
  }
  return {};
}
