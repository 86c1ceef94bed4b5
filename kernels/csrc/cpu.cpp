// The passes of passes.h: the loops of latent.h and likelihood.h, over tiles of the operands.
//
// The loops are compiled for each instruction set below, and the best one is chosen when the library
// is loaded. Outputs of the backward passes are written whole, whatever was in them.

#include <torch/csrc/stable/ops.h>

#include "lanes.h"
#include "operand.h"
#include "passes.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace vae_fast {

#if defined(__x86_64__)
#define VAE_FAST_TARGET __attribute__((target("arch=x86-64-v4,prefer-vector-width=512")))
namespace avx512 {
#include "latent.h"
#include "likelihood.h"
#include "storage.h"
}  // namespace avx512
#undef VAE_FAST_TARGET
#define VAE_FAST_TARGET __attribute__((target("arch=x86-64-v3")))
namespace avx2 {
#include "latent.h"
#include "likelihood.h"
#include "storage.h"
}  // namespace avx2
#undef VAE_FAST_TARGET
#endif
#define VAE_FAST_TARGET
namespace base {  // SSE2 on x86-64, NEON on AArch64
#include "latent.h"
#include "likelihood.h"
#include "storage.h"
}  // namespace base
#undef VAE_FAST_TARGET

namespace {

bool is_double(const View& t) { return t.type == ScalarType::Double; }

// ---- the instruction set ---------------------------------------------------------------------

enum class Isa { base, avx2, avx512 };

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2")) {
    return Isa::avx2;
  }
#endif
  return Isa::base;
}
const Isa kIsa = best_isa();

StorageKernels storage_kernels() {
#if defined(__x86_64__)
  if (kIsa == Isa::avx512) return avx512::storage_kernels<f32x16>();
  if (kIsa == Isa::avx2) return avx2::storage_kernels<f32x8>();
#endif
  return base::storage_kernels<f32x4>();
}
const StorageKernels kStorage = storage_kernels();

template <class T>
LatentKernels<T> latent_kernels(Param param);
template <>
LatentKernels<double> latent_kernels(Param param) {
  return base::latent_kernels<double>(param);
}
template <>
LatentKernels<float> latent_kernels(Param param) {
#if defined(__x86_64__)
  if (kIsa == Isa::avx512) return avx512::latent_kernels<f32x16>(param);
  if (kIsa == Isa::avx2) return avx2::latent_kernels<f32x8>(param);
#endif
  return base::latent_kernels<f32x4>(param);
}

template <class T>
LikelihoodKernel<T> likelihood_kernel(Param param, bool scalar, bool gradient);
template <>
LikelihoodKernel<double> likelihood_kernel(Param param, bool scalar, bool gradient) {
  return base::likelihood_kernel<double>(param, scalar, gradient);
}
template <>
LikelihoodKernel<float> likelihood_kernel(Param param, bool scalar, bool gradient) {
#if defined(__x86_64__)
  if (kIsa == Isa::avx512) return avx512::likelihood_kernel<f32x16>(param, scalar, gradient);
  if (kIsa == Isa::avx2) return avx2::likelihood_kernel<f32x8>(param, scalar, gradient);
#endif
  return base::likelihood_kernel<f32x4>(param, scalar, gradient);
}

// ---- latent pass -----------------------------------------------------------------------------

// A latent tensor as rows with one element stride. The order of latent elements is the order of the
// noise, so no dimension moves.
struct LatentOperand : Operand {
  bool straight = true;
  LatentOperand() = default;
  explicit LatentOperand(const View& t, int64_t event_from = 1)
      : Operand(operand(t, event_from)) {
    Event event = event_of(t, event_from);
    event.fuse<1>({this}, /*reorder=*/false);
    straight = event.sizes.size() == 1;
  }

  // n elements of each row as T: in place where they already are so, else gathered into `buffer`.
  template <class T>
  Rows<const T> load(int64_t offset, int64_t rows, int64_t begin, int64_t n, T* buffer) const {
    const int64_t stride = strides[0];
    offset += begin * stride;
    if (type == type_of<T> && stride == 1) {
      return {reinterpret_cast<const T*>(at(offset)), row_stride};
    }
    const bool joined = row_stride == n * stride;
    for (int64_t row = 0; row < (joined ? 1 : rows); ++row) {
      gather(*this, offset + row * row_stride, stride, joined ? rows * n : n, buffer + row * n);
    }
    return {buffer, n};
  }
};

// What both directions share: μ and the scale by rows of L elements, and the noise of a group of
// rows. Short rows are grouped, since rows and samples that follow each other have one run of noise.
template <class T>
struct Latent {
  static constexpr int64_t kLanes = sizeof(T) == 4 ? 4 : 2;  // normals per Philox call
  static constexpr int64_t kCalls = kTile / kLanes;          // Philox calls per tile

  int64_t batch, samples, size, calls, group, together, first_row;
  uint64_t seed, offset;
  bool scalar;
  LatentOperand mu, scale;
  T shared[kTile];  // a 0-dim scale, repeated
  LatentKernels<T> kernels;
  Clamp clamp;

  Latent(const View& mu_, const View& scale_, const View& key, const LatentOptions& options)
      : batch(mu_.sizes[0]),
        samples(std::max<int64_t>(options.num_samples, 1)),
        size(event_of(mu_).numel()),
        calls((size + kLanes - 1) / kLanes),
        group(std::max<int64_t>(1, kCalls / std::max<int64_t>(1, calls * samples))),
        together(std::clamp<int64_t>(kCalls / std::max<int64_t>(1, calls), 1, samples)),
        first_row(options.first_row),
        scalar(scale_.dim == 0),
        mu(mu_),
        kernels(latent_kernels<T>(static_cast<Param>(options.param))),
        clamp{options.lo, options.hi} {
    if (scalar) {
      std::fill(shared, shared + std::min(size, kTile), scalar_value<T>(scale_));
    } else {
      scale = LatentOperand(scale_);
    }
    STD_TORCH_CHECK(mu.straight && scale.straight, "vae_fast: a latent tensor needs a copy first");
    const uint64_t* bits = data_of<uint64_t>(key);
    seed = bits[0];
    offset = bits[key.strides[0]];
  }

  // Calls fn(b, rows, begin, n) for the tiles of the latent: `rows` whole rows from row b on, or n
  // elements from `begin` of one long row; in parallel over rows, in order within one.
  template <class Fn>
  void for_tiles(const Fn& fn) const {
    const int64_t cost = 4 * group * std::max<int64_t>(size, 1) * samples;
    torch::stable::parallel_for(
        0, (batch + group - 1) / group, std::max<int64_t>(1, kGrain / cost),
        [&](int64_t first, int64_t last) {
          for (int64_t g = first; g < last; ++g) {
            const int64_t b = g * group, rows = std::min(group, batch - b);
            for (int64_t begin = 0; begin < size; begin += kTile) {
              fn(b, rows, begin, std::min(size - begin, kTile));
            }
          }
        });
  }

  // Calls fn(k, eps) for every sample k of a tile, with its noise.
  template <class Fn>
  void for_samples(int64_t b, int64_t rows, int64_t begin, const Fn& fn) const {
    alignas(64) T eps[kTile + 64];  // room for the last block of 16 counters
    const int64_t per_row = std::min(calls - begin / kLanes, kCalls);
    for (int64_t first = 0; first < samples; first += together) {
      const int64_t count = std::min(together, samples - first);
      const uint64_t row = (uint64_t(first_row) + b) * samples + first;
      kernels.noise(rows * count * per_row, offset + row * calls + begin / kLanes,
                    static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), eps);
      for (int64_t k = 0; k < count; ++k) {
        const int64_t pitch = per_row * kLanes;
        fn(first + k, Rows<const T>{eps + k * pitch, count * pitch});
      }
    }
  }

  Rows<const T> load_mu(int64_t b, int64_t rows, int64_t begin, int64_t n, T* buffer) const {
    return mu.load(b * mu.row_stride, rows, begin, n, buffer);
  }
  // The clamped scale, and which elements' gradients that makes zero.
  Rows<const T> load_scale(int64_t b, int64_t rows, int64_t begin, int64_t n, T* buffer,
                           bool* zero) const {
    const Rows<const T> raw = scalar ? Rows<const T>{shared, 0}
                                     : scale.load(b * scale.row_stride, rows, begin, n, buffer);
    if (!clamp.active()) return raw;
    for (int64_t row = 0; row < rows; ++row) {
      clamp.apply(raw[row], n, buffer + row * n, zero + row * n);
    }
    return {buffer, n};
  }
};

template <class T>
void latent_forward_as(const View& mu, const View& scale, const View& key,
                       const LatentOptions& options, const View& z, const View& log_q,
                       const View& log_p) {
  const Latent<T> latent(mu, scale, key, options);
  T* const q = data_of<T>(log_q);
  T* const p = data_of<T>(log_p);
  const int64_t count = latent.samples * latent.batch;
  std::fill(q, q + count, static_cast<T>(-kHalfLog2Pi * latent.size));
  std::fill(p, p + count, static_cast<T>(-kHalfLog2Pi * latent.size));

  const Output<T> out(z);
  latent.for_tiles([&](int64_t b, int64_t group, int64_t begin, int64_t n) {
    alignas(64) T mu_tile[kTile], scale_tile[kTile], z_tile[kTile];
    bool zero[kTile];
    const Rows<const T> mus = latent.load_mu(b, group, begin, n, mu_tile);
    const Rows<const T> scales = latent.load_scale(b, group, begin, n, scale_tile, zero);
    latent.for_samples(b, group, begin, [&](int64_t k, Rows<const T> eps) {
      const int64_t row = k * latent.batch + b, at = row * latent.size + begin;
      T* const to = out.target(at, z_tile);
      latent.kernels.forward(group, n, mus, scales, eps, {to, n}, q + row, p + row);
      out.store(at, group * n, to);
    });
  });
}

template <class T>
void latent_backward_as(const View& g_z, const View& g_log_q, const View& g_log_p, const View& mu,
                        const View& scale, const View& key, const LatentOptions& options,
                        const View& g_mu, const View& g_scale) {
  const Latent<T> latent(mu, scale, key, options);
  const Output<T> out_mu(g_mu), out_scale(g_scale);
  std::vector<T> g_shared(latent.scalar ? latent.batch : 0, T(0));

  const bool sampled = options.num_samples > 0;
  LatentOperand upstream;
  if (g_z) upstream = LatentOperand(g_z, sampled ? 2 : 1);
  STD_TORCH_CHECK(upstream.straight, "vae_fast: a latent tensor needs a copy first");
  const int64_t sample_stride = g_z && sampled ? g_z.strides[0] : 0;
  const RowValues<T> q(g_log_q, latent.batch), p(g_log_p, latent.batch);

  latent.for_tiles([&](int64_t b, int64_t group, int64_t begin, int64_t n) {
    alignas(64) T mu_tile[kTile], scale_tile[kTile], z_tile[kTile], gm_tile[kTile], gs_tile[kTile];
    bool zero[kTile];
    const Rows<const T> mus = latent.load_mu(b, group, begin, n, mu_tile);
    const Rows<const T> scales = latent.load_scale(b, group, begin, n, scale_tile, zero);
    const int64_t at = b * latent.size + begin;
    T* const gm = out_mu.target(at, gm_tile);
    T* const gs = latent.scalar ? gs_tile : out_scale.target(at, gs_tile);
    if (!g_z) std::fill(z_tile, z_tile + n, T(0));
    latent.for_samples(b, group, begin, [&](int64_t k, Rows<const T> eps) {
      Rows<const T> g_zs{z_tile, 0};
      if (g_z) {
        const int64_t from = k * sample_stride + b * upstream.row_stride;
        g_zs = upstream.load(from, group, begin, n, z_tile);
      }
      const int64_t row = k * latent.batch + b;
      latent.kernels.backward(group, n, mus, scales, eps, g_zs, q.from(row), p.from(row), {gm, n},
                              {gs, n}, /*add=*/k > 0);
    });
    if (latent.clamp.active()) zero_where(zero, group * n, gs);
    out_mu.store(at, group * n, gm);
    if (!latent.scalar) out_scale.store(at, group * n, gs);
    for (int64_t i = 0; latent.scalar && i < group; ++i) {
      g_shared[b + i] += tree_sum<T>(i * n, (i + 1) * n, [&](int64_t j) { return gs[j]; });
    }
  });
  if (latent.scalar) {
    store_scalar(g_scale, tree_sum<T>(0, latent.batch, [&](int64_t b) { return g_shared[b]; }));
  }
}

// ---- likelihood pass -------------------------------------------------------------------------

// ∂loss/∂(row's term), for an upstream gradient of one.
template <class T>
T row_share(int64_t rows, int64_t samples, Reduction reduction) {
  if (reduction == Reduction::no_loss) return T(0);
  return T(1) / static_cast<T>(reduction == Reduction::mean ? std::max<int64_t>(rows, 1) : samples);
}

constexpr int64_t kStreamed = int64_t(1) << 21;  // bytes of a gradient that go past the caches
constexpr int64_t kVector = 64;                  // bytes of the widest vector

// The operands of one likelihood op and the loop over them.
template <class T>
struct Likelihood {
  int64_t batch, rows, samples, size, pieces;
  bool scalar, need_x = false;
  Event event;
  Operand x, mean, scale, mask, g_x, g_mean, g_scale;
  T shared = T(0);        // a 0-dim scale, clamped
  T shared_slope = T(1);  // and its clamp's derivative
  Param param;
  Clamp clamp;

  Likelihood(const View& x_, const View& mean_, const View& scale_, const View& mask_,
             const LikelihoodOptions& options)
      : batch(x_.sizes[0]),
        rows(mean_.sizes[0]),
        samples(batch > 0 ? rows / batch : 1),
        scalar(scale_ && scale_.dim == 0),
        event(event_of(x_)),
        x(operand(x_)),
        param(static_cast<Param>(options.param)),
        clamp{options.lo, options.hi} {
    size = event.numel();
    pieces = std::max<int64_t>(1, (size + kPiece - 1) / kPiece);
    split(mean_, scale_, mean, scale);
    if (scalar) {
      const T raw = scalar_value<T>(scale_);
      shared = clamp.of(raw);
      shared_slope = clamp.outside(raw) ? T(0) : T(1);
    }
    if (mask_) mask = operand(mask_);
  }

  void gradients(const View& g_mean_, const View& g_scale_) {
    split(g_mean_, g_scale_, g_mean, g_scale);
  }

  // Call once all operands are known.
  void fuse() {
    event.fuse<7>({&mean, &x, &scale, &mask, &g_x, &g_mean, &g_scale}, /*reorder=*/true);
  }

  // Runs the pass. weight holds the rows' upstream gradients; value and g_shared receive the rows'
  // −log p(x|z) and their shares of a scalar scale's gradient.
  void run(bool gradient, Rows<const T> weight, T* value, T* g_shared) const {
    const LikelihoodKernel<T> kernel = likelihood_kernel<T>(param, scalar, gradient);
    // With a gradient for x, the samples that share a row of x belong to one unit of work.
    const int64_t first_rows = need_x ? batch : rows;
    std::vector<LikelihoodTerms<T>> terms(rows * pieces);
    const int64_t work = std::max<int64_t>(1, std::min(size, kPiece)) * (need_x ? samples : 1);
    const bool direct = reads_in_place(gradient), stream = direct && gradient && streams();
    torch::stable::parallel_for(
        0, first_rows * pieces, std::max<int64_t>(1, kGrain / work),
        [&](int64_t first, int64_t last) {
          if (direct && pieces == 1) {
            run_rows(kernel, gradient, first, last, 0, size, weight, stream,
                     terms.data() + first);
            return;
          }
          std::vector<T> x_sum(need_x ? std::min(size, kPiece) : 0);
          for (int64_t unit = first; unit < last; ++unit) {
            const int64_t piece = unit % pieces, begin = piece * kPiece, row = unit / pieces;
            const int64_t end = std::min(size, begin + kPiece);
            if (direct) {
              run_rows(kernel, gradient, row, row + 1, begin, end, weight, stream, &terms[unit]);
              continue;
            }
            std::fill(x_sum.begin(), x_sum.end(), T(0));
            for (int64_t n = row; n < rows; n += first_rows) {
              terms[n * pieces + piece] =
                  run_piece(kernel, gradient, n, begin, end, weight[n], x_sum.data());
            }
            if (need_x) {
              event.store(g_x, row, begin, end - begin, static_cast<const T*>(x_sum.data()));
            }
          }
        });
    for (int64_t n = 0; n < rows; ++n) {
      const auto total = [&](T LikelihoodTerms<T>::*part) {
        return tree_sum<T>(n * pieces, (n + 1) * pieces, [&](int64_t i) { return terms[i].*part; });
      };
      if (value) value[n] = total(&LikelihoodTerms<T>::value);
      // Selected, not multiplied, since the gradient outside the clamp may be infinite.
      if (g_shared) g_shared[n] = shared_slope == T(0) ? T(0) : total(&LikelihoodTerms<T>::g_scale);
    }
  }

 private:
  // The mean's and the scale's operands: two tensors, or the halves of a packed dimension 1.
  void split(const View& mean_, const View& scale_, Operand& m, Operand& s) const {
    m = operand(mean_);
    if (!scale_) {
      s = m;
      s.data = s.at(mean_.sizes[1] / 2 * mean_.strides[1]);
    } else if (!scalar) {
      s = operand(scale_);
    }
  }

  // Whether a kernel can read and write the operands' own memory, row by row.
  bool reads_in_place(bool gradient) const {
    const auto fits = [&](const Operand& o) { return event.direct<T>(o); };
    return !mask && !need_x && fits(x) && fits(mean) && (!gradient || fits(g_mean)) &&
           (scalar || (!clamp.active() && fits(scale) && (!gradient || fits(g_scale))));
  }

  // Whether the gradients go past the caches: if they are larger, aligned, and not written in place.
  bool streams() const {
    const auto suits = [&](const Operand& g, const Operand& of) {
      return g.data != of.data && reinterpret_cast<uintptr_t>(g.data) % kVector == 0 &&
             g.row_stride * sizeof(T) % kVector == 0;
    };
    return rows * size * static_cast<int64_t>(sizeof(T)) >= kStreamed && suits(g_mean, mean) &&
           (scalar || suits(g_scale, scale));
  }

  // Rows [first, last) of a batch and its samples, or a piece of each, in place.
  void run_rows(LikelihoodKernel<T> kernel, bool gradient, int64_t first, int64_t last,
                int64_t begin, int64_t end, Rows<const T> weight, bool stream,
                LikelihoodTerms<T>* terms) const {
    const auto in = [&](const Operand& o, int64_t row) {
      return Rows<const T>{reinterpret_cast<const T*>(o.at(row * o.row_stride + begin)),
                           o.row_stride};
    };
    const auto out = [&](const Operand& o, int64_t row) {
      return Rows<T>{reinterpret_cast<T*>(o.at(row * o.row_stride + begin)), o.row_stride};
    };
    for (int64_t n = first; n < last;) {
      const int64_t b = n % batch, count = std::min(last - n, batch - b);  // of one sample
      kernel(count, end - begin, in(x, b), in(mean, n),
             scalar ? Rows<const T>{&shared, 0} : in(scale, n), {weight[n], weight.pitch},
             gradient ? out(g_mean, n) : Rows<T>{},
             gradient && !scalar ? out(g_scale, n) : Rows<T>{}, stream, terms);
      n += count;
      terms += count;
    }
  }

  // One piece of one row, tile by tile.
  LikelihoodTerms<T> run_piece(LikelihoodKernel<T> kernel, bool gradient, int64_t n, int64_t begin,
                               int64_t end, const T* weight, T* x_sum) const {
    T x_tile[kTile], m_tile[kTile], s_tile[kTile], gm_tile[kTile], gs_tile[kTile];
    bool zero[kTile];
    const int64_t b = samples == 1 ? n : n % batch;
    LikelihoodTerms<T> sum{T(0), T(0)};
    for (; begin < end; begin += kTile, x_sum += kTile) {
      const int64_t count = std::min(end - begin, kTile);
      const T* xs = event.load(x, b, begin, count, x_tile);
      const T* ms = event.load(mean, n, begin, count, m_tile);
      const T* ss = scalar ? &shared : event.load(scale, n, begin, count, s_tile);
      const bool clamped = !scalar && clamp.active();
      if (clamped) ss = clamp.apply(ss, count, s_tile, zero);
      LikelihoodTerms<T> terms;
      if (mask) {
        terms = masked_tile(kernel, gradient, n, b, begin, count, xs, ms, ss, weight, x_sum,
                            clamped ? zero : nullptr);
      } else {
        T* gm = gradient ? event.target(g_mean, n, begin, gm_tile) : nullptr;
        T* gs = gradient && !scalar ? event.target(g_scale, n, begin, gs_tile) : nullptr;
        kernel(1, count, {xs, 0}, {ms, 0}, {ss, 0}, {weight, 0}, {gm, 0}, {gs, 0}, false, &terms);
        if (gs && clamped) zero_where(zero, count, gs);
        if (gradient) store_gradients(n, begin, count, gm, gs, x_sum);
      }
      sum.value += terms.value;
      sum.g_scale += terms.g_scale;
    }
    return sum;
  }

  // The selected elements are packed together, and only they are ever computed on.
  LikelihoodTerms<T> masked_tile(LikelihoodKernel<T> kernel, bool gradient, int64_t n, int64_t b,
                                 int64_t begin, int64_t count, const T* xs, const T* ms,
                                 const T* ss, const T* weight, T* x_sum,
                                 const bool* zero) const {
    T x_kept[kTile], m_kept[kTile], s_kept[kTile], gm_kept[kTile], gs_kept[kTile];
    int64_t index[kTile + 1], kept = 0;
    event.runs(mask, b, begin, count, [&](int64_t offset, int64_t stride, int64_t at, int64_t run) {
      const char* keep = mask.at(offset);
      for (int64_t i = 0; i < run; ++i) {
        index[kept] = at + i;
        kept += keep[i * stride] != 0;
      }
    });
    s_kept[0] = *ss;
    for (int64_t i = 0; i < kept; ++i) {
      x_kept[i] = xs[index[i]];
      m_kept[i] = ms[index[i]];
      if (!scalar) s_kept[i] = ss[index[i]];
    }
    LikelihoodTerms<T> terms;
    kernel(1, kept, {x_kept, 0}, {m_kept, 0}, {s_kept, 0}, {weight, 0}, {gm_kept, 0}, {gs_kept, 0},
           false, &terms);
    if (gradient) {
      T gm_tile[kTile] = {}, gs_tile[kTile] = {};
      for (int64_t i = 0; i < kept; ++i) {
        gm_tile[index[i]] = gm_kept[i];
        if (!scalar) gs_tile[index[i]] = gs_kept[i];
      }
      if (zero) zero_where(zero, count, gs_tile);
      store_gradients(n, begin, count, gm_tile, gs_tile, x_sum);
    }
    return terms;
  }

  void store_gradients(int64_t n, int64_t begin, int64_t count, const T* gm, const T* gs,
                       T* x_sum) const {
    if (need_x) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) x_sum[i] -= gm[i];  // ∂x = −∂m
    }
    event.store(g_mean, n, begin, count, gm);
    if (!scalar) event.store(g_scale, n, begin, count, gs);
  }
};

// The loss of rows t = nll + β(log q − log p): the mean over samples, then the reduction.
template <class T>
void finish_loss(const Likelihood<T>& pass, const T* nll, const View& log_q, const View& log_p,
                 const LikelihoodOptions& options, const View& loss) {
  if (!loss) return;
  const RowValues<T> q(log_q, pass.batch), p(log_p, pass.batch);
  const T b = static_cast<T>(options.beta);
  const auto term = [&](int64_t n) { return log_q ? nll[n] + b * (q[n] - p[n]) : nll[n]; };
  T* const out = data_of<T>(loss);
  if (options.reduction == Reduction::none) {
    for (int64_t i = 0; i < pass.batch; ++i) {
      const auto sample = [&](int64_t k) { return term(k * pass.batch + i); };
      out[i] = tree_sum<T>(0, pass.samples, sample) / static_cast<T>(pass.samples);
    }
    return;
  }
  const bool mean = options.reduction == Reduction::mean;
  *out = tree_sum<T>(0, pass.rows, term) / static_cast<T>(mean ? pass.rows : pass.samples);
}

// The latent terms' gradients: ±β times the row's share of the loss gradient.
template <class T>
void latent_gradients(int64_t rows, double beta, T share, const RowValues<T>& g_loss,
                      const View& g_log_q, const View& g_log_p) {
  T* const q = data_of<T>(g_log_q);
  T* const p = data_of<T>(g_log_p);
  for (int64_t n = 0, b = 0; n < rows; ++n, b = b + 1 == g_loss.batch ? 0 : b + 1) {
    q[n] = static_cast<T>(beta) * share * g_loss[b];
    p[n] = -q[n];
  }
}

template <class T>
void likelihood_forward_as(const View& x, const View& mean, const View& scale, const View& mask,
                           const View& log_q, const View& log_p, const LikelihoodOptions& options,
                           const View& nll, const View& loss) {
  Likelihood<T> pass(x, mean, scale, mask, options);
  pass.fuse();
  T* const value = data_of<T>(nll);
  pass.run(/*gradient=*/false, {}, value, nullptr);
  finish_loss<T>(pass, value, log_q, log_p, options, loss);
}

template <class T>
void likelihood_backward_as(const View& g_nll, const View& g_loss, const View& x, const View& mean,
                            const View& scale, const View& mask, const LikelihoodOptions& options,
                            const View& g_x, const View& g_mean, const View& g_scale,
                            const View& g_log_q, const View& g_log_p) {
  Likelihood<T> pass(x, mean, scale, mask, options);
  pass.gradients(g_mean, pass.scalar ? scale : g_scale);
  pass.need_x = g_x.present;
  if (g_x) pass.g_x = operand(g_x);
  pass.fuse();

  const RowValues<T> nll(g_nll, pass.batch), loss(g_loss, pass.batch);
  const T share = row_share<T>(pass.rows, pass.samples, options.reduction);
  std::vector<T> weight(pass.rows), g_shared(pass.scalar ? pass.rows : 0);
  for (int64_t n = 0; n < pass.rows; ++n) weight[n] = nll[n] + share * loss[n % loss.batch];
  pass.run(/*gradient=*/true, {weight.data(), 1}, nullptr,
           pass.scalar ? g_shared.data() : nullptr);
  if (pass.scalar) {
    store_scalar(g_scale, tree_sum<T>(0, pass.rows, [&](int64_t n) { return g_shared[n]; }));
  }
  latent_gradients<T>(pass.rows, options.beta, share, loss, g_log_q, g_log_p);
}

template <class T>
void forward_grad_as(const View& x, const View& mean, const View& scale, const View& mask,
                     const View& log_q, const View& log_p, const LikelihoodOptions& options,
                     const View& g_mean, const View& g_scale, const View& nll, const View& loss,
                     const View& g_shared) {
  Likelihood<T> pass(x, mean, scale, mask, options);
  pass.gradients(g_mean, pass.scalar ? scale : g_scale);
  pass.fuse();
  const T share = row_share<T>(pass.rows, pass.samples, options.reduction);
  pass.run(/*gradient=*/true, {&share, 0}, data_of<T>(nll),
           pass.scalar ? data_of<T>(g_shared) : nullptr);
  finish_loss<T>(pass, data_of<T>(nll), log_q, log_p, options, loss);
}

// grad[n] *= factor(n), rows in parallel.
template <class T, class Factor>
void rescale_rows(const View& grad, const Factor& factor) {
  Operand rows = operand(grad);
  Event event = event_of(grad);
  event.fuse<1>({&rows}, /*reorder=*/true);
  const int64_t size = event.numel();
  torch::stable::parallel_for(
      0, grad.sizes[0], std::max<int64_t>(1, kGrain / std::max<int64_t>(size, 1)),
      [&](int64_t first, int64_t last) {
        T tile[kTile], scaled[kTile];
        for (int64_t n = first; n < last; ++n) {
          for (int64_t begin = 0; begin < size; begin += kTile) {
            const int64_t count = std::min(size - begin, kTile);
            const T* from = event.load(rows, n, begin, count, tile);
            const T by = factor(n);
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) scaled[i] = from[i] * by;
            event.store(rows, n, begin, count, static_cast<const T*>(scaled));
          }
        }
      });
}

template <class T>
void rescale_as(const View& g_mean, const View& g_scale, const View& g_shared, const View& g_nll,
                const View& g_loss, double beta, Reduction reduction, int64_t samples, int64_t batch,
                const View& g_log_q, const View& g_log_p, const View& g_scalar) {
  const RowValues<T> nll(g_nll, batch), loss(g_loss, batch);
  const int64_t rows = samples * batch;
  const T share = row_share<T>(rows, samples, reduction);
  const auto factor = [&](int64_t n) { return loss[n % loss.batch] + nll[n] / share; };
  const bool unit = rows == 0 || (!g_nll && loss.stride == 0 && factor(0) == T(1));
  if (!unit) {
    rescale_rows<T>(g_mean, factor);
    if (g_scale) rescale_rows<T>(g_scale, factor);
  }
  if (g_shared) {
    const RowValues<T> part(g_shared, batch);
    const auto term = [&](int64_t n) { return factor(n) * part[n]; };
    store_scalar(g_scalar, tree_sum<T>(0, rows, term));
  }
  latent_gradients<T>(rows, beta, share, loss, g_log_q, g_log_p);
}

}  // namespace

bool is_straight(const View& t, int64_t event_from) {
  return t.dim < event_from || LatentOperand(t, event_from).straight;
}

void advise_huge_pages(const View& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t(1) << 21;
  const uintptr_t bytes = t.numel() * element_size(t.type), data = reinterpret_cast<uintptr_t>(t.data);
  if (bytes < 2 * kHuge) return;
  const uintptr_t begin = (data + kHuge - 1) & ~(kHuge - 1), end = (data + bytes) & ~(kHuge - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)t;
#endif
}

void latent_forward(const View& mu, const View& scale, const View& key, const LatentOptions& options,
                    const View& z, const View& log_q, const View& log_p) {
  const auto run = is_double(mu) ? latent_forward_as<double> : latent_forward_as<float>;
  run(mu, scale, key, options, z, log_q, log_p);
}

void latent_backward(const View& g_z, const View& g_log_q, const View& g_log_p, const View& mu,
                     const View& scale, const View& key, const LatentOptions& options,
                     const View& g_mu, const View& g_scale) {
  const auto run = is_double(mu) ? latent_backward_as<double> : latent_backward_as<float>;
  run(g_z, g_log_q, g_log_p, mu, scale, key, options, g_mu, g_scale);
}

void likelihood_forward(const View& x, const View& mean, const View& scale, const View& mask,
                        const View& log_q, const View& log_p, const LikelihoodOptions& options,
                        const View& nll, const View& loss) {
  const auto run = is_double(mean) ? likelihood_forward_as<double> : likelihood_forward_as<float>;
  run(x, mean, scale, mask, log_q, log_p, options, nll, loss);
}

void likelihood_backward(const View& g_nll, const View& g_loss, const View& x, const View& mean,
                         const View& scale, const View& mask, const LikelihoodOptions& options,
                         const View& g_x, const View& g_mean, const View& g_scale,
                         const View& g_log_q, const View& g_log_p) {
  const auto run = is_double(mean) ? likelihood_backward_as<double> : likelihood_backward_as<float>;
  run(g_nll, g_loss, x, mean, scale, mask, options, g_x, g_mean, g_scale, g_log_q, g_log_p);
}

void likelihood_forward_grad(const View& x, const View& mean, const View& scale, const View& mask,
                             const View& log_q, const View& log_p,
                             const LikelihoodOptions& options, const View& g_mean,
                             const View& g_scale, const View& nll, const View& loss,
                             const View& g_shared) {
  const auto run = is_double(mean) ? forward_grad_as<double> : forward_grad_as<float>;
  run(x, mean, scale, mask, log_q, log_p, options, g_mean, g_scale, nll, loss, g_shared);
}

void likelihood_rescale(const View& g_mean, const View& g_scale, const View& g_shared,
                        const View& g_nll, const View& g_loss, double beta, Reduction reduction,
                        int64_t samples, int64_t batch, const View& g_log_q, const View& g_log_p,
                        const View& g_scalar) {
  const auto run = is_double(g_mean) ? rescale_as<double> : rescale_as<float>;
  run(g_mean, g_scale, g_shared, g_nll, g_loss, beta, reduction, samples, batch, g_log_q, g_log_p,
      g_scalar);
}

}  // namespace vae_fast

const vae_fast::Passes* vae_fast_passes() {
  static const vae_fast::Passes passes = {
      vae_fast::is_straight,             vae_fast::latent_forward,
      vae_fast::latent_backward,         vae_fast::likelihood_forward,
      vae_fast::likelihood_forward_grad, vae_fast::likelihood_rescale,
      vae_fast::advise_huge_pages};
  return &passes;
}
