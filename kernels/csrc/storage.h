// bf16 in memory as fp32 in registers.
//
// Included once per instruction set, as latent.h is. fp16 goes through its class's own conversion.

template <class F>
VAE_FAST_TARGET void widen_bf16(const uint16_t* from, int64_t n, float* to) {
  using U = typename Traits<F>::UInt;
  using S = typename Traits<F>::UShort;
  constexpr int width = Traits<F>::width;
  int64_t i = 0;
  for (; i + width <= n; i += width) {
    S v;
    std::memcpy(&v, from + i, sizeof(v));
    const U wide = __builtin_convertvector(v, U) << 16;
    std::memcpy(to + i, &wide, sizeof(wide));
  }
  for (; i < n; ++i) to[i] = bits_as<float>(uint32_t(from[i]) << 16);
}

template <class F>
VAE_FAST_TARGET void narrow_bf16(const float* from, int64_t n, uint16_t* to) {
  using U = typename Traits<F>::UInt;
  using S = typename Traits<F>::UShort;
  constexpr int width = Traits<F>::width;
  int64_t i = 0;
  for (; i + width <= n; i += width) {
    F v;
    std::memcpy(&v, from + i, sizeof(v));
    const S rounded = __builtin_convertvector(bf16_bits<F, U>(v), S);
    std::memcpy(to + i, &rounded, sizeof(rounded));
  }
  for (; i < n; ++i) to[i] = static_cast<uint16_t>(bf16_bits<float, uint32_t>(from[i]));
}

template <class F>
StorageKernels storage_kernels() {
  return {widen_bf16<F>, narrow_bf16<F>};
}
