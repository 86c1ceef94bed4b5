// Element functions of both passes, written once for every instruction set.
//
// Everything here is branch-free and templated on F: a GNU vector of floats as wide as the
// instruction set's registers, or a double. fp32 uses our own polynomials, because a libm call per
// element would undo the vectorisation; fp64 uses the standard library. The names are those of
// vae_fast/reference.py.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define VAE_FAST_INLINE inline __attribute__((always_inline))

// Products that are added need not be rounded before. Clang 13 would; GCC joins what it can, and its
// like in Clang joins the same sum here, but not there, and the bits of a row depend on others.
#if defined(__clang__)
#pragma STDC FP_CONTRACT ON
#endif

// The lanes of a and, from the number of those on, b by their numbers.
#if defined(__clang__) || __GNUC__ >= 12
#define VAE_FAST_SHUFFLE(A, B, ...) __builtin_shufflevector(A, B, __VA_ARGS__)
#else
#define VAE_FAST_SHUFFLE(A, B, ...) __builtin_shuffle(A, B, decltype((A) == (B)){__VA_ARGS__})
#endif

namespace vae_fast {

// The order is the op schema's integer code; vae_fast/ops.py holds the same list.
enum class Param : int { logvar, logstd, std, var, softplus };

constexpr double kHalfLog2Pi = 0.918938533204672741780329736405617640;

// ---- vectors and scalars under one notation ------------------------------------------------

template <class F>
struct Traits;

template <>
struct Traits<float> {
  using Scalar = float;
  using Int = int32_t;
  using UInt = uint32_t;
  static constexpr int width = 1;
};
template <>
struct Traits<double> {
  using Scalar = double;
  using Int = int64_t;
  static constexpr int width = 1;
};

// One vector register of each width: SSE and NEON, AVX2, AVX-512.
#define VAE_FAST_VECTOR(W, HALF)                                                                   \
  typedef float f32x##W __attribute__((vector_size(4 * W)));                                    \
  typedef int32_t i32x##W __attribute__((vector_size(4 * W)));                                  \
  typedef uint32_t u32x##W __attribute__((vector_size(4 * W)));                                 \
  typedef uint16_t u16x##W __attribute__((vector_size(2 * W)));                                 \
  typedef uint8_t u8x##W __attribute__((vector_size(W)));                                       \
  typedef uint64_t u64x##HALF __attribute__((vector_size(4 * W)));                              \
  template <>                                                                                   \
  struct Traits<f32x##W> {                                                                      \
    using Scalar = float;                                                                       \
    using Int = i32x##W;                                                                        \
    using UInt = u32x##W;                                                                       \
    using UShort = u16x##W;                                                                     \
    using UByte = u8x##W;                                                                       \
    using ULong = u64x##HALF;                                                                   \
    static constexpr int width = W;                                                             \
  };                                                                                            \
  VAE_FAST_INLINE f32x##W to_float(i32x##W v) { return __builtin_convertvector(v, f32x##W); }   \
  VAE_FAST_INLINE f32x##W to_float(u32x##W v) { return __builtin_convertvector(v, f32x##W); }   \
  VAE_FAST_INLINE f32x##W square_root(f32x##W v) {                                              \
    f32x##W out;                                                                                \
    for (int i = 0; i < W; ++i) out[i] = __builtin_sqrtf(v[i]);                                 \
    return out;                                                                                 \
  }
VAE_FAST_VECTOR(4, 2)
VAE_FAST_VECTOR(8, 4)
VAE_FAST_VECTOR(16, 8)
#undef VAE_FAST_VECTOR

// Sums of the lanes, as fixed trees.
VAE_FAST_INLINE float sum_lanes(const f32x4& v) {
  const f32x4 w = v + VAE_FAST_SHUFFLE(v, v, 2, 3, 0, 1);
  return w[0] + w[1];
}
VAE_FAST_INLINE float sum_lanes(const f32x8& v) {
  f32x4 halves[2];
  std::memcpy(halves, &v, sizeof(halves));
  return sum_lanes(halves[0] + halves[1]);
}
VAE_FAST_INLINE float sum_lanes(const f32x16& v) {
  f32x8 halves[2];
  std::memcpy(halves, &v, sizeof(halves));
  return sum_lanes(halves[0] + halves[1]);
}

VAE_FAST_INLINE double square_root(double v) { return sqrt(v); }
VAE_FAST_INLINE double sum_lanes(double v) { return v; }

template <class F>
VAE_FAST_INLINE F splat(typename Traits<F>::Scalar v) {
  return F{} + v;
}

// A comparison and its one blend. GCC 12 scalarises a 512-bit comparison whose result is used
// twice; conditions that are needed more than once go through Negative instead.
template <class Mask, class F>
VAE_FAST_INLINE F select(Mask mask, F yes, F no) {
  return mask ? yes : no;
}

// b where either is NaN.
template <class F>
VAE_FAST_INLINE F minimum(F a, F b) {
  return select(a < b, a, b);
}
template <class F>
VAE_FAST_INLINE F maximum(F a, F b) {
  return select(a > b, a, b);
}

// What GCC 12 does not find by itself for 512-bit vectors. It knows an instruction set's functions
// once something is declared for it.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VAE_FAST_GCC_X86 1
__attribute__((target("avx2,f16c,avx512f,avx512bw,avx512vl"))) void declare_avx512();
// One instruction each.
VAE_FAST_INLINE f32x16 minimum(f32x16 a, f32x16 b) {
  return __builtin_ia32_minps512_mask(a, b, f32x16{}, 0xffff, 4);
}
VAE_FAST_INLINE f32x16 maximum(f32x16 a, f32x16 b) {
  return __builtin_ia32_maxps512_mask(a, b, f32x16{}, 0xffff, 4);
}
// a·2^n for a whole n of any size, rounded once.
VAE_FAST_INLINE f32x16 times_power(f32x16 a, f32x16 n) {
  return __builtin_ia32_scalefps512_mask(a, n, f32x16{}, 0xffff, 4);
}
// The number of a table of sixteen that an index' low four bits say.
VAE_FAST_INLINE f32x16 pick(f32x16 table, u32x16 index) {
  return __builtin_ia32_permvarsf512_mask(table, (i32x16)index, f32x16{}, 0xffff);
}
#endif

// Writes a vector past the caches, which reads no line of memory first: for results that are much
// larger than the caches, and an aligned p. finish_stream() must follow before others read them.
template <class T, class V>
VAE_FAST_INLINE void store_past_caches(T* p, V v) {
#if defined(__x86_64__) && defined(__clang__)
  __builtin_nontemporal_store(v, reinterpret_cast<V*>(p));
#else
  std::memcpy(p, &v, sizeof(v));
#endif
}
VAE_FAST_INLINE void finish_stream() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}
#if defined(VAE_FAST_GCC_X86)
VAE_FAST_INLINE void store_past_caches(float* p, f32x4 v) { __builtin_ia32_movntps(p, v); }
VAE_FAST_INLINE void store_past_caches(float* p, f32x8 v) { __builtin_ia32_movntps256(p, v); }
VAE_FAST_INLINE void store_past_caches(float* p, f32x16 v) { __builtin_ia32_movntps512(p, v); }
typedef long long i64x2 __attribute__((vector_size(16)));
typedef long long i64x4 __attribute__((vector_size(32)));
VAE_FAST_INLINE void store_past_caches(uint16_t* p, u16x8 v) {
  __builtin_ia32_movntdq((i64x2*)p, (i64x2)v);
}
VAE_FAST_INLINE void store_past_caches(uint16_t* p, u16x16 v) {
  __builtin_ia32_movntdq256((i64x4*)p, (i64x4)v);
}
#endif

template <class To, class From>
VAE_FAST_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits_as needs equal sizes");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Halves of lanes as whole ones, and back. GCC 12 would take 512-bit vectors apart for it.
template <class U, class S>
VAE_FAST_INLINE U widen_lanes(S v) {
  return __builtin_convertvector(v, U);
}
template <class S, class U>
VAE_FAST_INLINE S narrow_lanes(U v) {
  return __builtin_convertvector(v, S);
}
#if defined(VAE_FAST_GCC_X86)
typedef short i16x16 __attribute__((vector_size(32)));
template <>
VAE_FAST_INLINE u32x16 widen_lanes(u16x16 v) {
  return (u32x16)__builtin_ia32_pmovzxwd512_mask((i16x16)v, i32x16{}, 0xffff);
}
template <>
VAE_FAST_INLINE u16x16 narrow_lanes(u32x16 v) {
  return (u16x16)__builtin_ia32_pmovdw512_mask((i32x16)v, i16x16{}, 0xffff);
}
#endif

// Bytes as whole lanes. GCC 12 takes this apart, too.
template <class F>
VAE_FAST_INLINE typename Traits<F>::Int widen_bytes(const uint8_t* p) {
  typename Traits<F>::UByte bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  return __builtin_convertvector(bytes, typename Traits<F>::Int);
}
#if defined(VAE_FAST_GCC_X86)
typedef char i8x16 __attribute__((vector_size(16)));
template <>
VAE_FAST_INLINE i32x4 widen_bytes<f32x4>(const uint8_t* p) {
  uint32_t word;
  std::memcpy(&word, p, sizeof(word));
  const u8x16 bytes = (u8x16)u32x4{word, 0, 0, 0}, zero{};
  const u16x8 halves = (u16x8)VAE_FAST_SHUFFLE(bytes, zero, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21,
                                               6, 22, 7, 23);
  return (i32x4)VAE_FAST_SHUFFLE(halves, u16x8{}, 0, 8, 1, 9, 2, 10, 3, 11);
}
template <>
VAE_FAST_INLINE i32x8 widen_bytes<f32x8>(const uint8_t* p) {
  uint64_t word;
  std::memcpy(&word, p, sizeof(word));
  return __builtin_ia32_pmovzxbd256((i8x16)u64x2{word, 0});
}
template <>
VAE_FAST_INLINE i32x16 widen_bytes<f32x16>(const uint8_t* p) {
  i8x16 bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  return __builtin_ia32_pmovzxbd512_mask(bytes, i32x16{}, 0xffff);
}
#endif

// A boolean in a byte for each lane, as all of the lane's bits or none.
template <class F>
VAE_FAST_INLINE typename Traits<F>::Int mask_lanes(const uint8_t* p) {
  if constexpr (Traits<F>::width == 1) {
    return -static_cast<typename Traits<F>::Int>(*p != 0);
  } else {
    return -widen_bytes<F>(p) >> 31;
  }
}

// Whether a lane is not zero.
template <class U>
VAE_FAST_INLINE bool any_lane(U v) {
  uint64_t words[sizeof(v) / sizeof(uint64_t)], any = 0;
  std::memcpy(words, &v, sizeof(v));
  for (const uint64_t word : words) any |= word;
  return any != 0;
}
#if defined(VAE_FAST_GCC_X86)
template <>
VAE_FAST_INLINE bool any_lane(u32x16 v) {
  return __builtin_ia32_ptestmd512((i32x16)v, (i32x16)v, 0xffff) != 0;
}
#endif

// The first n lanes of a vector, n below its width, as they lie in memory; lanes beyond them load
// those of `fill`. Without masks in the instruction set a call of memcpy.
template <class V, class T>
VAE_FAST_INLINE V load_part(const T* p, int64_t n, V fill) {
  std::memcpy(&fill, p, n * sizeof(T));
  return fill;
}
template <class V, class T>
VAE_FAST_INLINE void store_part(T* p, int64_t n, V v) {
  std::memcpy(p, &v, n * sizeof(T));
}
#if defined(VAE_FAST_GCC_X86)
VAE_FAST_INLINE uint16_t first_lanes(int64_t n) { return static_cast<uint16_t>((1u << n) - 1u); }
VAE_FAST_INLINE f32x16 load_part(const float* p, int64_t n, f32x16 fill) {
  return __builtin_ia32_loadups512_mask(p, fill, first_lanes(n));
}
VAE_FAST_INLINE void store_part(float* p, int64_t n, f32x16 v) {
  __builtin_ia32_storeups512_mask(p, v, first_lanes(n));
}
VAE_FAST_INLINE u16x16 load_part(const uint16_t* p, int64_t n, u16x16 fill) {
  return (u16x16)__builtin_ia32_loaddquhi256_mask((const short*)p, (i16x16)fill, first_lanes(n));
}
VAE_FAST_INLINE void store_part(uint16_t* p, int64_t n, u16x16 v) {
  __builtin_ia32_storedquhi256_mask((short*)p, (i16x16)v, first_lanes(n));
}
// AVX2 has no masks for 16-bit lanes.
VAE_FAST_INLINE i32x8 first_lanes_avx2(int64_t n) {
  return i32x8{0, 1, 2, 3, 4, 5, 6, 7} < static_cast<int32_t>(n);
}
VAE_FAST_INLINE f32x8 load_part(const float* p, int64_t n, f32x8 fill) {
  const i32x8 mask = first_lanes_avx2(n);
  return select(mask, (f32x8)__builtin_ia32_maskloadps256((const f32x8*)p, mask), fill);
}
VAE_FAST_INLINE void store_part(float* p, int64_t n, f32x8 v) {
  __builtin_ia32_maskstoreps256((f32x8*)p, first_lanes_avx2(n), v);
}
#endif

// The bits of a float rounded to bf16, to nearest even, in the low half of a lane; a NaN stays one.
template <class F, class U>
VAE_FAST_INLINE U bf16_bits(F f) {
  const U bits = bits_as<U>(f);
  return select(f == f, (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, U{} + 0x7fc0u);
}

// Floats rounded to fp16, to nearest even; a NaN stays one.
template <class F>
VAE_FAST_INLINE auto to_fp16(F f) {
  using U = typename Traits<F>::UInt;
  const U bits = bits_as<U>(f), size = bits & 0x7fffffffu;
  const U normal = (size - (112u << 23) + 0xfffu + ((size >> 13) & 1u)) >> 13;
  // Below 2^-14 the sum with ½ rounds to the 2^-24 that subnormals are multiples of.
  const U tiny = bits_as<U>(bits_as<F>(size) + 0.5f) - 0x3f000000u;
  const U large = select(size > 0x7f800000u, U{} + 0x7e00u, U{} + 0x7c00u);
  const U finite = select(size < 0x38800000u, tiny, normal);
  const U all = select(size < 0x47800000u, finite, large) | ((bits >> 16) & 0x8000u);
  return narrow_lanes<typename Traits<F>::UShort>(all);
}
// And back.
template <class F>
VAE_FAST_INLINE F from_fp16(typename Traits<F>::UShort half) {
  using U = typename Traits<F>::UInt;
  const U bits = widen_lanes<U>(half), size = (bits & 0x7fffu) << 13;
  // 2^-14 more than a subnormal has its bits in the places of a normal number.
  const F tiny = bits_as<F>(size + (113u << 23)) - 6.10351562e-05f;
  const U large = size + (select(size < 0x0f800000u, U{} + 112u, U{} + 224u) << 23);
  const F magnitude = select(size < 0x00800000u, tiny, bits_as<F>(large));
  return bits_as<F>(bits_as<U>(magnitude) | ((bits & 0x8000u) << 16));
}
#if defined(VAE_FAST_GCC_X86)
typedef short i16x8 __attribute__((vector_size(16)));
VAE_FAST_INLINE u16x16 to_fp16(f32x16 f) {
  return (u16x16)__builtin_ia32_vcvtps2ph512_mask(f, 0, i16x16{}, 0xffff);
}
VAE_FAST_INLINE u16x8 to_fp16(f32x8 f) { return (u16x8)__builtin_ia32_vcvtps2ph256(f, 0); }
template <>
VAE_FAST_INLINE f32x16 from_fp16(u16x16 half) {
  return __builtin_ia32_vcvtph2ps512_mask((i16x16)half, f32x16{}, 0xffff, 4);
}
template <>
VAE_FAST_INLINE f32x8 from_fp16(u16x8 half) {
  return __builtin_ia32_vcvtph2ps256((i16x8)half);
}
#endif

// The sign of a difference, as a mask that may be used many times.
template <class F>
struct Negative {
  using I = typename Traits<F>::Int;
  I mask;
  VAE_FAST_INLINE explicit Negative(F d) : mask(bits_as<I>(d) >> 31) {}
  VAE_FAST_INLINE F choose(F yes, F no) const {
    return bits_as<F>((bits_as<I>(yes) & mask) | (bits_as<I>(no) & ~mask));
  }
};
template <>
struct Negative<double> {
  bool mask;
  VAE_FAST_INLINE explicit Negative(double d) : mask(d < 0.0) {}
  VAE_FAST_INLINE double choose(double yes, double no) const { return mask ? yes : no; }
};

template <class F>
VAE_FAST_INLINE F absolute(F v) {
  return Negative<F>(v).choose(-v, v);
}

// a·b, and 0 where either is 0, whatever the other.
template <class F>
VAE_FAST_INLINE F product_or_zero(F a, F b) {
  using I = typename Traits<F>::Int;
  // Bits without their sign are 0 or more, and one less is negative for 0 alone.
  const I zero = ((bits_as<I>(a) & 0x7fffffff) - 1) | ((bits_as<I>(b) & 0x7fffffff) - 1);
  return bits_as<F>(bits_as<I>(a * b) & ~(zero >> 31));
}
VAE_FAST_INLINE double product_or_zero(double a, double b) {
  return a == 0.0 || b == 0.0 ? 0.0 : a * b;
}

// ---- log, exp, sine and cosine -------------------------------------------------------------
//
// Polynomials are summed in pairs, not term by term: as many instructions, which wait less for each
// other.

// Natural logarithm of a positive normal number: x = 2^e·(1+f) with 1+f in [√½, √2), and a
// degree-7 minimax polynomial for (log(1+f) − f + f²/2)/f³ (relative error 6e-9).
template <class F>
VAE_FAST_INLINE F log_normal(F x) {
  using U = typename Traits<F>::UInt;
  using I = typename Traits<F>::Int;
  const U shifted = bits_as<U>(x) - 0x3f3504f3u;  // bits of √½
  const F e = to_float(bits_as<I>(shifted) >> 23);
  const F f = bits_as<F>((shifted & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  const F f2 = f * f, f4 = f2 * f2;
  const F p01 = f * -0.250008106f + 0.333333164f, p23 = f * -0.166245535f + 0.200022861f;
  const F p45 = f * -0.131287545f + 0.141811922f, p67 = f * -0.078596063f + 0.128816441f;
  const F p = (p67 * f2 + p45) * f4 + (p23 * f2 + p01);
  // ln 2 in two parts: the high one times any exponent is exact.
  return e * 0.693359375f + (f + ((e * -2.12194440e-4f + f * f2 * p) - 0.5f * f2));
}

template <int kTimes, class F>
VAE_FAST_INLINE F log_normal_times(F x) {
  return log_normal(x) * static_cast<float>(kTimes);
}
#if defined(VAE_FAST_GCC_X86)
// With tables of sixteen in registers: x = 2^e·m, m in [1, 2), r about 1/m from the table, f = m·r − 1,
// and log x = e·ln 2 − log r + log(1+f), by a degree-3 minimax polynomial for (log(1+f) − f)/f²
// (relative error 3e-9). Towards 1 from either side r is 1 or ½, whence all but log(1+f) is exactly 0;
// the other r were searched for a logarithm that is a float to 13 digits. All is kTimes as large, a
// power of two, at no cost.
template <int kTimes>
VAE_FAST_INLINE f32x16 log_normal_times(f32x16 x) {
#define VAE_FAST_TABLE(_)                                                                        \
  {_(1.0f),         _(0.913425744f), _(0.86409837f),  _(0.821119666f), _(0.781135321f),         \
   _(0.744657218f), _(0.710069656f), _(0.680412114f), _(0.652004123f), _(0.627876878f),         \
   _(0.602709115f), _(0.581756234f), _(0.562065065f), _(0.541504622f), _(0.524453163f), _(0.5f)}
#define VAE_FAST_INVERSE(R) kTimes * R
#define VAE_FAST_LOG(R) -kTimes * static_cast<float>(__builtin_log(R))
  constexpr f32x16 inverses = VAE_FAST_TABLE(VAE_FAST_INVERSE), logs = VAE_FAST_TABLE(VAE_FAST_LOG);
#undef VAE_FAST_LOG
#undef VAE_FAST_INVERSE
#undef VAE_FAST_TABLE
  constexpr float times = kTimes, ln2 = times * 0.693147181f;
  constexpr float c0 = -0.5f / times, c1 = 0.333344519f / (times * times);
  constexpr float c2 = -0.250068545f / (times * times * times);
  constexpr float c3 = 0.188555703f / (times * times * times * times);
  const f32x16 m = __builtin_ia32_getmantps512_mask(x, 0, f32x16{}, 0xffff, 4);
  const f32x16 e = __builtin_ia32_getexpps512_mask(x, f32x16{}, 0xffff, 4);
  const u32x16 index = bits_as<u32x16>(m) >> 19;
  const f32x16 f = m * pick(inverses, index) - times, f2 = f * f;
  const f32x16 p = (f * c3 + c2) * f2 + (f * c1 + c0);
  return (p * f2 + f) + (e * ln2 + pick(logs, index));
}
VAE_FAST_INLINE f32x16 log_normal(f32x16 x) { return log_normal_times<1>(x); }
#endif

template <class F>
VAE_FAST_INLINE F log_any(F x) {
  // A subnormal is scaled by 2²³, and 23·ln 2 taken off again.
  const F normal = select(x < 1.17549435e-38f, x * 8388608.0f, x);
  const F y = log_normal(normal) - select(normal == x, F{}, splat<F>(15.9423847f));
  const F finite = select(x == 0.0f, splat<F>(-INFINITY), select(x < 0.0f, splat<F>(NAN), y));
  return select(x < INFINITY, finite, x);  // +inf and NaN pass through
}
VAE_FAST_INLINE double log_normal(double x) { return log(x); }
VAE_FAST_INLINE double log_any(double x) { return log(x); }

// (e^f − 1 − f)/f² for |f| ≤ ½ln 2: a degree-4 minimax polynomial, whose error is 3e-9 in e^f.
template <class F>
VAE_FAST_INLINE F exp_rest_near_zero(F f) {
  const F f2 = f * f;
  const F p01 = f * 0.166665196f + 0.5f, p23 = f * 0.00836888235f + 0.041666206f;
  return (f2 * 0.00139504799f + p23) * f2 + p01;
}

// Its series ½ + t/3! + t²/4! + …, for |t| up to ½.
VAE_FAST_INLINE double exp_rest_near_zero(double t) {
  constexpr double terms[] = {
      1.0 / 1307674368000, 1.0 / 87178291200, 1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800,
      1.0 / 3628800,       1.0 / 362880,      1.0 / 40320,      1.0 / 5040,      1.0 / 720,
      1.0 / 120,           1.0 / 24,          1.0 / 6,          0.5};
  double sum = 0.0;
  for (const double term : terms) sum = sum * t + term;
  return sum;
}

template <class F>
VAE_FAST_INLINE F exp_near_zero(F f) {
  return (exp_rest_near_zero(f) * (f * f) + f) + 1.0f;
}

// A factor e^t kept as its square root, so that d·e^t overflows or underflows only where the exact
// product does, and 0·e^t is 0 for every finite t.
template <class F>
struct Exp {
  F root;
  VAE_FAST_INLINE F times(F d) const { return d * root * root; }
};

// e^(t/2) = 2^n·e^f. Beyond |t| = 172 the root stays where it is: every product that this changes
// is 0 or infinite.
template <class F>
VAE_FAST_INLINE Exp<F> exp_of(F t) {
  using I = typename Traits<F>::Int;
  F h = t * 0.5f;
  h = select(h < -86.0f, splat<F>(-86.0f), h);  // false for NaN, which passes through
  h = select(h > 86.0f, splat<F>(86.0f), h);
  const F shifted = h * 1.44269504f + 12582912.0f;  // 1.5·2²³: the sum rounds to an integer
  const F n = shifted - 12582912.0f;
  const F f = (h - n * 0.693359375f) - n * -2.12194440e-4f;
  // For NaN any exponent will do, since the other factor is NaN.
  return {exp_near_zero(f) * bits_as<F>((bits_as<I>(shifted) - (0x4b400000 - 127)) << 23)};
}
#if defined(VAE_FAST_GCC_X86)
// With an instruction that multiplies by any 2^n, the factor is kept as 2^n·p instead: p < 1, so that
// d·p cannot overflow, but for a large factor 2^24 times that, so that of the smallest d nothing is
// lost on the way.
template <>
struct Exp<f32x16> {
  f32x16 n, p;
  VAE_FAST_INLINE f32x16 times(f32x16 d) const { return times_power(d * p, n); }
};
// e^t = 2^n·p, p from √½ to √2.
VAE_FAST_INLINE Exp<f32x16> split_exp(f32x16 t) {
  t = minimum(splat<f32x16>(300.0f), maximum(splat<f32x16>(-300.0f), t));
  const f32x16 n = (t * 1.44269504f + 12582912.0f) - 12582912.0f;
  return {n, exp_near_zero((t - n * 0.693359375f) - n * -2.12194440e-4f)};
}
VAE_FAST_INLINE Exp<f32x16> exp_of(f32x16 t) {
  const Exp<f32x16> e = split_exp(t);
  const f32x16 ahead = select(e.n > 24.0f, splat<f32x16>(24.0f), f32x16{}) - 1.0f;
  return {e.n - ahead, times_power(e.p, ahead)};
}
#endif
VAE_FAST_INLINE Exp<double> exp_of(double t) {
  t = t < -1400.0 ? -1400.0 : t;
  t = t > 1400.0 ? 1400.0 : t;
  return {exp(0.5 * t)};
}

// e^t itself.
template <class F>
VAE_FAST_INLINE F exp_any(F t) {
  const F root = exp_of(t).root;
  return root * root;
}
#if defined(VAE_FAST_GCC_X86)
VAE_FAST_INLINE f32x16 exp_any(f32x16 t) {
  const Exp<f32x16> e = split_exp(t);
  return times_power(e.p, e.n);
}
#endif
VAE_FAST_INLINE double exp_any(double t) { return exp(t); }

// e^t for a moderate t, of which 2^n is a normal number with room: half of exp_of's work. `place` is
// t's among the moderate ones, less than kPlaces for these alone: from 2^-32 to 2^32, |t| < 21.8 at
// least.
template <class F>
struct ModerateExp {
  using U = typename Traits<F>::UInt;  // which may overflow, for a t that is not moderate
  static constexpr uint32_t kPlaces = 64;
  F value;
  U place;
  VAE_FAST_INLINE explicit ModerateExp(F t) {
    const F shifted = t * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;  // as in exp_of
    // Up to there ln 2 in one part is close enough (6e-8 in e^t at the end) if n·ln 2 is not rounded,
    // which takes the fused multiply-add of the wider vectors' instruction sets.
    const F f = Traits<F>::width > 4 ? t - n * 0.693147181f
                                     : (t - n * 0.693359375f) - n * -2.12194440e-4f;
    value = bits_as<F>(bits_as<U>(exp_near_zero(f)) + (bits_as<U>(shifted) << 23));
    place = bits_as<U>(shifted) - (0x4b400000u - kPlaces / 2);
  }
};
#if defined(VAE_FAST_GCC_X86)
// n in sixteenths, whose 2^n are in a table: that of the whole part is added to its bits, less the
// sixteenths which the shift adds along with it.
template <>
struct ModerateExp<f32x16> {
  static constexpr uint32_t kPlaces = 64 * 16;
  f32x16 value;
  u32x16 place;
  VAE_FAST_INLINE explicit ModerateExp(f32x16 t) {
    constexpr u32x16 sixteenths{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    constexpr f32x16 powers{1.0f,        1.04427378f, 1.09050773f, 1.13878863f,
                            1.18920712f, 1.24185781f, 1.29683955f, 1.35425555f,
                            1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f,
                            1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f};
    const u32x16 table = bits_as<u32x16>(powers) - (sixteenths << 19);
    const f32x16 shifted = t * 1.44269504f + 786432.0f, n = shifted - 786432.0f;  // 1.5·2¹⁹
    const f32x16 f = t - n * 0.693147181f, f2 = f * f;
    const u32x16 index = bits_as<u32x16>(shifted);
    const u32x16 power = bits_as<u32x16>(pick(bits_as<f32x16>(table), index)) + (index << 19);
    // (e^f − 1 − f)/f² for |f| ≤ ln 2/32, whose error is 2e-9 in e^f.
    const f32x16 rest = f * 0.166670546f + 0.500016212f;
    value = (rest * f2 + f) * bits_as<f32x16>(power) + bits_as<f32x16>(power);
    place = index - (0x49400000u - kPlaces / 2);
  }
};
#endif

// sin(2πu) and cos(2πu) for u in [0, 1], given as kTurn·u: the nearest quarter turn is removed exactly,
// and minimax polynomials in f² serve both (errors 5e-9 and 5e-11).
template <class F>
inline constexpr float kTurn = 4.0f;
template <class F>
VAE_FAST_INLINE void sincos_turns(F turns, F& sine, F& cosine) {
  using U = typename Traits<F>::UInt;
  const F shifted = turns + 12582912.0f;
  const U quarter = bits_as<U>(shifted);  // the low bits count quarter turns
  const F f = turns - (shifted - 12582912.0f);
  const F f2 = f * f, f4 = f2 * f2;
  const F s01 = f2 * -0.64596349f + 1.57079637f, s23 = f2 * -0.00460217707f + 0.0796802267f;
  const F s = (s23 * f4 + s01) * f;
  const F c12 = f2 * 0.253669232f - 1.23370051f, c34 = f2 * 0.000904021668f - 0.0208602883f;
  const F c = (c34 * f4 + c12) * f2 + 1.0f;
  // An odd number of quarter turns swaps sine and cosine; bit 1 of the count holds the sign.
  const U swap = (bits_as<U>(s) ^ bits_as<U>(c)) & (0u - (quarter & 1u));
  sine = bits_as<F>(bits_as<U>(s) ^ swap ^ ((quarter & 2u) << 30));
  cosine = bits_as<F>(bits_as<U>(c) ^ swap ^ (((quarter + 1u) & 2u) << 30));
}

#if defined(VAE_FAST_GCC_X86)
// With tables: the nearest sixteenth of a turn is removed, and the addition theorems put it back.
template <>
inline constexpr float kTurn<f32x16> = 16.0f;
VAE_FAST_INLINE void sincos_turns(f32x16 turns, f32x16& sine, f32x16& cosine) {
  constexpr float a = 0.382683432f, b = 0.707106781f, c = 0.923879533f;  // sin π/8, 2π/8, 3π/8
  constexpr f32x16 sines{0, a, b, c, 1, c, b, a, 0, -a, -b, -c, -1, -c, -b, -a};
  constexpr f32x16 cosines{1, c, b, a, 0, -a, -b, -c, -1, -c, -b, -a, 0, a, b, c};
  const f32x16 shifted = turns + 12582912.0f;
  const f32x16 f = turns - (shifted - 12582912.0f), f2 = f * f;
  const f32x16 s = ((f2 * 7.77177484e-05f - 0.0100931786f) * f2 + 0.392699093f) * f;
  const f32x16 c1 = (f2 * 0.000989124994f - 0.077106148f) * f2;  // cos − 1
  const f32x16 turn_s = pick(sines, bits_as<u32x16>(shifted));
  const f32x16 turn_c = pick(cosines, bits_as<u32x16>(shifted));
  sine = (turn_s * c1 + turn_c * s) + turn_s;
  cosine = (turn_c * c1 - turn_s * s) + turn_c;
}
#endif

// log(1+w) for w in [0, 1]: a degree-8 minimax polynomial for (log(1+w) − w)/w² (relative error
// 5e-9).
template <class F>
VAE_FAST_INLINE F log1p_unit(F w) {
  const F w2 = w * w;
  const F p01 = w * 0.33330464f - 0.4999993f, p23 = w * 0.19692102f - 0.24958019f;
  const F p45 = w * 0.10661128f - 0.1534488f, p67 = w * 0.020086242f - 0.05745723f;
  const F p = ((w2 * -0.0032904686f + p67) * w2 + p45) * (w2 * w2) + (p23 * w2 + p01);
  return w2 * p + w;
}
VAE_FAST_INLINE double log1p_unit(double w) { return log1p(w); }

// e^t − 1 − t and e^t − 1, which near zero come from the polynomial above without its leading terms.
template <class F>
struct ExpMinusOne {
  F minus_t, value;
  VAE_FAST_INLINE explicit ExpMinusOne(F t) {
    const Negative<F> small(absolute(t) - 0.34f);
    const F f = small.choose(t, F{});
    const F rest = f * f * exp_rest_near_zero(f);
    const F far = exp_any(t) - 1.0f;
    minus_t = small.choose(rest, far - t);
    value = small.choose(f + rest, far);
  }
};
template <>
struct ExpMinusOne<double> {
  double minus_t, value;
  VAE_FAST_INLINE explicit ExpMinusOne(double t) : value(expm1(t)) {
    minus_t = t > -0.5 && t < 0.5 ? t * t * exp_rest_near_zero(t) : value - t;
  }
};

// ---- scale parameters ----------------------------------------------------------------------

// What a raw scale parameter s says of σ: log σ, σ, d(log σ)/ds, and division by σ that is finite
// wherever the exact quotient is and 0 for a zero dividend.
template <class F, Param P>
struct Scale;

// Whether σ is an exponential of s.
constexpr bool is_exponential(Param param) {
  return param == Param::logvar || param == Param::logstd;
}

template <class F>
struct ExpScale {
  F log_sigma, log_variance;
  F slope;  // d(log σ)/ds
  VAE_FAST_INLINE F times_slope(F g) const { return g * slope; }
  VAE_FAST_INLINE F sigma() const { return exp_any(log_sigma); }
  VAE_FAST_INLINE F inverse_root() const {
    return exp_any(log_sigma * typename Traits<F>::Scalar(-0.5));
  }
  VAE_FAST_INLINE Exp<F> inverse() const { return exp_of(-log_sigma); }
};

template <class F>
struct Scale<F, Param::logvar> : ExpScale<F> {
  using T = typename Traits<F>::Scalar;
  VAE_FAST_INLINE explicit Scale(F s) : ExpScale<F>{s * T(0.5), s, splat<F>(T(0.5))} {}
};

template <class F>
struct Scale<F, Param::logstd> : ExpScale<F> {
  using T = typename Traits<F>::Scalar;
  VAE_FAST_INLINE explicit Scale(F s) : ExpScale<F>{s, s * T(2), splat<F>(T(1))} {}
};

// What an element multiplies with: σ, 1/σ or 1/σ².
enum class Factor { sigma, inverse, precision };

// A scale whose factor is at hand, and so moderate that it can be multiplied with as it is.
template <class F, Param P, Factor kFactor>
struct ModerateScale : Scale<F, P> {
  F factor;
  VAE_FAST_INLINE ModerateScale(F s, F factor_) : Scale<F, P>(s), factor(factor_) {}
  VAE_FAST_INLINE F sigma() const {
    static_assert(kFactor == Factor::sigma);
    return factor;
  }
  VAE_FAST_INLINE ModerateScale inverse() const {
    static_assert(kFactor == Factor::inverse);
    return *this;
  }
  VAE_FAST_INLINE F times(F d) const { return d * factor; }
};

// A difference d over σ², and half the square of d over σ.
template <class F>
struct Standardized {
  F over_variance, half_square;
  template <class S>
  VAE_FAST_INLINE Standardized(F d, const S& scale) {
    using T = typename Traits<F>::Scalar;
    const auto inverse = scale.inverse();
    const F r = inverse.times(d);
    over_variance = inverse.times(r);
    half_square = r * T(0.5) * r;  // of r, not of r², which may overflow
  }
  template <Param P>
  VAE_FAST_INLINE Standardized(F d, const ModerateScale<F, P, Factor::precision>& scale) {
    using T = typename Traits<F>::Scalar;
    over_variance = scale.times(d);
    half_square = d * T(0.5) * over_variance;
  }
};

template <class F>
struct Quotient {
  F divisor;
  VAE_FAST_INLINE F times(F d) const {
    return select(d == typename Traits<F>::Scalar(0), d, d / divisor);
  }
};

template <class F>
struct DirectScale {
  F log_sigma;
  F slope;
  F value;
  VAE_FAST_INLINE F sigma() const { return value; }
  VAE_FAST_INLINE F inverse_root() const {
    return typename Traits<F>::Scalar(1) / square_root(value);
  }
  VAE_FAST_INLINE Quotient<F> inverse() const { return {value}; }
};

template <class F>
struct Scale<F, Param::std> : DirectScale<F> {
  using T = typename Traits<F>::Scalar;
  VAE_FAST_INLINE explicit Scale(F s) : DirectScale<F>{log_any(s), T(1) / s, s} {}
  // The slope itself overflows for scales that are no normal numbers.
  VAE_FAST_INLINE F times_slope(F g) const { return g / this->value; }
};

template <class F>
struct Scale<F, Param::var> : DirectScale<F> {
  using T = typename Traits<F>::Scalar;
  F raw;
  VAE_FAST_INLINE explicit Scale(F s)
      : DirectScale<F>{log_any(s) * T(0.5), T(0.5) / s, square_root(s)}, raw(s) {}
  VAE_FAST_INLINE F times_slope(F g) const { return g * T(0.5) / raw; }
};

template <class F>
struct SoftplusInverse {
  Negative<F> tail;
  Exp<F> exponential;
  Quotient<F> quotient;
  VAE_FAST_INLINE F times(F d) const { return tail.choose(exponential.times(d), quotient.times(d)); }
};

template <class F>
struct Scale<F, Param::softplus> {
  using T = typename Traits<F>::Scalar;
  // Below the cut σ = e^s to rounding, and may underflow: log σ and division go through s.
  static constexpr T cut = sizeof(T) == 4 ? T(-17) : T(-37);
  F raw, log_sigma, slope, value;
  Negative<F> tail;
  VAE_FAST_INLINE explicit Scale(F s) : raw(s), tail(s - cut) {
    const Negative<F> negative(s);
    const F w = exp_any(negative.choose(s, -s));
    value = negative.choose(F{}, s) + log1p_unit(w);  // a NaN stays one, through w
    log_sigma = tail.choose(s, log_any(value));
    slope = tail.choose(splat<F>(T(1)), negative.choose(w, splat<F>(T(1))) / ((w + T(1)) * value));
  }
  VAE_FAST_INLINE F times_slope(F g) const { return g * slope; }
  VAE_FAST_INLINE F sigma() const { return value; }
  VAE_FAST_INLINE F inverse_root() const {
    return tail.choose(exp_any(raw * T(-0.5)), T(1) / square_root(value));
  }
  VAE_FAST_INLINE SoftplusInverse<F> inverse() const {
    return {tail, exp_of(-raw), {value}};
  }
};

// A scale of which log σ and 1/√σ are at hand. The latter is finite: a zero divided by σ is zero.
template <class F>
struct ResolvedScale {
  F log_sigma, root;
  F slope = splat<F>(typename Traits<F>::Scalar(1));  // of log σ by itself
  VAE_FAST_INLINE ResolvedScale inverse() const { return *this; }
  VAE_FAST_INLINE F times(F d) const { return d * root * root; }
};

// A raw scale, kept within bounds or not, and what that makes of its gradient.
template <class F>
struct Unbounded {
  F kept;
  VAE_FAST_INLINE F gradient(F g) const { return g; }
};
// Outside of its bounds it has no gradient; a NaN is outside of nothing.
template <class F>
struct Bounded {
  F raw, kept;
  VAE_FAST_INLINE Bounded(F s, F lo, F hi) : raw(s), kept(minimum(hi, maximum(lo, s))) {}
  VAE_FAST_INLINE F gradient(F g) const {
    using I = typename Traits<F>::Int;
    return select(bits_as<I>(kept) == bits_as<I>(raw), g, F{});
  }
};

// m + c·tanh((s − m)/c) of the middle m and half the width c, whose derivative is 1 − tanh².
template <class F>
struct SoftlyBounded {
  using T = typename Traits<F>::Scalar;
  F kept, slope;
  VAE_FAST_INLINE SoftlyBounded(F s, F middle, F reach) {
    const F y = (s - middle) / reach;
    const Negative<F> negative(y);
    const F less = ExpMinusOne<F>(negative.choose(y, -y) * T(2)).value;  // e^(−2|y|) − 1
    const F rest = splat<F>(T(1)) / (less + T(2));
    const F size = -less * rest;
    kept = negative.choose(-size, size) * reach + middle;
    slope = (less + T(1)) * rest * rest * T(4);
  }
  VAE_FAST_INLINE F gradient(F g) const { return slope * g; }
};

}  // namespace vae_fast
