// Loops that prepare operands: raw scales, data stored as levels, and halves in memory as floats in
// registers.
//
// Included once per instruction set (each_isa.h).

// What becomes of a raw scale.
enum class Prepared { kept, log, log_and_root };

template <class F, Param P, Prepared kAs, class Bound>
VAE_FAST_INLINE void prepare_within(int64_t n, const Bound& bound, const ScalarOf<F>* from,
                                    ScalarOf<F>* to, ScalarOf<F>* slope, ScalarOf<F>* root) {
  using T = ScalarOf<F>;
  for_lanes<F>(n, [&](auto at) VAE_FAST_LAMBDA {
    const auto raw = bound(at.load(from, T(1)));
    if constexpr (kAs != Prepared::kept) {
      const Scale<F, P> scale(raw.kept);
      at.store(to, scale.log_sigma);
      at.store(slope, raw.gradient(scale.slope));
      if constexpr (kAs == Prepared::log_and_root) {
        at.store(root, minimum(splat<F>(std::numeric_limits<T>::max()), scale.inverse_root()));
      }
    } else {
      at.store(to, raw.kept);
      at.store(slope, raw.gradient(splat<F>(T(1))));
    }
  });
}
template <class F, Param P, Prepared kAs>
VAE_FAST_TARGET void prepare_scale(int64_t n, const Clamp& clamp, const ScalarOf<F>* from,
                                   ScalarOf<F>* to, ScalarOf<F>* slope,
                                   ScalarOf<F>* root = nullptr) {
  using T = ScalarOf<F>;
  const F lo = F{} + static_cast<T>(clamp.lo), hi = F{} + static_cast<T>(clamp.hi);
  const F middle = F{} + static_cast<T>(0.5 * (clamp.lo + clamp.hi));
  const F reach = F{} + static_cast<T>(0.5 * (clamp.hi - clamp.lo));
  const auto soft = [&](F s) VAE_FAST_LAMBDA { return SoftlyBounded<F>(s, middle, reach); };
  const auto hard = [&](F s) VAE_FAST_LAMBDA { return Bounded<F>(s, lo, hi); };
  // One loop each: GCC takes the vectors of one that chooses apart.
  if (!clamp.active()) {
    prepare_within<F, P, kAs>(n, NoBound<F>{}, from, to, slope, root);
  } else if (clamp.soft) {
    prepare_within<F, P, kAs>(n, soft, from, to, slope, root);
  } else {
    prepare_within<F, P, kAs>(n, hard, from, to, slope, root);
  }
}

template <class F, Param P>
VAE_FAST_TARGET void prepare_scale_as(int64_t n, const Clamp& clamp, bool log,
                                      const ScalarOf<F>* from, ScalarOf<F>* to,
                                      ScalarOf<F>* slope) {
  const auto run =
      log ? prepare_scale<F, P, Prepared::log> : prepare_scale<F, P, Prepared::kept>;
  run(n, clamp, from, to, slope, nullptr);
}

template <class F, Param P>
VAE_FAST_TARGET void resolve_scale(int64_t n, const Clamp& clamp, const ScalarOf<F>* from,
                                   ScalarOf<F>* log_sigma, ScalarOf<F>* slope, ScalarOf<F>* root) {
  prepare_scale<F, P, Prepared::log_and_root>(n, clamp, from, log_sigma, slope, root);
}

template <class F>
VAE_FAST_TARGET void levels_tile(int64_t n, const uint8_t* from, const float* u, ScalarOf<F> mul,
                                 ScalarOf<F> add, ScalarOf<F>* to) {
  if (u == nullptr) {
    for_lanes<F>(n, [&](auto at) VAE_FAST_LAMBDA { at.store(to, at.load(from) * mul + add); });
    return;
  }
  for_lanes<F>(n, [&](auto at) VAE_FAST_LAMBDA {
    if constexpr (std::is_same_v<ScalarOf<F>, float>) {
      at.store(to, (at.load(from) + at.load(u)) * mul + add);
    } else {
      at.store(to, (at.load(from) + u[at.i]) * mul + add);
    }
  });
}

// finish_stream() must follow.
template <class F>
VAE_FAST_TARGET void stream_tile(int64_t n, const ScalarOf<F>* from, const ScalarOf<F>* slope,
                                 ScalarOf<F>* to) {
  for_lanes<F>(n, [&](auto at) VAE_FAST_LAMBDA {
    const F v = at.load(from);
    at.stream(to, slope == nullptr ? v : product_or_zero(v, at.load(slope)));
  });
}

template <class F>
TileKernels<ScalarOf<F>> tile_kernels(Param param) {
  switch (param) {
#define VAE_FAST_CASE(P)                                                               \
  case Param::P:                                                                       \
    return {prepare_scale_as<F, Param::P>, resolve_scale<F, Param::P>, levels_tile<F>, \
            stream_tile<F>};
    VAE_FAST_CASE(logvar)
    VAE_FAST_CASE(logstd)
    VAE_FAST_CASE(std)
    VAE_FAST_CASE(var)
    VAE_FAST_CASE(softplus)
#undef VAE_FAST_CASE
  }
  return {};
}

template <class F>
VAE_FAST_TARGET void uniform_tile(int64_t calls, uint64_t counter, uint32_t k0, uint32_t k1,
                                  float* u) {
  using U = typename Traits<F>::UInt;
  philox_blocks<F>(calls, counter, k0, k1, kUniformStream,
                   [&](int64_t i, U x, U y, U z, U w) VAE_FAST_LAMBDA {
    store_transposed(uniform<F>(x), uniform<F>(y), uniform<F>(z), uniform<F>(w),
                     u + i * 4 * Traits<F>::width);
  });
}

template <class F, class From, class To>
VAE_FAST_TARGET void convert(const From* from, int64_t n, To* to) {
  for_lanes<F>(n, [&](auto at) VAE_FAST_LAMBDA { at.store(to, at.load(from)); });
}

template <class F>
StorageKernels storage_kernels() {
  return {convert<F, Bf16, float>, convert<F, float, Bf16>, convert<F, Fp16, float>,
          convert<F, float, Fp16>, uniform_tile<F>};
}
